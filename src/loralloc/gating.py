"""Gates on a PEFT model. Only this file and `peft_layers` import the internals of PEFT (`peft.tuners`).

A gated layer computes `base(x) + ((x Aᵀ) ∘ (scale ∘ gate)) Bᵀ`: `gate` is a parameter that methods train or set,
`scale` is fixed and holds PEFT's scaling (times a method's own constant); a zero in it shuts a rank off for good.
If a layer is just a frozen `nn.Linear` with one gated update, both are computed together (`kernel.gated_linear`); in
every other case the layer runs PEFT's own forward pass (`_GatedLayer`).

What we rely on in PEFT (tests/test_gating_peft.py names the assumption that broke): a layer calls
`lora_variant[adapter].forward(layer, active_adapter=, x=, result=)` for adapters that have one, and every parameter
dictionary named in `adapter_layer_names` follows `set_adapter` and `delete_adapter`; what a variant gets as `x` has
gone through the layer's `_cast_input_dtype`; with one active adapter, not merged and not disabled, the forward pass is
the base layer's and one call of the variant.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from peft.utils.other import transpose
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from loralloc.errors import UserError
from loralloc.kernel import gated_linear, gated_lora
from loralloc.naming import excluding, named
from loralloc.peft_layers import (
    check_gateable,
    check_linear,
    check_not_parallel,
    lora_adapter,
    peft_model,
    refuse_what_ignores_gates,
)
from loralloc.plain_lora import PlainSite, check_plain, made_anew, scale_changed
from loralloc.quantized import keep_trainable, parameter_count
from loralloc.sharding import check_sharding

_LINEAR_FORWARD = nn.Linear.forward  # as it was when this was imported: some tools replace it for all layers


@dataclass(frozen=True)
class Site(PlainSite):
    """One gated layer, as a method sees it: A [r, in], B [out, r], gate [r], scale [r]."""

    @property
    def gate(self) -> nn.Parameter:
        """Gates, [r], fp32 or wider."""
        return self.layer.lora_gate[self.adapter]

    @property
    def scale(self) -> Tensor:
        """Fixed factor per rank, [r]; zero where a rank is closed for good."""
        return self._variant.scale.to(self.gate.device)

    @property
    def attached_scaling(self) -> float:
        """PEFT's scaling as it was when the gates were attached: the one in `scale`."""
        return self._variant.scaling

    @property
    def is_deleted(self) -> bool:
        """Whether PEFT has deleted the adapter since, and the gates with it."""
        return not isinstance(self.layer.lora_variant.get(self.adapter), _GatedVariant)

    @property
    def rank(self) -> int:
        """Capacity: the number of ranks in the tensors, open or not."""
        return self.A.shape[0]

    @property
    def inputs(self) -> int:
        """Input features."""
        return self.A.shape[1]

    @property
    def outputs(self) -> int:
        """Output features."""
        return self.B.shape[0]

    @property
    def cost(self) -> int:
        """Parameters of one rank: in + out."""
        return self.inputs + self.outputs

    def scaling_at(self, rank: float) -> float:
        """What PEFT's scaling would be if the adapter had this rank."""
        power = 0.5 if self.layer.use_rslora.get(self.adapter, False) else 1.0
        return self.scaling * (self.rank / rank) ** power

    @property
    def bytes(self) -> int:
        """Bytes of one rank, at the dtypes of A and B."""
        return self.inputs * self.A.element_size() + self.outputs * self.B.element_size()

    @property
    def base_parameters(self) -> int:
        """Parameters of the model that the layer is in, without adapters."""
        return self._variant.base_parameters

    @property
    def plan_scale(self) -> float:
        """Scale of B·A for a run that starts from this run's plan: PEFT's scaling times the method's factor."""
        return self.scaling * self._variant.factor

    @property
    def dropout(self) -> float:
        """Probability of PEFT's dropout in front of A."""
        return float(getattr(self.layer.lora_dropout[self.adapter], "p", 0.0))

    @property
    def _variant(self) -> _GatedVariant:
        return self.layer.lora_variant[self.adapter]

    @property
    def gate_is_trained(self) -> bool:
        """Whether the gate takes part in training; it does until it is frozen."""
        return not self._variant.gate_frozen

    def freeze_gate(self) -> None:
        """Freeze the gate: no gradient, no place in the optimizer. Call it before the optimizer is built."""
        self._variant.gate_frozen = True  # requires_grad is not enough: PEFT's disable_adapter() sets it again
        self.gate.requires_grad_(False)

    def set_scale(self, open_ranks: Tensor, factor: float = 1.0, gain: float = 1.0) -> None:
        """Set the fixed scale to `scaling · factor · gain` where ranks are open, to 0 where they are closed for good.

        Args:
            open_ranks: Boolean [r].
            factor: The method's constant on top of PEFT's scaling; a run from the plan keeps it.
            gain: Constant of the method's own parametrisation of the gate; it is not part of the plan's scale.
        """
        self._variant.scale = open_ranks.to(self.gate.dtype) * (self.scaling * factor * gain)
        self._variant.factor = factor

    def set_row_scale(self, row_scale: Tensor | None) -> None:
        """Set the factor of the weight gradients per output row, [out] (see `kernel.gated_lora`); None for none."""
        self._variant.row_scale = row_scale

    def take_scale(self, ranks: Tensor) -> None:
        """Keep only the scale of these ranks, int64 [k]: the others have been removed from the tensors."""
        self._variant.taken = ranks, len(self.scale)
        self._variant.scale = self.scale[ranks.to(self.gate.device)]

    def put_back_scale(self) -> None:
        """Undo `take_scale`; the ranks that had left are closed for good."""
        self._variant.scale, self._variant.taken = self.full_scale, None

    @property
    def full_scale(self) -> Tensor:
        """The scale with zeros for ranks that have left the tensors."""
        if self._variant.taken is None:
            return self.scale
        (ranks, capacity), small = self._variant.taken, self._variant.scale
        return small.new_zeros(capacity).index_copy_(0, ranks.to(small.device), small)

    @property
    def start(self) -> Any:
        """How A and B were drawn: PEFT's `init_lora_weights`."""
        return self._variant.config.init_lora_weights

    @property
    def left_out(self) -> Any:
        """What the adapter leaves out already: PEFT's `exclude_modules`."""
        return self._variant.config.exclude_modules


