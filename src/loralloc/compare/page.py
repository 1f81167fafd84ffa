"""The page of a comparison, and what stands beside it: `compare.html`, `.csv`, `.json`, `figures/*.png`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from loralloc._version import __version__
from loralloc.compare import figures, tables
from loralloc.compare.fairness import fairness, notes
from loralloc.compare.folder import CompareFolder
from loralloc.compare.grid import Point, Shapes, section_of, tuning_seeds
from loralloc.compare.record import json_text
from loralloc.compare.results import Entry, Row, baseline_of, criterion, entries, paired, rows_have_losses
from loralloc.compare.statistics import differences
from loralloc.compare.verdict import Compared, verdict, with_gaps
from loralloc.files import write_atomically
from loralloc.recipe.schema import Recipe
from loralloc.report.charts import Chart
from loralloc.report.drawing import png, report_settings, svg
from loralloc.report.page import templates
from loralloc.report.palette import theme_colours
from loralloc.report.tables import Table
from loralloc.tasks.spec import TASKS


@dataclass(frozen=True)
class Part:
    """What the page shows for one budget."""

    point: Point
    verdict: str
    baseline: Entry
    compared: Sequence[Compared]
    results: Table
    costs: Table
    limit: float
    by_then: Table | None
    charts: list[Chart]


def write_page(folder: CompareFolder, recipe: Recipe, shapes: Shapes, rows: Sequence[Row]) -> str:
    """Write the page of a comparison, its tables and its figures; failed runs are listed.

    Args:
        folder: Its folder.
        recipe: Its recipe.
        shapes: Shapes of its model and data.
        rows: The results of its runs.

    Returns:
        The verdict.
    """
    found = entries(rows, criterion(recipe), tuning_seeds(recipe))
    with report_settings():
        points = dict.fromkeys(entry.point for entry in found)
        parts = [_part(point, found, recipe, shapes, _pending(point, rows)) for point in points]
        drawn = [chart for part in parts for chart in part.charts]
        pictures = {chart.name: svg(chart.figure, chart.name, chart.heading) for chart in drawn}
        for old in folder.figures.glob("*.png"):
            old.unlink()
        for chart in drawn:
            png(chart.figure, folder.figures / f"{chart.name}.png")
    write_atomically(folder.table, tables.csv_text(rows, found, shapes.metric))
    numbers = [(part.point, part.verdict, part.baseline, part.compared) for part in parts]
    write_atomically(folder.record, json_text(numbers, shapes.metric))
    told = headline([(part.point.label, part.verdict) for part in parts])
    values = {
        "light": theme_colours("light"),
        "dark": theme_colours("dark"),
        "folder": folder.root.resolve().name,
        "task": TASKS[recipe.task].label,
        "model": recipe.model.name,
        "verdict": told,
        "parts": parts,
        "pictures": pictures,
        "notes": notes(recipe, shapes, rows, found),
        "fairness": fairness(recipe, shapes, found),
        "failures": tables.failure_table(rows),
        "runs": len(rows),
        "finished": sum(row.finished for row in rows),
        "seeds": len(section_of(recipe).seeds),
        "recipe": folder.recipe.read_text(encoding="utf-8"),
        "version": __version__,
    }
    write_atomically(folder.page, templates("loralloc.compare").get_template("compare.html").render(values))
    return told


def headline(verdicts: Sequence[tuple[str, str]]) -> str:
    """Return the verdict in one sentence, over all budgets."""
    if len(verdicts) == 1:
        text = verdicts[0][1]
        return f"{text[:1].upper()}{text[1:]}."
    text = "; ".join(f"at {label}, {told}" for label, told in verdicts)
    return f"A{text[1:]}."


def compare_entries(found: Iterable[Entry], point: Point) -> list[Compared]:
    """Compare every contender at a budget with plain LoRA."""
    here = [entry for entry in found if entry.point == point]
    baseline = baseline_of(here, point)
    others = [(entry, paired(entry, baseline)) for entry in here if entry is not baseline]
    known = iter(differences([table for _, table in others if table is not None]))
    return [Compared(entry, None if table is None else next(known)) for entry, table in others]


def _pending(point: Point, rows: Iterable[Row]) -> int:
    """Runs at a budget that the next call repeats."""
    return sum(row.pending for row in rows if row.cell.point == point)


def _part(point: Point, found: Sequence[Entry], recipe: Recipe, shapes: Shapes, pending: int) -> Part:
    here = [entry for entry in found if entry.point == point]
    baseline, compared = baseline_of(here, point), compare_entries(here, point)
    limit, by_then = tables.equal_time(here)
    return Part(
        point,
        with_gaps(verdict(compared, baseline.chosen.row_loss, section_of(recipe).margin), baseline, pending),
        baseline,
        compared,
        tables.result_table(compared, baseline, shapes.metric, "validation" if shapes.test is None else "test"),
        tables.cost_table(here),
        limit,
        by_then,
        _charts(point, here, compared, limit, criterion(recipe)),
    )


def _charts(point: Point, here: Sequence[Entry], compared: Sequence[Compared], limit: float, by: str) -> list[Chart]:
    lines, charts = figures.lines(here), []
    if any(one.difference is not None for one in compared):
        charts.append(
            Chart(
                f"{point.slug}-differences",
                "Difference to plain LoRA",
                f"Paired by {'seed and row' if rows_have_losses(here) else 'seed'}. Thick: 95 %. Thin: all of them "
                "together.",
                figures.difference_figure(compared),
            )
        )
    if len(here[0].trials) > 1:
        charts.append(
            Chart(
                f"{point.slug}-learning-rates",
                "Learning rates",
                "On the validation data, mean over the seeds that try every rate. The dot is the rate chosen; in a "
                "ring, not all runs have a result. What diverges leaves the picture.",
                figures.rate_figure(here, by, lines),
            )
        )
    if any(len(figures.mean_course(entry)) > 1 for entry in here):
        charts.append(
            Chart(
                f"{point.slug}-cost",
                "Loss over processor time",
                "At the chosen rates, mean over the seeds. At the dashed line the cheapest had ended.",
                figures.cost_figure(here, limit, lines),
            )
        )
    return charts
