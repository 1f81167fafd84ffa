"""Which adapters are plain LoRA: B·A on the linear layers of an unchanged base model.

Programs that read LoRA files support nothing else, so anything beyond that could be trained but never exported. The
same functions refuse it when an allocation is attached and when an adapter is exported or truncated.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from loralloc.errors import UserError
from loralloc.naming import named
from loralloc.peft_layers import check_linear, is_quantized, lora_adapter, peft_model

CONVERTED = ("pissa", "olora", "corda", "lora_ga")
"""Prefixes of `init_lora_weights` for which PEFT changes the base weights and can convert the trained adapter."""

CHANGES_BASE_WEIGHTS = (*CONVERTED, "loftq")
"""The same prefixes, plus the one for which PEFT has no conversion."""

VARIANTS = tuple(field.name for field in fields(LoraConfig) if field.metadata.get("is_lora_variant"))
"""Settings of LoraConfig under which PEFT computes another update than B·A: `use_dora` and the like."""

OTHER_UPDATES = (*VARIANTS, "lora_bias", "use_qalora", "target_parameters")
"""Settings under which an adapter is more, or other, than B·A on linear layers."""


def check_plain(model: PeftModel, adapter: str, layers: Sequence[tuple[str, Any]]) -> None:
    """Refuse an adapter that is more than B·A on the base weights.

    Args:
        model: The model.
        adapter: Name of the adapter.
        layers: Its layers by full module name, all of them linear.

    Raises:
        UserError: With the setting or the layers, and what to change.
    """
    check_plain_config(model.peft_config[adapter])
    trained = [
        name
        for name, parameter in model.get_base_model().named_parameters()
        if parameter.requires_grad and not any(part in model.peft_config for part in name.split("."))
    ]
    if trained:
        raise UserError(
            f"{len(trained)} parameters of the base model are not frozen ({trained[0]}, ...), and no adapter holds "
            "what they learn; freeze them, or train their module as a whole with LoraConfig(modules_to_save=[...])"
        )
    found = {name: layer.lora_variant[adapter] for name, layer in layers if adapter in layer.lora_variant}
    if found:
        variant = type(next(iter(found.values()))).__name__
        where = named(list(found), [name for name, _ in layers if name not in found])
        raise UserError(
            f"{where}: the adapter uses PEFT's {variant}, which changes the update itself; use plain LoRA, a "
            "LoraConfig with init_lora_weights=True and no variant"
        )


def check_plain_config(config: PeftConfig) -> None:
    """Refuse settings of a config that make an adapter more than B·A on the base weights.

    Raises:
        UserError: With the setting and what to change.
    """
    assert isinstance(config, LoraConfig)
    start = config.init_lora_weights
    if isinstance(start, str) and start.lower().startswith(CHANGES_BASE_WEIGHTS):
        convert = (
            "; PEFT converts an adapter that is trained already, where its start was saved: "
            "save_pretrained(path, path_initial_model_for_weight_conversion=...)"
        )
        raise UserError(
            f'init_lora_weights="{start}" changes the base weights at the start, so that the adapter fits no stock '
            f"base model; train with LoraConfig(init_lora_weights=True){convert * start.lower().startswith(CONVERTED)}"
        )
    if config.bias != "none":
        raise UserError(
            f'bias="{config.bias}" trains biases of the base model, which are no part of plain LoRA; set '
            'LoraConfig(bias="none")'
        )
    if config.layer_replication:
        raise UserError(
            "layer_replication builds another model from the base model's layers, which is no part of plain LoRA; "
            "leave it out of LoraConfig"
        )
    for name in OTHER_UPDATES:
        if getattr(config, name):
            raise UserError(f"{name} makes the update more, or other, than B·A; leave it out of LoraConfig")


def check_active(layers: Iterable[tuple[str, Any]]) -> None:
    """Refuse an adapter that does not take part in what the model computes.

    Raises:
        UserError: It is merged or disabled.
    """
    for name, layer in layers:
        if layer.merged or layer.disable_adapters:
            state, cure = ("merged", "unmerge_adapter()") if layer.merged else ("disabled", "enable_adapter_layers()")
            raise UserError(f"{name}: the adapter is {state}, so there is nothing to compare with; call {cure} first")


def scale_changed(adapter: str, attached: float, now: float) -> UserError:
    """The refusal of another scale than the one that gates were attached with.

    Args:
        adapter: Name of the adapter.
        attached: PEFT's scaling then.
        now: PEFT's scaling now.
    """
    return UserError(
        f"the scale of the adapter is {float(now):g}, and was {attached:g} when the rank allocation was attached: a "
        f'run has one scale; set that of its layers back, layer.scaling["{adapter}"] = {attached!r}, or leave '
        "rescale_adapter_scale, and change it after finish()"
    )


def made_anew(adapter: str) -> UserError:
    """The refusal of a layer whose factors PEFT has made anew while gates are attached.

    Args:
        adapter: Name of the adapter.
    """
    return UserError(
        f'PEFT makes the adapter "{adapter}" anew under the gates of the attached rank allocation; load the model '
        "anew, and change the adapter first, then attach. EVA does so to choose ranks: get_peft_model, "
        "initialize_lora_eva_weights, and only then attach, or a Trainer (without peft_config) with the callback"
    )


def check_mergeable(model: PeftModel, layers: Sequence[tuple[str, Any]]) -> None:
    """Refuse to merge if the result would not be exactly the base weights plus the update.

    Merging into quantised weights rounds the update, most of which is smaller than a quantisation step. No process
    holds the whole weights of a sharded model. If two layers share a weight, merging would change both.

    Args:
        model: The model.
        layers: The adapter's layers by full module name.

    Raises:
        UserError: With the layers and what to do instead.
    """
    if quantized := [name for name, layer in layers if is_quantized(layer)]:
        where = named(quantized, [name for name, _ in layers if name not in quantized])
        raise UserError(
            f"{where}: the weights are quantised, and merging would round the update to their steps; load the base "
            'model in full precision, and the adapter (exported with profile="ragged") onto it, and export that: '
            'export_adapter(PeftModel.from_pretrained(base, "ADAPTER"), path, profile="merged"); of a run with '
            "model.load_in in its recipe, loralloc export RUN --profile merged does it"
        )
    if any(isinstance(parameter.data, DTensor) for parameter in model.parameters()):
        raise UserError(
            "the base model is sharded over processes, and no process holds a weight to merge into; export "
            'profile="ragged", and merge in one process: export_adapter(PeftModel.from_pretrained(base, "ADAPTER"), '
            'path, profile="merged"), or loralloc export RUN --profile merged'
        )
    owners: dict[int, list[str]] = {}
    for name, module in model.get_base_model().named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            owners.setdefault(id(weight), []).append(name.removesuffix(".base_layer"))
    for name, layer in layers:
        shared = [other for other in owners.get(id(layer.get_base_layer().weight), []) if other != name]
        if shared:
            raise UserError(
                f"{name} is tied to {shared[0]} (they share one weight), so merging the adapter of one would change "
                'both; export profile="ragged" or "uniform", or train without an adapter on it: '
                f'LoraConfig(exclude_modules=["{name}"])'
            )


def stored_apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors as a file holds them: on the CPU, contiguous, and without shared memory.

    Modules that are saved whole share memory if embeddings are tied (`ensure_weight_tying`).
    """
    return {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}


