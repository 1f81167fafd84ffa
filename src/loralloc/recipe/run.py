"""What a run does, from a recipe to an exported adapter and a report."""

from __future__ import annotations

import inspect
import json
import math
import shutil
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, cast

from datasets import Dataset
from huggingface_hub import HfApi

from loralloc import trace
from loralloc._version import __version__
from loralloc.adapter.export import Export, export_adapter, write_card
from loralloc.adapter.hub import exported_files, upload
from loralloc.errors import UserError
from loralloc.files import disk_is_full, file_is_too_large, in_shell
from loralloc.plain_lora import plain_sites
from loralloc.plan import ModuleRank, RankPlan
from loralloc.quantized import leave_memory
from loralloc.recipe import evaluations, stages
from loralloc.recipe.card import card_facts
from loralloc.recipe.changes import check_unchanged, in_words, split_changes
from loralloc.recipe.cuts import evaluate_cuts
from loralloc.recipe.from_recipe import task_data
from loralloc.recipe.going_on import speaking_of_a_full_disk
from loralloc.recipe.lock import locked
from loralloc.recipe.outcome import Outcome
from loralloc.recipe.passthrough import TOLD_TO_OTHERS, TRAINER, with_options, without
from loralloc.recipe.run_folder import RunFolder
from loralloc.recipe.schema import Recipe
from loralloc.recipe.screen import Screen
from loralloc.recipe.stages import Stage
from loralloc.recipe.trial import check_values
from loralloc.report import write_report
from loralloc.tasks.base import TaskData, length_of
from loralloc.tasks.generation import Generation
from loralloc.tasks.quantization import stored_config
from loralloc.training import processes
from loralloc.training.engines import under_fsdp2
from loralloc.training.trainer import RunTrainer


def run(
    recipe: Recipe,
    resume: bool = False,
    start_over: bool = False,
    untrained: float | None = None,
    screen: Screen | None = None,
    report: bool = True,
    allow_changed: Collection[str] = (),
) -> Outcome:
    """Train, allocate, export, evaluate and report one recipe.

    Everything is loaded and checked, and the untrained model evaluated, before anything is written or an earlier run is
    replaced. A method that searches first (AutoLoRA) does so in RUN/search; what is trained afterwards is plain LoRA at
    the ranks that were found.
    Where a launcher has started several processes, all of them train, and the first one writes.

    Args:
        recipe: The recipe.
        resume: Continue from the newest whole checkpoint; for a finished run, write the report if it is missing.
        start_over: Replace an earlier run.
        untrained: The metric before training, if it is known, or NaN if it is not to be; None measures it, and lets
            the untrained model answer where the recipe asks for answers.
        screen: Shows what happens; None shows nothing.
        report: Whether to write the report page now; it can be written later.
        allow_changed: What may differ from the run that is resumed, of `changes.ALLOWED`.

    Raises:
        UserError: The recipe, its data or its folder do not allow the run, or the disk is full.
    """
    screen = screen or Screen()
    processes.join()
    with processes.one_voice(), ExitStack() as stack, speaking_of_a_full_disk(recipe):
        with processes.together():
            check_values(recipe)
            folder = _open_folder(recipe, resume, start_over)
        processes.on_main(stack.enter_context, locked(folder.root))
        with processes.together():
            _open_folder(recipe, resume, start_over)  # somebody may have finished there meanwhile
        if resume and folder.metrics.is_file():
            return _finish(folder, screen)
        return _run(recipe, folder, resume, untrained, screen, report, allow_changed)


def _finish(folder: RunFolder, screen: Screen) -> Outcome:
    """Write the missing report page of a finished run."""
    processes.on_main(write_report, folder.root)
    screen.note(f"the run had finished; what was missing is written now: {folder.report}")
    metrics = json.loads(folder.metrics.read_text(encoding="utf-8"))
    return Outcome(folder, RankPlan.load(folder.plan), metrics, None)


