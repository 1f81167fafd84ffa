"""The stages of a run: a search for the ranks, where the method has one, and the training of what is exported."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import TrainerCallback

from loralloc.errors import UserError
from loralloc.methods.base import Method
from loralloc.methods.registry import PLAIN_LORA, make_method, methods, sections
from loralloc.plan import RankPlan
from loralloc.recipe.from_recipe import add_adapter, check_precision, method_data, training_arguments
from loralloc.recipe.run_folder import RunFolder
from loralloc.recipe.schema import Recipe
from loralloc.recipe.screen import Screen
from loralloc.tasks.base import TaskData
from loralloc.training import processes
from loralloc.training.callback import RankAllocation
from loralloc.training.checkpoint import check_processes, newest_complete
from loralloc.training.trainer import Agreement, PlainTrainer, SkipBadSteps

EVALUATED = {"untrained": "the untrained model", "eval": "validation data", "test": "test data"}
"""What an evaluation is about, by the prefix of its figures in the log."""


@dataclass(frozen=True)
class Stage:
    """A training that is ready to begin.

    Attributes:
        recipe: What it trains.
        folder: Where its trace, log and checkpoints are.
        data: What it sees.
        model: The adapted model.
        trainer: The trainer, with everything in it.
        allocation: The allocation of ranks; None for plain LoRA.
        steps: Optimizer steps.
        screen: Shows what happens.
    """

    recipe: Recipe
    folder: RunFolder
    data: TaskData
    model: PeftModel
    trainer: PlainTrainer
    allocation: RankAllocation | None
    steps: int
    screen: Screen

    def train(self, resume: bool) -> None:
        """Train, from the newest complete checkpoint when a run is resumed and has one."""
        checkpoint = newest_complete(self.folder.checkpoints, before=self.steps) if resume else None
        if checkpoint is not None:
            check_processes(checkpoint, processes.world_size())
        with self.screen.training():
            self.trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))

    def rehearse(self) -> None:
        """Do everything that a training does before its first step, refusals included, and end there."""
        self.trainer.add_callback(_StopBeforeFirstStep())
        with self.screen.training(), suppress(_ReadyToTrainError):
            self.trainer.train()

    def evaluate(self, prefix: str, split: Dataset | None = None) -> dict[str, float]:
        """Evaluate on a split, by default the test data or, without them, the validation data."""
        return evaluate(self.trainer, self.data, prefix, self.screen, split)

    def failure(self, plan: RankPlan) -> str | None:
        """Say why the training has failed, and what to do, where more than half of its steps were skipped."""
        bad, steps = plan.provenance["bad_steps"], plan.provenance["steps"]
        if 2 * bad <= steps:
            return None
        return (
            f"the training failed: {bad} of {steps} steps were skipped because their gradients were not finite, and "
            f"more than half is too many; lower training.learning_rate, which is "
            f"{self.recipe.training.learning_rate:g}, and start over with --replace"
        )


class _ReadyToTrainError(Exception):
    """Ends a rehearsal: nothing speaks against the first step."""


class _StopBeforeFirstStep(TrainerCallback):
    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        raise _ReadyToTrainError


def searches(recipe: Recipe) -> bool:
    """Whether the recipe's method searches for ranks before what it exports is trained."""
    kind = methods().get(recipe.method.name)
    return kind is not None and kind.search is not None


def prepare_search(recipe: Recipe, data: TaskData, folder: RunFolder, screen: Screen) -> Stage:
    """Load and check everything that a search needs, and show it.

    It trains on one part of the training data and learns the ranks on the other. Neither the validation nor the test
    data of the recipe are looked at.
    """
    train, held_out = method_data(recipe.method, data, recipe.training.seed)
    assert held_out is not None
    steps = search_steps(recipe, len(data.train))
    settings = {"steps": steps, "epochs": None, "eval_every": None}
    searching = recipe.model_copy(update={"training": recipe.training.model_copy(update=settings)})
    parts = replace(data, train=train, validation=held_out, test=None)
    stage = _prepare(searching, parts, folder.search, screen, make_method(recipe.method, held_out), steps)
    screen.start(recipe, data, stage.model)
    screen.search(steps, len(train), len(held_out))
    return stage


