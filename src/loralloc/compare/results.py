"""The results of a comparison's runs, and the learning rate at which each contender is judged."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loralloc.compare.folder import CompareFolder
from loralloc.compare.grid import BASELINE, Cell, Contender, Point
from loralloc.errors import UserError
from loralloc.files import read_jsonl
from loralloc.plan import RankPlan
from loralloc.recipe.run_folder import RunFolder
from loralloc.recipe.schema import Recipe
from loralloc.report.run_record import number
from loralloc.tasks.spec import GREATER_IS_BETTER
from loralloc.trace import read_trace

DIVERGED = "the validation loss is not finite: the training has diverged"
ROUNDING = 1e-4
"""Relative difference of two means of the same losses, at most: they are summed in another order and precision."""
UNFINITE = "the losses of {} of {:,} held-out examples are not finite: they cannot be compared"


@dataclass(frozen=True)
class Moment:
    """An evaluation within a run.

    Attributes:
        processor_seconds: Processor time of the run so far, a search included.
        loss: Loss on the validation data.
        over: Whether the adapter was still larger than at the end, in the budget's unit.
    """

    processor_seconds: float
    loss: float
    over: bool


@dataclass(frozen=True)
class Row:
    """The result of a run, or the reason for its failure.

    Attributes:
        cell: The run.
        reason: Why there is no result; empty if there is one.
        pending: Whether the next call of the same comparison runs it again.
        validation: Metrics on the validation data.
        held_out: Metrics on the test data or, without test data, on the validation data.
        losses: The loss of every held-out row.
        parameters: Parameters of the final adapter.
        adapter_bytes: Size of its weights file.
        seconds: Training time, a search included.
        processor_seconds: The same in processor time.
        memory_mib: Peak memory.
        ranks: The rank of every adapted module, by its name.
        course: Evaluations during training, then the evaluation of the final adapter.
    """

    cell: Cell
    reason: str = ""
    pending: bool = False
    validation: Mapping[str, float] = field(default_factory=dict)
    held_out: Mapping[str, float] = field(default_factory=dict)
    losses: NDArray[np.float64] | None = None
    parameters: int = 0
    adapter_bytes: int = 0
    seconds: float = math.nan
    processor_seconds: float = math.nan
    memory_mib: float = math.nan
    ranks: Mapping[str, int] = field(default_factory=dict)
    course: tuple[Moment, ...] = ()

    @property
    def finished(self) -> bool:
        """Whether there is something to compare."""
        return not self.reason

    @property
    def row_loss(self) -> float:
        """The mean loss of a held-out row; NaN where there are none."""
        return math.nan if self.losses is None else float(self.losses.mean())


def read_row(folder: CompareFolder, cell: Cell) -> Row:
    """Read the result of a run from its folder."""
    run = folder.run(cell.name)
    if not run.metrics.is_file():
        reason, final = folder.reason(cell.name) or ("not run yet", False)
        return Row(cell, reason=reason, pending=not final)
    metrics: dict[str, Any] = json.loads(run.metrics.read_text(encoding="utf-8"))
    validation, held_out = (_numbers(metrics[name]) for name in ("validation", "test"))
    search = metrics.get("search") or {}
    log = read_jsonl(run.log)
    weights = run.adapter / "adapter_model.safetensors"
    searched = number(search.get("processor_seconds", 0.0))
    cost = number(metrics["processor_seconds"]) + searched
    losses = _losses(run, held_out or validation)
    return Row(
        cell,
        reason=_not_finite(validation, losses),
        validation=validation,
        held_out=held_out or validation,
        losses=losses,
        parameters=metrics["final_parameters"],
        adapter_bytes=weights.stat().st_size if weights.is_file() else 0,
        seconds=number(metrics["train_seconds"]) + number(search.get("seconds", 0.0)),
        processor_seconds=cost,
        memory_mib=max((number(row["memory_mib"]) for row in log if "memory_mib" in row), default=math.nan),
        ranks=_ranks(run, cell.recipe.plan),
        course=_course(run, log, cost, searched, validation.get("loss", math.nan)),
    )


def _ranks(run: RunFolder, plan: str | None) -> dict[str, int]:
    """The ranks of a run; a run from a plan has no adapter at the plan's modules of rank 0."""
    closed = {} if plan is None else dict.fromkeys(RankPlan.load(plan).ranks, 0)
    return closed | RankPlan.load(run.plan).ranks


