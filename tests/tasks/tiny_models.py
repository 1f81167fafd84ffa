"""Tiny models built from a configuration: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import encoder_decoders
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ("a", "b", "c", "d", "e", "good", "bad", "film", "the", "is", ":", "user", "assistant", "hello", "yes", "no")


def build_tokenizer(template: str, pair: str | None, **special: str) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word of `WORDS`, and the special tokens by role."""
    tokens = list(dict.fromkeys(special.values()))
    vocabulary = {token: i for i, token in enumerate([*tokens, *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=special["unk_token"]))
    tokenizer.pre_tokenizer = Whitespace()
    used = [(token, vocabulary[token]) for token in tokens if token in f"{template} {pair}".split()]
    tokenizer.post_processor = TemplateProcessing(single=template, pair=pair, special_tokens=used)
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs, **special)


def save_decoder(folder: Path, tokenizer: PreTrainedTokenizerFast, width: int = 16) -> str:
    """A Llama of two layers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_encoder(folder: Path, tokenizer: PreTrainedTokenizerFast, width: int = 16) -> str:
    """A BERT of two layers, without a head."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_encoder_decoder(kind: encoder_decoders.Kind, folder: Path) -> str:
    """A T5 or a BART of two layers each way."""
    tokenizer = build_tokenizer(encoder_decoders.TEMPLATES[kind], None, **encoder_decoders.SPECIAL)
    return str(encoder_decoders.save(kind, folder, tokenizer))