def _run(
    recipe: Recipe,
    folder: RunFolder,
    resume: bool,
    untrained: float | None,
    screen: Screen,
    report: bool,
    allow_changed: Collection[str],
) -> Outcome:
    if recipe.compare is not None:
        screen.note(f"the section compare is for loralloc compare; this trains {recipe.method.name} alone")
    with processes.together():
        data = task_data(recipe)
    if resume:
        processes.on_main(_go_on, folder, recipe, screen)
    search_plan, continues, start = None, resume, None
    if stages.searches(recipe):
        continues = resume and folder.search.plan.is_file()  # else the training begins in this process
        search_plan, data, start = _search(recipe, data, folder, resume, untrained, screen, allow_changed)
    with processes.together():
        trained_recipe = recipe if search_plan is None else stages.retraining_recipe(recipe, folder.search.plan)
        stage = stages.prepare_training(trained_recipe, data, folder, screen, after_search=search_plan is not None)
    if continues and search_plan is not None:
        processes.on_main(_check_search, folder.search, stage, allow_changed)
    checkpoint = stage.checkpoint(allow_changed) if continues else None
    start = start or _look_at_untrained(stage, data, untrained)
    if not resume and search_plan is None:
        processes.on_main(folder.create, recipe)  # nothing but the training itself can fail from here on
    stage.train(checkpoint)
    seconds, plan = stage.trainer.train_seconds, plan_of(stage)
    if search_plan is not None:
        plan = _combined(search_plan, plan)
        processes.on_main(shutil.copyfile, folder.search.trace, folder.trace)
    elif stage.allocation is None:
        processes.on_main(_write_constant_trace, folder, plan, stage.trainer)
    if under_fsdp2(stage.trainer):  # all processes compute the export's check together
        export = _write_adapter(folder, plan, stage)
    else:
        export = processes.on_main(_write_adapter, folder, plan, stage)
    metrics = final_metrics(stage, plan, start.metric, seconds)
    if (after := stage.generate()) is not None:
        metrics["generation"] = after.record(start.answers)
    if export is not None:
        metrics |= {"adapter_check": export.difference, "adapter_check_allowed": export.allowed}
        if search_plan is not None:
            metrics["search"] = json.loads(folder.search.metrics.read_text(encoding="utf-8"))
        write_card(stage.model, export, folder.adapter, card_facts(recipe, data, plan, metrics))
        folder.write_json(folder.metrics, metrics)
        if report:
            write_report(folder.root)
        _push(stage, folder, screen)
    outcome = Outcome(folder, plan, metrics, export)
    screen.outcome(outcome)
    return outcome


def _push(stage: Stage, folder: RunFolder, screen: Screen) -> None:
    """Push the exported adapter to the Hub if the recipe says so; a failure is a warning and does not end the run."""
    arguments, repository = stage.trainer.args, stage.trainer.hub_model_id
    if not arguments.push_to_hub:
        return
    try:
        files, api = exported_files(folder.adapter), HfApi(token=arguments.hub_token)
        upload(api, folder.adapter, str(repository), files, arguments.hub_revision)
    except UserError as error:
        screen.warning(f"{error}; loralloc export {in_shell(folder.root)} --push {repository} pushes the adapter")


def rehearse(recipe: Recipe, resume: bool = False, start_over: bool = False, screen: Screen | None = None) -> None:
    """Do all that a run does before its first step; train nothing, write nothing.

    Raises:
        UserError: The run would be refused.
    """
    screen = screen or Screen()
    processes.join()
    with processes.one_voice(), TemporaryDirectory(prefix="loralloc-") as scratch:
        check_values(recipe)
        _open_folder(recipe, resume, start_over)
        recipe = with_options(recipe, TRAINER, without(recipe.training.trainer, TOLD_TO_OTHERS))
        folder, data = RunFolder(Path(scratch)), task_data(recipe)
        if searches := stages.searches(recipe):
            stage = stages.prepare_search(recipe, data, folder, screen)
        else:
            stage = stages.prepare_training(recipe, data, folder, screen, after_search=False)
        _check_metric(stage, data)
        stage.rehearse()
        if searches:
            assert isinstance(data.train, Dataset)
            screen.retraining(stages.total_steps(recipe, data.packed(data.train)), len(data.train))


def _open_folder(recipe: Recipe, resume: bool, start_over: bool) -> RunFolder:
    return RunFolder.resume(recipe) if resume else RunFolder.for_new_run(recipe, start_over)


def _go_on(folder: RunFolder, recipe: Recipe, screen: Screen) -> None:
    """Show how the recipe differs from the run's, which it may, and store it in the folder."""
    _, changes = split_changes(folder.load_recipe(), recipe)
    if changes:
        screen.note(f"the recipe differs in keys that may change: {in_words(changes)}")
    folder.go_on(recipe)


class _Untrained(NamedTuple):
    """What is known of the model before anything is trained: its metric, and its answers if it has given any."""

    metric: float
    answers: Generation | None


def _look_at_untrained(stage: Stage, data: TaskData, known: float | None) -> _Untrained:
    """Evaluate the model of a stage on the held-out data of the run, and let it answer, unless its metric is known.

    Raises:
        UserError: The run does not have the metric of the recipe.
    """
    if known is not None and math.isnan(known):
        _check_metric(stage, data)
    if known is not None:
        return _Untrained(known, None)
    found = stage.evaluate("untrained", data.held_out)
    stage.check_metric(found)
    return _Untrained(found[data.metric], evaluations.generation(stage.recipe, data, stage.trainer, stage.screen))


