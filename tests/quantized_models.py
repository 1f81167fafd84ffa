"""A tiny Llama in 4 and 8 bits, loaded as a user would, and its adapters.

It is 128 wide: of rows that are no multiple of 64 numbers bitsandbytes makes others on a CPU.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from models import VOCABULARY, lora_config, train_adapter
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from loralloc.quantized import keep_trainable
from loralloc.tasks.quantization import quantization_config
from loralloc.testing.models import seeded

BITS = ("4bit", "8bit")
ROUNDING = {"4bit": torch.finfo(torch.bfloat16).eps, "8bit": 1 / 127}
"""The least step of what layers compute with: bfloat16 products, and inputs of 8 bits."""

_FOLDER = TemporaryDirectory(prefix="loralloc-tests-")


@cache
def saved_llama(hidden: int = 128, dtype: torch.dtype = torch.float32) -> Path:
    """The folder of the model in full precision."""
    folder = Path(_FOLDER.name) / f"{hidden}-{dtype}"
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=3 * hidden // 2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    model = seeded(LlamaForCausalLM, config, 0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(0.5)  # as wide as the model is, logits are of order one again
    model.to(dtype).save_pretrained(folder)
    return folder


def quantized_llama(bits: str, hidden: int = 128, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """The model with all linear layers but the head quantised."""
    config = quantization_config(bits, ["lm_head"])
    return LlamaForCausalLM.from_pretrained(saved_llama(hidden), quantization_config=config, dtype=dtype)


def quantized_peft(
    bits: str, *, trained: bool = False, dtype: torch.dtype = torch.float32, **settings: Any
) -> PeftModel:
    """The quantised model with an adapter, fresh or with numbers in B, in evaluation mode; it may be evaluated."""
    base = quantized_llama(bits, dtype=dtype)
    keep_trainable(base)
    torch.manual_seed(1)
    model = get_peft_model(base, lora_config("llama", **settings)).eval()
    if trained:
        train_adapter(model)
    return model


@torch.no_grad()
def weights_of(layer: Any) -> Tensor:
    """The numbers that the weights of a layer in 8 bits stand for, from its integers and scales."""
    scales = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
    return layer.weight.data.float() * scales.float().unsqueeze(1) / 127