def _not_finite(validation: Mapping[str, float], losses: NDArray[np.float64] | None) -> str:
    """Why a finished run cannot be compared; empty if it can."""
    if not math.isfinite(validation.get("loss", math.nan)):
        return DIVERGED
    if losses is None or np.isfinite(losses).all():
        return ""
    return UNFINITE.format(int((~np.isfinite(losses)).sum()), len(losses))


def _numbers(found: Mapping[str, Any] | None) -> dict[str, float]:
    return {name: number(value) for name, value in (found or {}).items()}


def _losses(run: RunFolder, held_out: Mapping[str, float]) -> NDArray[np.float64] | None:
    """The loss of every held-out row; if these were not saved, the mean loss as a single row."""
    if run.losses.is_file():
        losses = json.loads(run.losses.read_text(encoding="utf-8"))["losses"]
        return np.array([math.nan if loss is None else loss for loss in losses], dtype=np.float64)
    return np.array([held_out["loss"]]) if "loss" in held_out else None


def _course(
    run: RunFolder, log: Sequence[Mapping[str, Any]], cost: float, before: float, last: float
) -> tuple[Moment, ...]:
    """The evaluations during training, then the final one; `before` is the processor time of a search."""
    timed = [(row["step"], number(row["processor_seconds"])) for row in log if "processor_seconds" in row]
    seen = [(row["step"], number(row["eval_loss"])) for row in log if "eval_loss" in row]
    if not timed or not seen:
        return (Moment(cost, last, over=False),)
    steps, seconds = zip((0, 0.0), *timed, strict=True)
    trace = None if before else read_trace(run.trace)  # after a search the ranks are final
    final = seen[-1][0]
    moments = []
    for step, loss in seen:
        if step < final:
            over = trace is not None and _used(trace, step) > trace.used(trace.events[-1])
            moments.append(Moment(before + float(np.interp(step, steps, seconds)), loss, over))
    return (*moments, Moment(cost, last, over=False))


def _used(trace: Any, step: int) -> int:
    return trace.used([event for event in trace.events if event.step <= step][-1])


@dataclass(frozen=True)
class Trial:
    """A learning rate that was tried.

    Attributes:
        learning_rate: The rate.
        rows: Its runs, one for each seed.
        tuning: Its runs with the tuning seeds, which try every rate.
        score: Mean validation score of the finished tuning runs, signed so that lower is better; NaN if there are none.
        worth: The same over all seeds.
    """

    learning_rate: float
    rows: tuple[Row, ...]
    tuning: tuple[Row, ...]
    score: float
    worth: float

    @property
    def finished(self) -> list[Row]:
        """The runs that have a result."""
        return [row for row in self.rows if row.finished]

    def average(self, name: str) -> float:
        """The mean over the seeds of a field of `Row`."""
        return mean([float(getattr(row, name)) for row in self.finished] or [math.nan])

    def held_out(self, name: str) -> float:
        """The mean over the seeds of a metric on the held-out data."""
        return _held_out(self.rows, name)

    @property
    def row_loss(self) -> float:
        """The mean over the seeds of the loss of a held-out row: what differences are differences of."""
        return mean([row.row_loss for row in self.finished if row.losses is not None] or [math.nan])

    def tried(self, name: str) -> float:
        """The mean over the tuning seeds of a metric on the held-out data."""
        return _held_out(self.tuning, name)


def differs_by_row(entries: Iterable[Entry]) -> bool:
    """Whether the mean loss of a row is another number than the loss of the task.

    It is where the task's loss counts tokens, so that long rows weigh more, or is the loss of something else.
    """
    pairs = [(entry.chosen.held_out("loss"), entry.chosen.row_loss) for entry in entries]
    return any(not math.isclose(*pair, rel_tol=ROUNDING) for pair in pairs if all(map(math.isfinite, pair)))


def rows_have_losses(entries: Iterable[Entry]) -> bool:
    """Whether held-out rows have losses of their own; it is also false where there is a single row.

    With `preference` only their mean is known. It counts as one row.
    """
    counts = [len(row.losses) for entry in entries for row in entry.chosen.finished if row.losses is not None]
    return not counts or max(counts) > 1


def _held_out(rows: Iterable[Row], name: str) -> float:
    return mean([row.held_out.get(name, math.nan) for row in rows if row.finished] or [math.nan])


