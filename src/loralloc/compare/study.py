"""A comparison from beginning to end: check, measure, run what has not been run, judge, write the page."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from loralloc.compare.cells import check_rows_apart, comparable, make_cell, plan_cells, scale_of
from loralloc.compare.execute import Executor, Job
from loralloc.compare.folder import CompareFolder
from loralloc.compare.grid import Cell, Point, Shapes, plan_of, section_of, tuning_seeds
from loralloc.compare.measure import measure
from loralloc.compare.page import write_page
from loralloc.compare.results import Entry, Row, criterion, entries, read_row, winner
from loralloc.errors import UserError
from loralloc.files import write_atomically
from loralloc.methods.registry import PLAIN_LORA
from loralloc.plan import RankPlan
from loralloc.recipe.changes import lines_without
from loralloc.recipe.run_folder import PLACES
from loralloc.recipe.schema import Recipe, dump_recipe


@dataclass(frozen=True)
class Outcome:
    """The result of a comparison.

    Attributes:
        verdict: The verdict in one sentence.
        page: The file of the page.
        table: The CSV file with a row for every run.
    """

    verdict: str
    page: Path
    table: Path


class Watcher:
    """Gets the progress of a comparison and shows nothing; the command line has subclasses that show it."""

    def planned(self, cells: Sequence[Cell], kept: Sequence[Cell]) -> None:
        """The runs are planned; those in `kept` have been run before."""

    def started(self, name: str) -> None:
        """A run has begun."""

    def ended(self, name: str, row: Row, seconds: float) -> None:
        """A run has ended, `seconds` after its start."""


def compare(recipe: Recipe, executor: Executor, retry: bool, watcher: Watcher) -> Outcome:
    """Run the comparison that a recipe describes.

    An interrupted comparison continues: finished runs are kept.

    Args:
        recipe: The recipe.
        executor: Runs the cells.
        retry: Repeat also the runs that were refused or have diverged.
        watcher: Shows what happens.

    Raises:
        UserError: It cannot be compared, or the folder holds something else.
    """
    recipe = comparable(recipe)
    folder = CompareFolder.of(recipe)
    folder.check(recipe)
    shapes = measure(recipe)
    check_rows_apart(recipe, shapes)
    cells = plan_cells(recipe, shapes, folder.runs)
    with folder.locked():
        folder.check_unchanged(shapes.depends_on)
        folder.create(recipe, shapes.depends_on)

        def run(due: Sequence[Cell]) -> list[Row]:
            for cell in due:
                _check_kept(folder, cell)
            if due:
                _run(folder, due, executor, retry, section_of(recipe).threads, watcher)
            return [read_row(folder, cell) for cell in due]

        rows = _tuned(cells, run, recipe)
        found = entries(rows, criterion(recipe), tuning_seeds(recipe))
        rows += _tuned(_retrained(recipe, shapes, folder, found), run, recipe)
        return Outcome(write_page(folder, recipe, shapes, rows), folder.page, folder.table)


def _tuned(cells: Sequence[Cell], run: Callable[[Sequence[Cell]], list[Row]], recipe: Recipe) -> list[Row]:
    """Run the tuning seeds at every rate, then the other seeds at the rate chosen for each contender and budget.

    If no tuning run of a contender has a result, its rate is unknown, and the other seeds are not run.
    """
    tuning = tuning_seeds(recipe)
    rows = run([cell for cell in cells if cell.seed in tuning])
    chosen = {
        (entry.point, entry.contender, entry.chosen.learning_rate)
        for entry in entries(rows, criterion(recipe), tuning)
        if math.isfinite(entry.chosen.score)
    }
    others = [cell for cell in cells if cell.seed not in tuning]
    return rows + run([cell for cell in others if (cell.point, cell.contender, cell.learning_rate) in chosen])


def _check_kept(folder: CompareFolder, cell: Cell) -> None:
    """Refuse a run that was made with other settings."""
    run = folder.run(cell.name)
    if cell.recipe.plan is None and run.metrics.is_file() and run.is_run() and not run.holds(cell.recipe):
        raise UserError(
            f"{run.root} was run with other settings than this comparison has; delete the folder to run it again, or "
            "name another one for the comparison with --output"
        )


def _retrained(recipe: Recipe, shapes: Shapes, folder: CompareFolder, found: Sequence[Entry]) -> list[Cell]:
    """The runs of plain LoRA at the ranks of the best method, at every budget: each seed at the plan of that seed."""
    cells = []
    for point in dict.fromkeys(entry.point for entry in found):
        best = winner(found, point)
        if best is not None:
            cells += _plan_cells(recipe, shapes, folder, point, best)
    return cells


def _plan_cells(recipe: Recipe, shapes: Shapes, folder: CompareFolder, point: Point, best: Entry) -> list[Cell]:
    cells = []
    for rate in section_of(recipe).learning_rates or ():
        for row in best.chosen.finished:
            plan = _plan_to_train(folder, row.cell.name, scale_of(recipe, shapes))
            changes = {"method": {"name": PLAIN_LORA}, "plan": str(plan)}
            contender = plan_of(best.contender)
            cells.append(make_cell(recipe, shapes, point, contender, rate, row.cell.seed, changes, folder.runs))
    return cells


def _plan_to_train(folder: CompareFolder, name: str, scale: float) -> Path:
    """The file of the plan that a run has found, at the scale of all other runs: ALLoRA's own has scale 1."""
    path = folder.run(name).plan
    plan = RankPlan.load(path)
    if all(_rounded(module.scale) == _rounded(scale) for module in plan.modules.values()):
        return path
    modules = {name: replace(module, scale=scale) for name, module in plan.modules.items()}
    path = folder.scaled_plan(name)
    path.parent.mkdir(exist_ok=True)
    replace(plan, modules=modules).save(path)
    return path


