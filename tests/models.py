"""Tiny models with fixed weights, and their adapters: every test builds its models here.

Llama and BERT are the ones that methods are held to their contract on (`loralloc.testing.models`). GPT-2 comes to them
for transformers' Conv1D, whose weight is transposed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from loralloc.gating import Site, attach_gates
from loralloc.testing import models as shared
from loralloc.testing.models import (
    HIDDEN,
    LABELS,
    VOCABULARY,
    labelled_batch,
    logits,
    tiny_bert,
    tiny_llama,
    token_batch,
)

__all__ = ["HIDDEN", "LABELS", "VOCABULARY", "labelled_batch", "logits", "tiny_bert", "tiny_llama", "token_batch"]


def tiny_gpt2(seed: int = 0, *, layers: int = 2, dtype: torch.dtype = torch.float32) -> GPT2LMHeadModel:
    """A causal language model of Conv1D layers."""
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=HIDDEN,
        n_layer=layers,
        n_head=4,
        n_positions=64,
        n_inner=24,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return shared.seeded(GPT2LMHeadModel, config, seed).to(dtype)


TINY: Mapping[str, shared.Tiny] = {
    **shared.TINY,
    "gpt2": shared.Tiny(tiny_gpt2, ["c_attn", "c_proj"], "CAUSAL_LM", fan_in_fan_out=True),
}
BUILDERS: Mapping[str, Callable[..., Any]] = {name: tiny.build for name, tiny in TINY.items()}
TARGETS: Mapping[str, list[str]] = {name: tiny.targets for name, tiny in TINY.items()}


def lora_config(name: str, **settings: Any) -> LoraConfig:
    """The LoraConfig for a tiny model, see `loralloc.testing.models`."""
    return shared.lora_config(TINY[name], **settings)


def tiny_peft(
    name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, trained: bool = False, **settings: Any
) -> PeftModel:
    """A tiny model with a LoRA adapter.

    Args:
        name: `llama`, `bert` or `gpt2`.
        seed: For the base weights and for the adapter.
        dtype: Of the base weights; PEFT keeps the adapter in float32.
        trained: Whether B (and a saved head) holds numbers other than those of a fresh adapter.
        settings: Fields of LoraConfig that differ from `lora_config`.
    """
    model = shared.adapted(TINY[name], seed=seed, dtype=dtype, **settings)
    if trained:
        train_adapter(model, seed + 2)
    return model


def on_layer(model: nn.Module, target: str, **settings: Any) -> PeftModel:
    """Any model, with LoRA of rank 2 on the layers of one name."""
    return get_peft_model(model, LoraConfig(r=2, target_modules=[target], **settings))


@torch.no_grad()
def train_adapter(model: nn.Module, seed: int = 2, adapter: str = "default") -> None:
    """Put numbers where training would: into every B, and into a saved head."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if f"lora_B.{adapter}" in name or f"lora_embedding_B.{adapter}" in name:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        if f"modules_to_save.{adapter}" in name:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """PEFT's LoRA layers by full module name in the base model."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


@torch.no_grad()
def set_ranks(model: nn.Module, ranks: Mapping[str, int], adapter: str = "default") -> None:
    """Close ranks as a finished allocation leaves them: exact zeros in both factors, of every other rank first."""
    for name, layer in lora_layers(model).items():
        A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        order = [*range(0, len(A), 2), *range(1, len(A), 2)]
        closed = order[: len(A) - ranks[name]]
        A[closed] = 0
        B[:, closed] = 0


# ---- Gated models, and the formula they are held against ----


def gated(name: str, **settings: Any) -> tuple[PeftModel, list[Site]]:
    """A trained model with gates of all kinds: zero, one rank closed for good, the others of either sign."""
    model = tiny_peft(name, trained=True, **settings)
    sites = attach_gates(model)
    shake(sites)
    return model, sites


@torch.no_grad()
def shake(sites: list[Site]) -> None:
    """Draw gates; the first is 0, the last rank is closed for good, and the scale is not PEFT's."""
    generator = torch.Generator().manual_seed(5)
    for site in sites:
        site.gate.copy_(2 * torch.randn(site.rank, generator=generator))
        site.gate[0] = 0.0
        site.set_scale(torch.arange(site.rank) < site.rank - 1, factor=1.25)


def two_adapters() -> tuple[PeftModel, list[Site]]:
    """A gated adapter, active, and a trained one without gates."""
    model, sites = gated("llama")
    model.add_adapter("plain", lora_config("llama", r=2))
    train_adapter(model, 9, "plain")
    return model, sites


def naive_update(site: Site, x: Tensor) -> Tensor:
    """The update of one layer's output, in plain operations that autograd follows."""
    return ((x.to(site.A.dtype) @ site.A.T) * site.scale * site.gate) @ site.B.T


@torch.no_grad()
def naive_delta(site: Site) -> Tensor:
    """ΔW = Σᵢ scaleᵢ · gateᵢ · bᵢ aᵢᵀ, one rank at a time, in the layout of the layer's weight."""
    delta = torch.zeros(site.outputs, site.inputs)
    for i in range(site.rank):
        delta += site.scale[i] * site.gate[i] * torch.outer(site.B[:, i], site.A[i])
    return delta.T if site.layer.fan_in_fan_out else delta


def inputs_of(site: Site, *shape: int) -> Tensor:
    """Inputs of one layer."""
    return torch.randn(*shape, site.inputs, generator=torch.Generator().manual_seed(3))


def cycled_ranks(model: nn.Module, *ranks: int) -> dict[str, int]:
    """Ranks dealt to the modules in turn, never above what a module has."""
    layers = lora_layers(model)
    capacity = [layer.lora_A["default"].weight.shape[0] for layer in layers.values()]
    return {name: min(ranks[i % len(ranks)], capacity[i]) for i, name in enumerate(layers)}
