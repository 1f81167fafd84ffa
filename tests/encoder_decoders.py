"""Tiny encoders with a decoder: T5 has relative positions, BART 32 places; both tie embeddings and head."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from loralloc.testing.models import seeded

Kind = Literal["t5", "bart"]
TEMPLATES = {"t5": "$A </s>", "bart": "<s> $A </s>"}
"""What their tokenizers make of a text."""
SPECIAL = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
PLACES = 32


def build(
    kind: Kind, seed: int = 0, *, layers: int = 2, vocabulary: int = 64, dtype: torch.dtype = torch.float32
) -> Any:
    """A model whose padding is token 0, whose texts end with token 3, and without dropout."""
    marks = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "vocab_size": vocabulary}
    if kind == "t5":
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2, "num_layers": layers, "dropout_rate": 0.0}
        return seeded(T5ForConditionalGeneration, T5Config(**sizes, **marks, decoder_start_token_id=0), seed).to(dtype)
    halves = {f"{stack}_{part}": size for stack in ("encoder", "decoder")
              for part, size in {"layers": layers, "attention_heads": 2, "ffn_dim": 24}.items()}  # fmt: skip
    config = BartConfig(
        d_model=16, max_position_embeddings=PLACES, dropout=0.0, decoder_start_token_id=3, **halves, **marks
    )
    return seeded(BartForConditionalGeneration, config, seed).to(dtype)


def save(kind: Kind, folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Write a model for a tokenizer with `SPECIAL` tokens, which are its first."""
    build(kind, vocabulary=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
