"""Axes over the steps of a run: shaded phases, labels beside the lines, and short numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from loralloc.report.palette import LIGHT
from loralloc.report.run_record import RunRecord
from loralloc.schedule import FINAL, WARM_UP
from loralloc.trace import Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 4.0, 2.45  # inches; small, so that the text stays legible when a phone scales the figure down
LEFT, RIGHT = 0.105, 0.86  # shares of the width at which the axes begin, and end where labels follow
WIDE = 0.97  # share of the width at which they end where none follow
BELOW, ABOVE = 0.404, 0.282  # inches below and above the axes
POINTS_PER_INCH = 72
LONG = 10_000  # from this last step on, numbers of steps are written short, or they would overlap


class EndLabel(NamedTuple):
    """A label beside the end of a line: the line's last value, the text, and the colour's name in the palette."""

    value: float
    text: str
    colour: str


def titled_axes(
    title: str, height: float = HEIGHT, left: float = LEFT, right: float = RIGHT, above: float = ABOVE
) -> tuple[Figure, Axes]:
    """Return a figure with one pair of axes: from `left` to `right` of its width, and `above` inches below its top."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height))
    axes = figure.add_axes((left, BELOW / height, right - left, 1 - (BELOW + above) / height))
    axes.set_title(title)
    return figure, axes


def step_axes(run: RunRecord, title: str, height: float = HEIGHT) -> tuple[Figure, Axes]:
    """Return a figure with one pair of axes, the steps of the run along x, and room for labels on the right.

    Args:
        run: The run.
        title: What is drawn, above the axes.
        height: Inches; a low figure has fewer marks along y.
    """
    from matplotlib.ticker import MaxNLocator

    figure, axes = titled_axes(title, height)
    axes.set_xlim(0, max(run.last_step, 1))
    axes.set_xlabel("step", loc="right", labelpad=1)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if run.last_step >= LONG:
        axes.xaxis.set_major_formatter(lambda value, _: short_number(value))
    axes.yaxis.set_major_locator(MaxNLocator(5 if height >= HEIGHT else 3))
    axes.yaxis.set_major_formatter(lambda value, _: short_number(value, digits_needed(axes.yaxis.get_majorticklocs())))
    axes.margins(y=0.1)
    return figure, axes


PHASE_COLOURS = {WARM_UP: "phase-1", FINAL: "phase-3"}
"""Any other phase is an allocation phase, whatever its name, and gets `phase-2`."""


def shade_phases(axes: Axes, trace: Trace, run: RunRecord, *, named: bool = False) -> None:
    """Shade the phases of the schedule, if there is more than one."""
    if len(trace.phases) < 2:
        return
    ends = [last for _, _, last in trace.phases[:-1]]
    edges = [0, *ends, max(run.last_step, ends[-1])]
    # The width of a name follows from the type size used here, so that the names can be placed without drawing first.
    steps_per_point = max(edges[-1], 1) / (axes.get_position().width * WIDTH * POINTS_PER_INCH)
    previous_end = 0.0
    for i, (name, _, _) in enumerate(trace.phases):
        left, right = edges[i], edges[i + 1]
        axes.axvspan(left, right, color=LIGHT[PHASE_COLOURS.get(name, "phase-2")], linewidth=0, zorder=0)
        half_width = 2.2 * len(name) * steps_per_point
        centre = max((left + right) / 2, previous_end + half_width + 2 * steps_per_point)
        if named and right - left >= half_width and centre + half_width <= edges[-1]:
            axes.text(
                centre, 0.965, name, transform=axes.get_xaxis_transform(), ha="center", va="top", size=7.5,
                color=LIGHT["muted"],
            )  # fmt: skip
            previous_end = centre + half_width


def end_labels(axes: Axes, labels: Sequence[EndLabel]) -> None:
    """Write labels beside the ends of their lines, moved apart where they would overlap."""
    if not labels:
        return
    points = 16 + 4.35 * max(len(label.text) for label in labels)
    box = axes.get_position()
    axes.set_position((box.x0, box.y0, 1 - box.x0 - points / (POINTS_PER_INCH * WIDTH), box.height))
    bottom, top = axes.get_ylim()
    gap = abs(top - bottom) * 0.068 * HEIGHT / axes.get_figure().get_size_inches()[1]  # type: ignore[union-attr]
    # From the bottom of the picture to its top, whichever way the axis runs.
    sign = 1 if bottom < top else -1
    ordered = sorted(labels, key=lambda label: sign * label.value)
    heights = spread([sign * label.value for label in ordered], gap, sign * bottom, sign * top)
    right = axes.get_xlim()[1]
    for label, height in zip(ordered, heights, strict=True):
        colour = LIGHT[label.colour]
        axes.plot(
            [1.005, 1.035], [label.value, sign * height], transform=axes.get_yaxis_transform(), clip_on=False,
            color=colour, linewidth=0.8, scalex=False, scaley=False,
        )  # fmt: skip
        axes.annotate(
            label.text, (right, sign * height), xytext=(11.5, 0), textcoords="offset points", va="center_baseline",
            size=8, color=colour, annotation_clip=False,
        )  # fmt: skip


def spread(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move ascending values apart until neighbours are `gap` from each other, within [low, high] if they fit.

    >>> spread([1.0, 1.0, 5.0], gap=1.0, low=0.0, high=10.0)
    [1.0, 2.0, 5.0]
    >>> spread([9.9, 10.0], gap=1.0, low=0.0, high=10.0)
    [9.0, 10.0]
    """
    moved = [min(max(value, low), high) for value in values]
    for i in range(1, len(moved)):
        moved[i] = max(moved[i], moved[i - 1] + gap)
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], high - gap * (len(moved) - 1 - i))
    return moved


def short_number(value: float, digits: int = 3) -> str:
    """Write a number in at most five characters or so.

    >>> short_number(288), short_number(0.25), short_number(442_368), short_number(12_500_000)
    ('288', '0.25', '442k', '12.5M')
    """
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 10 or (size > 1e3 and abs(value) >= size):
            return f"{value / size:.{digits}g}{unit}"
    return f"{value:,.0f}" if value == int(value) else f"{value:.{digits}g}"


def digits_needed(values: Iterable[float]) -> int:
    """Return how many digits, three or more, make the labels of an axis differ.

    >>> digits_needed([0.5, 0.75]), digits_needed([0.6931, 0.6933, 0.6935])
    (3, 4)
    """
    distinct = set(map(float, values))
    return next((n for n in range(3, 9) if len({short_number(value, n) for value in distinct}) == len(distinct)), 9)