@contextmanager
def gates_replaced(sites: Sequence[Site], gates: Sequence[Tensor | None]) -> Iterator[None]:
    """Compute with other gates inside: for each site [r], per sample [n, 1, r], or None for zeros.

    The gate parameters themselves do not change.

    Raises:
        UserError: On exit, naming all layers whose input did not have one row (or an equal number) per sample.
    """
    variants = [site._variant for site in sites]
    for variant, gate in zip(variants, gates, strict=True):
        variant.gate, variant.off = gate, gate is None
    try:
        yield
    finally:
        misfits = {site.name: site._variant.misfit for site in sites if site._variant.misfit}
        for variant in variants:
            variant.gate, variant.off, variant.misfit = None, False, ""
        if misfits:  # any other error inside was caused by it
            others = [site.name for site in sites if site.name not in misfits]
            cure = f"LoraConfig({excluding(list(misfits), others, sites[0].left_out)})" if others else "adapt others"
            raise UserError(
                f"{named(list(misfits), others)}: ranks cannot be switched per sample where a layer sees "
                f"{next(iter(misfits.values()))} (does it route tokens to experts, or look at positions?); leave out "
                f"what does, {cure}"
            )


class _GatedVariant(LoraVariant):
    """PEFT's hook for a different forward pass: the gated one."""

    def __init__(self, scale: Tensor, scaling: float, config: Any, base_parameters: int) -> None:
        self.scale = scale
        self.scaling = scaling  # the layer's own, which `scale` was made of
        self.config = config  # the adapter's
        self.base_parameters = base_parameters
        self.factor = 1.0
        self.row_scale: Tensor | None = None
        self.gate: Tensor | None = None  # instead of the layer's parameter
        self.off = False  # no update: as with gates of zero
        self.misfit = ""  # how the rows of an input did not match the samples, for a `gate` per sample
        self.gate_frozen = False
        self.taken: tuple[Tensor, int] | None = None  # positions of the ranks left in the tensors, of how many

    def supports_lora_conversion(self) -> bool:
        return False  # PEFT would convert without the gates; export_adapter does it right

    def init(self, module: Any, adapter_name: str, **kwargs: Any) -> None:  # type: ignore[override]
        raise made_anew(adapter_name)  # PEFT has replaced A and B, as EVA does to change ranks

    def forward(  # type: ignore[override]  # PEFT calls it on the instance; ours has state
        self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        if self.adds_nothing:
            return result
        return gated_lora(module.lora_dropout[active_adapter](x), result, *self._update_of(module, active_adapter, x))

    def with_layer(self, module: Any, frozen: Any, adapter: str, x: Tensor) -> Tensor:
        """Output of the frozen layer and the update together, if `_is_plain_product` holds for the layer."""
        weights = frozen._parameters
        return gated_linear(x, weights["weight"], weights["bias"], *self._update_of(module, adapter, x))

    @property
    def adds_nothing(self) -> bool:
        """Whether the adapter is shut off, or every rank has left the tensors."""
        return self.off or not len(self.scale)

    def _update_of(self, module: Any, adapter: str, x: Tensor) -> tuple[Any, ...]:
        """The kernel's arguments A, g, B, s and row_scale, for this input."""
        if self.scale.device != x.device:  # the model was moved after attaching
            with torch.inference_mode(False):  # what is made in it cannot be trained with afterwards
                self.scale = self.scale.to(x.device)
                self.row_scale = None if self.row_scale is None else self.row_scale.to(x.device)
        if not torch.compiler.is_compiling() and module.scaling[adapter] != self.scaling:
            raise scale_changed(adapter, self.scaling, module.scaling[adapter])
        parts = module._modules  # for small layers, looking up each attribute on the module would be noticeable
        gates = parts["lora_gate"]
        gate = gates._parameters.get(adapter)
        gate = gates[adapter] if gate is None else gate  # parametrised, or where others have put it
        gate = gate.detach() if self.gate_frozen else gate
        return (
            parts["lora_A"]._modules[adapter].weight,
            gate if self.gate is None else self._fitted(self.gate, x),
            parts["lora_B"]._modules[adapter].weight,
            self.scale,
            self.row_scale,
        )

    def _fitted(self, gate: Tensor, x: Tensor) -> Tensor:
        """Shape per-sample gates, [n, 1, r], for an input [n, ..., in], or [n · tokens, in] if it is flattened."""
        if gate.dim() == 1:
            return gate
        n, rank = gate.shape[0], gate.shape[-1]
        if x.dim() == 2 and len(x) % n == 0:
            return gate.view(n, rank).repeat_interleave(len(x) // n, 0)
        if len(x) != n:  # go on with an arbitrary gate, so that one pass finds all such layers
            self.misfit = f"{len(x)} rows for {n} samples"
            return gate.view(n, rank)[0]
        return gate.view(n, *[1] * (x.dim() - 2), rank)

    def _delta(self, module: Any, adapter: str, like: Tensor) -> Tensor:
        gate = module.lora_gate[adapter]
        gate = (gate * self.scale.to(gate.device)).to(like.device)
        delta = (module.lora_B[adapter].weight * gate) @ module.lora_A[adapter].weight.to(gate.dtype)
        return transpose(delta, module.fan_in_fan_out).to(like.dtype)

    def merge_safe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:  # type: ignore[override]
        return orig_weight + self._delta(module, active_adapter, orig_weight)

    def merge_unsafe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> None:  # type: ignore[override]
        orig_weight.data += self._delta(module, active_adapter, orig_weight)

    def unmerge(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:  # type: ignore[override]
        return orig_weight - self._delta(module, active_adapter, orig_weight)


def attach_gates(model: nn.Module, adapter: str | None = None) -> list[Site]:
    """Give every LoRA layer of the active adapter a gate of ones.

    The forward pass is unchanged: gates of one and PEFT's own scaling. Must happen before the optimizer is built.

    Args:
        model: A `PeftModel` with a LoRA adapter, compiled or not, or a model that holds one.
        adapter: Its name; the active adapter by default.

    Returns:
        The sites, in the model's order.

    Raises:
        UserError: There is no PeftModel or no LoRA adapter, the adapter could not be exported, or its layers cannot be
            gated or are gated already.
    """
    check_not_parallel(model)
    check_sharding(model)
    peft = peft_model(model)
    adapter = lora_adapter(peft, adapter)
    layers = check_linear(peft, adapter)
    if is_gated(peft, adapter):
        raise UserError("a rank allocation is attached already; finish() it first, or load the model anew")
    check_plain(peft, adapter, layers)
    check_gateable(peft, adapter, layers)
    keep_trainable(peft)
    config, base_parameters = peft.peft_config[adapter], parameter_count(peft, peft.peft_config)
    sites = []
    for name, layer in layers:
        weight = layer.lora_A[adapter].weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        if not hasattr(layer, "lora_gate"):
            layer.lora_gate = nn.ParameterDict()
            layer.adapter_layer_names = (*layer.adapter_layer_names, "lora_gate")
        layer.lora_gate[adapter] = nn.Parameter(torch.ones(weight.shape[0], dtype=dtype, device=weight.device))
        scale = torch.full_like(layer.lora_gate[adapter].data, layer.scaling[adapter])
        layer.lora_variant[adapter] = _GatedVariant(scale, float(layer.scaling[adapter]), config, base_parameters)
        if "forward" not in vars(layer):  # others, as accelerate, may have put theirs there
            layer.forward = _GatedLayer(layer).forward
        layer._cast_input_dtype = _GatedLayer(layer).uncast
        refuse_what_ignores_gates(layer)
        sites.append(Site(name, layer, adapter))
    return sites


def folded(A: Tensor, B: Tensor, gate: Tensor, scale: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Return factors of plain LoRA that, with PEFT's own scaling, compute the same as the gated ones.

    B becomes B · diag(scale ∘ gate) / scaling. Ranks that are closed for good (scale 0) become exact zeros in both
    factors, which is how `export_adapter` recognises them.

    Args:
        A: [r, in].
        B: [out, r].
        gate: [r].
        scale: [r].
        scaling: PEFT's scaling.
    """
    A = A.masked_fill((scale == 0).unsqueeze(1).to(A.device), 0)
    return A, (B * (scale * gate / scaling)).to(B.dtype)


@torch.no_grad()
def fold_gates(sites: Sequence[Site]) -> None:
    """Fold scale ∘ gate into B, clear closed ranks, and remove the gates: what is left is plain LoRA."""
    for site in sites:
        layer, adapter = site.layer, site.adapter
        A, B = folded(site.A, site.B, site.gate, site.scale, site.scaling)
        site.A.copy_(A)
        site.B.copy_(B)
        del layer.lora_gate[adapter], layer.lora_variant[adapter]
        if not layer.lora_gate:
            del layer.lora_gate
            layer.adapter_layer_names = tuple(n for n in layer.adapter_layer_names if n != "lora_gate")
            if getattr(layer.forward, "__func__", None) is _GatedLayer.forward:  # not what others put around it
                del layer.forward
            for replaced in ("merge", "_mixed_batch_forward", "_cast_input_dtype"):
                layer.__dict__.pop(replaced, None)


@contextmanager
def put_back_on_error(sites: Sequence[Site]) -> Iterator[None]:
    """If the body raises, restore plain LoRA: remove the gates, and give A and B their old values."""
    before = [(factor, factor.detach().clone()) for site in sites for factor in (site.A, site.B)]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for factor, value in before:
                factor.copy_(value)
            for site in sites:
                site.gate.fill_(1)
                site.set_scale(torch.ones_like(site.gate, dtype=torch.bool))
        fold_gates(sites)
        raise


def is_gated(model: nn.Module, adapter: str) -> bool:
    """Whether any layer carries gates of this adapter."""
    return any(
        isinstance(module, LoraLayer) and isinstance(module.lora_variant.get(adapter), _GatedVariant)
        for module in model.modules()
    )


class _GatedLayer:
    """Methods that replace some of a gated layer's own.

    They are bound methods because torch.compile then sees the same code in every block of a model and compiles it once.
    It would compile a `functools.partial` again for each block, until it gives up. They have a class of their own
    because a method that is bound to a layer, but not defined by the layer's class, cannot be pickled.
    """

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The forward pass: in one step where that is possible, else PEFT's."""
        layer = self.layer
        adapter, frozen = None if args or kwargs else _sole_adapter(layer), layer._modules["base_layer"]
        if adapter is None or not _is_plain_product(frozen):
            return type(layer).forward(layer, x, *args, **kwargs)  # type: ignore[no-any-return]
        return layer.lora_variant[adapter].with_layer(layer, frozen, adapter, x)  # type: ignore[no-any-return]

    def uncast(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Leave the input of gated adapters as it is, where PEFT would cast it to the adapter's dtype.

        The kernel casts the input itself and saves the original for the backward pass. With a base model in half
        precision, layers that share an input then share one tensor, instead of each saving an fp32 copy.
        """
        layer = self.layer
        active = [name for name in layer.active_adapters if name in layer.lora_A]
        if all(isinstance(layer.lora_variant.get(name), _GatedVariant) for name in active):
            return x
        return type(layer)._cast_input_dtype(layer, x, dtype)  # type: ignore[no-any-return]


def _sole_adapter(layer: Any) -> str | None:
    """The only active adapter, if its gated update (without dropout) is all that is added to the layer; else None."""
    active = layer.active_adapters
    if layer.disable_adapters or layer.merged_adapters or len(active) != 1:
        return None
    variant = layer.lora_variant.get(active[0])
    if not isinstance(variant, _GatedVariant) or variant.adds_nothing:
        return None
    dropout = layer._modules["lora_dropout"]._modules[active[0]]
    return None if dropout.training and not isinstance(dropout, nn.Identity) else active[0]


def _is_plain_product(frozen: Any) -> bool:
    """Whether a base layer is a frozen `nn.Linear` with its original forward pass and without hooks."""
    if type(frozen) is not nn.Linear or getattr(frozen.forward, "__func__", None) is not _LINEAR_FORWARD:
        return False
    for name in ("weight", "bias"):
        parameter = frozen._parameters.get(name, name)  # other code may have replaced it by a plain tensor
        if parameter is not None and (type(parameter) is not nn.Parameter or parameter.requires_grad):
            return False
    hooks = frozen._forward_hooks or frozen._forward_pre_hooks or frozen._backward_hooks or frozen._backward_pre_hooks
    return not hooks and not _has_any_global_hook()
