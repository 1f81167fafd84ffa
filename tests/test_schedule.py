"""The cubic schedule: exact numbers, the rules it refuses by, and what holds for every run."""

from __future__ import annotations

import re
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loralloc.errors import UserError
from loralloc.schedule import BudgetSchedule, cubic_schedule, phase_steps

INF = float("inf")


def refusal(text: str) -> re.Pattern[str]:
    """The whole message, letter by letter."""
    return re.compile(f"^{re.escape(text)}$")


def twin(step: int, start: int, target: int, warmup: int, cooldown: int, total: int) -> Fraction:
    """Equation 14 of AdaLoRA with its numerator put right, t − t_i, without rounding."""
    if step <= warmup:
        return Fraction(start)
    if step > total - cooldown:
        return Fraction(target)
    return target + (start - target) * (1 - Fraction(step - warmup, total - cooldown - warmup)) ** 3


def printed(step: int, start: int, target: int, warmup: int, cooldown: int, total: int) -> float:
    """Equation 14 as it is printed: the numerator is t − t_i − t_f."""
    if step < warmup:
        return start
    if step >= total - cooldown:
        return target
    return target + (start - target) * (1 - (step - warmup - cooldown) / (total - warmup - cooldown)) ** 3


@st.composite
def schedules(draw: st.DrawFn) -> BudgetSchedule:
    """Any schedule that fits its run."""
    total = draw(st.integers(3, 400))
    warmup = draw(st.integers(0, total - 3))
    cooldown = draw(st.integers(2, total - warmup - 1) | st.just(0.001)) if warmup < total - 3 else 2
    start = draw(st.integers(1, 10**7))
    return cubic_schedule(
        total, warmup, cooldown, draw(st.none() | st.integers(1, 50)), start, draw(st.integers(1, start))
    )


