"""The stages of a run: a search for the ranks, where the method has one, and the training of what is exported."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, TrainerCallback

from loralloc.errors import UserError, closest
from loralloc.methods.base import Method
from loralloc.methods.registry import PLAIN_LORA, make_method, methods, sections
from loralloc.plan import RankPlan
from loralloc.recipe import evaluations
from loralloc.recipe.best import best_callbacks, wait_for_final_ranks
from loralloc.recipe.changes import NotResumableError, check_unchanged
from loralloc.recipe.evaluations import build_trainer, refusing_options
from loralloc.recipe.fingerprints import depends_on
from loralloc.recipe.from_recipe import (
    add_adapter,
    check_precision,
    check_warmup,
    method_data,
)
from loralloc.recipe.passthrough import (
    OF_THE_EXPORTED_ALONE,
    PEFT,
    PLANNED,
    TOLD_TO_OTHERS,
    with_options,
    without,
)
from loralloc.recipe.run_folder import RunFolder
from loralloc.recipe.schema import Recipe
from loralloc.recipe.screen import Screen
from loralloc.recipe.targets import check_output_layer
from loralloc.tasks.base import TaskData, length_of
from loralloc.tasks.generation import Generation
from loralloc.tasks.preview import parts_of
from loralloc.training import processes
from loralloc.training.callback import RankAllocation
from loralloc.training.checkpoint import check_processes, drop_after, newest_whole
from loralloc.training.engines import refuse_engines, under_fsdp2
from loralloc.training.manifest import read_manifest
from loralloc.training.rewriting import complete_rewriting
from loralloc.training.signals import finishing_steps
from loralloc.training.trainer import Agreement, RunTrainer, SkipBadSteps

PREVIEWED = 2
"""Examples that a rehearsal shows."""


RECOVERY_WARM_UP = 0.1
"""Share of a recovery in which the learning rate rises."""


@dataclass(frozen=True)
class Stage:
    """A training that is ready to begin.

    Attributes:
        recipe: The recipe.
        folder: Where its trace, log and checkpoints are.
        data: The data to train and evaluate on.
        model: The adapted model.
        trainer: The trainer, ready to train the model on the data.
        allocation: The allocation of ranks; None for plain LoRA.
        steps: Optimizer steps.
        screen: Shows what happens.
    """

    recipe: Recipe
    folder: RunFolder
    data: TaskData
    model: PeftModel
    trainer: RunTrainer
    allocation: RankAllocation | None
    steps: int
    screen: Screen

    def train(self, checkpoint: Path | None = None) -> None:
        """Train, from a checkpoint on or from the start."""
        start = None if checkpoint is None else str(checkpoint)
        with self.screen.training(), finishing_steps():
            self.trainer.train(resume_from_checkpoint=start)

    def checkpoint(self, allow_changed: Collection[str] = ()) -> Path | None:
        """Find the newest whole checkpoint to resume from; newer ones are reported and deleted.

        Args:
            allow_changed: What may differ from the run that wrote it, of `changes.ALLOWED`.

        Raises:
            UserError: It belongs to a run that differs; or none is whole, and one that once was is damaged.
        """
        folder = self.folder.checkpoints
        found = processes.on_main(self._find, folder, allow_changed)
        step = int(processes.gather(-1 if found is None else found)[0])  # what the first process has found
        checkpoint = None if step < 0 else folder / f"checkpoint-{step}"
        processes.on_main(drop_after, folder, checkpoint)
        return checkpoint

    def _find(self, folder: Path, allow_changed: Collection[str]) -> int:
        """The step of the checkpoint to go on from; −1 where there is none."""
        complete_rewriting(folder)
        found = newest_whole(folder)
        told = [f"{folder / name} is not whole: {reason}" for name, reason in found.skipped.items()]
        if found.checkpoint is None and found.damaged:
            raise NotResumableError(f"no checkpoint is whole any more: {'; '.join(told)}. Start over with --replace")
        for sentence in told:
            self.screen.warning(f"{sentence}; it is passed over")
        if found.checkpoint is None:
            self.screen.note(f"there is no checkpoint in {folder} to resume from: the training starts over")
            return -1
        check_processes(found.checkpoint, processes.world_size())
        manifest, mine = read_manifest(found.checkpoint), self.trainer.depends_on()
        for words in check_unchanged(manifest.depends_on, mine, allow_changed, found.checkpoint):
            self.screen.warning(f"{words}, as --allow-changed says it may")
        return manifest.step

    def rehearse(self) -> None:
        """Do everything that a training does before its first step, refusals included, and end there."""
        self.trainer.add_callback(_StopBeforeFirstStep())
        with self.screen.training(), suppress(_ReadyToTrainError):
            self.trainer.train()
        first: Any = islice(iter(cast(Any, self.trainer.train_dataset)), PREVIEWED)
        tokenizer, apart, classes = self.data.tokenizer, self.data.targets_apart, tuple(self.data.classes)
        self.screen.preview([parts_of(tokenizer, example, apart, classes) for example in first])

    def evaluate(self, prefix: str, split: Dataset | None = None) -> dict[str, float]:
        """Evaluate on a split, by default the test data or, without them, the validation data."""
        with refusing_options(self.recipe):
            return evaluations.evaluate(self.trainer, self.data, prefix, self.screen, split)

    def generate(self) -> Generation | None:
        """Let the model answer held-out prompts, where the recipe asks for that."""
        return evaluations.generation(self.recipe, self.data, self.trainer, self.screen)

    def check_metric(self, found: Mapping[str, float]) -> None:
        """Refuse a metric that the run does not have, once an evaluation has shown which it has.

        Raises:
            UserError: With the metrics that it has.
        """
        if self.data.metric not in found:
            raise UserError(
                f"evaluate.metric: this run has no metric {self.data.metric}; it has {', '.join(found)}."
                f"{closest(self.data.metric, found)}"
            )
        name = str(self.trainer.args.metric_for_best_model or "loss").removeprefix("eval_")
        if name not in found:
            raise UserError(
                f"training.trainer.metric_for_best_model: a run has no metric {name}; it has {', '.join(found)}."
                f"{closest(name, found)}"
            )

    def failure(self, plan: RankPlan) -> str | None:
        """Say why the training has failed, and what to do, where more than half of its steps were skipped."""
        bad, steps = plan.provenance["bad_steps"], plan.provenance["steps"]
        if 2 * bad <= steps:
            return None
        return (
            f"the training failed: {bad} of {steps} steps were skipped because their gradients were not finite, and "
            f"more than half is too many; {self.screen.cure_of_divergence(self.recipe.training.learning_rate)}"
        )


class _ReadyToTrainError(Exception):
    """Ends a rehearsal: all checks before the first step have passed."""


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
    assert isinstance(data.train, Dataset)
    steps = search_steps(recipe, data.packed(data.train))
    parts = replace(data, train=train, validation=held_out, test=None)
    stage = _prepare(
        shortened(recipe, steps), parts, folder.search, screen, make_method(recipe.method, held_out), steps
    )
    stage.trainer.depends_on = depends_on(recipe, data, stage.model)
    screen.start(recipe, data, stage.model, steps)
    screen.search(steps, len(cast(Dataset, train)), len(held_out))
    return stage


def prepare_training(
    recipe: Recipe,
    data: TaskData,
    folder: RunFolder,
    screen: Screen,
    after_search: bool,
    adapt: Callable[[PreTrainedModel, Recipe], PeftModel] = add_adapter,
) -> Stage:
    """Load and check everything to train the adapter that is exported, and show it; `adapt` adds the adapter."""
    train, held_out = method_data(recipe.method, data, recipe.training.seed)
    steps = total_steps(recipe, data.packed(train) if isinstance(train, Dataset) else None)
    method = make_method(recipe.method, held_out)
    stage = _prepare(recipe, replace(data, train=train), folder, screen, method, steps, adapt)
    stage.trainer.depends_on = depends_on(recipe, data, stage.model)
    if after_search:
        screen.retraining(steps, length_of(train))
    else:
        screen.start(recipe, data, stage.model, steps)
    wait_for_final_ranks(recipe, stage.trainer, stage.allocation, screen)
    return stage


def prepare_recovery(
    recipe: Recipe, plan: Path, data: TaskData, folder: RunFolder, screen: Screen, steps: int, rate: float
) -> Stage:
    """Load and check everything to continue the training of an adapter for some steps, at the ranks of a plan.

    The highest learning rate is the recipe's times `rate`. The adapter is a fresh one: the caller writes into it the
    weights from which training starts.
    """
    recovering = shortened(retraining_recipe(recipe, plan), steps)
    alone = {"save_every": None, "compact": False, "warmup": RECOVERY_WARM_UP}
    alone["learning_rate"] = rate * recovering.training.learning_rate
    alone["trainer"] = without(recovering.training.trainer, TOLD_TO_OTHERS)
    recovering = recovering.model_copy(update={"training": recovering.training.model_copy(update=alone)})
    return _prepare(recovering, data, folder, screen, None, steps)


def retraining_recipe(recipe: Recipe, plan: Path) -> Recipe:
    """Return the recipe of a training after a search: plain LoRA at the ranks of a plan, on all training data."""
    plain = sections()[PLAIN_LORA](name=PLAIN_LORA)
    following = with_options(recipe, PEFT, without(recipe.lora.peft, PLANNED))
    return following.model_copy(update={"method": plain, "plan": str(plan.resolve())})


def shortened(recipe: Recipe, steps: int) -> Recipe:
    """Return the recipe of a search or a recovery of so many steps: nothing is evaluated meanwhile, or pushed."""
    trainer = without(recipe.training.trainer, OF_THE_EXPORTED_ALONE)
    settings = {"steps": steps, "epochs": None, "eval_every": None, "trainer": trainer}
    settings |= {"keep_best": False, "early_stopping": None}
    return recipe.model_copy(update={"training": recipe.training.model_copy(update=settings)})


def total_steps(recipe: Recipe, examples: int | None) -> int:
    """Optimizer steps of a run, counted as the Trainer does: every process takes its share of the batches.

    Args:
        recipe: The recipe.
        examples: Rows to train on; None for a stream, whose recipe sets the number of steps.
    """
    training = recipe.training
    if training.steps is not None:
        return training.steps
    assert examples is not None
    whole = math.floor if training.trainer.get("dataloader_drop_last") else math.ceil
    shared = (training.trainer.get("accelerator_config") or {}).get("split_batches")  # a batch is for all processes
    batches = whole(whole(examples / training.batch_size) / (1 if shared else processes.world_size()))
    return math.ceil((training.epochs or 1) * max(1, math.ceil(batches / training.accumulation)))


def search_steps(recipe: Recipe, examples: int) -> int:
    """Optimizer steps of a search.

    Args:
        recipe: The recipe.
        examples: Training examples before a part is held out.
    """
    length: float = recipe.method.search
    return length if isinstance(length, int) else max(1, round(length * total_steps(recipe, examples)))


def _prepare(
    recipe: Recipe,
    data: TaskData,
    folder: RunFolder,
    screen: Screen,
    method: Method | None,
    steps: int,
    adapt: Callable[[PreTrainedModel, Recipe], PeftModel] = add_adapter,
) -> Stage:
    """Build adapter and trainer; ranks are allocated by a callback, and without a method a guard skips bad steps."""
    check_precision(recipe, data.model)
    check_warmup(recipe, steps)
    model = adapt(data.model, recipe)
    key = "lora.target_modules" if recipe.plan is None else "plan"
    check_output_layer(recipe.task, model, key, "leave it out, or train it in full with lora.modules_to_save")
    allocation, compact = None, recipe.training.compact
    if method is not None:
        provenance = {"base_model": data.model.name_or_path, "seed": recipe.training.seed}
        allocation = RankAllocation(method, trace=folder.trace, provenance=provenance, compact=compact)
    elif compact and recipe.method.name == PLAIN_LORA:
        raise UserError("training.compact: plain LoRA closes no ranks that could leave memory; remove it")
    guard = SkipBadSteps() if allocation is None else None
    first: TrainerCallback = Agreement() if allocation is None else allocation
    callbacks = [first, *best_callbacks(recipe), screen.progress(allocation)]
    trainer = build_trainer(recipe, data, model, folder, train_dataset=data.train, guard=guard, callbacks=callbacks)
    model = cast(PeftModel, trainer.model)
    refuse_engines(trainer.args)
    if under_fsdp2(trainer) and recipe.evaluate.generate is not None:
        raise UserError(
            "evaluate.generate: one process writes the answers, and of a base model that FSDP2 shards it has a part; "
            "remove it, and let loralloc chat RUN answer"
        )
    checks = guard.checks if allocation is None else allocation.run.checks  # type: ignore[union-attr]
    checks.say, checks.say_every = screen.warning, recipe.training.log_every
    if allocation is not None:
        allocation.run.begin(steps)
    return Stage(recipe, folder, data, model, trainer, allocation, steps, screen)
