"""One training of `loralloc train`: the Trainer, with an allocation or without, resumed where it was interrupted."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from peft import PeftModel
from transformers import TrainerCallback

from loralloc.cli import terminal
from loralloc.cli.build import training_arguments
from loralloc.cli.folder import RunFolder
from loralloc.config import Recipe
from loralloc.errors import UserError
from loralloc.methods.base import Method
from loralloc.methods.registry import PLAIN_LORA
from loralloc.plan import RankPlan
from loralloc.tasks.base import TaskData
from loralloc.training import processes
from loralloc.training.callback import RankAllocation
from loralloc.training.checkpoint import check_processes, newest_complete
from loralloc.training.trainer import Agreement, PlainTrainer, SkipBadSteps

EVALUATED = {"untrained": "the untrained model", "eval": "validation data", "test": "test data"}
"""What an evaluation is about, by the prefix of its figures in the log."""


class Stage(NamedTuple):
    """A training that is ready to begin."""

    data: TaskData
    model: PeftModel
    trainer: PlainTrainer
    allocation: RankAllocation | None
    steps: int


def total_steps(recipe: Recipe, examples: int) -> int:
    """Optimizer steps of a run, counted as the Trainer does: every process takes its share of the batches."""
    if recipe.training.steps is not None:
        return recipe.training.steps
    batches = math.ceil(math.ceil(examples / recipe.training.batch_size) / processes.world_size())
    return math.ceil((recipe.training.epochs or 1) * max(1, math.ceil(batches / recipe.training.accumulation)))


def make_trainer(
    recipe: Recipe, data: TaskData, model: PeftModel, folder: RunFolder, method: Method | None
) -> tuple[PlainTrainer, RankAllocation | None]:
    """Build the trainer, with the allocation as a callback, or the guard of a training without one."""
    allocation, compact = None, recipe.training.compact
    if method is not None:
        provenance = {"base_model": data.model.name_or_path, "seed": recipe.training.seed}
        allocation = RankAllocation(method, trace=folder.trace, provenance=provenance, compact=compact)
    elif compact and recipe.method.name == PLAIN_LORA:
        raise UserError("training.compact: plain LoRA closes no ranks that could leave memory; remove it")
    guard = SkipBadSteps() if allocation is None else None
    callbacks = [Agreement() if allocation is None else allocation, terminal.Progress(allocation)]
    trainer = _build(recipe, data, model, folder, train_dataset=data.train, guard=guard, callbacks=callbacks)
    checks = guard.checks if allocation is None else allocation.run.checks  # type: ignore[union-attr]
    checks.say, checks.say_every = terminal.show_warning, recipe.training.log_every
    return trainer, allocation


def make_evaluator(recipe: Recipe, data: TaskData, model: PeftModel, scratch: Path) -> PlainTrainer:
    """Build a trainer that only evaluates: what the recipe says about training does not matter.

    Args:
        recipe: The recipe.
        data: The data.
        model: The model.
        scratch: A folder for what a trainer writes before it does anything.
    """
    return _build(recipe, data, model, RunFolder(scratch), callbacks=[terminal.Progress(None)])


def _build(recipe: Recipe, data: TaskData, model: PeftModel, folder: RunFolder, **options: Any) -> PlainTrainer:
    return PlainTrainer(
        model=model,
        args=training_arguments(recipe.training, folder.checkpoints),
        eval_dataset=data.validation,
        data_collator=data.collator,
        compute_metrics=data.compute_metrics,
        preprocess_logits_for_metrics=data.preprocess_logits,
        log=folder.log,
        **options,
    )


def train(trainer: PlainTrainer, checkpoints: Path, steps: int, resume: bool) -> None:
    """Train, from the newest complete checkpoint when a run is resumed and has one."""
    checkpoint = newest_complete(checkpoints, before=steps) if resume else None
    if checkpoint is not None:
        check_processes(checkpoint, processes.world_size())
    with terminal.progress_bar():
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))


def rehearse(trainer: PlainTrainer) -> None:
    """Do everything that a training does before its first step, refusals included, and end there."""
    trainer.add_callback(_Curtain())
    with terminal.progress_bar(), suppress(_ReadyError):
        trainer.train()


class _ReadyError(Exception):
    """Nothing speaks against the first step."""


class _Curtain(TrainerCallback):
    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        raise _ReadyError


def failure(recipe: Recipe, plan: RankPlan) -> str | None:
    """Say why a training has failed, and what to do, where more than half of its steps were skipped; else None."""
    bad, steps = plan.provenance["bad_steps"], plan.provenance["steps"]
    if 2 * bad <= steps:
        return None
    return (
        f"the training failed: {bad} of {steps} steps were skipped because their gradients were not finite, and more "
        f"than half is too many; lower training.learning_rate, which is {recipe.training.learning_rate:g}, and start "
        "over with --replace"
    )


def evaluate(trainer: PlainTrainer, data: TaskData, prefix: str, split: Dataset | None = None) -> dict[str, float]:
    """Evaluate on a split, by default the test data or, without them, the validation data."""
    if split is None:
        split = data.validation if data.test is None else data.test
    with _progress(trainer).evaluating(EVALUATED[prefix]):
        found = trainer.evaluate(split, metric_key_prefix=prefix)  # type: ignore[arg-type]
    return terminal.without_times(found, prefix)


def pace(trainer: PlainTrainer) -> terminal.Pace:
    """How long the steps took that a trainer has trained."""
    return _progress(trainer).pace


def _progress(trainer: PlainTrainer) -> terminal.Progress:
    return next(found for found in trainer.callback_handler.callbacks if isinstance(found, terminal.Progress))
