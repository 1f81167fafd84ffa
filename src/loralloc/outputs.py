"""What a model has computed of a batch, whatever its head is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ENDS = ("start_logits", "end_logits")
"""What a model of answers in a text returns instead of logits: how likely each token begins and ends the answer."""


def has_choices(model: Any) -> bool:
    """Whether a model reads several texts for each example and scores them; transformers has no other mark of it."""
    return type(model).__name__.endswith("ForMultipleChoice")


def logits_of(output: Any) -> Tensor:
    """Return the logits that a model has computed, or else its first output.

    Args:
        output: What the model has returned: a tensor, a tuple, or an output of transformers.

    Returns:
        The logits; of a model of answers those of beginnings and ends together, [n, length, 2].

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
