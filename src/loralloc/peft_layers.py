"""PEFT's LoRA layers: how they are found, which of them can be gated, and why others cannot."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from peft import LoraConfig, PeftMixedModel, PeftModel
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loralloc.errors import UserError, closest
from loralloc.naming import common_ends, excluding, named
from loralloc.quantized import is_packed

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

_QUANTIZED = ("bnb.", "hqq.", "gptq.", "torchao.", "awq.", "aqlm.", "eetq.", "inc.")
"""Modules of PEFT whose layers adapt quantised weights."""

MERGE_IGNORES_VARIANTS = frozenset({_LAYERS + "torchao.TorchaoLoraLinear"})
"""Layers whose in-place merge would drop the gates without a word; it is blocked until the gates are folded."""

MIXED_BATCHES_IGNORE_VARIANTS = frozenset({_LAYERS + "hqq.HqqLoraLinear"})
"""Layers whose forward pass with `adapter_names` would drop the gates; it is blocked likewise."""

NOT_LINEAR = {
    "layer.Embedding": "its update is a table look-up, not a product with an input",
    "layer.Conv1d": "its factors are convolution kernels",
    "layer.Conv2d": "its factors are convolution kernels",
    "layer.Conv3d": "its factors are convolution kernels",
    "layer.MultiheadAttention": "query, key and value are packed into one weight",
    "layer.ParamWrapper": "it adapts a parameter, such as all experts in one, and not a layer",
}
"""Layer classes whose adapter is no B·A on a linear layer, with the reason: neither gated nor exported."""

NOT_GATED = {
    "awq.AwqLoraLinear": "its forward pass ignores variants",
    "aqlm.AqlmLoraLinear": "its forward pass ignores variants",
    "eetq.EetqLoraLinear": "its forward pass ignores variants",
    "inc.IncLoraLinear": "Intel Neural Compressor layers have not been verified",
    "te.TeLinear": "TransformerEngine layers have not been verified",
    "tp_layer.LoraParallelLinear": "Megatron's tensor-parallel layers shard the factors",
}
"""Linear layer classes that we know and do not gate, with the reason; plain LoRA on them can be exported."""

PARALLEL = {
    "DistributedDataParallel": "it has already listed the gradients to average, and would not average those of gates",
    "DataParallel": "its replicas do not know of gates; launch with torchrun or accelerate launch (DDP)",
    "FullyShardedDataParallel": "it flattens the factors that scores are made of; use FSDP2 (fully_shard) or DDP",
    "DeepSpeedEngine": "it hides the gradients that scores are made of; use FSDP2 (fully_shard) or DDP",
}
"""Wrappers inside which no gate can be attached, with the reason."""


# ---- Finding the PeftModel ----


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model that torch.compile has wrapped, or the model itself: what is attached to it is compiled too."""
    while isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
        model = inner
    return model


def peft_model(model: nn.Module) -> PeftModel:
    """Return the one `PeftModel` in a model: itself, or inside a wrapper or a larger model.

    Raises:
        UserError: There is none, there are several, or one inside another; the message says what to pass.
    """
    found = {name: part for name, part in model.named_modules() if isinstance(part, PeftModel)}
    if not found:
        raise UserError(_no_peft_model(unwrapped(model)))
    outermost, chosen = next(iter(found.items()))
    inner = [name for name in found if name != outermost and (not outermost or name.startswith(f"{outermost}."))]
    if inner:
        raise UserError(
            "a PeftModel is inside another one (get_peft_model was called on a model that it had returned): an adapter "
            "saved from it fits no base model; call get_peft_model once, on the base model, and add a second adapter "
            "with model.add_adapter(name, config)"
        )
    if len(found) > 1:
        raise UserError(
            f"{type(model).__name__} holds {len(found)} PeftModels; pass the one to use: "
            + ", ".join(map(_expression, found))
        )
    return chosen


def check_not_parallel(model: nn.Module) -> None:
    """Refuse a model inside a parallel wrapper: gates that are attached now would not be handled by it.

    Raises:
        UserError: With the wrapper, the reason, and what to pass.
    """
    for path, part in model.named_modules():
        if isinstance(part, PeftModel):
            return
        if wrapper := _parallel(part):
            inner = _expression(f"{path}.module")
            raise UserError(
                f"the model is wrapped by {wrapper} already ({PARALLEL[wrapper]}); attach before wrapping, to what is "
                f"inside, {inner}, or to the model from before accelerator.prepare()"
            )


