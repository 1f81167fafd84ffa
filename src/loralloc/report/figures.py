"""The figures of the report."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from loralloc.naming import short_names
from loralloc.report.axes import (
    WIDE,
    EndLabel,
    end_labels,
    shade_phases,
    short_number,
    step_axes,
    titled_axes,
)
from loralloc.report.grid import Grid
from loralloc.report.palette import LIGHT, RAMP, RAMP_STEPS, SERIES, TEXT_ON_RAMP, step_of
from loralloc.report.run_record import Points, RunRecord
from loralloc.report.thinning import smoothed, thinned
from loralloc.trace import Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_CELLS = 1000  # modules that a heat map shows with their numbers
MOST_ROWS = 1000  # modules of the timeline; of more, every n-th
MOST_LINES = 40  # module types in grey; of more, every n-th
SAMPLES = 160  # of the ranks along the time axis
LOW = 1.5  # inches, the height of a figure of minor interest
SMOOTH_FROM = 30  # logged losses from which on a smoothed line helps


def budget_figure(run: RunRecord, trace: Trace) -> Figure:
    """The budget and what the ranks use of it, over the steps."""
    figure, axes = step_axes(run, trace.unit)
    end = run.reached
    steps = [event.step for event in trace.events]
    used = [trace.used(event) for event in trace.events]
    axes.fill_between([*steps, end], [*used, used[-1]], step="post", color=LIGHT["area"], alpha=0.55, linewidth=0)
    axes.plot([*steps, end], [*used, used[-1]], drawstyle="steps-post", color=LIGHT["series-1"])
    exact = used[-1] == trace.target
    labels = [EndLabel(used[-1], f"{short_number(used[-1])}, {'the budget' if exact else 'in use'}", "series-1")]
    budget = _budget_points(run, trace)
    if budget and trace.target is not None:
        style = "default" if trace.falling else "steps-post"  # else it falls in one step, if at all
        axes.plot(*zip(*budget, strict=True), drawstyle=style, color=LIGHT["ink"], linewidth=1, linestyle=(0, (4, 3)))
        labels += [] if exact else [EndLabel(trace.target, f"{short_number(trace.target)}, the budget", "ink")]
    axes.set_ylim(0, max([*used, *(value for _, value in budget)]) * 1.16 or 1)
    end_labels(axes, labels)
    shade_phases(axes, trace, run, named=True)
    return figure


def _budget_points(run: RunRecord, trace: Trace) -> list[tuple[int, int]]:
    """The budget wherever it was recorded: it falls also at steps at which no rank changed."""
    points = {event.step: event.budget for event in trace.events if event.budget is not None} | dict(run.budgets)
    start = trace.events[0].budget
    if trace.falling and start is not None:
        points.setdefault(trace.falling[0], start)
    if run.finished and trace.target is not None:
        points[run.reached] = trace.target
    return sorted(points.items())


def types_figure(run: RunRecord, trace: Trace, grid: Grid) -> Figure:
    """The mean rank of each module type, over the steps."""
    figure, axes = step_axes(run, "mean rank")
    last = len(trace.events) - 1
    events = [trace.events[i] for i in sorted({round(i * last / (SAMPLES * 2)) for i in range(SAMPLES * 2 + 1)})]
    steps = [*(event.step for event in events), run.reached]
    position = {name: i for i, name in enumerate(trace.sites)}
    ranks = np.array([event.ranks for event in events])
    means = {
        label: ranks[:, [position[name] for name in names]].mean(axis=1).tolist()
        for label, names in _groups(grid).items()
    }
    order = sorted(means, key=lambda label: -means[label][-1])
    # Too many to tell apart: the extremes get a colour and a name, the others stay in the background.
    named = order if len(order) <= SERIES else order[: SERIES // 2] + order[-SERIES // 2 :]
    others = [label for label in order if label not in named]
    labels = []
    for label in [*others[:: math.ceil(len(others) / MOST_LINES) or 1], *named]:
        colour = f"series-{named.index(label) + 1}" if label in named else "rule"
        values = means[label]
        in_front = 3 if label in named else 2
        axes.plot(steps, [*values, values[-1]], color=LIGHT[colour], drawstyle="steps-post", zorder=in_front)
        if label in named:
            labels.append(EndLabel(values[-1], f"{values[-1]:.1f} {_clip(label)}", colour))
    axes.set_ylim(0, max(max(values) for values in means.values()) * 1.08 or 1)
    shade_phases(axes, trace, run)
    end_labels(axes, labels)
    return figure


def timeline_figure(run: RunRecord, trace: Trace, grid: Grid, highest: int) -> Figure:
    """The rank of every module over the steps: a row for each, grouped by module type, first layer on top."""
    figure, axes = step_axes(run, "modules")
    position = {name: i for i, name in enumerate(trace.sites)}
    every = math.ceil(len(trace.sites) / MOST_ROWS)
    groups = {label: names[::every] for label, names in _groups(grid).items()}
    rows = [position[name] for names in groups.values() for name in names]
    columns = [[step_of(ranks[row], highest) for row in rows] for ranks in _sampled_ranks(trace, run.reached)]
    _picture(axes, list(zip(*columns, strict=True)), (0, max(run.reached, 1), len(rows), 0))
    axes.set_xlim(0, max(run.last_step, 1))
    axes.grid(visible=False)
    axes.set_yticks([])
    axes.spines["bottom"].set_visible(False)
    first_row = 0
    labels = []
    for label, names in groups.items():
        if first_row and len(groups) <= 2 * SERIES:  # more lines would hide what they divide
            axes.axhline(first_row, color=LIGHT["card"], linewidth=1.5)
        labels.append(EndLabel(first_row + len(names) / 2, _clip(label), "ink"))
        first_row += len(names)
    end_labels(axes, labels if len(labels) <= 2 * SERIES else [])
    return figure


def _picture(axes: Axes, steps: Sequence[Sequence[float]], extent: tuple[float, float, float, float]) -> None:
    """Draw an image of ramp steps (NaN: empty) in the colours of both themes; the page shows that of its own theme."""
    from matplotlib.colors import ListedColormap

    for theme in ("dark", "light"):
        axes.imshow(
            steps,
            cmap=ListedColormap(RAMP[theme]),
            vmin=0,
            vmax=RAMP_STEPS,
            aspect="auto",
            interpolation="none",
            extent=extent,
            gid=theme,
        )


def _sampled_ranks(trace: Trace, end: int) -> list[tuple[int, ...]]:
    """The ranks in the middle of each of `SAMPLES` equal parts of the time axis."""
    steps = [event.step for event in trace.events]
    times = ((i + 0.5) / SAMPLES * end for i in range(SAMPLES))
    return [trace.events[max(0, bisect_right(steps, time) - 1)].ranks for time in times]


def loss_figure(run: RunRecord) -> Figure:
    """Losses of training and evaluation, over the steps; values that are not finite leave a gap."""
    figure, axes = step_axes(run, "loss")
    labels = []
    if run.train:
        steps, values = zip(*run.train, strict=True)
        if len(values) >= SMOOTH_FROM:
            axes.plot(*_line(run.train), color=LIGHT["area"], linewidth=0.9)
            means = tuple(zip(steps, smoothed(values), strict=True))
            axes.plot(*_line(means), color=LIGHT["series-1"])
        else:
            axes.plot(steps, values, color=LIGHT["series-1"], marker="" if len(values) > 1 else "o")
        labels += _last_label(values, "training", "series-1")
    if run.evaluations:
        _, values = zip(*run.evaluations, strict=True)
        axes.plot(*_line(run.evaluations), color=LIGHT["series-2"], marker="o", markersize=3.5, markeredgewidth=0)
        labels += _last_label(values, "evaluation", "series-2")
    if run.trace:
        shade_phases(axes, run.trace, run)
    end_labels(axes, labels)
    return figure


def _line(points: Points) -> tuple[Sequence[int], Sequence[float]]:
    """The steps and the values of a line, thinned."""
    steps, values = zip(*thinned(points), strict=True)
    return steps, values


def series_figure(run: RunRecord, name: str, title: str, *, from_zero: bool = False) -> Figure:
    """One logged value over the steps, in a low figure; values that are not finite leave a gap.

    Args:
        run: The run.
        name: One of the run's `series`.
        title: What is drawn, with its unit.
        from_zero: Whether the axis begins at 0.
    """
    figure, axes = step_axes(run, title, LOW)
    steps, values = _line(run.series[name])
    axes.plot(steps, values, color=LIGHT["series-1"], marker="" if len(values) > 1 else "o")
    if from_zero:
        axes.set_ylim(0, max([value for value in values if math.isfinite(value)], default=0) * 1.16 or 1)
    if run.trace:
        shade_phases(axes, run.trace, run)
    return figure


def sizes_figure(sizes: Sequence[tuple[float, float]]) -> Figure:
    """Validation loss over the average rank; the last size is the adapter itself."""
    from matplotlib.ticker import NullLocator

    figure, axes = titled_axes("validation loss", right=WIDE)
    averages, losses = zip(*sizes, strict=True)
    axes.plot(averages, losses, color=LIGHT["series-1"], marker="o", markersize=4)
    axes.set_xscale("log")
    axes.set_xticks(averages, [f"{average:.2g}" for average in averages])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("average rank", loc="right", labelpad=1)
    axes.yaxis.set_major_formatter(lambda value, _: short_number(value))
    return figure


def heat_figure(run: RunRecord, grid: Grid, highest: int) -> Figure:
    """The final ranks, layers by module types; modules outside the grid follow below, in a column of their own."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    modules = run.plan.modules
    if len(modules) > MOST_CELLS:
        return _heat_picture(run, grid, highest)
    columns = [*grid.types, *(["other"] if grid.others else [])]
    rows = grid.row_names + list(grid.others)
    side = 0.5 + 0.075 * max(map(len, rows))
    width, height = side + 0.95 * len(columns) + 0.2, 0.55 + 0.3 * len(rows) + 0.15
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((side / width, 0.15 / height, 1 - (side + 0.2) / width, 0.3 * len(rows) / height))
    axes.set(xlim=(0, len(columns)), ylim=(len(rows), 0), xticks=[], yticks=[])
    axes.axis("off")
    places = [
        (grid.rows.index((stack, layer)), columns.index(kind), name)
        for (stack, layer, kind), name in grid.cells.items()
    ]
    places += [(len(grid.rows) + i, len(columns) - 1, name) for i, name in enumerate(grid.others)]
    for row, column, name in places:
        module = modules[name]
        step = step_of(module.rank, highest)
        patch = Rectangle((column + 0.03, row + 0.06), 0.94, 0.88, facecolor=RAMP["light"][step], edgecolor="none")
        axes.add_patch(patch)
        style: dict[str, Any] = {"color": TEXT_ON_RAMP["light"][step], "va": "center_baseline"}
        axes.text(column + 0.48, row + 0.5, f"{module.rank}", ha="right", weight="bold", **style)
        axes.text(column + 0.5, row + 0.5, f"/{module.start}", ha="left", size=8, **style)
    for row, label in enumerate(rows):
        axes.text(-0.08, row + 0.5, label, ha="right", va="center_baseline", color=LIGHT["muted"])
    for column, label in enumerate(columns):
        before, _, last = label.rpartition(".")
        axes.text(column + 0.5, -0.2, f"{_clip(before, 16)}\n{_clip(last, 16)}", ha="center", va="bottom", size=7.5)
    return figure


