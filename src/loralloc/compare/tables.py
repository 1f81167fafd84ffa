"""The tables of a comparison: results, costs, losses at equal processor time, failures, and a row for every run."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from itertools import combinations
from statistics import mean

import numpy as np

from loralloc.compare.figures import mean_course
from loralloc.compare.results import Entry, Moment, Row, Trial, differs_by_row
from loralloc.compare.statistics import Difference
from loralloc.compare.verdict import Compared
from loralloc.report.tables import Table
from loralloc.report.wording import duration, rounded
from loralloc.tasks.metrics import spearman

NOTHING = "\N{EN DASH}"
COLUMNS = (
    "budget", "parameters_allowed", "contender", "kind", "learning_rate", "seed", "chosen", "state", "reason",
    "validation_loss", "held_out_loss", "held_out_loss_per_example", "metric", "held_out_metric", "parameters",
    "adapter_bytes", "seconds", "processor_seconds", "memory_mib",
)  # fmt: skip


def result_table(compared: Sequence[Compared], baseline: Entry, metric: str, split: str) -> Table:
    """Return a row for every contender at a budget: losses, the difference to plain LoRA, its interval and p.

    The mean loss of a row has a column where it is another number than the task's loss.

    Args:
        compared: The contenders.
        baseline: Plain LoRA.
        metric: The metric to give beside the loss.
        split: The data that the losses are of: test or validation.
    """
    by_row = differs_by_row([baseline, *(one.entry for one in compared)])
    differences = (*(["loss of a row"] if by_row else []), "difference", "95 % interval", "p (Holm)")
    head = ("", "learning rate", f"{split} loss", metric.replace("_", " "), *differences)
    rows = [_result(baseline, metric, by_row, ("", "", ""))]
    for one in compared:
        found = one.difference
        cells = (NOTHING, NOTHING, NOTHING) if found is None else (signed(found.mean), *_certainty(found))
        rows.append(_result(one.entry, metric, by_row, cells))
    return Table(head, rows)


def _certainty(found: Difference) -> tuple[str, str]:
    """The interval of a difference, and p after the correction; neither is known of a single number."""
    if not found.known:
        return NOTHING, NOTHING
    p = "< 0.001" if found.adjusted < 0.001 else f"{found.adjusted:.3f}"
    return f"{signed(found.low)} to {signed(found.high)}", p


def _result(entry: Entry, metric: str, by_row: bool, cells: tuple[str, ...]) -> tuple[str, ...]:
    chosen = entry.chosen
    if not chosen.finished:
        return (entry.contender.label, *[NOTHING] * (4 if by_row else 3), *cells)
    edge = " (edge)" if entry.at_edge else ""
    some = f" ({len(chosen.finished)} of {len(chosen.rows)} runs)" if entry.failures else ""
    return (
        entry.contender.label,
        f"{chosen.learning_rate:g}{edge}",
        f"{chosen.held_out('loss'):.4f}{some}",
        rounded(chosen.held_out(metric)),
        *([f"{chosen.row_loss:.4f}"] if by_row else []),
        *cells,
    )


def cost_table(entries: Sequence[Entry]) -> Table:
    """Return what every contender costs, at its chosen rate, and how far its plans agree between the seeds."""
    head = ("", "parameters", "adapter, kB", "time of a run", "processor time", "memory, MiB", "agreement of plans")
    rows = []
    for entry in entries:
        chosen = entry.chosen
        if not chosen.finished:
            rows.append((entry.contender.label, *[NOTHING] * (len(head) - 1)))
            continue
        rows.append(
            (
                entry.contender.label,
                f"{chosen.average('parameters'):,.0f}",
                f"{chosen.average('adapter_bytes') / 1000:,.0f}",
                duration(chosen.average("seconds")),
                duration(chosen.average("processor_seconds")),
                f"{chosen.average('memory_mib'):,.0f}",
                agreement(chosen),
            )
        )
    return Table(head, rows)


def agreement(trial: Trial) -> str:
    """Return how far the seeds' plans agree: mean rank correlation and share of ranks in common, over all pairs."""
    names = dict.fromkeys(name for row in trial.finished for name in row.ranks)
    plans = [tuple(row.ranks.get(name, 0) for name in names) for row in trial.finished]
    if plans and all(len(set(plan)) == 1 for plan in plans):
        return "even"
    if len(plans) < 2:
        return NOTHING
    if len(set(plans)) == 1:
        return "the same"
    pairs = [(np.array(first, dtype=float), np.array(second, dtype=float)) for first, second in combinations(plans, 2)]
    correlation = mean(spearman(*pair) for pair in pairs)
    shared = mean(2 * float(np.minimum(*pair).sum()) / float(pair[0].sum() + pair[1].sum()) for pair in pairs)
    return f"{correlation:.2f}".replace("-", "\N{MINUS SIGN}") + f", {shared:.0%} in common"


