"""Budgets: exact numbers, and the rules they refuse by."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loralloc.budget import AMOUNTS, Budget, Modules, in_words
from loralloc.errors import UserError

INF = float("inf")
KINDS = ("average_rank", "total_rank", "parameters", "fraction", "adapter_bytes", "share_of_base")

ONE = f"a budget is exactly one of {', '.join(KINDS)}, or max_rank alone"

# Ranks and costs of up to eight modules.
modules = st.lists(st.tuples(st.integers(1, 64), st.integers(2, 20_000)), min_size=1, max_size=8)


def modules_of(ranks: Sequence[int], costs: Sequence[int], base: int | None = None) -> Modules:
    """Modules of a model in float32."""
    return Modules(ranks, costs, [4 * cost for cost in costs], base)


def refusal(text: str) -> re.Pattern[str]:
    """The whole message, letter by letter."""
    return re.compile(f"^{re.escape(text)}$")


class TestOneAmount:
    @pytest.mark.parametrize("kind", [*KINDS, "max_rank"])
    def test_one_is_accepted_and_kept(self, kind: str) -> None:
        assert Budget(**{kind: 1}).to_dict() == {kind: 1}
        assert Budget(**{kind: 1, "max_rank": 1}).to_dict() == {kind: 1, "max_rank": 1}

    def test_none_is_refused(self) -> None:
        with pytest.raises(UserError, match=refusal(f"{ONE}; got none")):
            Budget()

    @pytest.mark.parametrize(
        "given", [("average_rank", "fraction"), ("total_rank", "parameters"), KINDS], ids=lambda given: " ".join(given)
    )
    def test_several_are_refused_and_named(self, given: tuple[str, ...]) -> None:
        text = f"{ONE}; got {', '.join(given)}"
        with pytest.raises(UserError, match=refusal(text)):
            Budget(**dict.fromkeys(given, 1))

    def test_a_cap_does_not_make_two_amounts_one(self) -> None:
        with pytest.raises(UserError, match=refusal(f"{ONE}; got average_rank, fraction")):
            Budget(average_rank=1, fraction=1, max_rank=1)

    @pytest.mark.parametrize("kind", [*KINDS, "max_rank"])
    @pytest.mark.parametrize("value", [0, -1, -0.5, float("nan"), -INF])
    def test_what_is_not_positive_is_refused(self, kind: str, value: float) -> None:
        with pytest.raises(UserError, match=refusal(f"the budget must be positive, got {kind}={value}")):
            Budget(**{kind: value})

    @pytest.mark.parametrize("value", [1.0000001, 2, INF])
    @pytest.mark.parametrize(
        ("kind", "whole"), [("fraction", "the starting parameters"), ("share_of_base", "the base model's parameters")]
    )
    def test_a_fraction_above_one_is_refused(self, kind: str, whole: str, value: float) -> None:
        text = f"a budget as a fraction of {whole} is at most 1, got {kind}={value}"
        with pytest.raises(UserError, match=refusal(text)):
            Budget(**{kind: value})
        assert Budget(**{kind: 1.0}).unit == "parameters"

    @pytest.mark.parametrize("kind", ["total_rank", "parameters", "adapter_bytes", "max_rank"])
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
            Budget(average_rank=value).resolve(modules_of([12] * 3, [100, 100, 200], base=10**6))

    @pytest.mark.parametrize("kind", ["average_rank", "total_rank", "parameters", "adapter_bytes"])
    def test_an_endless_count_is_refused_as_above_the_start(self, kind: str) -> None:
        with pytest.raises(UserError, match=f"^the budget {kind}=10+ asks for .* start with"):
            Budget(**{kind: 10**400}).resolve(modules_of([12] * 3, [100, 100, 200]))

    def test_the_unit_is_what_is_counted(self) -> None:
        units = [Budget(**{kind: 1}).unit for kind in (*KINDS, "max_rank")]
        assert units == ["ranks", "ranks", "parameters", "parameters", "bytes", "parameters", "ranks"]

    def test_the_names_of_amounts_are_the_fields(self) -> None:
        assert (*AMOUNTS, "max_rank") == tuple(field.name for field in fields(Budget))


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
        assert budget.resolve(modules_of(self.RANKS, self.COSTS)) == target

    def test_an_average_of_many_modules_is_meant_in_decimals(self) -> None:
        assert 4.35 * 100 < 435, "as floats multiply"
        assert Budget(average_rank=4.35).resolve(modules_of([8] * 100, [2] * 100)) == 435

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
            budget.resolve(modules_of(ranks, self.COSTS, base=10**6))

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
            budget.resolve(modules_of(self.RANKS, self.COSTS))

    @given(modules, st.data())
    def test_counts_are_taken_as_they_are(self, modules: list[tuple[int, int]], data: st.DataObject) -> None:
        ranks, costs = zip(*modules, strict=True)
        total = data.draw(st.integers(1, sum(ranks)))
        assert Budget(total_rank=total).resolve(modules_of(ranks, costs)) == total
        parameters = data.draw(st.integers(min(costs), modules_of(ranks, costs).total("parameters")))
        assert Budget(parameters=parameters).resolve(modules_of(ranks, costs)) == parameters

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
        assert budget.resolve(modules_of([2 * 10**5], [10**7])) == target

    @given(modules, st.integers(1, 64_000))
    def test_an_average_is_met_from_below_by_less_than_one_rank(
        self, modules: list[tuple[int, int]], thousandths: int
    ) -> None:
        ranks, costs = zip(*modules, strict=True)
        budget, exact = Budget(average_rank=thousandths / 1000), Fraction(thousandths * len(ranks), 1000)
        if 1 <= exact <= sum(ranks):
            target = budget.resolve(modules_of(ranks, costs))
            assert target <= exact < target + 1
        else:
            with pytest.raises(UserError, match="leaves 0 ranks" if exact < 1 else f"start with {sum(ranks)};"):
                budget.resolve(modules_of(ranks, costs))

    @given(modules, st.integers(1, 1000))
    def test_a_fraction_is_never_exceeded_and_missed_by_less_than_one_parameter(
        self, modules: list[tuple[int, int]], thousandths: int
    ) -> None:
        ranks, costs = zip(*modules, strict=True)
        available = sum(rank * cost for rank, cost in modules)
        exact = Fraction(thousandths * available, 1000)
        if exact >= min(costs):
            target = Budget(fraction=thousandths / 1000).resolve(modules_of(ranks, costs))
            assert target <= exact < target + 1
        else:
            with pytest.raises(UserError, match="not even one rank"):
                Budget(fraction=thousandths / 1000).resolve(modules_of(ranks, costs))

    @pytest.mark.parametrize(("start", "kept"), [(15, 11), (24, 13), (30, 22)])
    def test_a_fraction_that_names_a_rank_leaves_that_rank(self, start: int, kept: int) -> None:
        """LLaMA-7B, all linear layers: 11/15 of rank 15 everywhere is rank 11 everywhere, not one parameter less."""
        costs = (4096 + 4096,) * 128 + (4096 + 11008,) * 96
        assert Budget(fraction=kept / start).resolve(modules_of([start] * 224, costs)) == kept * sum(costs)

    @given(modules)
    def test_the_whole_start_is_a_budget(self, modules: list[tuple[int, int]]) -> None:
        ranks, costs = zip(*modules, strict=True)
        everything = modules_of(ranks, costs).total("parameters")
        assert Budget(fraction=1.0).resolve(modules_of(ranks, costs)) == everything
        assert Budget(parameters=everything).resolve(modules_of(ranks, costs)) == everything
        assert Budget(average_rank=sum(ranks) / len(ranks)).resolve(modules_of(ranks, costs)) == sum(ranks)

    def test_the_start_counts_every_site_by_its_own_cost(self) -> None:
        start = modules_of(self.RANKS, self.COSTS)
        assert [start.total(unit) for unit in ("ranks", "parameters", "bytes")] == [28, 3200, 12_800]
        deberta = [768 + 768] * 4 + [768 + 3072] * 2
        assert modules_of([1] * 72, deberta * 12).total("parameters") == 165_888  # a published number

    def test_modules_and_costs_must_match(self) -> None:
        with pytest.raises(ValueError, match="shorter"):
            modules_of([1, 2], [3]).total("parameters")


class TestBytes:
    def test_are_those_of_each_modules_own_dtypes(self) -> None:
        """Half a module in bfloat16: a rank of it costs less, and the start is what the file would hold."""
        mixed = Modules([4, 4], [100, 100], [400, 300])
        assert mixed.total("bytes") == 2800
        assert Budget(adapter_bytes=2800).resolve(mixed) == 2800
        with pytest.raises(UserError, match=r"asks for 2801 bytes, but the 2 adapted modules start with 2800;"):
            Budget(adapter_bytes=2801).resolve(mixed)
        with pytest.raises(
            UserError, match=r"leaves 299 bytes for 2 modules: not even one rank \(the cheapest costs 300"
        ):
            Budget(adapter_bytes=299).resolve(mixed)


class TestShareOfBase:
    def test_is_counted_in_parameters_of_the_base_model(self) -> None:
        assert Budget(share_of_base=0.001).resolve(modules_of([12, 12], [100, 200], base=1_234_567)) == 1234

    def test_above_the_start_is_refused_with_both_numbers(self) -> None:
        with pytest.raises(UserError, match=r"share_of_base=0.5 asks for 5000 parameters, but .* start with 3600;"):
            Budget(share_of_base=0.5).resolve(modules_of([12, 12], [100, 200], base=10_000))

    def test_without_a_base_model_it_is_refused_with_what_to_give_instead(self) -> None:
        text = (
            "the budget share_of_base=0.5 is a share of the base model, which an adapter's folder does not hold; give "
            "parameters or adapter_bytes instead"
        )
        with pytest.raises(UserError, match=refusal(text)):
            Budget(share_of_base=0.5).resolve(modules_of([12], [100]))


class TestMaxRank:
    MODULES = modules_of([12, 12, 4], [100, 100, 200])

    @pytest.mark.parametrize(
        ("budget", "target"),
        [
            (Budget(max_rank=6), 16),  # 6, 6 and 4
            (Budget(max_rank=99), 28),
            (Budget(average_rank=5, max_rank=6), 15),
            (Budget(total_rank=16, max_rank=6), 16),
            (Budget(parameters=1500, max_rank=6), 1500),
            (Budget(parameters=3000, max_rank=6), 2000),  # what the modules can have
            (Budget(adapter_bytes=12_800, max_rank=6), 8000),
        ],
        ids=str,
    )
    def test_the_target_is_one_that_the_modules_can_have(self, budget: Budget, target: int) -> None:
        assert budget.resolve(self.MODULES) == target

    def test_ranks_that_cannot_be_met_are_refused_with_two_cures_that_work(self) -> None:
        text = (
            "the budget average_rank=8 asks for 24 ranks, but with max_rank=6 the 3 adapted modules can have no more "
            "than 16; raise max_rank to 10 or lower the budget to total_rank=16"
        )
        with pytest.raises(UserError, match=refusal(text)):
            Budget(average_rank=8, max_rank=6).resolve(self.MODULES)
        assert Budget(average_rank=8, max_rank=10).resolve(self.MODULES) == 24
        with pytest.raises(UserError, match="raise max_rank to 10"):
            Budget(average_rank=8, max_rank=9).resolve(self.MODULES)
        assert Budget(total_rank=16, max_rank=6).resolve(self.MODULES) == 16

    def test_holds_from_the_limit_on_that_the_modules_can_have_under_it(self) -> None:
        capped, free = Budget(total_rank=9, max_rank=6), Budget(total_rank=9)
        assert [capped.cap(self.MODULES, limit) for limit in (9, 16, 17, 28)] == [6, 6, None, None]
        assert free.cap(self.MODULES, 9) is None


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (Budget(average_rank=8.5), "average rank 8.5"),
        (Budget(parameters=1_234_567), "parameters 1,234,567"),
        (Budget(share_of_base=0.001, max_rank=1), "share of base 0.001, at most 1 rank a module"),
    ],
)
def test_budgets_read_well(budget: Budget, words: str) -> None:
    assert in_words(budget.to_dict()) == words
