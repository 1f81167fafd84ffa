"""What a model has computed of a batch, whatever its head is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ENDS = ("start_logits", "end_logits")
"""Outputs of an extractive question-answering model, which has no `logits`: scores of each token as start and end."""


def has_choices(model: Any) -> bool:
    """Whether a model is a multiple-choice model, which scores several texts per example; only its class name tells."""
    return type(model).__name__.endswith("ForMultipleChoice")


def logits_of(output: Any) -> Tensor:
    """Return the logits that a model has computed, or else its first output.

    Args:
        output: What the model has returned: a tensor, a tuple, or an output of transformers.

    Returns:
        The logits; for extractive question answering, the start and end logits stacked, [n, length, 2].

    Raises:
        ValueError: There are none.
    """
    if isinstance(output, Tensor):
        return output
    if all(isinstance(getattr(output, name, None), Tensor) for name in ENDS):
        return torch.stack([getattr(output, name) for name in ENDS], dim=-1)
    logits = getattr(output, "logits", None)
    found = output[0] if logits is None else logits
    if found.dim() == 0:
        raise ValueError("it returns a loss and no logits")
    return found
