"""Which figures a page shows, and the sentences beside them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from loralloc.report import figures
from loralloc.report.grid import Grid, arrange
from loralloc.report.run_record import RunRecord, mapping, number
from loralloc.trace import Trace

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Chart:
    """A figure, its heading and the sentences below the heading; the name is that of its file and of its elements."""

    name: str
    heading: str
    caption: str
    figure: Figure


class Side(NamedTuple):
    """The words on a small chart, and whether its axis begins at 0."""

    heading: str
    caption: str
    unit: str
    from_zero: bool = True


SIDES = {
    "learning_rate": Side("Learning rate", "What the optimizer was given.", "learning rate"),
    "grad_norm": Side("Gradient norm", "Of the logged steps, before clipping.", "norm"),
    "tokens_per_second": Side(
        "Speed", "Tokens without padding, all processes together; evaluations take none of the time.", "tokens/s"
    ),
    "examples_per_second": Side(
        "Speed", "Examples, all processes together; evaluations take none of the time.", "examples/s"
    ),
    "memory_mib": Side(
        "Memory",
        "The most so far: allocated on the first GPU or, without one, resident in the first process.",
        "MiB",
    ),
}
"""The small charts, by the logged value that they draw."""


def charts(run: RunRecord, grid: Grid, highest: int) -> list[Chart]:
    """Draw the figures for which the run has data; `highest` is the rank with the strongest colour."""
    drawn = []
    if len(run.plan.modules) > figures.MOST_CELLS:
        ranks = figures.heat_figure(run, grid, highest)
        told = f"A row for each layer, a column for each type; the strongest colour is rank {highest}."
        drawn.append(Chart("ranks", "Ranks", told, ranks))
    trace = run.trace
    if trace and not _without_allocation(trace):
        grid = grid if trace.sites == tuple(run.plan.modules) else arrange(trace.sites)
        which = "One row per module" if len(trace.sites) <= figures.MOST_ROWS else "A row for each of a sample"
        rows = f"{which}, grouped by type, first layer on top. The colours are those of the ranks above."
        drawn += [
            Chart("budget", "Budget", _budget_caption(trace), figures.budget_figure(run, trace)),
            Chart("types", "Ranks by module type", _types_caption(grid), figures.types_figure(run, trace, grid)),
            Chart("timeline", "Ranks of every module", rows, figures.timeline_figure(run, trace, grid, highest)),
        ]
    if run.train or run.evaluations:
        drawn.append(Chart("loss", "Loss", _loss_caption(run), figures.loss_figure(run)))
    if sizes := loss_over_size(run):
        drawn.append(Chart("sizes", "Smaller adapters", SIZES_CAPTION, figures.sizes_figure(sizes)))
    return drawn


SIZES_CAPTION = (
    "Validation loss of this adapter, cut to fewer ranks by its singular values, with no more training: an upper bound "
    "of what smaller ones can do. loralloc frontier trains each size a little more, and recommends one."
)


def loss_over_size(run: RunRecord) -> list[tuple[float, float]]:
    """Return (average rank, validation loss) of the adapter's smaller sizes, and of itself, from small to large."""
    found = run.metrics.get("cuts")
    cuts = [cut for cut in found if isinstance(cut, dict)] if isinstance(found, list) else []
    sizes = [(number(cut.get("average_rank")), number(mapping(cut.get("metrics")).get("loss"))) for cut in cuts]
    whole = number(mapping(run.metrics.get("validation")).get("loss"))
    sizes.insert(0, (run.plan.total_rank / len(run.plan.modules), whole))
    known = [size for size in sizes if all(map(math.isfinite, size))]
    return known[::-1] if len(known) > 1 else []


def side_charts(run: RunRecord) -> list[Chart]:
    """Draw a small chart for each of `SIDES` that the run has logged."""
    return [
        Chart(name.replace("_", "-"), side.heading, side.caption, figure)
        for name, side in SIDES.items()
        if name in run.series
        for figure in [figures.series_figure(run, name, side.unit, from_zero=side.from_zero)]
    ]


def notes(run: RunRecord) -> list[str]:
    """Return sentences on how to read the figures, and on those that are not there."""
    sentences = []
    if run.search_steps:
        sentences.append(
            f"Steps 1 to {run.search_steps:,} are the search for the ranks. "
            "After the search, the exported adapter was trained from scratch at the ranks that it chose."
        )
    if run.trace is None:
        sentences.append("There is no trace.jsonl, so the ranks over time cannot be shown.")
    elif _without_allocation(run.trace):
        sentences.append("The ranks are constant: this method does not change them, so there is no budget to show.")
    if not run.train and not run.evaluations:
        sentences.append("No losses have been logged.")
    return sentences


def _without_allocation(trace: Trace) -> bool:
    return trace.constant and len(trace.phases) < 2


def _budget_caption(trace: Trace) -> str:
    start, unit = trace.used(trace.events[0]), trace.unit
    shades = " Every figure over the steps shades the phases of the run." if len(trace.phases) > 1 else ""
    if trace.falling is None or trace.target is None:
        return f"From {start:,} to {trace.used(trace.events[-1]):,} {unit}.{shades}"
    warmup, fallen = trace.falling
    return (
        f"{start:,} {unit} until step {warmup:,}, {trace.target:,} from step {fallen:,}. "
        f"The dashed line is the budget.{shades}"
    )


def _types_caption(grid: Grid) -> str:
    hidden = len(grid.types) + bool(grid.others) - figures.SERIES
    if hidden <= 0:
        return "Mean over the layers."
    return f"Mean over the layers. The highest and the lowest are named; {hidden} in between are grey."


def _loss_caption(run: RunRecord) -> str:
    sentences = []
    if len(run.train) >= figures.SMOOTH_FROM:
        sentences.append("Training loss: the pale line is as logged, the strong line is smoothed.")
    elif len(run.train) == 1:
        sentences.append("Only one training loss has been logged.")
    elif not run.train:
        sentences.append("No training losses have been logged.")
    if not run.evaluations:
        sentences.append("No evaluation has been logged during training.")
    broken = sum(not math.isfinite(value) for _, value in (*run.train, *run.evaluations))
    if broken:
        words = "loss was not finite and is" if broken == 1 else "losses were not finite and are"
        sentences.append(f"{broken:,} logged {words} left out.")
    return " ".join(sentences) or "As logged."
