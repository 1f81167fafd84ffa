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
from loralloc.compare.results import Entry, Row, Trial
from loralloc.compare.verdict import Compared
from loralloc.report.tables import Table
from loralloc.report.wording import duration, rounded
from loralloc.tasks.metrics import spearman

NOTHING = "\N{EN DASH}"
COLUMNS = (
    "budget", "parameters_allowed", "contender", "kind", "learning_rate", "seed", "chosen", "state", "reason",
    "validation_loss", "held_out_loss", "metric", "held_out_metric", "parameters", "adapter_bytes", "seconds",
    "processor_seconds", "memory_mib",
)  # fmt: skip


def result_table(compared: Sequence[Compared], baseline: Entry, metric: str) -> Table:
    """Return a row for every contender at a budget: losses, the difference to plain LoRA, its interval and p."""
    head = ("", "learning rate", "test loss", metric.replace("_", " "), "difference", "95 % interval", "p (Holm)")
    rows = [_result(baseline, metric, ("", "", ""))]
    for one in compared:
        found = one.difference
        if found is None:
            cells = (NOTHING, NOTHING, NOTHING)
        else:
            interval = f"{signed(found.low)} to {signed(found.high)}" if math.isfinite(found.low) else NOTHING
            cells = (signed(found.mean), interval, "< 0.001" if found.adjusted < 0.001 else f"{found.adjusted:.3f}")
        rows.append(_result(one.entry, metric, cells))
    return Table(head, rows)


def _result(entry: Entry, metric: str, cells: tuple[str, ...]) -> tuple[str, ...]:
    chosen = entry.chosen
    if not chosen.finished:
        return (entry.contender.label, NOTHING, NOTHING, NOTHING, *cells)
    edge = " (edge)" if entry.at_edge else ""
    some = f" ({len(chosen.finished)} of {len(chosen.rows)} runs)" if entry.failures else ""
    return (
        entry.contender.label,
        f"{chosen.learning_rate:g}{edge}",
        f"{chosen.held_out('loss'):.4f}{some}",
        rounded(chosen.held_out(metric)),
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
    if all(len(set(plan)) == 1 for plan in plans):
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
    """Return the processor time of the cheapest contender, and the validation loss of all by then."""
    costs = [entry.chosen.average("processor_seconds") for entry in entries if entry.chosen.finished]
    if len(costs) < 2:
        return math.nan, None
    limit, rows = min(costs), []
    for entry in entries:
        course = mean_course(entry)
        by_then = [moment for moment in course if moment.processor_seconds <= limit * (1 + 1e-9)]
        if not course:
            continue
        share = min(1.0, limit / course[-1].processor_seconds)
        value = f"{by_then[-1].loss:.4f}" if by_then else "nothing yet"
        note = "with more ranks than it may keep" if by_then and by_then[-1].over else ""
        rows.append((entry.contender.label, f"{share:.0%}", value, f"{course[-1].loss:.4f}", note))
    return limit, Table(("", "of its run", "validation loss by then", "at its end", ""), rows)


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
            row.validation.get("loss"), row.held_out.get("loss"), metric, row.held_out.get(metric),
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
