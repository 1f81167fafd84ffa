"""The models that are timed: real architectures with random weights. Speed does not depend on the values."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

SEED = 0


@dataclass(frozen=True)
class Shape:
    """A model, its batch, and the layers that get an adapter.

    Attributes:
        name: As given on the command line.
        family: `bert` (sequence classification) or `llama` (causal language model).
        hidden: Width of the residual stream.
        layers: Number of blocks.
        inner: Width of the feed-forward part.
        heads: Attention heads.
        kv_heads: Key-value heads (Llama).
        vocabulary: Token ids.
        batch: Sequences in a step.
        tokens: Tokens in a sequence.
        dtype: Of the frozen weights.
        targets: Layers that get an adapter, as in `LoraConfig.target_modules`.
    """

    name: str
    family: str
    hidden: int
    layers: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int = 4096
    batch: int = 4
    tokens: int = 128
    dtype: torch.dtype = torch.float32
    targets: str | tuple[str, ...] = "all-linear"

    def build(self, device: str) -> nn.Module:
        """Return the model in training mode, the same weights at every call."""
        torch.manual_seed(SEED)
        with torch.device(device):  # random numbers are drawn where they are needed
            model = _bert(self) if self.family == "bert" else _llama(self)
        return model.to(device, self.dtype).train()

    def inputs(self, device: str, seed: int = SEED) -> dict[str, Tensor]:
        """Return a batch with labels."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(1, self.vocabulary, (self.batch, self.tokens), generator=generator)
        labels = ids[:, 0] % 2 if self.family == "bert" else ids
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        return {key: value.to(device) for key, value in batch.items()}

    def with_(self, **changes: object) -> Shape:
        """Return the same shape with other fields."""
        return replace(self, **changes)  # type: ignore[arg-type]


def _bert(shape: Shape) -> nn.Module:
    config = BertConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        intermediate_size=shape.inner,
        num_attention_heads=shape.heads,
        max_position_embeddings=max(512, shape.tokens),
        hidden_dropout_prob=0.0,  # so that losses of contenders can be compared
        attention_probs_dropout_prob=0.0,
        num_labels=2,
    )
    return BertForSequenceClassification(config)


def _llama(shape: Shape) -> nn.Module:
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        intermediate_size=shape.inner,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=max(2048, shape.tokens),
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


_SHAPES = (
    Shape("tiny", "llama", 32, 2, 64, 4, 2, vocabulary=64, batch=2, tokens=8),
    Shape("minilm", "bert", 384, 6, 1536, 12, 12, vocabulary=30522, batch=16, tokens=64),
    Shape("llama-128", "llama", 128, 16, 344, 4, 4, batch=1, tokens=16),  # hardly any arithmetic: 112 layers' overhead
    Shape("llama-512", "llama", 512, 4, 1376, 8, 8),
    Shape("llama-1024", "llama", 1024, 8, 2752, 16, 16),
    Shape("llama-1b", "llama", 2048, 16, 8192, 32, 8, vocabulary=128256, tokens=512, dtype=torch.bfloat16),
    Shape("llama-3b", "llama", 3072, 28, 8192, 24, 8, vocabulary=128256, tokens=512, dtype=torch.bfloat16),
)
SHAPES = {shape.name: shape for shape in _SHAPES}
CPU_SHAPES = ("minilm", "llama-512", "llama-1024")
CUDA_SHAPES = ("llama-1b", "llama-3b")
