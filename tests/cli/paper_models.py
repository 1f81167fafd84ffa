"""Tiny models with the architectures that the papers adapt, and their tokenizers, as checkpoints on disk."""

from __future__ import annotations

import string
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    RobertaConfig,
    RobertaModel,
)

from .command import build_tokenizer

WIDE: Mapping[str, Any] = {  # the ranks of the papers must fit
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
DEBERTA: Mapping[str, Any] = {  # as in microsoft/deberta-v3-base: query and key also project relative positions
    "relative_attention": True,
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 16,
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "type_vocab_size": 0,
}
BART: Mapping[str, Any] = {
    "d_model": 32,
    **{
        f"{part}_{key}": value
        for part in ("encoder", "decoder")
        for key, value in {"layers": 2, "attention_heads": 2, "ffn_dim": 64}.items()
    },
    "max_position_embeddings": 64,
    "decoder_start_token_id": 3,
    "forced_eos_token_id": 3,
}


class Tiny(NamedTuple):
    """How a model of an architecture is made, and how many of its matrices the papers adapt."""

    config: Any
    model: Any
    settings: Mapping[str, Any]
    matrices: int
    encoder: bool = False


TINY: Mapping[str, Tiny] = {
    "deberta-v3": Tiny(DebertaV2Config, DebertaV2Model, {**WIDE, **DEBERTA}, 12, encoder=True),
    "roberta": Tiny(RobertaConfig, RobertaModel, {**WIDE, "type_vocab_size": 1}, 12, encoder=True),
    "arctic": Tiny(BertConfig, partial(BertModel, add_pooling_layer=False), WIDE, 12, encoder=True),
    "bart": Tiny(BartConfig, BartForConditionalGeneration, BART, 32, encoder=True),
    "gpt2": Tiny(GPT2Config, GPT2LMHeadModel, {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}, 8),
    "llama": Tiny(LlamaConfig, LlamaForCausalLM, {**WIDE, "num_key_value_heads": 2}, 14),
    "qwen2": Tiny(Qwen2Config, Qwen2ForCausalLM, {**WIDE, "num_key_value_heads": 2, "tie_word_embeddings": True}, 14),
}


def tiny_of(name: str) -> Tiny:
    """The tiny model for a published one, by its name on the Hub."""
    (found,) = (tiny for part, tiny in TINY.items() if part in name.lower())
    return found


def save_tiny(tiny: Tiny, folder: Path) -> Path:
    """Write two layers and a tokenizer; encoders have no head yet."""
    tokenizer = _tokenizer(tiny)
    tokenizer.save_pretrained(folder)
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("pad", "bos", "eos")}
    torch.manual_seed(0)
    tiny.model(tiny.config(vocab_size=len(tokenizer), **ids, **tiny.settings)).save_pretrained(folder)
    return folder


def _tokenizer(tiny: Tiny) -> PreTrainedTokenizerFast | Qwen2Tokenizer:
    if tiny.model is Qwen2ForCausalLM:  # its class is the one that AutoTokenizer takes, whatever the files say
        return Qwen2Tokenizer(
            vocab={sign: i for i, sign in enumerate(["<|endoftext|>", "Ġ", ":", *string.ascii_letters])}
        )
    single, pair = ("<s> $A </s>", "<s> $A </s> $B </s>") if tiny.encoder else ("$A", None)
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = build_tokenizer(single, pair, **special)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return tokenizer
