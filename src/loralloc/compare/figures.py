"""The figures of a comparison: differences with their intervals, learning rates, cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from loralloc.compare.results import Entry, Moment
from loralloc.compare.verdict import Compared
from loralloc.report.axes import HEIGHT, WIDTH, EndLabel, digits_needed, end_labels, short_number
from loralloc.report.palette import LIGHT, SERIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROW = 0.23
"""Height of a contender's row in the chart of differences, in inches."""
LONGEST = 22
"""Characters of a label."""


def colours(entries: Sequence[Entry]) -> dict[str, str]:
    """Give every contender a colour of the palette; controls are grey, as are contenders once the colours run out."""
    told = [entry.contender.id for entry in entries if entry.contender.kind in ("baseline", "method", "plan")]
    told += [entry.contender.id for entry in entries if entry.contender.kind == "peer"]
    names = list(dict.fromkeys(told))[: SERIES - 1]
    found = {name: f"series-{place + 1}" for place, name in enumerate(names)}
    return {entry.contender.id: found.get(entry.contender.id, f"series-{SERIES}") for entry in entries}


def difference_figure(compared: Sequence[Compared]) -> Figure:
    """Mean difference to plain LoRA, with its 95 % interval (thick) and the simultaneous interval of all (thin)."""
    known = [(one.entry, one.difference) for one in compared if one.difference is not None]
    height = 0.62 + ROW * max(1, len(known))
    figure, axes = _axes(height, left=0.36, right=0.97)
    axes.axvline(0, color=LIGHT["ink"], linewidth=1)
    for place, (entry, one) in enumerate(known):
        colour = LIGHT["muted" if not (one.significant and entry.complete) else "good" if one.mean < 0 else "warn"]
        axes.plot([one.low_all, one.high_all], [place, place], color=colour, linewidth=0.8)
        axes.plot([one.low, one.high], [place, place], color=colour, linewidth=3.2, alpha=0.55)
        axes.plot([one.mean], [place], "o", color=colour, markersize=4.5)
        axes.text(
            -0.03, place, clipped(entry.contender.label), transform=axes.get_yaxis_transform(), ha="right", va="center",
            size=8, color=LIGHT["ink"],
        )  # fmt: skip
    axes.set_ylim(len(known) - 0.5, -0.5)
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.grid(visible=True, axis="x", color=LIGHT["rule"], linewidth=0.6)
    axes.set_xlabel("loss minus plain LoRA's; left of 0 is better", loc="right", labelpad=2)
    _short_ticks(axes, "x")
    return figure


def rate_figure(entries: Sequence[Entry], unit: str, palette: dict[str, str]) -> Figure:
    """The validation score at every learning rate; a dot marks the chosen rate."""
    figure, axes = _axes(HEIGHT, title=unit)
    labels = []
    for entry in entries:
        points = [(trial.learning_rate, abs(trial.score)) for trial in entry.trials if math.isfinite(trial.score)]
        if not points:
            continue
        colour = palette[entry.contender.id]
        axes.plot(*zip(*points, strict=True), color=LIGHT[colour], linewidth=1.3, marker=".", markersize=3)
        if math.isfinite(entry.chosen.score):
            axes.plot([entry.chosen.learning_rate], [abs(entry.chosen.score)], "o", color=LIGHT[colour], markersize=5)
        labels.append(EndLabel(points[-1][1], clipped(entry.contender.label), colour))
    rates = [trial.learning_rate for trial in entries[0].trials]
    axes.set_xscale("log")
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    axes.set_xlabel("learning rate", loc="right", labelpad=1)
    _short_ticks(axes, "y")
    end_labels(axes, labels)
    return figure


def cost_figure(entries: Sequence[Entry], limit: float, palette: dict[str, str]) -> Figure:
    """Validation loss over processor time at the chosen rates; the dashed line is the total time of the cheapest."""
    figure, axes = _axes(HEIGHT, title="validation loss")
    labels = []
    for entry in entries:
        course = mean_course(entry)
        if not course:
            continue
        colour = palette[entry.contender.id]
        points = [(moment.processor_seconds, moment.loss) for moment in course]
        axes.plot(*zip(*points, strict=True), color=LIGHT[colour], linewidth=1.3)
        labels.append(EndLabel(points[-1][1], clipped(entry.contender.label), colour))
    axes.axvline(limit, color=LIGHT["ink"], linewidth=1, linestyle=(0, (4, 3)))
    axes.set_xlim(left=0)
    axes.set_xlabel("processor time, seconds", loc="right", labelpad=1)
    _short_ticks(axes, "y")
    end_labels(axes, labels)
    return figure


def mean_course(entry: Entry) -> list[Moment]:
    """The evaluations of a contender's chosen runs, averaged over seeds; empty if their numbers differ between runs."""
    courses = [row.course for row in entry.chosen.finished]
    if not courses or len({len(course) for course in courses}) > 1:
        return []
    count = len(courses)
    return [
        Moment(
            sum(moment.processor_seconds for moment in moments) / count,
            sum(moment.loss for moment in moments) / count,
            any(moment.over for moment in moments),
        )
        for moments in zip(*courses, strict=True)
    ]


def clipped(label: str) -> str:
    """A label that fits beside a line."""
    return label if len(label) <= LONGEST else f"{label[: LONGEST - 1]}…"


def _axes(height: float, title: str = "", left: float = 0.105, right: float = 0.86) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(WIDTH, height))
    above = 0.282 if title else 0.1
    axes = figure.add_axes((left, 0.404 / height, right - left, 1 - (0.404 + above) / height))
    axes.set_title(title)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.margins(y=0.1)
    return figure, axes


def _short_ticks(axes: Axes, which: str) -> None:
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_formatter(lambda value, _: short_number(value, digits_needed(axis.get_majorticklocs())))
