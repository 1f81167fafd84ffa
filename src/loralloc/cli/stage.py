"""One training of `loralloc train`: the Trainer, with an allocation or without, resumed where it was interrupted."""

from __future__ import annotations

import math
from pathlib import Path

from datasets import Dataset
from peft import PeftModel

from loralloc.cli import terminal
from loralloc.cli.build import training_arguments
from loralloc.cli.folder import RunFolder
from loralloc.config import Recipe
from loralloc.errors import UserError
from loralloc.methods.base import Method
from loralloc.recipe_methods import LoRAConfigSection
from loralloc.tasks.base import TaskData
from loralloc.training import processes
from loralloc.training.callback import RankAllocation
from loralloc.training.checkpoint import check_processes, newest_complete
from loralloc.training.trainer import Agreement, PlainTrainer


def total_steps(recipe: Recipe, examples: int) -> int:
    """Optimizer steps of a run, counted as the Trainer does: every process takes its share of the batches."""
    if recipe.training.steps is not None:
        return recipe.training.steps
    batches = math.ceil(math.ceil(examples / recipe.training.batch_size) / processes.world_size())
    return math.ceil((recipe.training.epochs or 1) * max(1, math.ceil(batches / recipe.training.accumulation)))


def make_trainer(
    recipe: Recipe, data: TaskData, model: PeftModel, folder: RunFolder, method: Method | None
) -> tuple[PlainTrainer, RankAllocation | None]:
    """Build the trainer, with the allocation as a callback."""
    allocation, compact = None, recipe.training.compact
    if method is not None:
        provenance = {"base_model": data.model.name_or_path, "seed": recipe.training.seed}
        allocation = RankAllocation(method, trace=folder.trace, provenance=provenance, compact=compact)
    elif compact and isinstance(recipe.method, LoRAConfigSection):
        raise UserError("training.compact: plain LoRA closes no ranks that could leave memory; remove it")
    callbacks = [Agreement() if allocation is None else allocation, terminal.Progress(allocation)]
    trainer = PlainTrainer(
        model=model,
        args=training_arguments(recipe.training, folder.checkpoints),
        train_dataset=data.train,
        eval_dataset=data.validation,
        data_collator=data.collator,
        compute_metrics=data.compute_metrics,
        preprocess_logits_for_metrics=data.preprocess_logits,
        log=folder.log,
        callbacks=callbacks,
    )
    return trainer, allocation


def train(trainer: PlainTrainer, checkpoints: Path, steps: int, resume: bool) -> None:
    """Train, from the newest complete checkpoint when a run is resumed and has one."""
    checkpoint = newest_complete(checkpoints, before=steps) if resume else None
    if checkpoint is not None:
        check_processes(checkpoint, processes.world_size())
    with terminal.progress_bar():
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))


def evaluate(trainer: PlainTrainer, data: TaskData, prefix: str, split: Dataset | None = None) -> dict[str, float]:
    """Evaluate on a split, by default the test data or, without them, the validation data."""
    if split is None:
        split = data.validation if data.test is None else data.test
    found = trainer.evaluate(split, metric_key_prefix=prefix)  # type: ignore[arg-type]
    timing = ("_runtime", "_per_second", "_preparation_time")
    return {
        key.removeprefix(f"{prefix}_"): value
        for key, value in found.items()
        if not key.endswith(timing) and key != "epoch"
    }
