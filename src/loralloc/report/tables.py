"""The heat map of the ranks, and the tables that unfold at the end of the page."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from html import escape
from itertools import groupby
from typing import Any

from loralloc.plan import ModuleRank
from loralloc.report.grid import Grid
from loralloc.report.palette import step_of
from loralloc.report.run_record import RunRecord, number
from loralloc.report.wording import measure

SHOWN_CLASSES = 100
"""Most classes listed one by one."""


def heat_map(run: RunRecord, grid: Grid, top: int) -> str:
    """Return the final ranks as a table: layers by module types with their sums, and what stands outside the layers."""
    modules = run.plan.modules
    columns = "".join(f'<th scope="col">{_column_head(name)}</th>' for name in grid.types)
    body = []
    for stack, rows in groupby(grid.rows, key=lambda row: row[0]):
        if len(grid.stacks) > 1:
            body.append(f'<tr class="stack"><th colspan="{len(grid.types) + 2}">{_breakable(stack)}</th></tr>')
        body += [_row(run, grid, stack, layer, top) for _, layer in rows]
    tables = []
    if grid.rows:
        sums = "".join(_sum([modules[name] for name in grid.column(kind)]) for kind in grid.types)
        everything = _sum([modules[name] for name in grid.cells.values()])
        rows = "\n".join(body)
        tables.append(
            f'<table class="heat" style="--columns: {len(grid.types) + 1}">'
            f'<colgroup><col class="layer"><col span="{len(grid.types) + 1}"></colgroup>'
            f'<thead><tr><th scope="col">layer</th>{columns}'
            f'<th scope="col">layer<br>total</th></tr></thead>\n<tbody>{rows}</tbody>\n'
            f'<tfoot><tr><th scope="row">total</th>{sums}{everything}</tr></tfoot></table>'
        )
    if grid.others:
        rows = "\n".join(
            f'<tr>{_cell(name, modules[name], top)}<th scope="row"><code>{_breakable(name)}</code></th></tr>'
            for name in grid.others
        )
        tables.append(f'<table class="heat other"><caption>outside the layers</caption><tbody>{rows}</tbody></table>')
    return "\n".join(f'<div class="scroll" tabindex="0">{table}</div>' for table in tables)


def _row(run: RunRecord, grid: Grid, stack: str, layer: int, top: int) -> str:
    names = [grid.cells.get((stack, layer, kind)) for kind in grid.types]
    modules = run.plan.modules
    cells = "".join(_cell(name, modules[name], top) if name else "<td></td>" for name in names)
    return f'<tr><th scope="row">{layer}</th>{cells}{_sum([modules[name] for name in names if name])}</tr>'


def _cell(name: str, module: ModuleRank, top: int) -> str:
    size = f"{module.inputs:,} &times; {module.outputs:,}"
    title = f"{escape(name)}: rank {module.rank}, {module.start} at the start, {size}"
    return (
        f'<td class="cell r{step_of(module.rank, top)}" title="{title}">'
        f"{module.rank}<small>/{module.start}</small></td>"
    )


def _sum(modules: Iterable[ModuleRank]) -> str:
    modules = list(modules)
    rank, start = sum(module.rank for module in modules), sum(module.start for module in modules)
    return f'<td class="sum">{rank:,}<small>/{start:,}</small></td>'


def _column_head(name: str) -> str:
    before, _, last = name.rpartition(".")
    return f"{_breakable(before)}<b>{_breakable(last)}</b>"


def _breakable(name: str) -> str:
    """A dotted name that may be broken after its dots and underscores, and within CamelCase."""
    return re.sub(r"(?<=[._])|(?<=[a-z])(?=[A-Z])", "<wbr>", escape(name))


def module_table(run: RunRecord) -> str:
    """Return every module with its rank, shape and parameters, and the totals."""
    rows = "\n".join(
        f"<tr><td><code>{escape(name)}</code></td><td>{m.rank}</td><td>{m.start}</td><td>{m.inputs:,}</td>"
        f"<td>{m.outputs:,}</td><td>{m.parameters:,}</td></tr>"
        for name, m in run.plan.modules.items()
    )
    start = sum(module.start for module in run.plan.modules.values())
    return (
        '<div class="scroll" tabindex="0"><table class="plain modules"><thead><tr><th scope="col">module</th>'
        '<th scope="col">rank</th><th scope="col">start</th><th scope="col">in</th><th scope="col">out</th>'
        f'<th scope="col">parameters</th></tr></thead>\n<tbody>{rows}</tbody>\n'
        f"<tfoot><tr><td>total</td><td>{run.plan.total_rank:,}</td><td>{start:,}</td><td></td><td></td>"
        f"<td>{run.plan.parameters:,}</td></tr></tfoot></table></div>"
    )


def measure_table(run: RunRecord) -> str:
    """Return all figures of metrics.json that were measured on data; nothing when there are none."""
    parts = {name: run.metrics.get(name) for name in ("validation", "test")}
    found: dict[str, dict[str, Any]] = {name: part for name, part in parts.items() if isinstance(part, dict) and part}
    if not found:
        return ""
    head = "".join(f'<th scope="col">{name}</th>' for name in found)
    names = dict.fromkeys(name for part in found.values() for name in part)
    rows = "\n".join(
        f"<tr><td>{escape(name.replace('_', ' '))}</td>"
        + "".join(f"<td>{measure(number(part[name])) if name in part else '&ndash;'}</td>" for part in found.values())
        + "</tr>"
        for name in names
    )
    return (
        '<div class="scroll" tabindex="0"><table class="plain facts"><thead><tr><th scope="col">measure</th>'
        f"{head}</tr></thead>\n<tbody>{rows}</tbody></table></div>"
    )


def class_table(run: RunRecord) -> str:
    """Return the classes with their training examples, the commonest first; nothing without classes."""
    found = run.classes
    if not found:
        return ""
    total = max(1, sum(found.values()))
    ordered = sorted(found.items(), key=lambda item: -item[1])
    rows = "\n".join(
        f"<tr><td><code>{escape(json.dumps(name, ensure_ascii=False))}</code></td><td>{count:,}</td>"
        f"<td>{count / total:.1%}</td></tr>"
        for name, count in ordered[:SHOWN_CLASSES]
    )
    rest = [count for _, count in ordered[SHOWN_CLASSES:]]
    more = f"<tfoot><tr><td>{len(rest):,} more</td><td>{sum(rest):,}</td><td></td></tr></tfoot>" if rest else ""
    return (
        '<div class="scroll" tabindex="0"><table class="plain facts"><thead><tr><th scope="col">class</th>'
        '<th scope="col">training examples</th><th scope="col">share</th></tr></thead>\n'
        f"<tbody>{rows}</tbody>{more}</table></div>"
    )


def provenance_table(run: RunRecord) -> str:
    """Return what the plan says of its origin; settings one by one."""
    rows = "\n".join(
        f"<tr><td>{escape(name)}</td><td><code>{escape(str(value))}</code></td></tr>"
        for name, value in _flat(run.plan.provenance)
    )
    return (
        f'<div class="scroll" tabindex="0"><table class="plain facts"><tbody>{rows}</tbody></table></div>'
        if rows
        else ""
    )


def _flat(record: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in record.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
