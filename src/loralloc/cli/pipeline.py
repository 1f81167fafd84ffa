"""What `loralloc train` does, step by step."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peft import PeftModel

from loralloc import trace
from loralloc._version import __version__
from loralloc.cli import search, stage, terminal
from loralloc.cli.build import add_adapter, method_data, task_data
from loralloc.cli.card import card_facts
from loralloc.cli.folder import RunFolder
from loralloc.config import Recipe
from loralloc.errors import UserError
from loralloc.export import Export, export_adapter, write_card
from loralloc.gating import plain_sites
from loralloc.methods.registry import make_method
from loralloc.plan import ModuleRank, RankPlan
from loralloc.report import write_report
from loralloc.tasks.base import TaskData
from loralloc.training import processes
from loralloc.training.trainer import PlainTrainer


@dataclass(frozen=True)
class Outcome:
    """What a run produced.

    Attributes:
        folder: The run folder.
        plan: The rank plan.
        metrics: The content of metrics.json.
        export: The exported adapter; None in processes other than the first, which write nothing.
    """

    folder: RunFolder
    plan: RankPlan
    metrics: Mapping[str, Any]
    export: Export | None


def run(recipe: Recipe, resume: bool = False, start_over: bool = False, untrained: float | None = None) -> Outcome:
    """Train, allocate, export, evaluate and report one recipe.

    Everything is loaded and checked before anything is written or an earlier run is replaced. A method that searches
    first (AutoLoRA) does so in RUN/search; what is trained afterwards is plain LoRA at the ranks that were found.
    Where a launcher has started several processes, all of them train, and the first one writes.

    Args:
        recipe: The recipe.
        resume: Continue from the newest complete checkpoint.
        start_over: Replace an earlier run.
        untrained: The metric before training, where it is known.
    """
    terminal.quiet_libraries()
    with processes.one_voice():
        return _run(recipe, resume, start_over, untrained)


def _run(recipe: Recipe, resume: bool, start_over: bool, untrained: float | None) -> Outcome:
    with processes.together():
        folder = RunFolder.resume(recipe) if resume else RunFolder.for_new_run(recipe, start_over)
    searched = search.find_plan(recipe, folder, resume) if search.searches(recipe) else None
    trained = recipe if searched is None else search.retraining(recipe, folder)
    with processes.together():
        data, model, trainer, allocation, steps = _prepare(trained, folder, searched is not None)
    if not resume and searched is None:
        processes.on_main(folder.create, recipe)
    if untrained is None:
        untrained = stage.evaluate(trainer, data, "untrained")[data.metric]
    stage.train(trainer, folder.checkpoints, steps, resume)
    seconds = trainer.train_seconds
    plan = allocation.plan if allocation is not None else _plan_without_allocation(trained, data, model, trainer)
    assert plan is not None
    if searched is not None:
        plan = search.combined(searched, plan)
        processes.on_main(shutil.copyfile, folder.search.trace, folder.trace)
    elif allocation is None:
        processes.on_main(_write_constant_trace, folder, plan, trainer)
    export = processes.on_main(_write_adapter, folder, plan, data, model, stage.failure(trained, plan))
    metrics = _final_metrics(trained, data, trainer, plan, untrained, seconds)
    if export is not None:
        metrics |= {"adapter_check": export.difference, "adapter_check_allowed": export.allowed}
        if searched is not None:
            metrics["search"] = search.metrics(folder)
        write_card(model, export, folder.adapter, card_facts(recipe, data, plan, metrics))
        folder.write_json(folder.metrics, metrics)
        report = write_report(folder.root)
        terminal.show_outcome(folder, plan, metrics, export, report)
    return Outcome(folder, plan, metrics, export)


def show_plan(recipe: Recipe, resume: bool = False, start_over: bool = False) -> None:
    """Do all that a run does before its first step, and show budget and schedule; train nothing, write nothing.

    Raises:
        UserError: The run would be refused.
    """
    terminal.quiet_libraries()
    with processes.one_voice(), TemporaryDirectory(prefix="loralloc-") as scratch:
        _ = RunFolder.resume(recipe) if resume else RunFolder.for_new_run(recipe, start_over)
        folder = RunFolder(Path(scratch))
        if search.searches(recipe):
            searching = search.prepare(recipe, folder)
            stage.rehearse(searching.trainer)
            examples = len(searching.data.train)
            terminal.show_retraining(stage.total_steps(recipe, examples), examples)
        else:
            stage.rehearse(_prepare(recipe, folder).trainer)


def _prepare(recipe: Recipe, folder: RunFolder, searched: bool = False) -> stage.Stage:
    """Load and check everything that a training needs, and show it."""
    data = task_data(recipe)
    model = add_adapter(data.model, recipe)
    train, held = method_data(recipe.method, data, recipe.training.seed)
    steps = stage.total_steps(recipe, len(train))
    if searched:
        terminal.show_retraining(steps, len(train))
    else:
        terminal.show_start(recipe, data, model)
        terminal.show_processes(recipe)
    seen = replace(data, train=train)
    trainer, allocation = stage.make_trainer(recipe, seen, model, folder, make_method(recipe.method, held))
    if allocation is not None:
        allocation.run.begin(steps)
    return stage.Stage(data, model, trainer, allocation, steps)


def _write_adapter(folder: RunFolder, plan: RankPlan, data: TaskData, model: PeftModel, failure: str | None) -> Export:
    """Write plan and adapter, and what else it takes to load it.

    Raises:
        UserError: The training or the export failed; what was trained is kept, and the message says what to do.
    """
    plan.save(folder.plan)
    data.model.config.save_pretrained(folder.model)
    data.tokenizer.save_pretrained(folder.model)
    folder.keep_trained(model.save_pretrained)
    if failure is not None:
        raise UserError(f"{failure}; what was trained is kept in {folder.trained}")
    try:
        rows = [data.validation[index] for index in range(min(2, len(data.validation)))]
        export = export_adapter(model, folder.adapter, batch=data.collator(rows), tokenizer=data.tokenizer)
    except (RuntimeError, ValueError, OSError) as error:
        if all(weight.isfinite().all() for weight in model.parameters() if weight.requires_grad):
            cure = f"what was trained is kept in {folder.trained}: loralloc export {folder.root} writes it from there"
        else:
            cure = "the loss diverged: lower the learning rate"
        raise UserError(f"the run ended without an adapter: {error}; {cure}") from error
    folder.drop_trained()
    return export


def _final_metrics(
    recipe: Recipe,
    data: TaskData,
    trainer: PlainTrainer,
    plan: RankPlan,
    untrained: float,
    seconds: float,
) -> dict[str, Any]:
    return {
        "task": recipe.task,
        "metric": data.metric,
        "greater_is_better": data.greater_is_better,
        "validation": stage.evaluate(trainer, data, "eval", data.validation),
        "test": None if data.test is None else stage.evaluate(trainer, data, "test", data.test),
        "reference": {**data.reference, "untrained": untrained},
        "classes": dict(data.classes),
        "train_seconds": round(seconds, 1),
        "processes": processes.world_size(),
        "total_steps": trainer.state.max_steps,
        "bad_steps": plan.provenance["bad_steps"],
        "final_ranks": plan.total_rank,
        "final_parameters": plan.parameters,
    }


def _plan_without_allocation(recipe: Recipe, data: TaskData, model: PeftModel, trainer: PlainTrainer) -> RankPlan:
    """The plan of a run without allocation: every rank as it started."""
    modules = {}
    for name, layer, adapter in plain_sites(model):
        rank, inputs = layer.lora_A[adapter].weight.shape
        outputs = layer.lora_B[adapter].weight.shape[0]
        modules[name] = ModuleRank(rank, rank, inputs, outputs, float(layer.scaling[adapter]))
    steps = trainer.state.global_step
    assert trainer.guard is not None
    provenance = {
        "loralloc": __version__,
        "base_model": data.model.name_or_path,
        "seed": recipe.training.seed,
        "total_steps": steps,
        "steps": steps,
        "bad_steps": len(trainer.guard.steps),
    }
    return RankPlan(recipe.method.name, modules, provenance=provenance)


def _write_constant_trace(folder: RunFolder, plan: RankPlan, trainer: PlainTrainer) -> None:
    """The trace of a run without allocation."""
    assert trainer.guard is not None
    modules, ranks, steps = plan.modules.values(), list(plan.ranks.values()), plan.provenance["steps"]
    start = trace.start_event(list(plan.modules), [(m.inputs, m.outputs) for m in modules], ranks, steps)
    skipped = [trace.bad_step_event(step) for step in trainer.guard.steps]
    folder.trace.unlink(missing_ok=True)
    trace.append(folder.trace, start, *skipped, trace.finish_event(steps, ranks, plan.parameters))
