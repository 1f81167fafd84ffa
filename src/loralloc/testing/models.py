"""Tiny models with fixed weights, and their adapters: what a method is held to the contract on.

The architectures are those whose layers differ: Llama (Linear without bias, long module names) and BERT for
classification (a head that is saved, and names that end alike: `output.dense` and `attention.output.dense`). Nothing is
downloaded: weights come from the config and a seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

VOCABULARY = 64
HIDDEN = 16
LABELS = 3


class Tiny(NamedTuple):
    """A tiny model, and how it is adapted.

    Attributes:
        build: Takes a seed, and `dtype`; returns the model.
        targets: Layer types to adapt: of several shapes, and in BERT one whose name ends like another's.
        task: PEFT's task type.
        fan_in_fan_out: Whether its layers keep their weight transposed.
    """

    build: Callable[..., Any]
    targets: list[str]
    task: str
    fan_in_fan_out: bool = False


def tiny_llama(seed: int = 0, *, layers: int = 2, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Build a causal language model; its projections have no bias, key and value are narrower than query."""
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
    return seeded(LlamaForCausalLM, config, seed).to(dtype)


def tiny_bert(seed: int = 0, *, layers: int = 2, dtype: torch.dtype = torch.float32) -> BertForSequenceClassification:
    """Build a classifier: `output.dense` and `attention.output.dense` end alike, the head is saved whole."""
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    config.num_labels = LABELS
    return seeded(BertForSequenceClassification, config, seed).to(dtype)


def seeded(model: type[PreTrainedModel], config: PretrainedConfig, seed: int) -> Any:
    """Build with weights that depend on the seed alone; larger than usual, so that logits are of order one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built: Any = model(config)
        for parameter in built.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(std=0.2)
    return built.eval()


TINY: Mapping[str, Tiny] = {
    "llama": Tiny(tiny_llama, ["q_proj", "v_proj", "down_proj"], "CAUSAL_LM"),
    "bert": Tiny(tiny_bert, ["query", "attention.output.dense", "output.dense"], "SEQ_CLS"),
}


def lora_config(tiny: Tiny, **settings: Any) -> LoraConfig:
    """Make the LoraConfig for a tiny model: r = 4 and lora_alpha = 6, so that the scaling 1.5 is neither 1 nor 2."""
    defaults: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 6,
        "lora_dropout": 0.0,
        "target_modules": list(tiny.targets),
        "task_type": tiny.task,
        "fan_in_fan_out": tiny.fan_in_fan_out,
    }
    return LoraConfig(**{**defaults, **settings})


def adapted(tiny: Tiny, *, seed: int = 0, dtype: torch.dtype = torch.float32, **settings: Any) -> PeftModel:
    """Build a tiny model with a fresh LoRA adapter, in evaluation mode.

    Args:
        tiny: Which.
        seed: For the base weights and for the adapter.
        dtype: Of the base weights; PEFT keeps the adapter in float32.
        settings: Fields of LoraConfig that differ from `lora_config`.
    """
    key = repr((tiny.build, seed, dtype, sorted(settings.items())))
    if key not in _built:
        base = tiny.build(seed, dtype=dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1)
            _built[key] = get_peft_model(base, lora_config(tiny, **settings)).eval()  # type: ignore[assignment]
    return deepcopy(_built[key])


_built: dict[str, PeftModel] = {}
"""Models that a test has asked for: a copy takes a quarter of the time."""


def token_batch(seed: int = 0, *, samples: int = 3, length: int = 7) -> dict[str, Tensor]:
    """Draw token ids without the padding id 0."""
    ids = torch.randint(1, VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def labelled_batch(name: str, seed: int = 0) -> dict[str, Tensor]:
    """Draw a batch of 3 samples from which the model of this name computes a loss."""
    batch = token_batch(seed)
    ids = batch["input_ids"]
    return {**batch, "labels": ids[:, 0] % LABELS if name == "bert" else ids}


def on_device_of(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Put the tensors of a batch where a model is."""
    device = next(model.parameters()).device
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


@torch.no_grad()
def logits(model: nn.Module, batch: Mapping[str, Tensor] | None = None) -> Tensor:
    """Compute the logits of a batch, the model left in the mode it is in."""
    return model(**on_device_of(model, token_batch() if batch is None else batch)).logits