def _heat_picture(run: RunRecord, grid: Grid, highest: int) -> Figure:
    """The heat map without numbers, which would be too small; modules outside the grid fill extra rows below."""
    modules, width = run.plan.modules, max(1, len(grid.types))
    folded = [grid.others[at : at + width] for at in range(0, len(grid.others), width)]
    rows = [[grid.cells.get((stack, layer, kind)) for kind in grid.types] for stack, layer in grid.rows]
    rows += [[*names, *[None] * (width - len(names))] for names in folded]
    steps = [[math.nan if name is None else step_of(modules[name].rank, highest) for name in row] for row in rows]
    figure, axes = titled_axes("layers", right=WIDE)
    axes.set_xlabel("module types", loc="right", labelpad=1)
    axes.grid(visible=False)
    _picture(axes, steps, (0, width, len(rows), 0))
    return figure


def _groups(grid: Grid) -> dict[str, list[str]]:
    """Modules by module type under the shortest names that tell the types apart; the others are a group."""
    names = short_names(grid.types)
    groups = {names[module_type]: grid.column(module_type) for module_type in grid.types}
    return groups | ({"other": list(grid.others)} if grid.others else {})


def _last_label(values: Sequence[float], name: str, colour: str) -> list[EndLabel]:
    finite = [value for value in values if math.isfinite(value)]
    return [EndLabel(finite[-1], f"{finite[-1]:.3g} {name}", colour)] if finite else []


def _clip(text: str, length: int = 20) -> str:
    return text if len(text) <= length else "…" + text[-(length - 1) :]
