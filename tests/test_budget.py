"""Budgets and the cubic schedule: exact numbers, the rules they refuse by, and what holds for every run."""

from __future__ import annotations

import re
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loralloc.budget import Budget, start_budget
from loralloc.errors import UserError
from loralloc.schedule import BudgetSchedule, cubic_schedule, phase_steps

INF = float("inf")
KINDS = ("average_rank", "total_rank", "parameters", "fraction")

# Ranks and costs of up to eight modules.
modules = st.lists(st.tuples(st.integers(1, 64), st.integers(2, 20_000)), min_size=1, max_size=8)


def refusal(text: str) -> re.Pattern[str]:
    """The whole message, letter by letter."""
    return re.compile(f"^{re.escape(text)}$")


class TestOneOfFour:
    @pytest.mark.parametrize("kind", KINDS)
    def test_one_is_accepted_and_kept(self, kind: str) -> None:
        assert Budget(**{kind: 1}).to_dict() == {kind: 1}

    def test_none_is_refused(self) -> None:
        with pytest.raises(
            UserError,
            match=refusal("a budget is exactly one of average_rank, total_rank, parameters, fraction; got none"),
        ):
            Budget()

    @pytest.mark.parametrize(
        "given", [("average_rank", "fraction"), ("total_rank", "parameters"), KINDS], ids=lambda given: " ".join(given)
    )
    def test_several_are_refused_and_named(self, given: tuple[str, ...]) -> None:
        text = f"a budget is exactly one of average_rank, total_rank, parameters, fraction; got {', '.join(given)}"
        with pytest.raises(UserError, match=refusal(text)):
            Budget(**dict.fromkeys(given, 1))

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("value", [0, -1, -0.5, float("nan"), -INF])
    def test_what_is_not_positive_is_refused(self, kind: str, value: float) -> None:
        with pytest.raises(UserError, match=refusal(f"the budget must be positive, got {kind}={value}")):
            Budget(**{kind: value})

    @pytest.mark.parametrize("value", [1.0000001, 2, INF])
    def test_a_fraction_above_one_is_refused(self, value: float) -> None:
        text = f"a budget as a fraction of the starting parameters is at most 1, got fraction={value}"
        with pytest.raises(UserError, match=refusal(text)):
            Budget(fraction=value)
        assert Budget(fraction=1.0).unit == "parameters"

    @pytest.mark.parametrize("kind", ["total_rank", "parameters"])
    @pytest.mark.parametrize("value", [8.0, 0.5, 8.5, 1e300, INF, Fraction(8)])
    def test_a_count_is_a_whole_number(self, kind: str, value: float) -> None:
        with pytest.raises(UserError, match=refusal(f"the budget in {kind} must be a whole number, got {value!r}")):
            Budget(**{kind: value})

    @pytest.mark.parametrize(("value", "asked"), [(INF, "inf"), (1e308, "inf"), (1e300, "3e+300")])
    def test_an_endless_average_is_refused_as_above_the_start(self, value: float, asked: str) -> None:
        text = (
            f"the budget average_rank={value} asks for {asked} ranks, but the 3 adapted modules start with 36; "
            "lower the budget or raise LoraConfig.r (lora.r in a recipe)"
        )
        with pytest.raises(UserError, match=refusal(text)):
            Budget(average_rank=value).resolve([12] * 3, [100, 100, 200])

    @pytest.mark.parametrize("kind", ["average_rank", "total_rank", "parameters"])
    def test_an_endless_count_is_refused_as_above_the_start(self, kind: str) -> None:
        with pytest.raises(UserError, match=f"^the budget {kind}=10+ asks for .* start with"):
            Budget(**{kind: 10**400}).resolve([12] * 3, [100, 100, 200])

    def test_the_unit_is_what_is_counted(self) -> None:
        units = [Budget(**{kind: 1}).unit for kind in KINDS]
        assert units == ["ranks", "ranks", "parameters", "parameters"]


