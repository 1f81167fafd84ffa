"""Estimate the time and memory of a run from a few real steps on its longest examples; nothing is kept.

Streamed data are the exception: the steps are on the examples that come first.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loralloc.recipe import stages
from loralloc.recipe.from_recipe import task_data
from loralloc.recipe.passthrough import OF_THE_EXPORTED_ALONE, TOLD_TO_OTHERS, TRAINER, with_options, without
from loralloc.recipe.run_folder import RunFolder
from loralloc.recipe.schema import Recipe
from loralloc.recipe.screen import Screen
from loralloc.recipe.stages import Stage
from loralloc.tasks.base import TaskData, length_of
from loralloc.training import processes
from loralloc.training.meter import peak_memory

STEPS = 2
"""Timed steps, after one that warms up."""
DRAWN = 256
"""Examples of a stream whose lengths are counted."""


@dataclass(frozen=True)
class Estimate:
    """What a run will take.

    Attributes:
        base_parameters: Parameters of the model without the adapter.
        start_parameters: Trainable parameters at the start.
        budget: Final budget of the adapter, in words; None without an allocation.
        steps: Optimizer steps of the run.
        examples: Training examples before a method holds some out; None for a stream.
        tokens_per_step: Tokens of a step if all its examples are as long as the longest (of a stream, the longest of
            the first `DRAWN`).
        tokens_per_epoch: Tokens of the examples that are trained on, without padding; None for a stream.
        seconds_per_step: Mean of the steps after the first, on the longest examples (of a stream, on its first).
        memory: Bytes by part: weights, adapter, gradients, optimizer.
        peak: Peak memory in bytes: allocated on a GPU, or resident on the CPU.
        peak_of: What `peak` measures.
    """

    base_parameters: int
    start_parameters: int
    budget: str | None
    steps: int
    examples: int | None
    tokens_per_step: int
    tokens_per_epoch: int | None
    seconds_per_step: float
    memory: Mapping[str, int]
    peak: int
    peak_of: str

    @property
    def seconds(self) -> float:
        """Seconds of the whole run, if every step took as long as those measured."""
        return self.steps * self.seconds_per_step


class StepTimes(TrainerCallback):
    """Measures how long every training step takes.

    Attributes:
        seconds: Seconds of each step so far.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A step begins."""
        self._begun = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A step has ended."""
        self.seconds.append(time.perf_counter() - self._begun)


def estimate(recipe: Recipe) -> Estimate:
    """Make a few steps on the longest examples of a recipe.

    Args:
        recipe: The recipe. If its method searches first, the steps measured are those of the search.

    Raises:
        UserError: The run would be refused.
    """
    processes.refuse_several("loralloc estimate")
    recipe = _training_alone(recipe)
    data = task_data(recipe)
    each = recipe.training.batch_size * recipe.training.accumulation
    base = sum(parameter.numel() for parameter in data.model.parameters())
    times = StepTimes()
    with TemporaryDirectory(prefix="loralloc-") as scratch:
        stage, lengths = _prepare(recipe, data, each, RunFolder(Path(scratch)))
        stage.trainer.add_callback(times)
        stage.trainer.add_callback(_StopAfter(STEPS + 1))
        trained = [parameter for parameter in stage.model.parameters() if parameter.requires_grad]
        stage.train()
    adapter = _bytes(trained)
    memory = {"weights": _bytes(stage.model.parameters()) - adapter, "adapter": adapter, "gradients": adapter}
    memory["optimizer"] = _bytes(_state_tensors(stage.trainer.optimizer))
    peak, peak_of = peak_memory()
    return Estimate(
        base_parameters=base,
        start_parameters=sum(parameter.numel() for parameter in trained),
        budget=None if stage.allocation is None else f"{stage.allocation.run.target:,} {stage.allocation.run.unit}",
        steps=stage.steps,
        examples=length_of(data.train),
        tokens_per_step=max(lengths) * each,
        tokens_per_epoch=sum(lengths) if isinstance(data.train, Dataset) else None,
        seconds_per_step=mean(times.seconds[1:] or times.seconds),
        memory=memory,
        peak=peak,
        peak_of=peak_of,
    )


def _training_alone(recipe: Recipe) -> Recipe:
    """The recipe with nothing but training steps: no evaluations, checkpoints, trackers or uploads."""
    quiet = with_options(recipe, TRAINER, without(recipe.training.trainer, (*OF_THE_EXPORTED_ALONE, *TOLD_TO_OTHERS)))
    aside = {"eval_every": None, "save_every": None, "keep_best": False, "early_stopping": None}
    return quiet.model_copy(update={"training": quiet.training.model_copy(update=aside)})


def _prepare(recipe: Recipe, data: TaskData, each: int, folder: RunFolder) -> tuple[Stage, list[int]]:
    """Return (the stage, with copies of its longest examples as training data; the tokens of every example).

    A stream is not replaced, and only its first `DRAWN` examples are counted.
    """
    if stages.searches(recipe):
        stage = stages.prepare_search(recipe, data, folder, Screen())
    else:
        stage = stages.prepare_training(recipe, data, folder, Screen(), after_search=False)
    train: Any = stage.trainer.train_dataset
    rows: Any = train if isinstance(train, Dataset) else islice(iter(train), DRAWN)
    lengths = [_tokens(row, data.targets_apart) for row in rows]
    if isinstance(train, Dataset):
        order = sorted(range(len(train)), key=lengths.__getitem__, reverse=True)
        stage.trainer.train_dataset = train.select(order[:each] * (STEPS + 1))
    return stage, lengths


def _tokens(example: Mapping[str, Any], targets_apart: bool) -> int:
    """Tokens that go through the model for an example: source and target, both answers, or all choices."""
    if "prompt_ids" in example:
        return 2 * len(example["prompt_ids"]) + len(example["chosen_ids"]) + len(example["rejected_ids"])
    ids = example["input_ids"]
    read = sum(map(len, ids)) if isinstance(ids[0], list) else len(ids)
    return read + (len(example["labels"]) if targets_apart else 0)


class _StopAfter(TrainerCallback):
    """Ends a training early, after a given number of steps."""

    def __init__(self, steps: int) -> None:
        self._steps = steps

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_training_stop = control.should_training_stop or state.global_step >= self._steps


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _state_tensors(optimizer: Any) -> list[torch.Tensor]:
    states: Any = optimizer.state.values()
    values = [value for state in states for value in state.values()]
    return [value for value in values if isinstance(value, torch.Tensor)]