class TestSchedule:
    PAPER = cubic_schedule(100, 10, 30, 10, 216, 144)

    def test_the_published_numbers(self) -> None:
        steps = (0, 10, 11, 12, 20, 30, 40, 50, 60, 70, 71, 99)
        numbers = [216, 216, 212, 209, 185, 165, 153, 146, 144, 144, 144, 144]
        assert [self.PAPER.budget(t) for t in steps] == numbers

    def test_the_published_example(self) -> None:
        example = cubic_schedule(3000, 500, 1500, 1, 72 * 12, 72 * 8)
        assert [example.budget(t) for t in (500, 1000, 1250, 1500)] == [864, 612, 580, 576]

    def test_the_printed_formula_is_not_what_we_compute(self) -> None:
        """It would jump above the start at t_i and miss the target before the final phase."""
        assert printed(10, 216, 144, 10, 30, 100) == pytest.approx(387)
        assert printed(69, 216, 144, 10, 30, 100) == pytest.approx(153.9, abs=0.05)
        assert self.PAPER.budget(10) == 216
        assert self.PAPER.budget(69) == 144

    @given(schedules())
    def test_equals_the_twin_and_falls_from_start_to_target(self, schedule: BudgetSchedule) -> None:
        s, cooldown = schedule, schedule.total_steps - schedule.fallen
        budgets = [s.budget(t) for t in range(s.total_steps)]
        for step, budget in enumerate(budgets):
            exact = twin(step, s.start, s.target, s.warmup, cooldown, s.total_steps)
            # Floats may fall to either side of a whole number; otherwise the budget is the floor.
            assert exact - 1 - Fraction(1, 10**6) < budget <= exact + Fraction(1, 10**6)
        assert budgets[0] == s.start
        assert budgets[-1] == s.target
        assert all(s.start >= now >= then >= s.target for now, then in pairwise(budgets))
        assert all(isinstance(budget, int) for budget in budgets)

    @given(schedules())
    def test_phases_partition_the_run(self, schedule: BudgetSchedule) -> None:
        phases = [schedule.phase(t) for t in range(schedule.total_steps)]
        falling = schedule.fallen - schedule.warmup
        expected = ["warmup"] * (schedule.warmup + 1) + ["decrease"] * falling
        assert phases == expected + ["final"] * (schedule.total_steps - len(expected))
        assert falling >= 1

    @given(schedules())
    def test_ranks_are_closed_on_the_interval_and_in_every_final_step(self, schedule: BudgetSchedule) -> None:
        for step in range(schedule.total_steps):
            if step <= schedule.warmup:
                assert not schedule.closes(step)
            elif step > schedule.fallen:
                assert schedule.closes(step)
            else:  # multiples of the interval, counted from the start of the run
                assert schedule.closes(step) == (step % schedule.interval == 0)

    def test_closings_of_the_example(self) -> None:
        closing = [t for t in range(100) if self.PAPER.closes(t)]
        assert closing == [20, 30, 40, 50, 60, 70, *range(71, 100)]

    @given(schedules())
    def test_a_target_equal_to_the_start_never_moves(self, schedule: BudgetSchedule) -> None:
        flat = BudgetSchedule(**{**vars(schedule), "target": schedule.start})
        assert {flat.budget(t) for t in range(flat.total_steps)} == {flat.start}

    @pytest.mark.parametrize("cooldown", [0.01, 0.1, 0.29, 2, 0.2])
    def test_at_least_two_steps_are_taken_at_the_final_budget(self, cooldown: float) -> None:
        schedule = cubic_schedule(10, 2, cooldown, 4, 10_000, 10)
        assert schedule.fallen == 8
        assert [schedule.phase(t) for t in (2, 3, 8, 9)] == ["warmup", "decrease", "decrease", "final"]
        assert schedule.budget(7) > schedule.budget(8) == schedule.budget(9) == 10
        assert schedule.closes(9)

    @pytest.mark.parametrize("cooldown", [0, 0.0, 1])
    def test_fewer_steps_are_refused(self, cooldown: float) -> None:
        with pytest.raises(UserError, match=refusal(f"cooldown must be at least 2 steps, got {cooldown}")):
            cubic_schedule(10, 2, cooldown, 4, 20, 10)

    def test_a_longer_cooldown_is_taken_as_it_is(self) -> None:
        assert [cubic_schedule(10, 2, cooldown, 4, 20, 10).fallen for cooldown in (3, 0.3, 7, 0.7)] == [7, 7, 3, 3]

    @given(schedules())
    def test_the_last_step_closes_ranks_for_good(self, schedule: BudgetSchedule) -> None:
        last = schedule.total_steps - 1
        assert schedule.phase(last) == "final"
        assert schedule.closes(last)
        assert schedule.budget(last - 1) == schedule.budget(last) == schedule.target


class TestPhases:
    @pytest.mark.parametrize(
        ("value", "steps"),
        [(0, 0), (0.0, 0), (0.15, 45), (0.41, 123), (20, 20), (300, 300), (1, 1), (0.999, 299), (1 / 3, 100)],
    )
    def test_fractions_are_of_the_run_and_whole_numbers_are_steps(self, value: float, steps: int) -> None:
        assert phase_steps("warmup", value, 300) == steps

    @given(st.integers(0, 999), st.integers(1, 10**6))
    def test_a_fraction_is_rounded_down_as_if_it_were_decimal(self, thousandths: int, total: int) -> None:
        assert phase_steps("cooldown", thousandths / 1000, total) == thousandths * total // 1000

    @pytest.mark.parametrize("name", ["warmup", "cooldown"])
    @pytest.mark.parametrize("value", [1.0, 20.0, -0.1, float("nan"), INF])
    def test_a_fraction_outside_the_run_is_refused(self, name: str, value: float) -> None:
        text = f"{name} as a fraction of the run must be in [0, 1), got {value}; whole steps are written as int"
        with pytest.raises(UserError, match=refusal(text)):
            phase_steps(name, value, 100)

    def test_negative_steps_are_refused(self) -> None:
        with pytest.raises(UserError, match=refusal("cooldown must be at least 0 steps, got -3")):
            phase_steps("cooldown", -3, 100)


