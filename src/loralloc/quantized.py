"""Linear layers whose frozen weights bitsandbytes keeps in 4 or 8 bits: what training and comparing must know of them.

* On a CPU with AVX512-BF16, an evaluation packs 4-bit weights for inference. From then on their products have no
  gradient, without an error, and their scales are rounded to bf16: `keep_trainable` turns it off.
* On a CPU, 4-bit weights are dequantised wrongly if the row length is not a multiple of the block size: `misread_rows`.
* Both kinds round their input: 4-bit layers to their compute dtype, 8-bit layers to 8 bits (on a CPU in evaluation
  only). A difference in the last bit can then become one of a percent. Outputs are therefore compared with dequantised
  weights and inputs that are not rounded: `dequantized`.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear

BLOCK = 64
"""Number of 4-bit weights that share one scale."""


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Go through bitsandbytes' linear layers by name; there are none where it has not been imported."""
    if (bitsandbytes := sys.modules.get("bitsandbytes")) is not None:
        kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
        yield from ((name, module) for name, module in model.named_modules() if isinstance(module, kinds))


def keep_trainable(model: nn.Module) -> None:
    """Let gradients pass 4-bit layers also after an evaluation."""
    for _, layer in quantized_layers(model):
        if getattr(layer, "support_avx512bf16_for_cpu", False):
            layer.support_avx512bf16_for_cpu = False


def parameter_count(model: nn.Module, adapters: Collection[str]) -> int:
    """Count a model's parameters without adapters; a packed weight counts as in · out, whatever it stores.

    Args:
        model: The model.
        adapters: Names of the adapters on it, and of what was saved with them.
    """
    counts: dict[int, int] = {}  # by identity: what is tied is counted once
    for name, module in model.named_modules():
        if any(part in adapters for part in name.split(".")):
            continue
        own = {key: parameter for key, parameter in module.named_parameters(recurse=False) if key not in adapters}
        if _holds_packed_weight(module):
            counts[id(module)] = module.in_features * module.out_features  # type: ignore[operator]
            own = {key: parameter for key, parameter in own.items() if key == "bias"}
        counts |= {id(parameter): parameter.numel() for parameter in own.values()}
    return sum(counts.values())


def _holds_packed_weight(module: nn.Module) -> bool:
    """Whether a module is a linear layer that stores its weight in another form than a tensor [out, in]."""
    inputs, outputs = (getattr(module, name, None) for name in ("in_features", "out_features"))
    if not (isinstance(inputs, int) and isinstance(outputs, int)) or any(module.children()):
        return False
    weight = getattr(module, "weight", None)
    return weight is None or weight.numel() != inputs * outputs


def is_packed(layer: nn.Module) -> bool:
    """Whether a layer's weights have been packed for inference: no gradient reaches the layers before it any more."""
    state = getattr(getattr(layer, "weight", None), "quant_state", None)
    return bool(getattr(state, "packing_format_for_cpu", False))


def misread_rows(model: nn.Module) -> dict[str, int]:
    """Return the 4-bit layers on a CPU whose weights bitsandbytes may dequantise wrongly, with their row lengths."""
    return {
        name: layer.in_features
        for name, layer in quantized_layers(model)
        if _is_4_bit(layer) and layer.weight.device.type == "cpu" and layer.in_features % BLOCK
    }


@contextmanager
def dequantized(model: nn.Module) -> Iterator[None]:
    """Compute inside with weights that are dequantised to the input's dtype, and with inputs that are not rounded."""
    with ExitStack() as stack:
        for _, layer in quantized_layers(model):
            # accelerate, where it has spread a model over devices, calls the layer's own forward pass by this name.
            name = "_old_forward" if "_old_forward" in vars(layer) else "forward"
            stack.callback(_put_back, layer, name, vars(layer).get(name))
            setattr(layer, name, partial(_product, layer))
        yield


def leave_memory(model: nn.Module) -> None:
    """Free the weights of a model that is no longer used, even if there are still references to it."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.new_empty(0)  # not on the meta device: bitsandbytes' parameters do not go there
    for _, layer in quantized_layers(model):
        if not _is_4_bit(layer):
            layer.state.reset_grads()  # it holds the weights too


def _is_4_bit(layer: Any) -> bool:
    return hasattr(layer.weight, "quant_state")


def _put_back(layer: nn.Module, name: str, earlier: Any) -> None:
    if earlier is None:
        delattr(layer, name)
    else:
        setattr(layer, name, earlier)


def _product(layer: Any, x: Tensor) -> Tensor:
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return linear(x, _weight(layer).to(x.dtype), bias)


def _weight(layer: Any) -> Tensor:
    """The weights as numbers, [out, in]."""
    from bitsandbytes import functional

    if not _is_4_bit(layer):
        scales = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
        return functional.int8_vectorwise_dequant(layer.weight.data, scales)  # type: ignore[no-any-return]
    if is_packed(layer):
        layer = deepcopy(layer)
        layer.state_dict()  # unpacks
    return functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)  # type: ignore[no-any-return]