def _check_metric(stage: Stage, data: TaskData) -> None:
    """Evaluate a batch of the held-out data, to learn which metrics the run will have.

    Raises:
        UserError: It will not have the metric of the recipe.
    """
    rows = range(min(len(data.held_out), 2 * stage.recipe.training.batch_size))
    stage.check_metric(stage.evaluate("batch", data.held_out.select(rows)))


def _search(
    recipe: Recipe,
    data: TaskData,
    folder: RunFolder,
    resume: bool,
    untrained: float | None,
    screen: Screen,
    allow_changed: Collection[str],
) -> tuple[RankPlan, TaskData, _Untrained | None]:
    """Search for the ranks, or read the plan of a finished search.

    Returns:
        The plan, the data with a fresh model, and what was found of the model before the search, if there was one.
    """
    with processes.together():
        if resume and folder.search.plan.is_file():
            return RankPlan.load(folder.search.plan), data, None
    with processes.together():
        stage = stages.prepare_search(recipe, data, folder, screen)
    start = _look_at_untrained(stage, data, untrained)
    if not resume:
        processes.on_main(folder.create, recipe)
    processes.on_main(folder.search.root.mkdir, exist_ok=True)
    stage.train(stage.checkpoint(allow_changed) if resume else None)
    plan = plan_of(stage)
    if (failure := stage.failure(plan)) is not None:
        raise UserError(failure)
    record = {"examples": length_of(stage.data.train), "held_out": len(stage.data.validation)}
    record |= {"steps": plan.provenance["steps"], "seconds": round(stage.trainer.train_seconds, 1)}
    record["processor_seconds"] = round(stage.trainer.processor_seconds, 2)
    processes.on_main(_write_search, folder.search, record, stage.trainer.depends_on, plan)
    with processes.together():
        return plan, _with_fresh_model(data), start


def _check_search(search: RunFolder, stage: Stage, allow_changed: Collection[str]) -> None:
    """Refuse to train at the ranks of a search with other data, another base model or other library versions."""
    known, mine = search.depends_on.is_file(), stage.trainer.depends_on()
    theirs = json.loads(search.depends_on.read_text(encoding="utf-8")) if known else {}
    alike = {kind: mine[kind] for kind in ("data", "base", "versions")}  # the recipe is the folder's, compared already
    for words in check_unchanged(theirs, alike, allow_changed, search.root):
        stage.screen.warning(f"{words}, as --allow-changed says it may")


def _write_search(
    folder: RunFolder, record: dict[str, Any], depends_on: Callable[[], Mapping[str, Any]], plan: RankPlan
) -> None:
    folder.write_json(folder.metrics, record)
    folder.write_json(folder.depends_on, dict(depends_on()))
    plan.save(folder.plan)  # last: it says that the search is over


def _with_fresh_model(data: TaskData) -> TaskData:
    """Return the same examples with the model as it was before a search; the searched model is freed first."""
    assert data.again is not None
    leave_memory(data.model)
    return replace(data, model=data.again())


def _combined(searched: RankPlan, trained: RankPlan) -> RankPlan:
    """The plan of a run with a search: ranks and settings of the search, steps of both stages."""
    steps = {key: searched.provenance[key] for key in ("total_steps", "steps", "bad_steps")}
    settings = searched.provenance["settings"]
    return replace(searched, provenance={**trained.provenance, "settings": settings, "search": steps})


def _write_adapter(folder: RunFolder, plan: RankPlan, stage: Stage) -> Export | None:
    """Write plan, adapter, and the files to load it with; the first process returns the export, others None.

    Raises:
        UserError: The training or the export failed; what was trained is kept, and the message says what to do.
    """
    data, model = stage.data, stage.model
    if processes.is_main():
        plan.save(folder.plan)
        stored_config(data.model).save_pretrained(folder.model)
        data.tokenizer.save_pretrained(folder.model)
        folder.keep_trained(model.save_pretrained)
    if (failure := stage.failure(plan)) is not None:
        raise UserError(f"{failure}; what was trained is kept in {folder.trained}")
    try:
        export = export_adapter(model, folder.adapter, batch=_sample(stage), tokenizer=data.tokenizer)
    except (RuntimeError, ValueError, OSError) as error:
        if disk_is_full(error) or file_is_too_large(error):
            raise
        if all(weight.isfinite().all() for weight in model.parameters() if weight.requires_grad):
            kept = f"what was trained is kept in {folder.trained}"
            cure = f"{kept}: loralloc export {in_shell(folder.root)} writes it from there"
        else:
            cure = "the loss diverged: lower the learning rate"
        raise UserError(f"the run ended without an adapter: {error}; {cure}") from error
    if not processes.is_main():
        return None
    folder.drop_trained()
    return export


