"""The page of a frontier: the curve, the recommendation, and a table; one self-contained file and a PNG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loralloc.files import write_atomically
from loralloc.frontier.point import Measured, Point
from loralloc.frontier.result import Frontier, loss_interval, megabytes
from loralloc.report.axes import HEIGHT, WIDTH, short_number
from loralloc.report.drawing import png, report_settings, svg
from loralloc.report.page import templates
from loralloc.report.palette import LIGHT, theme_colours
from loralloc.report.tables import Table
from loralloc.report.wording import rounded

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN_SPREAD = 4.0
"""Most height of the loss axis, in heights of the recovered line; the line of cuts is clipped above it."""

DROPPED_FIRST = {
    "ablation": "those whose AB-LoRA score on training examples is the lowest",
    "sensitivity": "those without which the loss of training examples rises least",
    "singular_value": "those with the smallest singular values",
}
"""Which terms are dropped first, by order."""


def write_page(frontier: Frontier, folder: Path) -> Path:
    """Write frontier.html and frontier.png into a folder.

    Args:
        frontier: What to show.
        folder: An existing folder.

    Returns:
        The path of the page.
    """
    with report_settings():
        figure = curve(frontier)
        png(figure, folder / "frontier.png")
        picture = svg(figure, "frontier", "Loss over average rank")
    path = folder / "frontier.html"
    values = _values(frontier) | {"picture": picture}
    write_atomically(path, templates("loralloc.frontier").get_template("frontier.html").render(values))
    return path


def _values(frontier: Frontier) -> dict[str, Any]:
    return {
        "light": theme_colours("light"),
        "dark": theme_colours("dark"),
        "source": str(frontier.source.adapter),
        "model": frontier.source.recipe.model.name,
        "task": frontier.source.recipe.task,
        "verdict": frontier.verdict(),
        "facts": _facts(frontier),
        "table": table(frontier),
        "export": f"loralloc frontier {frontier.source.named} --export {frontier.average(frontier.choice):.3g}",
        "recovered": frontier.recovery.steps > 0,
        "steps": frontier.recovery.steps,
        "rate": f"{frontier.recovery.rate:.0%}",
        "first": DROPPED_FIRST[frontier.order],
        "examples": len(frontier.choice.best.losses),
    }


def _facts(frontier: Frontier) -> list[tuple[str, str]]:
    """The headline figures: what they are, and their values."""
    point, largest = frontier.choice, frontier.points[0]
    facts = [
        ("Recommended average rank", f"{frontier.average(point):.3g}"),
        ("Adapter", f"{megabytes(point.nbytes)} of {megabytes(largest.nbytes)}"),
        ("Largest rank of a module", f"{point.largest_rank}"),
        (frontier.metric, rounded(point.best.metrics.get(frontier.metric, math.nan))),
    ]
    if frontier.source.seconds:
        facts.append(("Cost of the curve", f"{frontier.seconds / frontier.source.seconds:.2g} trainings"))
    return facts


def table(frontier: Frontier) -> Table:
    """A row for each size."""
    head = ["average rank", "ranks", "size", "largest rank", "loss, cut"]
    head += ["loss, recovered"] if frontier.recovery.steps else []
    head += [frontier.metric, "above the best (95 %)", "p"]
    rows = []
    for place, (point, worse) in enumerate(zip(frontier.points, frontier.worse, strict=True)):
        mark = " ◂" if place == frontier.recommended else ""
        row = [f"{frontier.average(point):.3g}{mark}", f"{point.ranks:,}", megabytes(point.nbytes)]
        row += [str(point.largest_rank), rounded(loss_interval(point.cut)[0])]
        row += [rounded(loss_interval(point.recovered)[0])] if point.recovered else []
        row.append(rounded(point.best.metrics.get(frontier.metric, math.nan)))
        best = place == frontier.best
        row += ["the best", ""] if best else [f"{worse.mean:+.4f} ({worse.low:+.4f} to {worse.high:+.4f})", _p(worse.p)]
        rows.append(tuple(row))
    return Table(tuple(head), rows)


def _p(value: float) -> str:
    return "< .001" if value < 0.001 else f"{value:.3f}".lstrip("0")


def curve(frontier: Frontier) -> Figure:
    """Mean loss of a validation example over the average rank, of the cuts and after their recovery."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator

    figure = Figure(figsize=(WIDTH, HEIGHT * 1.2))
    axes = figure.add_axes((0.125, 0.15, 0.85, 0.74))
    axes.set_title("loss of a validation example")
    axes.set_xscale("log", base=2)
    averages = [frontier.average(point) for point in frontier.points]
    axes.set_xlabel("average rank", loc="right", labelpad=1)
    low, high = math.floor(math.log2(min(averages))), math.ceil(math.log2(max(averages)))
    axes.xaxis.set_major_locator(FixedLocator([2.0**k for k in range(low, high + 1)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(lambda value, _: short_number(value))
    cuts = [point.cut for point in frontier.points]
    recovered = [point.recovered for point in frontier.points if point.recovered is not None]
    _line(axes, averages, cuts, "series-2" if recovered else "series-1", "cut")
    if recovered:
        _line(axes, averages, recovered, "series-1", f"cut, then trained for {frontier.recovery.steps:,} steps")
    axes.set_ylim(*_limits(recovered or cuts, cuts))
    choice = frontier.choice
    axes.plot(
        [frontier.average(choice)], [loss_interval(choice.best)[0]], marker="o", markersize=9, markerfacecolor="none",
        color=LIGHT["ink"], linestyle="none", label="recommended",
    )  # fmt: skip
    axes.legend(frameon=False, loc="upper right", fontsize=8)
    return figure


def _line(axes: Axes, averages: Sequence[float], found: Sequence[Measured], colour: str, label: str) -> None:
    intervals = list(map(loss_interval, found))
    means, low = [mean for mean, _ in intervals], [mean - half for mean, half in intervals]
    high = [mean + half for mean, half in intervals]
    axes.fill_between(averages, low, high, color=LIGHT[colour], alpha=0.15, linewidth=0)
    axes.plot(averages, means, color=LIGHT[colour], marker="o", markersize=3, label=label)


def _limits(shown: Sequence[Measured], cuts: Sequence[Measured]) -> tuple[float, float]:
    """Limits of the loss axis: all of `shown` (the lower line), and as much of the cuts as `SHOWN_SPREAD` allows."""
    ends = _finite(shown) or _finite(cuts) or [(0.0, 1.0)]
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    highest = max((cut.mean for cut in cuts if math.isfinite(cut.mean)), default=high)
    room = (high - low) * SHOWN_SPREAD
    high = max(high, min(highest, low + room))
    return low - 0.05 * (high - low), high + 0.12 * (high - low)


def _finite(found: Sequence[Measured]) -> list[tuple[float, float]]:
    """The intervals of the mean losses, of those that are finite."""
    return [(mean - half, mean + half) for mean, half in map(loss_interval, found) if math.isfinite(mean + half)]


def point_in_words(point: Point) -> str:
    """Describe a point in one line, for a terminal."""
    loss, cut = (rounded(loss_interval(measured)[0]) for measured in (point.best, point.cut))
    before = f", {cut} before it recovered" if point.gained else ""
    return f"  {point.ranks:>6,} ranks  {megabytes(point.nbytes):>7}  loss {loss}{before}"
