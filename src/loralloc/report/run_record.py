"""Read a run folder: the plan, the trace of its ranks, the logged losses, the final figures and the recipe."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from loralloc import reading
from loralloc.errors import UserError
from loralloc.files import read_jsonl, read_text
from loralloc.plain_yaml import PlainLoader
from loralloc.plan import ModuleRank, PlanError, RankPlan
from loralloc.trace import LARGEST, Trace, read_trace

Points = tuple[tuple[int, float], ...]
"""Steps, and a value at each."""

SERIES = ("learning_rate", "grad_norm", "tokens_per_second", "examples_per_second", "memory_mib")
"""Logged values beside the loss that the report draws."""


@dataclass(frozen=True)
class RunRecord:
    """Everything the report shows, as found on disk.

    Attributes:
        path: The folder as the user named it.
        plan: Final ranks, or those of the latest trace event while training runs.
        finished: Whether the plan is final.
        trace: None when there is no trace.jsonl.
        train: (step, loss) of training; losses may be NaN.
        evaluations: (step, loss) of evaluation; losses may be NaN.
        budgets: (step, budget) as logged.
        series: (step, value) of every other logged value, for each of `SERIES` that the log has.
        metrics: metrics.json; empty when there is none.
        recipe_text: recipe.yaml as written; None when there is none.
        recipe: recipe.yaml parsed; empty when it is missing or not a mapping.
        search_steps: Steps of the search that preceded the training; they count on the time axis. 0 for none.
        absent: What is missing in the folder, each as a sentence.
    """

    path: Path
    plan: RankPlan
    finished: bool
    trace: Trace | None
    train: Points
    evaluations: Points
    budgets: tuple[tuple[int, int], ...]
    series: dict[str, Points]
    metrics: dict[str, Any]
    recipe_text: str | None
    recipe: dict[str, Any]
    search_steps: int
    absent: tuple[str, ...]

    @cached_property
    def last_step(self) -> int:
        """End of the time axis: the last step of an ended run; else the later of the planned and the reached step."""
        if self.finished and self.trace and self.trace.ended:
            return self.reached
        return max(self.reached, self.trace.total_steps if self.trace else 0)

    @cached_property
    def reached(self) -> int:
        """The last step that is logged or traced."""
        steps = [step for step, _ in (*self.train, *self.evaluations)]
        steps += [event.step for event in self.trace.events] if self.trace else []
        return max(steps, default=0)

    @property
    def bad_steps(self) -> int:
        """Number of skipped steps, from the trace or, without one, from the plan."""
        if self.trace:
            return len(self.trace.bad_steps)
        recorded = number(self.plan.provenance.get("bad_steps"))
        return int(recorded) if math.isfinite(recorded) else 0

    @property
    def classes(self) -> dict[str, int]:
        """Training examples of every class; empty for a task without classes and for runs that did not count them."""
        counts = {name: number(value) for name, value in mapping(self.metrics.get("classes")).items()}
        return {name: int(value) for name, value in counts.items() if math.isfinite(value)}

    def section(self, name: str) -> dict[str, Any]:
        """Return one mapping of the recipe; empty when it is not there."""
        return mapping(self.recipe.get(name))


def read_run(path: Path) -> RunRecord:
    """Read a run folder, finished or not.

    Args:
        path: The folder that `loralloc train` wrote, or a run without a recipe.

    Raises:
        UserError: The folder is not a run, or one of its files is damaged.
    """
    files = {name: path / name for name in ("ranks.json", "trace.jsonl", "log.jsonl", "metrics.json", "recipe.yaml")}
    absent = []
    searched = path / "search" / "trace.jsonl"
    others = (searched, searched.with_name("log.jsonl"), path / "model" / "config.json", path / "figures")
    reading.check_inside(path, [*files.values(), *others])
    trace = read_trace(files["trace.jsonl"] if files["trace.jsonl"].exists() else searched)
    finished = files["ranks.json"].exists()
    if not finished and trace is None:
        raise UserError(
            f"{path} is not a run folder: it has neither ranks.json nor a trace.jsonl with a start event. "
            "Give the folder that `loralloc train` wrote, the recipe's `output`"
        )
    recipe_text, recipe = _read_recipe(files["recipe.yaml"])
    if finished:
        plan = _read_plan(files["ranks.json"])
    else:
        assert trace is not None
        plan = _plan_so_far(trace, recipe)
        absent.append("ranks.json: training has not finished; the ranks shown are the latest in the trace.")
    if not plan.modules:
        raise UserError(f"{path}: the run has no adapted modules, so there is nothing to report")
    if trace is None:
        absent.append("trace.jsonl: how the ranks developed is not known.")
    log = _read_log(files["log.jsonl"])
    search_steps = trace.events[-1].step if trace and searched.exists() and files["log.jsonl"].exists() else 0
    if searched.exists():
        log = _after(_read_log(searched.with_name("log.jsonl")), log, search_steps)
    if not log.train and not log.evaluations:
        absent.append("log.jsonl: no losses have been logged.")
    metrics = _read_object(files["metrics.json"])
    if not metrics:
        absent.append("metrics.json: the final figures are written when training has finished.")
    if recipe_text is None:
        absent.append("recipe.yaml: the recipe of this run is not in the folder.")
    return RunRecord(
        path,
        plan,
        finished,
        trace,
        *log,
        metrics,
        recipe_text,
        recipe,
        search_steps,
        tuple(absent),
    )


def _read_plan(path: Path) -> RankPlan:
    try:
        return RankPlan.load(path)
    except PlanError as error:
        raise UserError(f"{error}; restore the file, or train again") from error


def _plan_so_far(trace: Trace, recipe: dict[str, Any]) -> RankPlan:
    """The ranks of a run that has not finished."""
    rows = zip(trace.sites, trace.events[-1].ranks, trace.events[0].ranks, trace.inputs, trace.outputs, strict=True)
    modules = {
        # The trace does not record the scale, and the report does not show it.
        name: ModuleRank(rank, start, inputs, outputs, scale=math.nan)
        for name, rank, start, inputs, outputs in rows
    }
    return RankPlan(str(mapping(recipe.get("method")).get("name", "")), modules, provenance={"label": trace.label})


class _Log(NamedTuple):
    train: Points
    evaluations: Points
    budgets: tuple[tuple[int, int], ...]
    series: dict[str, Points]


def _read_log(path: Path) -> _Log:
    rows = read_jsonl(path)
    return _Log(
        _points(rows, "loss"),
        _points(rows, "eval_loss"),
        tuple((step, int(value)) for step, value in _points(rows, "budget") if 0 <= value <= LARGEST),
        {name: points for name in SERIES if (points := _points(rows, name))},
    )


def _points(rows: Iterable[Mapping[str, Any]], name: str) -> Points:
    """The logged values of one name, with their steps."""
    return tuple([(row["step"], number(row[name])) for row in rows if name in row])  # read_jsonl has made steps whole


def _after(search: _Log, log: _Log, steps: int) -> _Log:
    """Join the log of a search of so many steps and that of the training after it; budgets are of the training only."""
    series = {
        name: (*search.series.get(name, ()), *_later(log.series.get(name, ()), steps))
        for name in SERIES
        if name in search.series or name in log.series
    }
    train = (*search.train, *_later(log.train, steps))
    return _Log(train, _later(log.evaluations, steps), log.budgets, series)


def _later(points: Points, steps: int) -> Points:
    """Move points later by the steps of the stage before them."""
    return tuple((step + steps, value) for step, value in points)


def _read_object(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    return reading.read_object(path, "restore the file, or delete it to report without it")


def _read_recipe(path: Path) -> tuple[str | None, dict[str, Any]]:
    if not path.exists():
        return None, {}
    text = read_text(path, reading.RECIPE_LIMIT)
    try:
        data = yaml.load(text, PlainLoader)
    except (yaml.YAMLError, ValueError):
        # The text is shown as it is; only the lines for loading the adapter become less specific.
        data = None
    return text, data if isinstance(data, dict) else {}


def number(value: object) -> float:
    """Return a JSON value as a number, NaN if it is not a number.

    >>> number(3), number("3"), number(None), number(True), number(10**400)
    (3.0, nan, nan, nan, nan)
    """
    try:
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return math.nan


def mapping(value: object) -> dict[str, Any]:
    """Return a JSON value if it is an object, else an empty one."""
    return value if isinstance(value, dict) else {}
