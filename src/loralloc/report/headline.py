"""What stands at the top of the page: one sentence, and the headline figures."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from loralloc.report import wording
from loralloc.report.run_record import RunRecord, number
from loralloc.tasks.spec import GREATER_IS_BETTER


class Bar(NamedTuple):
    """A value of the metric as a percentage of the scale; `ours` is the run's own, not a reference."""

    label: str
    percent: float
    value: str
    ours: bool


@dataclass(frozen=True)
class Headline:
    """One headline figure.

    Attributes:
        value: The figure itself; empty when there is none yet.
        total: What the figure is a part of.
        good: The note's first words when they are good news.
        bad: The note's first words when they are bad news.
    """

    label: str
    value: str
    note: str
    total: str = ""
    good: str = ""
    bad: str = ""
    bars: tuple[Bar, ...] = ()
    wide: bool = False


def summary(run: RunRecord) -> tuple[str, str, str]:
    """Return what became of the ranks, in one sentence: its beginning, its result and its end."""
    modules = run.plan.modules.values()
    start, kept = sum(module.start for module in modules), run.plan.total_rank
    moved = sum(max(0, module.rank - module.start) for module in modules)
    ranks, over = wording.count(kept, "rank"), f"over {wording.count(len(modules), 'module')}"
    steps = wording.count(run.last_step, "step") if run.last_step else ""
    if not run.finished:
        planned = f"; {steps} planned" if steps else ""
        return "Training has not finished. At present", f"{kept:,} of {start:,} ranks", f" are in use {over}{planned}."
    over += f" in {steps}" if steps else ""
    if all(module.rank == module.start for module in modules):
        return "Trained", ranks, f" {over}; every module kept the rank it started with."
    if moved and kept == start:
        return "Trained", ranks, f" {over}; {moved:,} of them moved to another module."
    return f"Started with {wording.count(start, 'rank')} and kept", f"{kept:,}", f" of them, {over}."


def headline(run: RunRecord) -> list[Headline]:
    """Return the headline figures: the metric with its references, ranks, parameters, time, adapter check."""
    return [_metric(run), _ranks(run), _parameters(run), _time(run), _adapter_check(run)]


def _metric(run: RunRecord) -> Headline:
    name = str(run.metrics.get("metric") or "metric").replace("_", " ")
    name = name[:1].upper() + name[1:]  # rougeL keeps its L
    values = wording.metric_values(run)
    measured = [data for data in ("test", "validation") if data in values]
    if not measured:
        later = "Not measured in this run." if run.metrics else "Measured when training has finished."
        return Headline(name, "", later, wide=True)
    data = measured[0]
    references = [f"{_label(key)} {wording.rounded(values[key])}" for key in values if key not in measured]
    note = f"on the {data} data; {', '.join(references) or 'nothing to compare with'}"
    if not GREATER_IS_BETTER.get(str(run.metrics.get("metric")), True):
        note += "; lower is better"
    return Headline(name, wording.rounded(values[data]), note, bars=_bars(values, measured), wide=True)


def _label(name: str) -> str:
    return {"majority": "majority class"}.get(name, name.replace("_", " "))


def _bars(values: dict[str, float], measured: list[str]) -> tuple[Bar, ...]:
    """The metric beside its references, on a scale from 0 to 1, or to the largest if that is more."""
    finite = {key: value for key, value in values.items() if math.isfinite(value)}
    if len(finite) < 2:
        return ()
    largest = max(1.0, *finite.values())
    return tuple(
        Bar(_label(key), round(max(0.0, 100 * value / largest), 1), wording.rounded(value), key in measured)
        for key, value in finite.items()
    )


def _ranks(run: RunRecord) -> Headline:
    modules = run.plan.modules.values()
    start, kept = sum(module.start for module in modules), run.plan.total_rank
    note = f"{kept / len(modules):.3g} per module; budget: {wording.budget(run)}"
    return Headline("Ranks" if run.finished else "Ranks so far", f"{kept:,}", note, total=f"{start:,}")


def _parameters(run: RunRecord) -> Headline:
    start, kept = run.plan.start_parameters, run.plan.parameters
    change = (
        "as at the start" if kept == start else f"{wording.percent_change(start, kept)} from {start:,} at the start"
    )
    return Headline("LoRA parameters", f"{kept:,}", f"{change}; heads not counted")


def _time(run: RunRecord) -> Headline:
    steps = wording.count(run.last_step, "step") if run.last_step else ""
    search = run.metrics.get("search")
    search_seconds = number(search.get("seconds")) if isinstance(search, dict) else 0.0
    seconds = number(run.metrics.get("train_seconds")) + search_seconds
    if not math.isfinite(seconds):
        return Headline("Training time", "", f"{steps} planned" if steps else "Not recorded.")
    note = f"{steps}, {seconds / run.last_step:.3g} s each" if steps else "number of steps not recorded"
    note += f"; {wording.duration(search_seconds)} of it for the search" if search_seconds else ""
    return Headline("Training time", wording.duration(seconds), note)


def _adapter_check(run: RunRecord) -> Headline:
    if run.metrics.get("adapter_check") is None:
        return Headline("Adapter check", "", "The exported adapter has not been compared with the trained model.")
    difference = number(run.metrics["adapter_check"])
    allowed = number(run.metrics.get("adapter_check_allowed"))
    value = f"{difference:.1e}" if math.isfinite(difference) else "not finite"
    note = "Largest change of a logit after reloading."
    if difference <= allowed:
        return Headline("Adapter check", value, note, good="✓ reloads as trained.")
    limit = f"above {allowed:.1e}, the most that rounding explains" if math.isfinite(allowed) else "no limit recorded"
    return Headline("Adapter check", value, note, bad=f"✗ {limit}.")