@dataclass(frozen=True)
class Entry:
    """A contender at a budget.

    Attributes:
        point: The budget.
        contender: The contender.
        trials: The runs at each learning rate, the smallest rate first.
        chosen: The runs at the rate at which it is judged.
    """

    point: Point
    contender: Contender
    trials: tuple[Trial, ...]
    chosen: Trial

    @property
    def failures(self) -> int:
        """Runs at the chosen rate that have no result."""
        return len(self.chosen.rows) - len(self.chosen.finished)

    @property
    def complete(self) -> bool:
        """Whether there is a chosen rate, with a result for every seed."""
        return math.isfinite(self.chosen.score) and not self.failures

    @property
    def at_edge(self) -> bool:
        """Whether the chosen rate is the smallest or the largest of three or more: a better one may lie beyond."""
        ends = (self.trials[0], self.trials[-1])
        return len(self.trials) > 2 and self.chosen in ends and math.isfinite(self.chosen.score)


def criterion(recipe: Recipe) -> str:
    """Return the metric by which learning rates are chosen: the recipe's `evaluate.metric`, else the loss."""
    return recipe.evaluate.metric or "loss"


def entries(rows: Iterable[Row], metric: str, tuning: Collection[int] | None = None) -> list[Entry]:
    """Choose a learning rate for every contender at every budget.

    The rate with the fewest failed tuning runs is chosen; among these, the one with the best mean validation score over
    the tuning seeds; of equal ones, the smallest.

    Args:
        rows: The runs.
        metric: See `criterion`.
        tuning: The tuning seeds, which try every rate; None: all seeds.

    Raises:
        UserError: No run has the metric.
    """
    rows = list(rows)
    known = dict.fromkeys(name for row in rows for name in row.validation)
    if known and metric not in known:
        raise UserError(f"evaluate.metric: these runs have no metric {metric}; they have {', '.join(known)}")
    grouped: dict[tuple[Point, Contender], dict[float, list[Row]]] = {}
    for row in rows:
        by_rate = grouped.setdefault((row.cell.point, row.cell.contender), {})
        by_rate.setdefault(row.cell.learning_rate, []).append(row)
    sign = sign_of(metric)
    found = []
    for (point, contender), by_rate in grouped.items():
        trials = tuple(_trial(rate, by_rate[rate], tuning, metric, sign) for rate in sorted(by_rate))
        best = min(trials, key=lambda trial: (*_order(trial.tuning, trial.score), trial.learning_rate))
        found.append(Entry(point, contender, trials, best))
    return found


def sign_of(metric: str) -> int:
    """Return -1 for a metric of which more is better, else 1: times it, lower is better."""
    return -1 if GREATER_IS_BETTER.get(metric, metric != "loss") else 1


def _trial(rate: float, rows: Iterable[Row], tuning: Collection[int] | None, metric: str, sign: int) -> Trial:
    rows = tuple(sorted(rows, key=lambda row: row.cell.seed))
    tried = tuple(row for row in rows if tuning is None or row.cell.seed in tuning)
    score, worth = (
        mean([sign * row.validation.get(metric, math.nan) for row in part if row.finished] or [math.nan])
        for part in (tried, rows)
    )
    return Trial(rate, rows, tried, score, worth)


def _order(rows: Iterable[Row], score: float) -> tuple[int, float]:
    failed = sum(not row.finished for row in rows)
    return failed, score if math.isfinite(score) else math.inf


def winner(found: Iterable[Entry], point: Point) -> Entry | None:
    """Return the best method on the validation data at a budget, of those with uneven ranks; None if there is none."""
    allocating = [
        entry
        for entry in found
        if entry.point == point
        and entry.contender.kind == "method"
        and any(len(set(row.ranks.values())) > 1 for row in entry.chosen.finished)
    ]
    return min(allocating, key=lambda entry: _order(entry.chosen.rows, entry.chosen.worth), default=None)


def paired(entry: Entry, baseline: Entry) -> NDArray[np.float64] | None:
    """Return a contender's losses minus plain LoRA's, [seeds, rows], at the chosen rates, for seeds that both have."""
    theirs = {row.cell.seed: row.losses for row in baseline.chosen.finished if row.losses is not None}
    pairs = [
        row.losses - theirs[row.cell.seed]
        for row in entry.chosen.finished
        if row.losses is not None and row.cell.seed in theirs and len(row.losses) == len(theirs[row.cell.seed])
    ]
    return np.stack(pairs) if pairs else None


def baseline_of(found: Iterable[Entry], point: Point) -> Entry:
    """Return plain LoRA at a budget."""
    return next(entry for entry in found if entry.point == point and entry.contender == BASELINE)