def equal_time(entries: Sequence[Entry]) -> tuple[float, Table | None]:
    """Return the processor time of the cheapest contender, and the validation loss of all by then.

    Between two evaluations the loss is interpolated: a run that is nearly at its end is not to be judged by its middle.
    Plans do not count as cheapest: the run that has found the ranks is not in their time.
    """
    finished = [entry for entry in entries if entry.chosen.finished]
    costs = [entry.chosen.average("processor_seconds") for entry in finished if entry.contender.kind != "plan"]
    if len(costs) < 2:
        return math.nan, None
    limit = min(costs) * (1 + 1e-9)  # means of the same numbers differ by rounding: the cheapest is at its end
    rows = [(entry.contender.label, *_by_then(course, limit)) for entry in finished if (course := mean_course(entry))]
    return limit, Table(("", "of its run", "validation loss by then", "at its end", ""), rows)


def _by_then(course: Sequence[Moment], limit: float) -> tuple[str, str, str, str]:
    """How far a run was at a limit of processor time: share, loss, loss at its end, and a remark on its size."""
    times, losses = ([getattr(moment, name) for moment in course] for name in ("processor_seconds", "loss"))
    known = "nothing yet" if limit < times[0] else f"{np.interp(limit, times, losses):.4f}"
    before = [moment for moment in course if moment.processor_seconds <= limit]
    note = "with more ranks than it may keep" if before and before[-1].over else ""
    return f"{min(1.0, limit / times[-1]):.0%}", known, f"{losses[-1]:.4f}", note


def failure_table(rows: Sequence[Row]) -> Table | None:
    """Return the runs without a result and the reasons; None if all have one."""
    failed = [(row.cell.name, row.reason) for row in rows if row.reason]
    return Table(("run", "reason"), failed) if failed else None


def csv_text(rows: Sequence[Row], chosen: Sequence[Entry], metric: str) -> str:
    """Return compare.csv: a row for every run."""
    judged = {row.cell.name for entry in chosen for row in entry.chosen.rows}
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        cell = row.cell
        values = (
            row.validation.get("loss"), row.held_out.get("loss"), row.row_loss, metric, row.held_out.get(metric),
            row.parameters or None, row.adapter_bytes or None, row.seconds, row.processor_seconds, row.memory_mib,
        )  # fmt: skip
        writer.writerow(
            [
                cell.point.label, cell.point.parameters, cell.contender.id, cell.contender.kind,
                f"{cell.learning_rate:g}", cell.seed, cell.name in judged, "finished" if row.finished else "failed",
                row.reason, *(_written(value) for value in values),
            ]
        )  # fmt: skip
    return file.getvalue()


def _written(value: object) -> object:
    return "" if value is None or (isinstance(value, float) and not math.isfinite(value)) else value


def signed(value: float) -> str:
    """Write a difference with its sign.

    >>> signed(0.01234), signed(-0.5)
    ('+0.0123', '−0.5000')
    """
    return f"{value:+.4f}".replace("-", "\N{MINUS SIGN}")