class TestLayingTheSchedule:
    def test_fractions_and_steps_lay_the_same_schedule(self) -> None:
        assert cubic_schedule(300, 0.15, 0.45, 1, 432, 288) == cubic_schedule(300, 45, 135, 1, 432, 288)

    def test_fields(self) -> None:
        schedule = cubic_schedule(300, 0.15, 135, 7, 432, 288)
        assert schedule == BudgetSchedule(total_steps=300, warmup=45, fallen=165, interval=7, start=432, target=288)

    @pytest.mark.parametrize(("total", "interval"), [(3, 1), (500, 1), (749, 1), (751, 2), (16_370, 33), (50_520, 101)])
    def test_the_default_interval_closes_about_500_times(self, total: int, interval: int) -> None:
        assert cubic_schedule(total, 0, 0.001, None, 10, 5).interval == interval

    @pytest.mark.parametrize("total", [-1, 0, 1, 2])
    def test_a_run_needs_three_steps(self, total: int) -> None:
        text = f"allocating ranks takes at least 3 optimizer steps, the run has {total}"
        with pytest.raises(UserError, match=refusal(text)):
            cubic_schedule(total, 0, 2, 1, 10, 5)
        shortest = cubic_schedule(3, 0, 0.1, 1, 10, 5)
        assert [shortest.phase(t) for t in range(3)] == ["warmup", "decrease", "final"]
        assert [shortest.budget(t) for t in range(3)] == [10, 5, 5]

    @pytest.mark.parametrize("interval", [0, -5])
    def test_an_interval_is_at_least_one_step(self, interval: int) -> None:
        with pytest.raises(UserError, match=refusal(f"interval must be at least 1 step, got {interval}")):
            cubic_schedule(100, 0, 2, interval, 10, 5)

    @pytest.mark.parametrize(
        ("warmup", "cooldown", "steps"),
        [
            (50, 50, (50, 50)),
            (0.5, 0.5, (50, 50)),
            (99, 0.001, (99, 2)),
            (98, 0.001, (98, 2)),
            (98, 0.01, (98, 2)),
            (98, 2, (98, 2)),
            (0, 100, (0, 100)),
            (200, 0.1, (200, 10)),
        ],
    )
    def test_phases_that_leave_no_step_to_fall_are_refused(
        self, warmup: float, cooldown: float, steps: tuple[int, int]
    ) -> None:
        text = (
            f"no step is left in which the budget could fall: warmup={warmup} ({steps[0]} steps) and "
            f"cooldown={cooldown} ({steps[1]} steps) fill the 100 steps of the run"
        )
        with pytest.raises(UserError, match=refusal(text)):
            cubic_schedule(100, warmup, cooldown, 1, 10, 5)

    @pytest.mark.parametrize(("warmup", "cooldown"), [(49, 50), (97, 2), (97, 0.001), (0, 99), (0.97, 0.02)])
    def test_one_step_to_fall_is_enough(self, warmup: float, cooldown: float) -> None:
        schedule = cubic_schedule(100, warmup, cooldown, 1, 10, 5)
        assert schedule.fallen == schedule.warmup + 1
        assert [schedule.budget(t) for t in (schedule.warmup, schedule.fallen)] == [10, 5]
        assert schedule.closes(schedule.fallen)

    @pytest.mark.parametrize("phase", ["warmup", "cooldown"])
    def test_refusals_name_the_phase(self, phase: str) -> None:
        with pytest.raises(UserError, match=f"^{phase} as a fraction"):
            cubic_schedule(**{"total_steps": 9, "warmup": 0, "cooldown": 2, phase: 1.5}, interval=1, start=9, target=5)
