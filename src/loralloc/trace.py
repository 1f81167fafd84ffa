"""trace.jsonl: how the ranks of a run developed, one event a line. Its keys are written and read here and nowhere else.

| event | when | keys besides `event` and `step` |
|---|---|---|
| `start` | first | `label`, `total_steps`, `sites`, `in`, `out`, `ranks`, and what `schedule_of` returns |
| `allocate` | ranks have changed | `budget`, `ranks`, `parameters`, and what the method tells |
| `freeze` | ranks are final | the same |
| `plan` | a search has checked its plan | `ranks`, `parameters`, `settled`, and what the method tells |
| `bad_step` | a step was skipped | |
| `finish` | last | `ranks`, `parameters` |

Ranks are those of all sites, in their order. Standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import mul
from pathlib import Path
from typing import Any

from loralloc.errors import UserError
from loralloc.files import read_jsonl, write_atomically
from loralloc.naming import LONGEST, is_module_name
from loralloc.schedule import FALLS, Schedule

Event = dict[str, Any]
Span = tuple[str, int, int]

MOST_PHASES = 16
"""Most phases of a schedule in a trace; real schedules have at most three."""

LARGEST = 2**53
"""Largest count that is accepted in a trace; no real budget comes near it, not even in bytes."""


# ---- Writing ----


def start_event(
    label: str, sites: Sequence[str], sizes: Sequence[tuple[int, int]], ranks: Sequence[int], total_steps: int
) -> Event:
    """Return the event that opens a trace.

    Args:
        label: What the method is called.
        sites: Full names of the modules, in the model's order.
        sizes: Inputs and outputs of each.
        ranks: Their ranks at the start.
        total_steps: Optimizer steps of the run.
    """
    inputs, outputs = zip(*sizes, strict=True)
    return {
        "event": "start",
        "step": 0,
        "label": label,
        "total_steps": total_steps,
        "sites": list(sites),
        "in": list(inputs),
        "out": list(outputs),
        "ranks": list(ranks),
    }


def schedule_of(schedule: Schedule, unit: str, costs: Sequence[int], target: int | None) -> Event:
    """Return what a start event says of a schedule.

    Args:
        schedule: The budget over the run.
        unit: What it counts.
        costs: What one rank of each site costs, in this unit.
        target: The budget at the end; None for a run without one.
    """
    common = ("total_steps", "start", "target")
    own = {key: value for key, value in asdict(schedule).items() if key not in common}  # type: ignore[call-overload]
    return {
        "schedule": own,
        "phases": [list(span) for span in schedule.spans()],
        "unit": unit,
        "costs": list(costs),
        "start_budget": schedule.start,
        "target_budget": target,
    }


def allocation_event(
    step: int, budget: int, ranks: Sequence[int], parameters: int, *, final: bool, details: Mapping[str, Any]
) -> Event:
    """Return the event of a decision."""
    name = "freeze" if final else "allocate"
    return {"event": name, "step": step, "budget": budget, "ranks": ranks, "parameters": parameters, **details}


def plan_event(step: int, ranks: Sequence[int], parameters: int, *, settled: bool, details: Mapping[str, Any]) -> Event:
    """Return the event of a check of a search's plan: what it would keep now."""
    return {"event": "plan", "step": step, "ranks": ranks, "parameters": parameters, "settled": settled, **details}


def bad_step_event(step: int) -> Event:
    """Return the event of a step that was skipped."""
    return {"event": "bad_step", "step": step}


def finish_event(step: int, ranks: Sequence[int], parameters: int) -> Event:
    """Return the event that ends a trace."""
    return {"event": "finish", "step": step, "ranks": ranks, "parameters": parameters}


def append(path: Path, *events: Event) -> None:
    """Write events at the end of a trace."""
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(event) + "\n" for event in events))


def rewind(path: Path, step: int) -> bool:
    """Drop the events from a step on, for a run that goes on there.

    Returns:
        Whether any event is left.

    Raises:
        UserError: The file is damaged.
    """
    before = [event for event in read_jsonl(path) if event["step"] < step]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(json.dumps(event) + "\n" for event in before))
    return bool(before)


# ---- Reading ----


@dataclass(frozen=True)
class RankEvent:
    """The ranks of all sites after one step, in the order of `Trace.sites`."""

    step: int
    ranks: tuple[int, ...]
    budget: int | None


