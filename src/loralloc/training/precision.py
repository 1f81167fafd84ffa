"""The precision in which a model computes where autocast is not around a call of it, but inside."""

from __future__ import annotations

import torch
from accelerate.state import AcceleratorState, is_initialized
from torch import nn


def prepared_dtype(model: nn.Module) -> torch.dtype | None:
    """The dtype of the autocast that accelerate has put into a model's forward; None where it has put none there."""
    if "_original_forward" not in vars(model) or not is_initialized():
        return None
    return torch.float16 if AcceleratorState().mixed_precision == "fp16" else torch.bfloat16
