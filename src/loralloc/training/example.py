"""Keeps a sample or two of a run's training data, on which the check of its export compares outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from loralloc.adapter.check import remember_example
from loralloc.training.step_data import samples_of

SAMPLES = 2


class FirstBatch:
    """Waits for the first batch that a model is trained on, and keeps its first samples.

    No local function, so that the model can be pickled meanwhile.

    Args:
        model: The model, called with keyword arguments.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._hook = model.register_forward_pre_hook(self._look, with_kwargs=True)

    def forget(self) -> None:
        """Wait no longer."""
        self._hook.remove()

    def _look(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or args:
            return
        # Arguments other than tensors are options of a training loop, such as TRL's to compute no logits.
        tensors = {key: value for key, value in kwargs.items() if isinstance(value, Tensor)}
        batch = samples_of(tensors, slice(SAMPLES))
        remember_example(self._model, {key: value.detach().to("cpu", copy=True) for key, value in batch.items()})
        self.forget()
