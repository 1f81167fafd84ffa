"""Tiny models with fixed weights, and their adapters: every test builds its models here.

The architectures are those whose layers differ: Llama (Linear without bias, long module names), BERT for
classification (a head that is saved, and names that end alike: `output.dense` and `attention.output.dense`) and GPT-2
(transformers' Conv1D, whose weight is transposed). Nothing is downloaded: weights come from the config and a seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from loralloc.gating import Site, attach_gates

VOCABULARY = 64
HIDDEN = 16
LABELS = 3


def tiny_llama(seed: int = 0, *, layers: int = 2, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """A causal language model; its projections have no bias, key and value are narrower than query."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    return _seeded(LlamaForCausalLM, config, seed).to(dtype)


def tiny_bert(seed: int = 0, *, layers: int = 2, dtype: torch.dtype = torch.float32) -> BertForSequenceClassification:
    """A classifier: `output.dense` and `attention.output.dense` collide in their ends, the head is saved whole."""
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=64,
        num_labels=LABELS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return _seeded(BertForSequenceClassification, config, seed).to(dtype)


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
    return _seeded(GPT2LMHeadModel, config, seed).to(dtype)


def _seeded(model: type[PreTrainedModel], config: Any, seed: int) -> Any:
    """Build with weights that depend on the seed alone; larger than usual, so that logits are of order one."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        built = model(config)
        for parameter in built.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(std=0.2)
    return built.eval()


BUILDERS: Mapping[str, Callable[..., Any]] = {"llama": tiny_llama, "bert": tiny_bert, "gpt2": tiny_gpt2}

TARGETS: Mapping[str, list[str]] = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "bert": ["query", "attention.output.dense", "output.dense"],
    "gpt2": ["c_attn", "c_proj"],
}
"""Layer types to adapt: of several shapes, and in BERT one whose name ends like another's."""

TASKS: Mapping[str, str | None] = {"llama": "CAUSAL_LM", "bert": "SEQ_CLS", "gpt2": "CAUSAL_LM"}


def lora_config(name: str, **settings: Any) -> LoraConfig:
    """The LoraConfig for a tiny model: r = 4 and lora_alpha = 6, so that the scaling 1.5 is neither 1 nor 2."""
    defaults: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 6,
        "lora_dropout": 0.0,
        "target_modules": list(TARGETS[name]),
        "task_type": TASKS[name],
        "fan_in_fan_out": name == "gpt2",
    }
    return LoraConfig(**{**defaults, **settings})


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
    key = repr((name, seed, dtype, trained, sorted(settings.items())))
    if key not in _built:
        base = BUILDERS[name](seed, dtype=dtype)
        with torch.random.fork_rng():
            torch.manual_seed(seed + 1)
            model = get_peft_model(base, lora_config(name, **settings))
        if trained:
            train_adapter(model, seed + 2)
        _built[key] = model.eval()
    return deepcopy(_built[key])


_built: dict[str, PeftModel] = {}
"""Models that a test has asked for: a copy takes a quarter of the time."""


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


def token_batch(seed: int = 0, *, samples: int = 3, length: int = 7) -> dict[str, Tensor]:
    """Token ids without the padding id 0."""
    ids = torch.randint(1, VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def labelled_batch(name: str, seed: int = 0) -> dict[str, Tensor]:
    """A batch from which the model computes a loss."""
    batch = token_batch(seed)
    ids = batch["input_ids"]
    return {**batch, "labels": ids[:, 0] % LABELS if name == "bert" else ids}


@torch.no_grad()
def logits(model: nn.Module, batch: Mapping[str, Tensor] | None = None) -> Tensor:
    """The logits of a batch, the model left in the mode it is in."""
    return model(**(token_batch() if batch is None else batch)).logits


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
