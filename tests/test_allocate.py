"""Selection: exact, deterministic, and equal to sorting tuples by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loralloc.allocate import Keep, best_of_each, break_ties, by_score, keep_most, keep_top, keep_within, select
from loralloc.budget import Budget, Modules

NAN, INF = float("nan"), float("inf")

# Few distinct values, so that ties are the rule, and everything that a diverged run can produce.
one_score = st.sampled_from([0.0, -0.0, 1.0, 1.5, -2.0, 2.0**-149, 2.0**127, NAN, INF, -INF]) | st.floats(width=32)
some_scores = st.lists(one_score, max_size=24)


def with_permutation(scores: list[float]) -> st.SearchStrategy[tuple[list[float], list[int]]]:
    return st.tuples(st.just(scores), st.permutations(range(len(scores))))


def ranking(scores: list[float]) -> list[int]:
    """Positions from best to worst: by score, then by position; NaN is −∞."""
    return sorted(range(len(scores)), key=lambda i: (INF if math.isnan(scores[i]) else -scores[i], i))


def top_twin(scores: list[float], count: int) -> list[bool]:
    best = set(ranking(scores)[:count])
    return [i in best for i in range(len(scores))]


def within_twin(scores: list[float], costs: list[int], limit: int) -> list[bool]:
    keep, spent = [False] * len(scores), 0
    for i in ranking(scores):
        if spent + costs[i] <= limit:
            keep[i], spent = True, spent + costs[i]
    return keep


def spent(keep: list[bool], costs: list[int]) -> int:
    return sum(cost for kept, cost in zip(keep, costs, strict=True) if kept)


class TestBreakTies:
    @given(st.lists(st.tuples(one_score, st.sampled_from([0.0, 1.0, NAN])), max_size=24))
    def test_equals_the_sorted_tuples(self, pairs: list[tuple[float, float]]) -> None:
        scores, others = ([pair[place] for pair in pairs] for place in (0, 1))
        places = break_ties(torch.tensor(scores), torch.tensor(others))
        assert sorted(places.tolist()) == [-float(place) for place in reversed(range(len(pairs)))]
        key = [[INF if math.isnan(value) else -value for value in pair] for pair in pairs]
        assert by_score(places).tolist() == sorted(range(len(pairs)), key=lambda i: (*key[i], i))


class TestKeepTop:
    @given(some_scores)
    def test_equals_the_sorted_tuples_for_every_count(self, scores: list[float]) -> None:
        for count in range(len(scores) + 1):
            keep = keep_top(torch.tensor(scores), count)
            assert keep.dtype == torch.bool
            assert keep.shape == (len(scores),)
            assert int(keep.sum()) == count, "met exactly, whatever the scores"
            assert keep.tolist() == top_twin(scores, count)

    @given(some_scores, st.integers(1, 10**12))
    def test_a_count_out_of_range_is_refused(self, scores: list[float], beyond: int) -> None:
        for count in (-1, -beyond, len(scores) + 1, len(scores) + beyond):
            with pytest.raises(ValueError, match=f"^cannot keep {count} of {len(scores)} ranks$"):
                keep_top(torch.tensor(scores), count)

    @given(some_scores)
    def test_a_larger_count_only_adds(self, scores: list[float]) -> None:
        kept = [keep_top(torch.tensor(scores), count) for count in range(len(scores) + 1)]
        for few, many in pairwise(kept):
            assert not (few & ~many).any()

    @given(st.lists(st.floats(width=32, allow_nan=False), max_size=12, unique=True).flatmap(with_permutation))
    def test_moves_with_the_ranks_where_no_two_are_equal(self, case: tuple[list[float], list[int]]) -> None:
        scores, order = case
        for count in range(len(scores) + 1):
            keep = keep_top(torch.tensor(scores), count)
            shuffled = keep_top(torch.tensor([scores[i] for i in order]), count)
            assert shuffled.tolist() == [keep.tolist()[i] for i in order]

    @pytest.mark.parametrize("value", [0.0, 1.0, -INF, INF, NAN])
    @pytest.mark.parametrize("count", [0, 1, 17, 100])
    def test_equal_scores_keep_the_first(self, value: float, count: int) -> None:
        """The published rule, score <= threshold goes, would keep none of them."""
        assert keep_top(torch.full((100,), value), count).tolist() == [True] * count + [False] * (100 - count)

    def test_signed_zeros_are_equal(self) -> None:
        assert keep_top(torch.tensor([-0.0, 0.0, -0.0, 0.0]), 2).tolist() == [True, True, False, False]

    @pytest.mark.parametrize(
        ("scores", "kept"),
        [
            ([NAN, -1e30, 0.0], [False, True, True]),
            ([NAN, -INF, 0.0], [True, False, True]),  # NaN is −∞: a tie, so the earlier stays
            ([-INF, NAN, 0.0], [True, False, True]),
            ([NAN, NAN, INF], [True, False, True]),
        ],
    )
    def test_not_a_number_counts_as_minus_infinity(self, scores: list[float], kept: list[bool]) -> None:
        assert keep_top(torch.tensor(scores), 2).tolist() == kept

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_in_every_precision(self, dtype: torch.dtype) -> None:
        scores = torch.tensor([0.5, NAN, 2.0, -INF, 2.0, INF, 0.0], dtype=dtype)
        assert keep_top(scores, 3).tolist() == [False, False, True, False, True, True, False]

    def test_many_ties_among_many_ranks(self) -> None:
        """Large enough for another sorting algorithm than that of short lists."""
        scores = torch.randint(0, 7, (20_000,)).float()
        for count in (0, 1, 5_000, 19_999, 20_000):
            assert keep_top(scores, count).tolist() == top_twin(scores.tolist(), count)

    def test_leaves_the_scores_alone(self) -> None:
        scores = torch.tensor([1.0, NAN, 2.0])
        keep_top(scores, 1)
        assert scores.isnan().tolist() == [False, True, False]

    def test_one_site_can_lose_everything_to_another(self) -> None:
        """Selection is global: a factor on one site's scores is enough."""
        small, large = torch.rand(4), torch.rand(4)
        assert keep_top(torch.cat([small, 1e4 * large]), 4).tolist() == [False] * 4 + [True] * 4


