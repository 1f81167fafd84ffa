"""The schedules by which a run comes down to its budget. Numbers only: no tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from loralloc.errors import UserError

Phase = Literal["warmup", "decrease", "final"]

# What the phases of a run are called, in terminals and reports.
WARM_UP, FALLS, ROUNDS, FINAL, ALL = "warm-up", "budget falls", "rounds", "final ranks", "all ranks"


class Schedule(Protocol):
    """The budget over a run."""

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        ...

    @property
    def start(self) -> int:
        """Budget at the start."""
        ...

    @property
    def target(self) -> int:
        """Budget at the end."""
        ...

    @property
    def steps_until_final(self) -> int:
        """Optimizer steps after which the ranks are final.

        0 if they are final from the start; more than `total_steps` if they are chosen when the run ends.
        """
        ...

    def budget(self, step: int) -> int:
        """Return the budget after the 0-based optimizer step."""
        ...

    def spans(self) -> Sequence[tuple[str, int, int]]:
        """Return the phases as (name, first step, last step), those without a step left out."""
        ...


@dataclass(frozen=True)
class ConstantSchedule:
    """A budget that is the same from start to end.

    Attributes:
        total_steps: Optimizer steps of the run.
        start: Budget at the start.
        target: Budget at the end.
    """

    total_steps: int
    start: int
    target: int

    @property
    def steps_until_final(self) -> int:
        """Always 0: the ranks are final from the start."""
        return 0

    def budget(self, step: int) -> int:
        """Return the start, whatever the step."""
        del step
        return self.start

    def spans(self) -> Sequence[tuple[str, int, int]]:
        """Return the one phase."""
        return [(FINAL, 0, self.total_steps - 1)]


@dataclass(frozen=True)
class CutSchedule:
    """All ranks up to one step, after which they are chosen at once.

    Attributes:
        total_steps: Optimizer steps of the run.
        start: Budget before the cut.
        target: Budget after it.
        cut: Steps before the cut; equal to `total_steps` if ranks are chosen when the run ends.

    >>> schedule = CutSchedule(total_steps=100, start=216, target=144, cut=80)
    >>> [schedule.budget(t) for t in (0, 78, 79, 99)], schedule.cuts_after(79)
    ([216, 216, 144, 144], True)
    """

    total_steps: int
    start: int
    target: int
    cut: int

    @property
    def steps_until_final(self) -> int:
        """The steps before the cut; more than `total_steps` if the cut is at the end of the run."""
        return self.cut if self.cut < self.total_steps else self.total_steps + 1

    def cuts_after(self, step: int) -> bool:
        """Whether the cut follows the 0-based optimizer step."""
        return step + 1 == self.cut < self.total_steps

    def budget(self, step: int) -> int:
        """Return `start` before the cut and `target` after it; if the cut is at the end, `start` at every step."""
        return self.start if step + 1 < self.steps_until_final else self.target

    def spans(self) -> Sequence[tuple[str, int, int]]:
        """Return the steps with all ranks and those with the final ones."""
        edges = {ALL: (0, self.cut - 1), FINAL: (self.cut, self.total_steps - 1)}
        return [(name, first, last) for name, (first, last) in edges.items() if first <= last]


@dataclass(frozen=True)
class RoundSchedule:
    """A constant number of ranks, some of which move between modules in rounds.

    Attributes:
        total_steps: Optimizer steps of the run.
        start: Budget throughout (it may shrink when no module is left to receive a rank).
        target: The same.
        warmup: Steps before the first round.
        interval: Steps between rounds.
        rounds: Number of rounds.

    >>> schedule = RoundSchedule(total_steps=100, start=56, target=56, warmup=20, interval=10, rounds=3)
    >>> [t for t in range(100) if schedule.round_after(t) is not None], schedule.steps_until_final
    ([19, 29, 39], 40)
    """

    total_steps: int
    start: int
    target: int
    warmup: int
    interval: int
    rounds: int

    @property
    def steps_until_final(self) -> int:
        """Those up to the last round."""
        return self.warmup + (self.rounds - 1) * self.interval if self.rounds else 0

    def round_after(self, step: int) -> int | None:
        """Return the number of the round that follows the 0-based optimizer step, from 0 on; None for no round."""
        done, rest = divmod(step + 1 - self.warmup, self.interval)
        return done if rest == 0 and 0 <= done < self.rounds else None

    def budget(self, step: int) -> int:
        """Return the start, whatever the step."""
        del step
        return self.start

    def spans(self) -> Sequence[tuple[str, int, int]]:
        """Return warm-up, rounds and final ranks."""
        final = self.steps_until_final
        warmup = self.warmup if self.rounds else 0
        edges = {WARM_UP: (0, warmup - 1), ROUNDS: (warmup, final - 1), FINAL: (final, self.total_steps - 1)}
        return [(name, first, last) for name, (first, last) in edges.items() if first <= last]


@dataclass(frozen=True)
class BudgetSchedule:
    """The cubic budget of AdaLoRA, as its code has it (the formula printed in the paper, eq. 14, is misprinted).

        b(t) = start                                                t ≤ warmup
        b(t) = ⌊target + (start − target) · m³⌋,  m = 1 − (t − warmup)/(fallen − warmup)
        b(t) = target                                               t > fallen

    Attributes:
        total_steps: Optimizer steps of the run, T.
        warmup: Last step at the full budget, t_i.
        fallen: Step T − t_f; from here on the budget is the target.
        interval: Between `warmup` and `fallen`, ranks are closed at multiples of this many steps.
        start: Budget at the start.
        target: Budget at the end.
    """

    total_steps: int
    warmup: int
    fallen: int
    interval: int
    start: int
    target: int

    @property
    def steps_until_final(self) -> int:
        """The steps up to and including the first one of the final phase, after which ranks are closed for good."""
        return self.fallen + 2

    def phase(self, step: int) -> Phase:
        """Return the phase that the 0-based optimizer step belongs to."""
        return "warmup" if step <= self.warmup else "decrease" if step <= self.fallen else "final"

    def budget(self, step: int) -> int:
        """Return b(step).

        >>> schedule = BudgetSchedule(total_steps=100, warmup=10, fallen=70, interval=10, start=216, target=144)
        >>> [schedule.budget(t) for t in (0, 10, 11, 12, 20, 30, 40, 50, 60, 70)]
        [216, 216, 212, 209, 185, 165, 153, 146, 144, 144]
        """
        if step <= self.warmup:
            return self.start
        if step > self.fallen:
            return self.target
        remaining = 1 - (step - self.warmup) / (self.fallen - self.warmup)
        return int(self.target + (self.start - self.target) * remaining**3)

    def spans(self) -> Sequence[tuple[str, int, int]]:
        """Return warm-up, falling budget and final ranks."""
        edges = {WARM_UP: (0, self.warmup), FALLS: (self.warmup + 1, self.fallen)}
        edges[FINAL] = (self.fallen + 1, self.total_steps - 1)
        return [(name, first, last) for name, (first, last) in edges.items() if first <= last]

    def closes(self, step: int) -> bool:
        """Whether ranks are closed after this step: at multiples of `interval` while the budget falls, then always."""
        phase = self.phase(step)
        return phase == "final" or (phase == "decrease" and step % self.interval == 0)


def cubic_schedule(
    total_steps: int, warmup: float, cooldown: float, interval: int | None, start: int, target: int
) -> BudgetSchedule:
    """Lay the three phases over a run.

    Args:
        total_steps: Optimizer steps of the run.
        warmup: Steps at the full budget: a whole number of steps (int), or a fraction of the run (float below 1).
        cooldown: Steps at the final budget, likewise. Two or more, so that ranks are closed for good before the end.
        interval: Steps between closings; None for about 500 over the run.
        start: Budget at the start, in its unit.
        target: Budget at the end.

    Raises:
        UserError: The phases do not fit into the run, or a number is out of range.

    >>> cubic_schedule(3000, 500, 0.5, None, 864, 576).budget(1000)
    612
    """
    if total_steps < 3:
        raise UserError(f"allocating ranks takes at least 3 optimizer steps, the run has {total_steps}")
    if interval is not None and interval < 1:
        raise UserError(f"interval must be at least 1 step, got {interval}")
    warmup_steps = phase_steps("warmup", warmup, total_steps)
    cooldown_steps = phase_steps("cooldown", cooldown, total_steps, least=2)
    if warmup_steps + cooldown_steps >= total_steps:
        raise UserError(
            f"no step is left in which the budget could fall: warmup={warmup} ({warmup_steps} steps) and "
            f"cooldown={cooldown} ({cooldown_steps} steps) fill the {total_steps} steps of the run"
        )
    return BudgetSchedule(
        total_steps=total_steps,
        warmup=warmup_steps,
        fallen=total_steps - cooldown_steps,
        interval=interval or max(1, round(total_steps / 500)),
        start=start,
        target=target,
    )


def round_schedule(total_steps: int, warmup: float, interval: float, rounds: int, target: int) -> RoundSchedule:
    """Lay rounds over a run.

    Args:
        total_steps: Optimizer steps of the run.
        warmup: Steps before the first round: a whole number (int), or a fraction of the run (float below 1). One or
            more, since a rank that was never trained has no score.
        interval: Steps between rounds, likewise.
        rounds: Number of rounds.
        target: The budget.

    Raises:
        UserError: The rounds do not fit into the run: new ranks must be trained for at least one step.

    >>> round_schedule(100, 0.2, 0.05, 3, 56)
    RoundSchedule(total_steps=100, start=56, target=56, warmup=20, interval=5, rounds=3)
    """
    first = phase_steps("warmup", warmup, total_steps, least=1)
    between = phase_steps("interval", interval, total_steps, least=1)
    last = first + (rounds - 1) * between
    if rounds and last >= total_steps:
        raise UserError(
            f"the last of {rounds} rounds would follow step {last} of {total_steps}, and new ranks would never be "
            f"trained: lower warmup={warmup} ({first} steps), interval={interval} ({between} steps) or rounds"
        )
    return RoundSchedule(total_steps, target, target, first, between, rounds)


def phase_steps(name: str, value: float, total_steps: int, least: int = 0) -> int:
    """Turn a phase given as steps (int) or as a fraction of the run (float) into steps.

    Args:
        name: What the phase is called.
        value: Its length.
        total_steps: Optimizer steps of the run.
        least: Steps that it takes at least. A fraction is rounded up to them.

    Raises:
        UserError: A fraction outside [0, 1), or too few steps.

    >>> phase_steps("warmup", 0.15, 300), phase_steps("warmup", 20, 300), phase_steps("warmup", 0.15, 4, least=1)
    (45, 20, 1)
    """
    if isinstance(value, int) or value == 0:
        if value < least:
            raise UserError(f"{name} must be at least {least} steps, got {value}")
        return int(value)
    if not 0 <= value < 1:
        raise UserError(
            f"{name} as a fraction of the run must be in [0, 1), got {value}; whole steps are written as int"
        )
    return max(least, int(value * total_steps + 1e-9))