def _parallel(module: nn.Module) -> str | None:
    """The name of the parallel wrapper, if a module is one; else None."""
    return next((kind.__name__ for kind in type(module).__mro__ if kind.__name__ in PARALLEL), None)


def is_adapted(model: nn.Module) -> bool:
    """Whether a model has an adapter of any kind on its layers."""
    return any(isinstance(part, BaseTunerLayer) for part in model.modules())


def _no_peft_model(model: nn.Module) -> str:
    """The error message for a model without a PeftModel."""
    expected = f"expected a PeftModel, got {type(model).__name__}"
    modules = list(model.named_modules())
    if any(isinstance(part, PeftMixedModel) for _, part in modules):
        return f"{expected}, for adapters of several kinds; call get_peft_model without mixed=True"
    path, inner = next(((path, part) for path, part in modules if isinstance(part, PreTrainedModel)), ("", model))
    targets = linear_targets(inner)
    if not targets:
        return f"{expected}, and it has no linear layers that LoRA could adapt"
    wanted = "all-linear" if isinstance(inner, PreTrainedModel) else targets
    place = _expression(path)
    wrap = f"{place} = get_peft_model({place}, LoraConfig(r=12, target_modules={json.dumps(wanted)}))"
    if any(isinstance(part, LoraLayer) for _, part in modules):
        return (
            f"{expected}, with LoRA layers in it; pass the model that get_peft_model returned. Where add_adapter or "
            f"inject_adapter_in_model made them, load the model anew and wrap it instead, {wrap}"
        )
    return f"{expected}: wrap it first, {wrap}"


def _expression(path: str) -> str:
    """A module's path as one would write it in Python."""
    parts = [f"[{part}]" if part.isdigit() else f".{part}" for part in path.split(".") if part]
    return "model" + "".join(parts)


# ---- Finding adapter and layers ----


def lora_adapter(model: PeftModel, adapter: str | None) -> str:
    """Return the name of a LoRA adapter, of the active one by default; refuse what has none."""
    if adapter is None:
        active = model.active_adapters
        if len(active) != 1:
            raise UserError(
                f"ranks are allocated for one adapter at a time, but active are {active}; choose one, "
                f'model.set_adapter("{active[0]}")'
            )
        adapter = active[0]
    if adapter not in model.peft_config:
        adapters = list(model.peft_config)
        raise UserError(f'no adapter "{adapter}" in the model, it has {adapters}.{closest(adapter, adapters)}')
    peft_type = str(getattr(model.peft_config[adapter].peft_type, "value", model.peft_config[adapter].peft_type))
    if peft_type != "LORA":
        raise UserError(f'adapter "{adapter}" is of type {peft_type}; ranks are allocated for LoRA: use LoraConfig')
    return adapter


def lora_layers(model: PeftModel, adapter: str) -> list[tuple[str, Any]]:
    """Return (full module name, PEFT layer) of every layer that an adapter adapts, at least one.

    Raises:
        UserError: There is none, or a wrapper inside the PeftModel has changed the names of the layers.
    """
    layers = []
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and adapter in module._get_available_adapters():
            layers.append((name.removeprefix(PREFIX), module))
    if not layers:
        raise UserError(f'adapter "{adapter}" has no LoRA layers; {_named_layers(model)}')
    for name, part in model.get_base_model().named_modules():
        if wrapper := "torch.compile" if hasattr(part, "_orig_mod") else _parallel(part):
            place = f"{name} is" if name else "what get_peft_model was called on is"
            raise UserError(
                f"{place} wrapped by {wrapper} inside the PeftModel, and an adapter saved with the names of its layers "
                "would fit no base model; wrap last: get_peft_model on the base model itself, then attach, then wrap "
                "what get_peft_model returned"
            )
    return layers


