"""The figures of a comparison: differences with their intervals, learning rates, cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from loralloc.compare.results import Entry, Moment, sign_of
from loralloc.compare.verdict import Compared
from loralloc.report.axes import WIDE, EndLabel, digits_needed, end_labels, short_number, titled_axes
from loralloc.report.palette import LIGHT, SERIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROW = 0.23
"""Height of a contender's row in the chart of differences, in inches."""
LONGEST = 22
"""Characters of a label."""
SHOWN_SPREAD = 4.0
"""Most height of the axis of learning rates, in heights of what the chosen ones span: what diverges is cut off."""
DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
"""Styles of lines that share a colour, in their order."""


class Line(NamedTuple):
    """How a contender's line is drawn.

    Attributes:
        colour: Name of its colour in the palette.
        dash: The style, as matplotlib has it.
    """

    colour: str
    dash: object


def lines(entries: Sequence[Entry]) -> dict[str, Line]:
    """Give every contender a colour of the palette; controls are grey, as are contenders once the colours run out.

    Contenders of one colour have different dashes.
    """
    told = [entry.contender.id for entry in entries if entry.contender.kind in ("baseline", "method", "plan")]
    told += [entry.contender.id for entry in entries if entry.contender.kind == "peer"]
    names = list(dict.fromkeys(told))[: SERIES - 1]
    found = {name: f"series-{place + 1}" for place, name in enumerate(names)}
    drawn: dict[str, Line] = {}
    for entry in entries:
        colour = found.get(entry.contender.id, f"series-{SERIES}")
        before = sum(line.colour == colour for line in drawn.values())
        drawn[entry.contender.id] = Line(colour, DASHES[before % len(DASHES)])
    return drawn


def difference_figure(compared: Sequence[Compared]) -> Figure:
    """Mean difference to plain LoRA, with its 95 % interval (thick) and the simultaneous interval of all (thin)."""
    known = [(one.entry, one.difference) for one in compared if one.difference is not None]
    height = 0.62 + ROW * max(1, len(known))
    figure, axes = _axes("", height=height, left=0.36, right=WIDE, above=0.1)
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


def rate_figure(entries: Sequence[Entry], metric: str, drawn: Mapping[str, Line]) -> Figure:
    """The validation score at every learning rate; a dot marks the chosen rate, a ring one with a failed run."""
    figure, axes = _axes(f"validation {metric.replace('_', ' ')}")
    sign, labels = sign_of(metric), []
    known = [entry for entry in entries if any(math.isfinite(trial.score) for trial in entry.trials)]
    low, high = sorted(sign * end for end in _score_limits(known))
    for entry in known:
        trials = [trial for trial in entry.trials if math.isfinite(trial.score)]
        points = [(trial.learning_rate, sign * trial.score) for trial in trials]
        line = drawn[entry.contender.id]
        colour = LIGHT[line.colour]
        axes.plot(
            *zip(*points, strict=True), color=colour, linewidth=1.3, linestyle=line.dash, marker=".", markersize=3
        )
        for trial, point in zip(trials, points, strict=True):
            if trial is entry.chosen:
                axes.plot(*point, "o", color=colour, markersize=5)
            if any(not row.finished for row in trial.tuning):
                axes.plot(*point, "o", color=colour, markersize=7, markerfacecolor="none")
        labels.append(EndLabel(min(max(points[-1][1], low), high), clipped(entry.contender.label), line.colour))
    axes.set_ylim(low, high)
    rates = [trial.learning_rate for trial in entries[0].trials]
    axes.set_xscale("log")
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    axes.set_xlabel("learning rate", loc="right", labelpad=1)
    _short_ticks(axes, "y")
    end_labels(axes, labels)
    return figure


def _score_limits(entries: Sequence[Entry]) -> tuple[float, float]:
    """The best and the worst score to show, lower is better: the chosen ones, and as much as `SHOWN_SPREAD` allows."""
    scores = [trial.score for entry in entries for trial in entry.trials if math.isfinite(trial.score)]
    if not scores:
        return 0.0, 1.0
    best = min(scores)
    worst = max([entry.chosen.score for entry in entries if math.isfinite(entry.chosen.score)] or scores)
    most = best + SHOWN_SPREAD * (worst - best) if worst > best else max(scores)
    shown = max(worst, min(max(scores), most))
    room = 0.1 * (shown - best) or 0.1 * abs(best) or 1.0
    return best - room, shown + room


def cost_figure(entries: Sequence[Entry], limit: float, drawn: Mapping[str, Line]) -> Figure:
    """Validation loss over processor time at the chosen rates; the dashed line is the total time of the cheapest."""
    figure, axes = _axes("validation loss")
    labels = []
    for entry in entries:
        course = mean_course(entry)
        if not course:
            continue
        colour, dash = drawn[entry.contender.id]
        points = [(moment.processor_seconds, moment.loss) for moment in course]
        axes.plot(*zip(*points, strict=True), color=LIGHT[colour], linewidth=1.3, linestyle=dash)
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


def _axes(title: str, **place: float) -> tuple[Figure, Axes]:
    from matplotlib.ticker import MaxNLocator

    figure, axes = titled_axes(title, **place)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.margins(y=0.1)
    return figure, axes


def _short_ticks(axes: Axes, which: str) -> None:
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_formatter(lambda value, _: short_number(value, digits_needed(axis.get_majorticklocs())))
