"""What a run reports while it is in progress."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from transformers import Trainer, TrainerCallback

if TYPE_CHECKING:
    from peft import PeftModel

    from loralloc.recipe.outcome import Outcome
    from loralloc.recipe.schema import Recipe
    from loralloc.tasks.base import TaskData
    from loralloc.tasks.preview import Part
    from loralloc.training.callback import RankAllocation


class Screen:
    """Shows nothing; the command line has subclasses that do (`loralloc.cli.terminal`, `loralloc.cli.screens`)."""

    def start(self, recipe: Recipe, data: TaskData, model: PeftModel, steps: int) -> None:
        """A run begins."""

    def search(self, steps: int, examples: int, held_out: int) -> None:
        """A search for ranks begins, which precedes the training."""

    def retraining(self, steps: int, examples: int | None) -> None:
        """The training after a search is announced."""

    def warning(self, sentence: str) -> None:
        """A sentence that must not be overlooked."""

    def note(self, sentence: str) -> None:
        """A sentence about what the run does by itself."""

    def progress(self, allocation: RankAllocation | None) -> TrainerCallback:
        """Return a callback that shows how far a training is."""
        del allocation
        return TrainerCallback()

    def training(self) -> AbstractContextManager[None]:
        """A context around a training, however it ends."""
        return nullcontext()

    def evaluating(self, trainer: Trainer, what: str) -> AbstractContextManager[None]:
        """A context around an evaluation outside of a training."""
        del trainer, what
        return nullcontext()

    def generating(self, count: int) -> AbstractContextManager[Callable[[int], None]]:
        """A context around the answering of prompts; call the function it gives with the number of answers so far."""
        del count
        return nullcontext(lambda done: None)

    def cure_of_divergence(self, rate: float) -> str:
        """Say what to do about a training that has diverged, as the commands that can be given differ.

        Args:
            rate: Its learning rate.
        """
        return f"lower training.learning_rate, which is {rate:g}, and start over with --replace"

    def preview(self, examples: Sequence[Sequence[Part]]) -> None:
        """The first examples as the model will see them."""

    def evaluated(self, what: str, metrics: Mapping[str, float]) -> None:
        """An evaluation has found these metrics."""

    def outcome(self, outcome: Outcome) -> None:
        """A run has ended."""