def adapter_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that hold adapter parameters, gates among them, and the copies of modules that are saved whole."""
    found = []
    for part in model.modules():
        if isinstance(part, BaseTunerLayer | AuxiliaryTrainingWrapper):
            held = [attrgetter(name)(part) for name in part.adapter_layer_names if hasattr(part, name.split(".")[0])]
            found += [module for module in held if isinstance(module, nn.Module)]
    return found


def class_name(layer: LoraLayer) -> str:
    """Return a layer's class by full name, as in `SUPPORTED`."""
    return f"{type(layer).__module__}.{type(layer).__qualname__}"


def is_quantized(layer: LoraLayer) -> bool:
    """Whether the weight that a layer adapts is kept in fewer bits: merging would round the update with it."""
    return class_name(layer).removeprefix(_LAYERS).startswith(_QUANTIZED)


def linear_targets(model: nn.Module) -> list[str]:
    """Name endings of a model's attention projections, or else of its linear layers, to use as `target_modules`.

    Layers outside attention are left out if possible: in models with experts, PEFT resolves some of their names to one
    parameter that holds all experts.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    head = base.get_output_embeddings() if isinstance(base, PreTrainedModel) else None
    names = [name for name in _linear_layers(base) if base.get_submodule(name) is not head]
    attention = [name for name in names if "attn" in name.lower() or "attention" in name.lower()]
    chosen = attention or names
    return common_ends(chosen, [name for name, _ in base.named_modules() if name not in chosen])


def _linear_layers(base: nn.Module) -> Iterator[str]:
    """Names of linear layers, adapted or not; layers inside an adapted layer are not listed separately."""
    inside: tuple[str, ...] = ()
    for name, module in base.named_modules():
        if name.startswith(inside):
            continue
        if isinstance(module, LoraLayer):
            inside = (*inside, f"{name}.")
            if class_name(module) in SUPPORTED:
                yield name
        elif isinstance(module, nn.Linear | Conv1D) and not isinstance(module, NonDynamicallyQuantizableLinear):
            yield name  # the exception is part of torch's attention, which reads its weight without calling it


# ---- Layers that cannot be gated ----


@dataclass(frozen=True)
class _Problem:
    """Why a layer cannot be gated.

    Attributes:
        what: The reason, to stand behind the layer's name.
        cure: What to do; empty where the layer has to be left out.
    """

    what: str
    cure: str = ""


def check_linear(model: PeftModel, adapter: str) -> list[tuple[str, Any]]:
    """Return an adapter's layers as `lora_layers` does; refuse what is no linear layer.

    Raises:
        UserError: With all such layers and the cure.
    """
    layers = lora_layers(model, adapter)
    problems: dict[str, _Problem] = {}
    for name, layer in layers:
        if name.startswith(tuple(f"{outer}." for outer in problems)):
            continue  # a part of the layer that was found
        kind = class_name(layer).removeprefix(_LAYERS)
        if kind in NOT_LINEAR or adapter not in layer.lora_A:
            reason = NOT_LINEAR.get(kind, "its factors are no matrices of a linear layer")
            cure = _named_layers(model) if kind == "layer.ParamWrapper" else ""
            problems[name] = _Problem(f"LoRA on {type(layer).__name__} layers is not supported ({reason})", cure)
    inside = tuple(f"{outer}." for outer in problems)
    _refuse(model, adapter, [name for name, _ in layers if not name.startswith(inside)], problems)
    return layers


def check_gateable(model: PeftModel, adapter: str, layers: Sequence[tuple[str, Any]]) -> None:
    """Refuse linear layers that cannot be gated, or not as they are.

    Raises:
        UserError: With all of them, the reason and the cure.
    """
    found = {name: _problem(layer, adapter) for name, layer in layers}
    _refuse(model, adapter, list(found), {name: problem for name, problem in found.items() if problem is not None})


def _problem(layer: Any, adapter: str) -> _Problem | None:
    """The first reason for which a layer cannot be gated."""
    kind = class_name(layer)
    if kind not in SUPPORTED:
        reason = NOT_GATED.get(kind.removeprefix(_LAYERS), "the class is not known to loralloc")
        cure = "load the base model in 16 bit or with bitsandbytes" if kind.removeprefix(_LAYERS) in NOT_GATED else ""
        return _Problem(f"ranks cannot be allocated in {type(layer).__name__} layers ({reason})", cure)
    if is_packed(layer.get_base_layer()):
        packed = "bitsandbytes has packed its weights for inference on this CPU, and gradients do not pass it any more"
        return _Problem(packed, "load the base model anew, and evaluate it after attaching only")
    if layer.merged:
        return _Problem("the adapter is merged into the base weights", "call model.unmerge_adapter() first")
    if not layer.scaling[adapter] > 0:
        scale = f"the scale lora_alpha / r is {layer.scaling[adapter]}; it must be positive"
        return _Problem(scale, "set LoraConfig(lora_alpha=...) to a number above 0, such as 2 · r")
    A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    if adapter not in layer.active_adapters or not (A.requires_grad or B.requires_grad):
        inactive = f'adapter "{adapter}" is not being trained (inactive, or frozen as loaded for inference)'
        return _Problem(inactive, f'call model.set_adapter("{adapter}"), or load it with is_trainable=True')
    if not B.requires_grad and not B.detach().any():
        frozen = "B is frozen at zero, as in every fresh adapter, so the adapter cannot learn anything"
        return _Problem(frozen, f'call model.set_adapter("{adapter}"), after which A alone can be frozen')
    return None


def _refuse(model: PeftModel, adapter: str, names: Sequence[str], problems: dict[str, _Problem]) -> None:
    """Raise one error that lists all problems, equal ones together; do nothing if there are none."""
    if not problems:
        return
    said = []
    for problem in dict.fromkeys(problems.values()):
        which = [name for name, other in problems.items() if other == problem]
        text = f"{named(which, [name for name in names if name not in which])}: {problem.what}"
        said.append(f"{text}; {problem.cure}" if problem.cure else text)
    left_out = [name for name, problem in problems.items() if not problem.cure]
    others = [name for name in names if name not in problems]
    if left_out and others:
        config = model.peft_config[adapter]
        assert isinstance(config, LoraConfig)
        untied = (
            "ensure_weight_tying=False, " if config.ensure_weight_tying else ""
        )  # PEFT looks for the adapter to tie
        cure = f"LoraConfig({untied}{excluding(left_out, others, config.exclude_modules)})"
        said.append(f"leave out what is not supported, {cure} (lora.exclude_modules in a recipe)")
    elif left_out:
        said.append(_named_layers(model))
    raise UserError("; ".join(said))


def _named_layers(model: PeftModel) -> str:
    """A cure: name linear layers."""
    targets = linear_targets(model)
    if not targets:
        return "the model has no linear layers that LoRA could adapt"
    config = f"LoraConfig(target_modules={json.dumps(targets)})"
    return f"name linear layers in a new {config} (lora.target_modules in a recipe)"


def refuse_what_ignores_gates(layer: Any) -> None:
    """Block what a layer would compute without its gates, until they are folded."""
    if class_name(layer) in MERGE_IGNORES_VARIANTS:
        layer.merge = _refuse_merge
    if class_name(layer) in MIXED_BATCHES_IGNORE_VARIANTS:
        layer._mixed_batch_forward = _refuse_mixed_batch


def _refuse_merge(*args: Any, **kwargs: Any) -> None:
    raise UserError("this layer's merge ignores gates; call finish() on the rank allocation first, then merge")


def _refuse_mixed_batch(*args: Any, **kwargs: Any) -> None:
    raise UserError("with adapter_names this layer ignores gates; call finish() on the rank allocation first")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def bare_base(model: PeftModel) -> Iterator[nn.Module]:
    """Yield the base model with the same weights and without any adapter; put the adapters back afterwards."""
    base: Any = model
    while isinstance(base, PeftModel):
        base = base.get_base_model()
    attributes, flags = dict(vars(base)), {p: p.requires_grad for p in model.parameters()}
    hooks = [(module, OrderedDict(module._forward_hooks)) for module in base.modules()]
    taken = [(parent, name, child) for parent in list(base.modules()) for name, child in parent._modules.items()]
    for parent, name, child in taken:
        parent._modules[name] = _without_adapter(child)
    for left_behind in ("peft_config", "hf_device_map"):  # PEFT would extend one, and place the model by the other
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
