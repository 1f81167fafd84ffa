"""The heat map of the ranks, and the tables that unfold at the end of the page."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from statistics import mean
from typing import NamedTuple

from loralloc.files import leaves
from loralloc.plan import ModuleRank
from loralloc.report.figures import MOST_CELLS
from loralloc.report.grid import Grid
from loralloc.report.palette import step_of
from loralloc.report.run_record import RunRecord, mapping, number
from loralloc.report.wording import rounded

SHOWN_CLASSES = 100
"""Most classes listed one by one."""

Total = tuple[int, int]
"""Ranks of several modules, kept and at the start."""


class Table(NamedTuple):
    """A table of plain text; head and foot may be empty."""

    head: tuple[str, ...]
    rows: list[tuple[str, ...]]
    foot: tuple[str, ...] = ()


class Cell(NamedTuple):
    """A module in the heat map, with its step of the ramp."""

    name: str
    module: ModuleRank
    step: int


class Row(NamedTuple):
    """A layer of the heat map: a cell for each module type that it has."""

    layer: int
    cells: list[Cell | None]
    total: Total


@dataclass(frozen=True)
class HeatMap:
    """The final ranks: layers by module types.

    Attributes:
        types: Module types, one for each column.
        stacks: Rows by the stack of layers to which they belong.
        totals: The total of each column, and that of all columns last.
        others: Modules outside the layers.
    """

    types: tuple[str, ...]
    stacks: dict[str, list[Row]]
    totals: list[Total]
    others: list[Cell]


def heat_map(run: RunRecord, grid: Grid, highest: int) -> HeatMap | None:
    """Return the final ranks by layer and module type, with their totals, and what stands outside the layers.

    None for more than `MOST_CELLS` modules, which only a picture can show.
    """
    modules = run.plan.modules
    if len(modules) > MOST_CELLS:
        return None
    cells = {name: Cell(name, module, step_of(module.rank, highest)) for name, module in modules.items()}
    stacks: dict[str, list[Row]] = {stack: [] for stack in grid.stacks}
    for stack, layer in grid.rows:
        names = [grid.cells.get((stack, layer, module_type)) for module_type in grid.types]
        total = _total(modules[name] for name in names if name)
        stacks[stack].append(Row(layer, [cells[name] if name else None for name in names], total))
    columns = [grid.column(module_type) for module_type in grid.types]
    totals = [_total(modules[name] for name in names) for names in (*columns, grid.cells.values())]
    return HeatMap(grid.types, stacks, totals, [cells[name] for name in grid.others])


def _total(modules: Iterable[ModuleRank]) -> Total:
    modules = list(modules)
    return sum(module.rank for module in modules), sum(module.start for module in modules)


def type_means(run: RunRecord, grid: Grid) -> list[tuple[str, float]]:
    """Return the module types with their mean ranks, the highest first."""
    means = {kind: mean(run.plan.modules[name].rank for name in grid.column(kind)) for kind in grid.types}
    return sorted(means.items(), key=lambda item: -item[1])


def module_table(run: RunRecord) -> Table:
    """Return the modules with their ranks, shapes and parameters, and the totals; at most `MOST_CELLS` modules."""
    modules = run.plan.modules
    head = ("module", "rank", "start", "in", "out", "parameters")
    rows = [
        (name, f"{m.rank}", f"{m.start}", f"{m.inputs:,}", f"{m.outputs:,}", f"{m.parameters:,}")
        for name, m in islice(modules.items(), MOST_CELLS)
    ]
    if len(modules) > MOST_CELLS:
        rows.append((f"{len(modules) - MOST_CELLS:,} more, in ranks.json", "", "", "", "", ""))
    kept, start = _total(modules.values())
    return Table(head, rows, ("total", f"{kept:,}", f"{start:,}", "", "", f"{run.plan.parameters:,}"))


def metric_table(run: RunRecord) -> Table | None:
    """Return all values of metrics.json that were measured on data; None when there are none."""
    measured = {name: run.metrics.get(name) for name in ("validation", "test")} | mapping(run.metrics.get("also"))
    results = {name: values for name, found in measured.items() if (values := mapping(found))}
    if not results:
        return None
    names = dict.fromkeys(name for values in results.values() for name in values)
    rows = [
        (
            name.replace("_", " "),
            *(rounded(number(values[name])) if name in values else "\N{EN DASH}" for values in results.values()),
        )
        for name in names
    ]
    return Table(("metric", *results), rows)


def class_table(run: RunRecord) -> Table | None:
    """Return the classes with their training examples, the commonest first; None without classes."""
    if not run.classes:
        return None
    total = max(1, sum(run.classes.values()))
    ordered = sorted(run.classes.items(), key=lambda item: -item[1])
    rows = [
        (json.dumps(name, ensure_ascii=False), f"{examples:,}", f"{examples / total:.1%}")
        for name, examples in ordered[:SHOWN_CLASSES]
    ]
    rest = [examples for _, examples in ordered[SHOWN_CLASSES:]]
    foot = (f"{len(rest):,} more", f"{sum(rest):,}", "") if rest else ()
    return Table(("class", "training examples", "share"), rows, foot)


def provenance_table(run: RunRecord) -> Table | None:
    """Return what the plan says of its origin, settings one by one; None when it says nothing."""
    rows = [(name, str(value)) for name, value in leaves(run.plan.provenance)]
    return Table((), rows) if rows else None
