"""Training batches before the first step, for methods whose start depends on them. Looking leaves no trace."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from loralloc.errors import UserError
from loralloc.peft_layers import evaluating
from loralloc.training.step_data import on_device, random_state_kept


@dataclass(frozen=True)
class ModelBatch:
    """The `TrainingBatch` of a run.

    Attributes:
        model: The model, in evaluation mode.
        inputs: What it takes, on its device.
    """

    model: nn.Module
    inputs: Mapping[str, Any]

    def forward(self) -> Any:
        """Run the model on it."""
        return self.model(**self.inputs)


def check_start(step: int, *, finished: bool, calibrated: bool) -> None:
    """Refuse to calibrate a run that has begun.

    Args:
        step: Steps made.
        finished: Whether the run is finished.
        calibrated: Whether it has been calibrated.

    Raises:
        UserError: It has begun, or has been calibrated before.
    """
    if step or finished:
        raise UserError(
            f"calibrate() is for the start of a run, and this one is {'finished' if finished else f'at step {step}'}; "
            "call it right after attach(), and not in a run that is resumed"
        )
    if calibrated:
        raise UserError("the run has been calibrated already; give calibrate() all batches in one call")


def batches_of(model: nn.Module, batches: Iterable[Any], device: torch.device) -> Iterator[ModelBatch]:
    """Yield batches of one's own as a method sees them.

    Raises:
        UserError: One is no mapping.
    """
    for batch in batches:
        if not isinstance(batch, Mapping):
            raise UserError(
                "calibrate() takes batches as the model does, mappings such as {input_ids: ..., attention_mask: ...}, "
                f"and this one is a {type(batch).__name__}; a single batch goes in a list, [batch]"
            )
        yield ModelBatch(model, on_device(batch, device))


@contextmanager
def without_a_trace(model: nn.Module) -> Iterator[None]:
    """Compute in evaluation mode inside; modes, gradients and random states are the same before and after."""
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None  # so that a backward pass inside adds to none of them
    try:
        with random_state_kept(), evaluating(model):
            yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