def prepare_training(recipe: Recipe, data: TaskData, folder: RunFolder, screen: Screen, after_search: bool) -> Stage:
    """Load and check everything that the training of what is exported needs, and show it."""
    train, held_out = method_data(recipe.method, data, recipe.training.seed)
    steps = total_steps(recipe, len(train))
    stage = _prepare(recipe, replace(data, train=train), folder, screen, make_method(recipe.method, held_out), steps)
    if after_search:
        screen.retraining(steps, len(train))
    else:
        screen.start(recipe, data, stage.model)
    return stage


def retraining_recipe(recipe: Recipe, folder: RunFolder) -> Recipe:
    """Return the recipe of what follows a search: plain LoRA at the ranks that it has found, on all training data."""
    plain = sections()[PLAIN_LORA](name=PLAIN_LORA)
    return recipe.model_copy(update={"method": plain, "plan": str(folder.search.plan.resolve())})


def total_steps(recipe: Recipe, examples: int) -> int:
    """Optimizer steps of a run, counted as the Trainer does: every process takes its share of the batches."""
    if recipe.training.steps is not None:
        return recipe.training.steps
    batches = math.ceil(math.ceil(examples / recipe.training.batch_size) / processes.world_size())
    return math.ceil((recipe.training.epochs or 1) * max(1, math.ceil(batches / recipe.training.accumulation)))


def search_steps(recipe: Recipe, examples: int) -> int:
    """Optimizer steps of a search.

    Args:
        recipe: The recipe.
        examples: Training examples before a part is held out.
    """
    length: float = recipe.method.search
    return length if isinstance(length, int) else max(1, round(length * total_steps(recipe, examples)))


def _prepare(
    recipe: Recipe, data: TaskData, folder: RunFolder, screen: Screen, method: Method | None, steps: int
) -> Stage:
    """Build adapter and trainer; the allocation is a callback, a training without one has a guard."""
    check_precision(recipe, data.model)
    model = add_adapter(data.model, recipe)
    allocation, compact = None, recipe.training.compact
    if method is not None:
        provenance = {"base_model": data.model.name_or_path, "seed": recipe.training.seed}
        allocation = RankAllocation(method, trace=folder.trace, provenance=provenance, compact=compact)
    elif compact and recipe.method.name == PLAIN_LORA:
        raise UserError("training.compact: plain LoRA closes no ranks that could leave memory; remove it")
    guard = SkipBadSteps() if allocation is None else None
    callbacks = [Agreement() if allocation is None else allocation, screen.progress(allocation)]
    trainer = _trainer(recipe, data, model, folder, train_dataset=data.train, guard=guard, callbacks=callbacks)
    checks = guard.checks if allocation is None else allocation.run.checks  # type: ignore[union-attr]
    checks.say, checks.say_every = screen.warning, recipe.training.log_every
    if allocation is not None:
        allocation.run.begin(steps)
    return Stage(recipe, folder, data, model, trainer, allocation, steps, screen)


def make_evaluator(recipe: Recipe, data: TaskData, model: PeftModel, scratch: Path, screen: Screen) -> PlainTrainer:
    """Build a trainer that only evaluates: what the recipe says about training does not matter.

    Args:
        recipe: The recipe.
        data: The data.
        model: The model.
        scratch: A folder for what a trainer writes before it does anything.
        screen: Shows what happens.
    """
    return _trainer(recipe, data, model, RunFolder(scratch), callbacks=[screen.progress(None)])


def _trainer(recipe: Recipe, data: TaskData, model: PeftModel, folder: RunFolder, **options: Any) -> PlainTrainer:
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


def evaluate(
    trainer: PlainTrainer, data: TaskData, prefix: str, screen: Screen, split: Dataset | None = None
) -> dict[str, float]:
    """Evaluate on a split, by default the test data or, without them, the validation data.

    Returns:
        What was found, by the metrics' own names.
    """
    if split is None:
        split = data.validation if data.test is None else data.test
    with screen.evaluating(trainer, EVALUATED[prefix]):
        metrics = trainer.evaluate(split, metric_key_prefix=prefix)  # type: ignore[arg-type]
    return without_times(metrics, prefix)


def without_times(metrics: dict[str, float], prefix: str) -> dict[str, float]:
    """Return what a Trainer's evaluation has found, by its own names, without how long it took."""
    timing = ("_runtime", "_per_second", "_preparation_time")
    return {
        key.removeprefix(f"{prefix}_"): value
        for key, value in metrics.items()
        if not key.endswith(timing) and key != "epoch"
    }
