"""PEFT's LoRA layers: how they are found, which of them can be gated, and why others cannot."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from loralloc.errors import UserError, closest

PREFIX = "base_model.model."
_LAYERS = "peft.tuners.lora."

SUPPORTED = frozenset(
    _LAYERS + name
    for name in (
        "layer.Linear",  # torch.nn.Linear and transformers' Conv1D
        "bnb.Linear8bitLt",
        "bnb.Linear4bit",
        "hqq.HqqLoraLinear",
        "gptq.GPTQLoraLinear",
        "torchao.TorchaoLoraLinear",
    )
)
"""Layer classes that can be gated, by full name so that no optional package is imported."""

MERGE_IGNORES_VARIANTS = frozenset({_LAYERS + "torchao.TorchaoLoraLinear"})
"""Layers whose in-place merge would drop the gates without a word; it is blocked until the gates are folded."""

MIXED_BATCHES_IGNORE_VARIANTS = frozenset({_LAYERS + "hqq.HqqLoraLinear"})
"""Layers whose forward pass with `adapter_names` would drop the gates; it is blocked likewise."""

REFUSED = {
    "layer.Embedding": "its update is a table look-up, not a product with an input",
    "layer.Conv1d": "its factors are convolution kernels",
    "layer.Conv2d": "its factors are convolution kernels",
    "layer.Conv3d": "its factors are convolution kernels",
    "layer.MultiheadAttention": "query, key and value are packed into one weight",
    "layer.ParamWrapper": "it adapts expert parameters, not a layer, and cannot carry a variant",
    "awq.AwqLoraLinear": "its forward pass ignores variants",
    "aqlm.AqlmLoraLinear": "its forward pass ignores variants",
    "eetq.EetqLoraLinear": "its forward pass ignores variants",
    "inc.IncLoraLinear": "Intel Neural Compressor layers have not been verified",
    "te.TeLinear": "TransformerEngine layers have not been verified",
    "tp_layer.LoraParallelLinear": "Megatron's tensor-parallel layers shard the factors",
}
"""Layer classes we know and refuse, with the reason."""


def lora_adapter(model: nn.Module, adapter: str | None) -> str:
    """Return the name of a LoRA adapter, of the active one by default; refuse what has none."""
    if not isinstance(model, PeftModel):
        raise UserError(
            f"expected a PeftModel, got {type(model).__name__}: wrap it first, "
            "model = get_peft_model(model, LoraConfig(r=12, target_modules='all-linear'))"
        )
    if adapter is None:
        active = model.active_adapters
        if len(active) != 1:
            raise UserError(f"ranks are allocated for one adapter at a time, active are {active}: use set_adapter")
        adapter = active[0]
    if adapter not in model.peft_config:
        raise UserError(f'no adapter "{adapter}" in the model.{closest(adapter, list(model.peft_config))}')
    peft_type = str(getattr(model.peft_config[adapter].peft_type, "value", model.peft_config[adapter].peft_type))
    if peft_type != "LORA":
        raise UserError(f'adapter "{adapter}" is of type {peft_type}; ranks are allocated for LoRA: use LoraConfig')
    return adapter


def lora_layers(model: nn.Module, adapter: str) -> list[tuple[str, Any]]:
    """Return (full module name, PEFT layer) of every layer that an adapter adapts, at least one."""
    layers = []
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and adapter in module._get_available_adapters():
            layers.append((name.removeprefix(PREFIX), module))
    if not layers:
        raise UserError(f'adapter "{adapter}" has no LoRA layers')
    return layers


def class_name(layer: LoraLayer) -> str:
    """Return a layer's class by full name, as in `SUPPORTED`."""
    return f"{type(layer).__module__}.{type(layer).__qualname__}"


def check_layer(name: str, layer: LoraLayer, adapter: str) -> None:
    """Refuse what cannot be gated, by name, with the reason and the cure."""
    kind = class_name(layer)
    exclude = f'leave it out with LoraConfig(exclude_modules=["{name}"])'
    if kind not in SUPPORTED:
        reason = REFUSED.get(kind.removeprefix(_LAYERS), "the class is not known to loralloc")
        cure = exclude if "Linear" not in kind else f"load the base model in 16 bit or with bitsandbytes, or {exclude}"
        raise UserError(f"{name}: ranks cannot be allocated in {type(layer).__name__} layers ({reason}); {cure}")
    if adapter in layer.lora_variant:
        variant = type(layer.lora_variant[adapter]).__name__
        raise UserError(f"{name}: the adapter uses {variant}, which changes the update itself; use plain LoRA")
    if layer.lora_bias[adapter]:
        raise UserError(f"{name}: lora_bias=True is not supported: a bias has no rank; set lora_bias=False")
    if layer.merged:
        raise UserError(f"{name}: the adapter is merged into the base weights; call unmerge_adapter() first")
    if not layer.scaling[adapter] > 0:
        raise UserError(f"{name}: the scale lora_alpha / r is {layer.scaling[adapter]}; it must be positive")
    weight = layer.lora_A[adapter].weight
    if adapter not in layer.active_adapters or not weight.requires_grad:
        raise UserError(
            f'{name}: adapter "{adapter}" is not being trained (inactive, or frozen as loaded for inference); call '
            f'set_adapter("{adapter}"), or load it with is_trainable=True'
        )
    if type(weight.data).__name__ == "DTensor":
        raise UserError(
            f"{name}: the adapter is sharded over processes (tensor parallel or FSDP); attach before sharding is not "
            "supported yet: train with one process or with DDP"
        )


@contextmanager
def bare_base(model: PeftModel) -> Iterator[nn.Module]:
    """The base model inside, without any adapter and on the same weights; the adapters are back after it."""
    base: Any = model
    while isinstance(base, PeftModel):
        base = base.get_base_model()
    attributes, flags = dict(vars(base)), {p: p.requires_grad for p in model.parameters()}
    hooks = [(module, OrderedDict(module._forward_hooks)) for module in base.modules()]
    taken = [(parent, name, child) for parent in list(base.modules()) for name, child in parent._modules.items()]
    for parent, name, child in taken:
        parent._modules[name] = _without_adapter(child)
    for left_behind in ("peft_config", "hf_device_map"):  # PEFT would add to the one, and place the model by the other
        vars(base).pop(left_behind, None)
    try:
        yield base
    finally:
        vars(base).clear()
        vars(base).update(attributes)
        for parent, name, child in taken:
            parent._modules[name] = child
        for module, registered in hooks:
            module._forward_hooks.clear()
            module._forward_hooks.update(registered)
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def _without_adapter(child: Any) -> Any:
    if isinstance(child, BaseTunerLayer):
        return child.get_base_layer()
    return child.original_module if isinstance(child, AuxiliaryTrainingWrapper) else child
