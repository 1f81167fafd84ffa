"""What `loralloc train` does, step by step."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from datasets import Dataset
from peft import PeftModel

from loralloc._version import __version__
from loralloc.cli import terminal
from loralloc.cli.build import add_adapter, method_data, method_of, task_data, training_arguments
from loralloc.cli.folder import RunFolder
from loralloc.config import Recipe
from loralloc.errors import UserError
from loralloc.export import Export, export_adapter
from loralloc.gating import plain_sites
from loralloc.methods.base import Method
from loralloc.plan import ModuleRank, RankPlan
from loralloc.report import write_report
from loralloc.tasks.base import TaskData
from loralloc.training.callback import RankAllocation
from loralloc.training.checkpoint import newest_complete
from loralloc.training.run import AllocationRun
from loralloc.training.trainer import PlainTrainer


@dataclass(frozen=True)
class Outcome:
    """What a run produced.

    Attributes:
        folder: The run folder.
        plan: The rank plan.
        metrics: The content of metrics.json.
        export: The exported adapter.
    """

    folder: RunFolder
    plan: RankPlan
    metrics: Mapping[str, Any]
    export: Export


def run(recipe: Recipe, resume: bool = False, start_over: bool = False) -> Outcome:
    """Train, allocate, export, evaluate and report one recipe.

    Everything is loaded and checked before anything is written or an earlier run is replaced.
    """
    terminal.quiet_libraries()
    folder = RunFolder.resume(recipe) if resume else RunFolder.for_new_run(recipe, start_over)
    data = task_data(recipe)
    model = add_adapter(data.model, recipe)
    terminal.show_start(recipe, data, model)
    train, held = method_data(recipe.method, data, recipe.training.seed)
    trainer, allocation = make_trainer(
        recipe, replace(data, train=train), model, folder, method_of(recipe.method, held)
    )
    steps = total_steps(recipe, len(train))
    if allocation is not None:
        allocation.run.begin(steps)
    if not resume:
        folder.create(recipe)
    untrained = evaluate(trainer, data, "untrained")[data.metric]
    checkpoint = newest_complete(folder.checkpoints, before=steps) if resume else None
    with terminal.progress_bar():
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    seconds = trainer.train_seconds
    plan = allocation.plan if allocation is not None else _constant_plan(recipe, data, model, folder, trainer)
    assert plan is not None
    plan.save(folder.plan)
    data.model.config.save_pretrained(folder.model)
    data.tokenizer.save_pretrained(folder.model)
    try:
        export = export_adapter(model, folder.adapter)
    except RuntimeError as error:
        raise UserError(
            f"the run ended without an adapter: {error}; if the loss diverged, lower the learning rate"
        ) from error
    metrics = _final_metrics(recipe, data, trainer, plan, export, untrained, seconds)
    folder.write_json(folder.metrics, metrics)
    report = write_report(folder.root)
    terminal.show_outcome(folder, plan, metrics, export, report)
    return Outcome(folder, plan, metrics, export)


def show_plan(recipe: Recipe) -> None:
    """Load everything and show budget and schedule; train nothing, write nothing."""
    terminal.quiet_libraries()
    data = task_data(recipe)
    model = add_adapter(data.model, recipe)
    terminal.show_start(recipe, data, model)
    train, held = method_data(recipe.method, data, recipe.training.seed)
    method = method_of(recipe.method, held)
    if method is not None:
        allocation = AllocationRun(model, method)
        allocation.begin(total_steps(recipe, len(train)))
        terminal.show_schedule(allocation)


def total_steps(recipe: Recipe, examples: int) -> int:
    """Optimizer steps of a run, counted as the Trainer does."""
    if recipe.training.steps is not None:
        return recipe.training.steps
    batches = math.ceil(examples / recipe.training.batch_size)
    return math.ceil((recipe.training.epochs or 1) * max(1, math.ceil(batches / recipe.training.accumulation)))


def make_trainer(
    recipe: Recipe, data: TaskData, model: PeftModel, folder: RunFolder, method: Method | None
) -> tuple[PlainTrainer, RankAllocation | None]:
    """Build the trainer, with the allocation as a callback."""
    allocation = None
    if method is not None:
        provenance = {"base_model": data.model.name_or_path, "seed": recipe.training.seed}
        allocation = RankAllocation(method, trace=folder.trace, provenance=provenance, compact=recipe.training.compact)
    callbacks = [callback for callback in (allocation, terminal.Progress(allocation)) if callback is not None]
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


def _final_metrics(
    recipe: Recipe,
    data: TaskData,
    trainer: PlainTrainer,
    plan: RankPlan,
    export: Export,
    untrained: float,
    seconds: float,
) -> dict[str, Any]:
    return {
        "task": recipe.task,
        "metric": data.metric,
        "greater_is_better": data.greater_is_better,
        "validation": evaluate(trainer, data, "eval", data.validation),
        "test": None if data.test is None else evaluate(trainer, data, "test", data.test),
        "reference": {**data.reference, "untrained": untrained},
        "train_seconds": round(seconds, 1),
        "total_steps": trainer.state.max_steps,
        "final_ranks": plan.total_rank,
        "final_parameters": plan.parameters,
        "adapter_check": export.difference,
    }


def _constant_plan(
    recipe: Recipe, data: TaskData, model: PeftModel, folder: RunFolder, trainer: PlainTrainer
) -> RankPlan:
    """The plan of a run without allocation: every rank as it started."""
    modules = {}
    for name, layer, adapter in plain_sites(model):
        rank, inputs = layer.lora_A[adapter].weight.shape
        outputs = layer.lora_B[adapter].weight.shape[0]
        modules[name] = ModuleRank(rank, rank, inputs, outputs, float(layer.scaling[adapter]))
    steps = trainer.state.global_step
    provenance = {
        "loralloc": __version__,
        "base_model": data.model.name_or_path,
        "seed": recipe.training.seed,
        "total_steps": steps,
        "steps": steps,
    }
    plan = RankPlan(recipe.method.name, modules, provenance=provenance)
    ranks = list(plan.ranks.values())
    sizes = {"in": [m.inputs for m in modules.values()], "out": [m.outputs for m in modules.values()]}
    start = {"event": "start", "step": 0, "total_steps": steps, "sites": list(modules), **sizes, "ranks": ranks}
    finish = {"event": "finish", "step": steps, "ranks": ranks, "parameters": plan.parameters}
    folder.trace.write_text("".join(json.dumps(event) + "\n" for event in (start, finish)), encoding="utf-8")
    return plan