class TestResolve:
    RANKS, COSTS = (12, 12, 4), (100, 100, 200)  # 28 ranks, 3200 parameters

    @pytest.mark.parametrize(
        ("budget", "target"),
        [
            (Budget(average_rank=8), 24),
            (Budget(average_rank=8.5), 25),  # 25.5, down
            (Budget(average_rank=28 / 3), 28),  # all of it, though 28/3 is not a binary fraction
            (Budget(average_rank=0.34), 1),
            (Budget(total_rank=1), 1),
            (Budget(total_rank=28), 28),
            (Budget(parameters=100), 100),
            (Budget(parameters=3199), 3199),
            (Budget(parameters=3200), 3200),
            (Budget(fraction=0.1), 320),
            (Budget(fraction=0.145), 464),  # 463.99999999999994 as floats multiply
            (Budget(fraction=1 / 3), 1066),
            (Budget(fraction=1.0), 3200),
        ],
        ids=str,
    )
    def test_numbers(self, budget: Budget, target: int) -> None:
        assert budget.resolve(self.RANKS, self.COSTS) == target

    def test_an_average_of_many_modules_is_meant_in_decimals(self) -> None:
        assert 4.35 * 100 < 435, "as floats multiply"
        assert Budget(average_rank=4.35).resolve([8] * 100, [2] * 100) == 435

    @pytest.mark.parametrize(
        ("budget", "text"),
        [
            (Budget(average_rank=9.4), "average_rank=9.4 asks for 28.2 ranks"),
            (Budget(total_rank=29), "total_rank=29 asks for 29 ranks"),
            (Budget(total_rank=10**11), "total_rank=100000000000 asks for 100000000000 ranks"),
            (Budget(parameters=3201), "parameters=3201 asks for 3201 parameters"),
        ],
        ids=str,
    )
    def test_above_the_start_is_refused_with_both_numbers(self, budget: Budget, text: str) -> None:
        available = 27 if budget.average_rank else 28
        ranks = (12, 12, 3) if budget.average_rank else self.RANKS
        start = available if budget.unit == "ranks" else 3200
        end = f"start with {start}; lower the budget or raise LoraConfig.r (lora.r in a recipe)"
        with pytest.raises(UserError, match=refusal(f"the budget {text}, but the 3 adapted modules {end}")):
            budget.resolve(ranks, self.COSTS)

    @pytest.mark.parametrize(
        ("budget", "leaves", "cheapest"),
        [
            (Budget(average_rank=0.3), "average_rank=0.3 leaves 0 ranks", 1),
            (Budget(parameters=99), "parameters=99 leaves 99 parameters", 100),
            (Budget(fraction=0.03), "fraction=0.03 leaves 96 parameters", 100),
        ],
        ids=str,
    )
    def test_too_small_for_one_rank_is_refused_with_the_cheapest(
        self, budget: Budget, leaves: str, cheapest: int
    ) -> None:
        text = f"the budget {leaves} for 3 modules: not even one rank (the cheapest costs {cheapest})"
        with pytest.raises(UserError, match=refusal(text)):
            budget.resolve(self.RANKS, self.COSTS)

    @given(modules, st.data())
    def test_counts_are_taken_as_they_are(self, modules: list[tuple[int, int]], data: st.DataObject) -> None:
        ranks, costs = zip(*modules, strict=True)
        total = data.draw(st.integers(1, sum(ranks)))
        assert Budget(total_rank=total).resolve(ranks, costs) == total
        parameters = data.draw(st.integers(min(costs), start_budget(ranks, costs, "parameters")))
        assert Budget(parameters=parameters).resolve(ranks, costs) == parameters

    @pytest.mark.parametrize(
        ("budget", "target"),
        [
            (Budget(parameters=10**12), 10**12),
            (Budget(parameters=2 * 10**12), 2 * 10**12),
            (Budget(fraction=1.0), 2 * 10**12),
        ],
        ids=["half", "all", "fraction"],
    )
    def test_huge_counts_are_taken_as_they_are(self, budget: Budget, target: int) -> None:
        assert budget.resolve([2 * 10**5], [10**7]) == target

    @given(modules, st.integers(1, 64_000))
    def test_an_average_is_met_from_below_by_less_than_one_rank(
        self, modules: list[tuple[int, int]], thousandths: int
    ) -> None:
        ranks, costs = zip(*modules, strict=True)
        budget, exact = Budget(average_rank=thousandths / 1000), Fraction(thousandths * len(ranks), 1000)
        if 1 <= exact < sum(ranks) + 1:
            target = budget.resolve(ranks, costs)
            assert target <= exact < target + 1
        else:
            with pytest.raises(UserError, match="leaves 0 ranks" if exact < 1 else f"start with {sum(ranks)};"):
                budget.resolve(ranks, costs)

    @given(modules, st.integers(1, 1000))
    def test_a_fraction_is_never_exceeded_and_missed_by_less_than_one_parameter(
        self, modules: list[tuple[int, int]], thousandths: int
    ) -> None:
        ranks, costs = zip(*modules, strict=True)
        available = sum(rank * cost for rank, cost in modules)
        exact = Fraction(thousandths * available, 1000)
        if exact >= min(costs):
            target = Budget(fraction=thousandths / 1000).resolve(ranks, costs)
            assert target <= exact < target + 1
        else:
            with pytest.raises(UserError, match="not even one rank"):
                Budget(fraction=thousandths / 1000).resolve(ranks, costs)

    @pytest.mark.parametrize(("start", "kept"), [(15, 11), (24, 13), (30, 22)])
    def test_a_fraction_that_names_a_rank_leaves_that_rank(self, start: int, kept: int) -> None:
        """LLaMA-7B, all linear layers: 11/15 of rank 15 everywhere is rank 11 everywhere, not one parameter less."""
        costs = (4096 + 4096,) * 128 + (4096 + 11008,) * 96
        assert Budget(fraction=kept / start).resolve([start] * 224, costs) == kept * sum(costs)

    @given(modules)
    def test_the_whole_start_is_a_budget(self, modules: list[tuple[int, int]]) -> None:
        ranks, costs = zip(*modules, strict=True)
        everything = start_budget(ranks, costs, "parameters")
        assert Budget(fraction=1.0).resolve(ranks, costs) == everything
        assert Budget(parameters=everything).resolve(ranks, costs) == everything
        assert Budget(average_rank=sum(ranks) / len(ranks)).resolve(ranks, costs) == sum(ranks)

    def test_the_start_counts_every_site_by_its_own_cost(self) -> None:
        assert start_budget(self.RANKS, self.COSTS, "ranks") == 28
        assert start_budget(self.RANKS, self.COSTS, "parameters") == 1200 + 1200 + 800
        deberta = [768 + 768] * 4 + [768 + 3072] * 2
        assert start_budget([1] * 72, deberta * 12, "parameters") == 165_888  # a published number

    def test_modules_and_costs_must_match(self) -> None:
        with pytest.raises(ValueError, match="shorter"):
            start_budget([1, 2], [3], "parameters")


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