def _sample(stage: Stage) -> dict[str, Any]:
    """A batch of two validation examples at most, with the keys that the model's forward takes."""
    trainer, rows = stage.trainer, cast(Dataset, stage.trainer.eval_dataset)
    # Evaluation examples may have columns for metrics alone, and packed training examples columns that these lack.
    known = cast(Any, trainer.train_dataset).column_names or rows.column_names
    columns = [name for name in rows.column_names if name in known]
    batch = trainer.data_collator([{key: rows[i][key] for key in columns} for i in range(min(2, len(rows)))])
    taken = inspect.signature(stage.model.get_base_model().forward).parameters
    return {key: value for key, value in batch.items() if key in taken}


def final_metrics(stage: Stage, plan: RankPlan, untrained: float, seconds: float) -> dict[str, Any]:
    """Evaluate a trained stage, write losses.json, and return the content of metrics.json.

    Args:
        stage: The stage.
        plan: Its plan.
        untrained: The metric before training.
        seconds: Duration of the training.
    """
    data = stage.data
    also = {name: stage.evaluate("also", examples) for name, examples in data.also.items()}
    cuts = evaluate_cuts(stage)
    validation = stage.evaluate("eval", data.validation)
    test = None if data.test is None else stage.evaluate("test", data.test)
    _write_losses(stage)  # of the last evaluation: the test data or, without them, the validation data
    return {
        "task": stage.recipe.task,
        "metric": data.metric,
        "greater_is_better": data.greater_is_better,
        "validation": validation,
        "test": test,
        "also": also,
        "cuts": cuts,
        "reference": {**data.reference, "untrained": untrained},
        "classes": dict(data.classes),
        "train_seconds": round(seconds, 1),
        "processor_seconds": round(stage.trainer.processor_seconds, 2),
        "processes": processes.world_size(),
        "total_steps": stage.trainer.state.global_step,
        **_stopped(stage),
        "bad_steps": plan.provenance["bad_steps"],
        "final_ranks": plan.total_rank,
        "final_parameters": plan.parameters,
    }


def _stopped(stage: Stage) -> dict[str, int]:
    """The planned steps of a run that ended early, and the step of the exported state if it is the best evaluated."""
    state, kept = stage.trainer.state, {}
    if state.global_step < state.max_steps:
        kept["planned_steps"] = state.max_steps
        stage.screen.note(f"stopped after {state.global_step:,} of {state.max_steps:,} steps: no better evaluation")
    if stage.trainer.args.load_best_model_at_end and state.best_global_step:
        kept["best_step"] = state.best_global_step
        stage.screen.note(f"the best evaluation was that of step {state.best_global_step:,}: this state is exported")
    return kept


def _write_losses(stage: Stage) -> None:
    """Write the loss of every example of the last evaluation, where the task has one."""
    data, evaluated = stage.data, stage.trainer.evaluated
    if data.example_losses is None or evaluated is None:
        return
    record = {"split": "validation" if data.test is None else "test", "losses": data.example_losses(evaluated).tolist()}
    processes.on_main(stage.folder.write_json, stage.folder.losses, record)


def plan_of(stage: Stage) -> RankPlan:
    """Return the plan of a trained stage; without an allocation every rank is as it started."""
    if stage.allocation is not None:
        assert stage.allocation.plan is not None
        return stage.allocation.plan
    recipe, trainer = stage.recipe, stage.trainer
    modules = {}
    for site in plain_sites(stage.model):
        (rank, inputs), outputs = site.A.shape, len(site.B)
        modules[site.name] = ModuleRank(rank, rank, inputs, outputs, site.scaling)
    steps = trainer.state.global_step
    assert trainer.guard is not None
    provenance = {
        "loralloc": __version__,
        "label": "plain LoRA",
        "base_model": stage.data.model.name_or_path,
        "seed": recipe.training.seed,
        "total_steps": steps,
        "steps": steps,
        "bad_steps": len(trainer.guard.steps),
    }
    return RankPlan(recipe.method.name, modules, provenance=provenance)


def _write_constant_trace(folder: RunFolder, plan: RankPlan, trainer: RunTrainer) -> None:
    """The trace of a run without allocation."""
    assert trainer.guard is not None
    modules, ranks, steps = plan.modules.values(), list(plan.ranks.values()), plan.provenance["steps"]
    sizes = [(module.inputs, module.outputs) for module in modules]
    start = trace.start_event(plan.provenance["label"], list(plan.modules), sizes, ranks, steps)
    skipped = [trace.bad_step_event(step) for step in trainer.guard.steps]
    folder.trace.unlink(missing_ok=True)
    trace.append(folder.trace, start, *skipped, trace.finish_event(steps, ranks, plan.parameters))