def _run(
    folder: CompareFolder, cells: Sequence[Cell], executor: Executor, retry: bool, threads: int, watcher: Watcher
) -> None:
    """Run the cells that are due; a failure is recorded and does not stop the other runs."""
    by_name = {cell.name: cell for cell in cells}
    due = [cell for cell in cells if _is_due(folder, cell, retry)]
    watcher.planned(cells, [cell for cell in cells if cell not in due])
    begun: dict[str, float] = {}

    def started(name: str) -> None:
        begun[name] = time.perf_counter()
        watcher.started(name)

    for cell in due:
        if folder.run(cell.name).metrics.is_file():  # of another plan, of losses not finite, or half removed
            folder.run(cell.name).remove()
        folder.failure(cell.name).unlink(missing_ok=True)
        _write_recipe(folder.run_recipe(cell.name), _text(cell))
    for ended in executor.run([_job(folder, cell, threads) for cell in due], started):
        if ended.reason is not None:
            folder.fail(ended.name, ended.reason, final=ended.final)
        row = read_row(folder, by_name[ended.name])
        watcher.ended(ended.name, row, time.perf_counter() - begun[ended.name])


def _write_recipe(path: Path, text: str) -> None:
    """Write a run's recipe, unless the file has it: a run whose comparison was killed may hold a lock on the file."""
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_atomically(path, text)


def _text(cell: Cell) -> str:
    """The recipe of a run; for one from a plan also that plan, in a comment: the recipe only names its file."""
    planned = "" if cell.recipe.plan is None else f"# plan: {_planned(cell.recipe.plan)}\n"
    return dump_recipe(cell.recipe) + planned


def _settings(text: str) -> list[str]:
    """The lines of a run's recipe that decide how it ends: not where it lies."""
    return lines_without(text, PLACES)


def _planned(path: str | Path) -> dict[str, tuple[int, str]]:
    """The ranks above 0 in a plan, each with its scale."""
    modules = RankPlan.load(path).modules
    return {name: (module.rank, _rounded(module.scale)) for name, module in modules.items() if module.rank}


def _rounded(scale: float) -> str:
    """A scale to compare with others: they are quotients, which differ in their last digits."""
    return f"{scale:.6g}"


def _is_due(folder: CompareFolder, cell: Cell, retry: bool) -> bool:
    """Whether a run has to be made: it has no result, or one of other settings or another plan.

    A run that would fail again with the same settings is due only on `retry`, as is one whose losses are not finite.
    """
    run, recipe = folder.run(cell.name), folder.run_recipe(cell.name)
    if run.metrics.is_file() and run.holds(cell.recipe):
        if cell.recipe.plan is not None and _planned(run.plan) != _planned(cell.recipe.plan):
            return True
        return retry and not read_row(folder, cell).finished
    failed = folder.reason(cell.name)
    same = recipe.is_file() and _settings(recipe.read_text(encoding="utf-8")) == _settings(_text(cell))
    return retry or failed is None or not failed[1] or not same


def _job(folder: CompareFolder, cell: Cell, threads: int) -> Job:
    peer = cell.contender.id if cell.contender.kind == "peer" else None
    recipe, log = (str(path.absolute()) for path in (folder.run_recipe(cell.name), folder.log(cell.name)))
    return Job(cell.name, recipe, log, peer, threads, os.getcwd())