@dataclass(frozen=True)
class Trace:
    """How the ranks developed.

    Attributes:
        label: What the method is called; empty when the trace does not say.
        sites: Full module names, in the model's order.
        inputs: Input features of each site.
        outputs: Output features of each site.
        unit: What the budget counts: "ranks", "parameters" or "bytes".
        costs: What one rank of each site costs, in this unit.
        total_steps: Optimizer steps of the run; 0 when the trace does not say.
        phases: (name, first step, last step) of each phase of the schedule; empty without one.
        target: Budget at the end; None without a budget.
        events: Every event that has ranks, the start first; for a search, this includes the plan at each check.
        ended: Whether the run has ended; it may have been planned for more steps.
        bad_steps: Steps that were skipped because their gradient was not finite.
    """

    label: str
    sites: tuple[str, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    unit: str
    costs: tuple[int, ...]
    total_steps: int
    phases: tuple[Span, ...]
    target: int | None
    events: tuple[RankEvent, ...]
    ended: bool
    bad_steps: tuple[int, ...]

    @property
    def constant(self) -> bool:
        """Whether no module ever changed its rank."""
        return all(event.ranks == self.events[0].ranks for event in self.events)

    @property
    def falling(self) -> tuple[int, int] | None:
        """The step after which the budget falls and the one at which it has fallen; None where it does not fall."""
        return next(((first - 1, last) for name, first, last in self.phases if name == FALLS), None)

    def used(self, event: RankEvent) -> int:
        """Return what the ranks of an event cost, in the unit of the budget."""
        return sum(map(mul, event.ranks, self.costs))


def read_trace(path: Path) -> Trace | None:
    """Read a trace.

    Args:
        path: The file.

    Returns:
        The trace; None where there is no file, or no start event in it.

    Raises:
        UserError: The file is damaged.
    """
    rows = read_jsonl(path)
    at = next((i for i, row in enumerate(rows) if row.get("event") == "start"), None)
    if at is None:
        return None
    try:
        return _trace(path, rows[at], rows[at:])
    except UserError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: an event lacks a field or has a wrong one ({error!r}); restore the file") from error


def _trace(path: Path, start: Event, rows: Sequence[Event]) -> Trace:
    sites, unit = _sites(start["sites"]), _word(start.get("unit", "ranks"))
    inputs, outputs = (_whole_numbers(start[key], least=1) for key in ("in", "out"))
    parameters = [a + b for a, b in zip(inputs, outputs, strict=True)]
    costs = _whole_numbers(start.get("costs") or ([1] * len(sites) if unit == "ranks" else parameters))
    if not len(sites) == len(inputs) == len(costs):
        raise ValueError(f"{len(inputs)} sizes and {len(costs)} costs of {len(sites)} sites")
    events = []
    for row in (start, *(row for row in rows[1:] if "ranks" in row)):
        ranks = _whole_numbers(row["ranks"])
        if len(ranks) != len(sites):
            raise UserError(
                f"{path}: {len(ranks)} ranks for {len(sites)} sites at step {row['step']}; restore the file"
            )
        budget = row.get("start_budget" if row is start else "budget")
        events.append(RankEvent(row["step"], ranks, None if budget is None else _whole(budget)))
    target = start.get("target_budget")
    return Trace(
        label=_word(start.get("label", "")),
        sites=sites,
        inputs=inputs,
        outputs=outputs,
        unit=unit,
        costs=costs,
        total_steps=_whole(start.get("total_steps") or 0),
        phases=_spans(start.get("phases") or ()),
        target=None if target is None else _whole(target),
        events=tuple(events),
        ended=rows[-1].get("event") == "finish",
        bad_steps=tuple(sorted({row["step"] for row in rows if row.get("event") == "bad_step"})),
    )


def _sites(names: Sequence[Any]) -> tuple[str, ...]:
    """Return names of modules, each once."""
    wrong = next((name for name in names if not is_module_name(name)), None)
    if wrong is not None or not isinstance(names, list) or len(set(names)) < len(names):
        raise ValueError(f"sites must be names of modules, each once, got {_shown(names if wrong is None else wrong)}")
    return tuple(names)


def _spans(phases: Sequence[Any]) -> tuple[Span, ...]:
    if len(phases) > MOST_PHASES:
        raise ValueError(f"{len(phases):,} phases, but at most {MOST_PHASES} are allowed")
    return tuple((_word(name), _whole(first), _whole(last)) for name, first, last in phases)


def _word(value: Any) -> str:
    """Return a short text; refuse what is none."""
    if not isinstance(value, str) or len(value) > LONGEST:
        raise ValueError(f"{_shown(value)} is no name")
    return value


def _whole_numbers(values: Sequence[Any], least: int = 0) -> tuple[int, ...]:
    return tuple(_whole(value, least) for value in values)


def _whole(value: Any, least: int = 0) -> int:
    """Return a count; refuse what is none, such as 1e300 or -3."""
    if type(value) is not int or not least <= value <= LARGEST:
        raise ValueError(f"{_shown(value)} is not a whole number from {least} to {LARGEST}")
    return value


def _shown(value: Any) -> str:
    return repr(value)[:80]