@dataclass(frozen=True)
class PlainSite:
    """A LoRA layer of an adapter, gated or not.

    Attributes:
        name: Full module name in the base model, for example `model.layers.0.self_attn.q_proj`.
        layer: PEFT's layer.
        adapter: Name of the adapter.
    """

    name: str
    layer: Any
    adapter: str

    @property
    def A(self) -> nn.Parameter:  # noqa: N802 - the papers' symbol
        """Down projection, [r, in]."""
        return self.layer.lora_A[self.adapter].weight

    @property
    def B(self) -> nn.Parameter:  # noqa: N802 - the papers' symbol
        """Up projection, [out, r]."""
        return self.layer.lora_B[self.adapter].weight

    @property
    def scaling(self) -> float:
        """PEFT's scaling of this adapter: lora_alpha / r, or lora_alpha / √r with rsLoRA."""
        return float(self.layer.scaling[self.adapter])


def plain_sites(model: nn.Module) -> Iterator[PlainSite]:
    """Go through the LoRA layers of the active adapter.

    Raises:
        UserError: There is no PeftModel or no LoRA adapter in the model, or the adapter has layers that are not linear.
    """
    peft = peft_model(model)
    adapter = lora_adapter(peft, None)
    for name, layer in check_linear(peft, adapter):
        yield PlainSite(name, layer, adapter)