priced = st.lists(st.tuples(one_score, st.integers(1, 30)), max_size=20)


class TestKeepWithin:
    @given(priced.filter(len), st.integers(-5, 400))
    def test_equals_the_naive_greedy_choice(self, ranks: list[tuple[float, int]], limit: int) -> None:
        scores, costs = map(list, zip(*ranks, strict=True))
        keep = keep_within(torch.tensor(scores), torch.tensor(costs), limit)
        assert keep.dtype == torch.bool
        assert keep.tolist() == within_twin(scores, costs, limit)

    @given(priced.filter(len), st.integers(0, 400))
    def test_never_exceeds_the_limit_and_leaves_no_room(self, ranks: list[tuple[float, int]], limit: int) -> None:
        scores, costs = map(list, zip(*ranks, strict=True))
        keep = keep_within(torch.tensor(scores), torch.tensor(costs), limit).tolist()
        rest = limit - spent(keep, costs)
        assert rest >= 0
        assert all(cost > rest for kept, cost in zip(keep, costs, strict=True) if not kept)

    @given(priced.filter(len))
    def test_the_whole_price_keeps_everything_and_one_less_does_not(self, ranks: list[tuple[float, int]]) -> None:
        scores, costs = map(list, zip(*ranks, strict=True))
        assert keep_within(torch.tensor(scores), torch.tensor(costs), sum(costs)).all()
        assert not keep_within(torch.tensor(scores), torch.tensor(costs), sum(costs) - 1).all()
        assert not keep_within(torch.tensor(scores), torch.tensor(costs), min(costs) - 1).any()

    @given(st.lists(one_score, min_size=1, max_size=24), st.integers(1, 2000), st.data())
    def test_is_the_top_where_all_cost_the_same(self, scores: list[float], cost: int, data: st.DataObject) -> None:
        limit = data.draw(st.integers(0, cost * len(scores)))
        keep = keep_within(torch.tensor(scores), torch.full((len(scores),), cost), limit)
        assert keep.tolist() == keep_top(torch.tensor(scores), limit // cost).tolist()

    def test_skips_what_does_not_fit_and_goes_on(self) -> None:
        scores, costs = torch.tensor([4.0, 3.0, 2.0, 1.0]), torch.tensor([5, 6, 4, 1])
        assert keep_within(scores, costs, 10).tolist() == [True, False, True, True]
        assert keep_within(scores, costs, 11).tolist() == [True, True, False, False]

    def test_prices_beyond_32_bits(self) -> None:
        costs = torch.tensor([2**40, 2**40 + 1])
        assert keep_within(torch.tensor([1.0, 2.0]), costs, 2**41).tolist() == [False, True]
        assert keep_within(torch.tensor([1.0, 2.0]), costs, 2**41 + 1).tolist() == [True, True]

    def test_no_ranks_are_a_boolean_too(self) -> None:
        for keep in (keep_top(torch.tensor([]), 0), keep_within(torch.tensor([]), torch.tensor([]).long(), 5)):
            assert keep.dtype == torch.bool
            assert keep.shape == (0,)


class TestKeepMost:
    @given(priced.filter(len), st.integers(0, 400))
    def test_never_exceeds_the_limit_and_leaves_no_room(self, ranks: list[tuple[float, int]], limit: int) -> None:
        scores, costs = map(list, zip(*ranks, strict=True))
        keep = keep_most(torch.tensor(scores), torch.tensor(costs), limit)
        assert keep.dtype == torch.bool
        rest = limit - spent(keep.tolist(), costs)
        assert rest >= 0
        assert all(cost > rest for kept, cost in zip(keep.tolist(), costs, strict=True) if not kept)

    @given(st.lists(one_score, min_size=1, max_size=24), st.integers(1, 2000), st.data())
    def test_is_the_top_where_all_cost_the_same(self, scores: list[float], cost: int, data: st.DataObject) -> None:
        limit = data.draw(st.integers(0, cost * len(scores)))
        keep = keep_most(torch.tensor(scores), torch.full((len(scores),), cost), limit)
        assert keep.tolist() == keep_top(torch.tensor(scores), limit // cost).tolist()

    def test_is_worth_more_than_what_fits_in_order(self) -> None:
        scores, costs = torch.tensor([12.0, 9.0, 9.0]), torch.tensor([6, 5, 5])
        assert keep_most(scores, costs, 10).tolist() == [False, True, True]
        assert keep_within(scores, costs, 10).tolist() == [True, False, False]


UNITS = ("total_rank", "parameters", "adapter_bytes")


@st.composite
def selections(draw: st.DrawFn) -> tuple[torch.Tensor, Budget, Modules]:
    """Scores of modules that differ in rank, shape and dtype, and a budget that they can have."""
    shapes = draw(
        st.lists(st.tuples(st.integers(1, 4), st.integers(1, 9), st.sampled_from([2, 4])), min_size=1, max_size=5)
    )
    modules = Modules(
        [rank for rank, _, _ in shapes], [cost for _, cost, _ in shapes], [cost * size for _, cost, size in shapes]
    )
    kind, cap = draw(st.sampled_from(UNITS)), draw(st.none() | st.integers(1, 4))
    unit = Budget(**{kind: 1}).unit
    most = modules.total(unit, cap if unit == "ranks" else None)
    least = min(modules.costs(unit))
    amount = draw(st.integers(least, max(least, most)))
    scores = draw(st.lists(one_score, min_size=sum(modules.ranks), max_size=sum(modules.ranks)))
    return torch.tensor(scores), Budget(**{kind: amount}, max_rank=cap), modules


class TestSelect:
    @given(selections(), st.sampled_from([keep_most, keep_within]))
    def test_budget_and_cap_hold_and_no_further_rank_fits(
        self, case: tuple[torch.Tensor, Budget, Modules], keep: Keep
    ) -> None:
        scores, budget, modules = case
        limit = budget.resolve(modules)
        kept = select(scores, budget, modules, limit, keep)
        counts = [int(part.sum()) for part in kept.split(modules.ranks)]
        most, costs = modules.capped(budget.max_rank), modules.costs(budget.unit)
        left = limit - sum(count * cost for count, cost in zip(counts, costs, strict=True))
        assert left == 0 if budget.unit == "ranks" else left >= 0
        assert all(count <= m for count, m in zip(counts, most, strict=True))
        assert not any(count < m and cost <= left for count, m, cost in zip(counts, most, costs, strict=True))

    @given(selections())
    def test_of_a_module_its_best_ranks_stay(self, case: tuple[torch.Tensor, Budget, Modules]) -> None:
        scores, budget, modules = case
        kept = select(scores, budget, modules, budget.resolve(modules))
        for part, flags in zip(scores.split(modules.ranks), kept.split(modules.ranks), strict=True):
            assert flags.tolist() == top_twin(part.tolist(), int(flags.sum()))

    @given(selections())
    def test_without_a_cap_that_binds_it_is_the_selection_without(
        self, case: tuple[torch.Tensor, Budget, Modules]
    ) -> None:
        scores, budget, modules = case
        limit = budget.resolve(modules)
        free, wide = (replace(budget, max_rank=cap) for cap in (None, max(modules.ranks)))
        assert torch.equal(select(scores, free, modules, limit), select(scores, wide, modules, limit))

    def test_a_cap_moves_what_it_takes_to_other_modules(self) -> None:
        modules = Modules([3, 3], [10, 10], [40, 40])
        scores = torch.tensor([9.0, 7.0, 8.0, 1.0, 3.0, 2.0])
        assert select(scores, Budget(total_rank=4), modules, 4).tolist() == [True] * 3 + [False, True, False]
        capped = Budget(total_rank=4, max_rank=2)
        assert select(scores, capped, modules, 4).tolist() == [True, False, True, False, True, True]

    def test_while_the_limit_is_above_what_a_cap_allows_there_is_none(self) -> None:
        modules = Modules([3, 1], [10, 10], [40, 40])
        budget = Budget(total_rank=2, max_rank=1)
        assert select(torch.arange(4.0), budget, modules, 3).tolist() == [False, True, True, True]
        assert select(torch.arange(4.0), budget, modules, 2).tolist() == [False, False, True, True]

    @given(selections())
    def test_the_best_of_each_module_are_found_as_by_hand(self, case: tuple[torch.Tensor, Budget, Modules]) -> None:
        scores, _, modules = case
        for most in range(1, 5):
            flags = torch.zeros(len(scores), dtype=torch.bool)
            flags[best_of_each(scores, modules.ranks, most)] = True
            for part, found in zip(scores.split(modules.ranks), flags.split(modules.ranks), strict=True):
                assert found.tolist() == top_twin(part.tolist(), min(most, len(part)))
