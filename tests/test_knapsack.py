"""The knapsack: never above the limit, no further rank fits, and worth what the best of all choices is worth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loralloc import knapsack
from loralloc.knapsack import fitting, most_valuable

NAN, INF = float("nan"), float("inf")

# Whole numbers, whose sums are exact, and few of them, so that ties are the rule.
worths = st.sampled_from([0.0, -1.0, 1.0, 2.0, 3.0, 5.0, 8.0, 13.0, NAN, -INF])
ranks = st.lists(st.tuples(worths, st.integers(1, 12)), min_size=1, max_size=11)


def most_by_trying(worth: Sequence[float], costs: Sequence[int], limit: int) -> float:
    """The largest sum of worths above 0 that any choice within the limit has, by trying all of them."""
    best = {0: 0.0}  # by what is spent
    for value, cost in zip(worth, costs, strict=True):
        if value > 0:
            more = {spent + cost: total + value for spent, total in best.items() if spent + cost <= limit}
            best |= {spent: max(total, best.get(spent, 0.0)) for spent, total in more.items()}
    return max(best.values())


def chosen(worth: Sequence[float], costs: Sequence[int], limit: int) -> tuple[list[int], float]:
    """Positions that are kept, and the sum of their worths above 0; the promises hold whatever is asked."""
    kept = most_valuable(np.array(worth), np.array(costs), limit).tolist()
    assert len(set(kept)) == len(kept)
    left = limit - sum(costs[i] for i in kept)
    assert left >= 0 or not kept
    assert all(costs[i] > left for i in range(len(costs)) if i not in kept), "a further rank fits"
    return sorted(kept), sum(worth[i] for i in kept if worth[i] > 0)


@given(ranks, st.integers(-3, 140))
def test_is_worth_what_the_best_choice_is_worth(ranks: list[tuple[float, int]], limit: int) -> None:
    worth, costs = map(list, zip(*ranks, strict=True))
    assert chosen(worth, costs, limit)[1] == most_by_trying(worth, costs, limit)


@given(st.lists(st.tuples(st.integers(1, 10**6), st.sampled_from([64, 80, 176])), min_size=20, max_size=60), st.data())
def test_many_ranks_of_few_costs_too(ranks: list[tuple[int, int]], data: st.DataObject) -> None:
    worth, costs = [float(value) for value, _ in ranks], [cost for _, cost in ranks]
    limit = data.draw(st.integers(0, sum(costs)))
    assert chosen(worth, costs, limit)[1] == most_by_trying(worth, costs, limit)


@given(ranks, st.integers(0, 140))
def test_of_equal_cost_and_worth_the_earlier_stays(ranks: list[tuple[float, int]], limit: int) -> None:
    worth, costs = map(list, zip(*ranks, strict=True))
    kept, _ = chosen(worth, costs, limit)
    for i in set(range(len(costs))) - set(kept):
        assert not any(j > i and costs[j] == costs[i] and worth[j] == worth[i] for j in kept)


def test_where_greedy_by_ratio_is_beaten() -> None:
    """Worth per cost would take the first, and then nothing fits."""
    assert chosen([12.0, 9.0, 9.0], [6, 5, 5], 10) == ([1, 2], 18.0)
    assert chosen([12.0, 9.0, 9.0], [6, 5, 5], 9) == ([0], 12.0)


def test_a_rank_that_costs_more_than_there_is_does_not_matter() -> None:
    assert chosen([1e9, 1.0], [100, 3], 10) == ([1], 1.0)


def test_worthless_ranks_fill_up_last_and_in_order() -> None:
    worth, costs = [0.0, -2.0, NAN, 3.0, -1.0], [2, 3, 2, 4, 3]
    assert chosen(worth, costs, 4)[0] == [3]
    assert chosen(worth, costs, 6)[0] == [0, 3]
    assert chosen(worth, costs, 9)[0] == [0, 3, 4]
    assert chosen(worth, costs, 11)[0] == [0, 2, 3, 4], "-2 does not fit, and what is no number does"


@pytest.mark.parametrize("huge", [INF, 1e308])
def test_sums_do_not_overflow(huge: float) -> None:
    assert chosen([huge, huge, 1.0, 2.0], [3, 3, 2, 4], 8)[0] == [0, 1, 2]


def test_worths_of_any_scale_are_told_apart() -> None:
    for scale in (1e-300, 1.0, 1e300):
        assert chosen([12 * scale, 9 * scale, 9 * scale], [6, 5, 5], 10)[0] == [1, 2]


class TestGreedy:
    """The path that is taken where a search would take too long."""

    @pytest.fixture(autouse=True)
    def no_search(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(knapsack, "MOST_COMBINATIONS", 0)

    def test_is_another_path(self) -> None:
        assert chosen([12.0, 9.0, 9.0], [6, 5, 5], 10) == ([0], 12.0)

    def test_the_best_single_rank_is_kept_where_it_is_worth_more(self) -> None:
        """By worth per cost alone 2 would be kept, of 99."""
        assert chosen([2.0, 99.0], [1, 50], 50) == ([1], 99.0)

    def test_is_at_least_half_of_the_most_and_short_by_one_rank(self) -> None:
        generator = np.random.default_rng(0)
        short = 0
        for _ in range(300):
            count = int(generator.integers(2, 12))
            worth, costs = generator.integers(1, 30, count).astype(float), generator.integers(1, 40, count)
            limit = int(generator.integers(costs.min(), costs.sum()))
            most = most_by_trying(worth.tolist(), costs.tolist(), limit)
            _, got = chosen(worth.tolist(), costs.tolist(), limit)
            order = np.argsort(-worth / costs, kind="stable")
            order = order[costs[order] <= limit]
            cut = int(np.searchsorted(np.cumsum(costs[order]), limit, side="right"))
            first_left_out = worth[order[cut]] if cut < len(order) else 0.0
            assert most / 2 <= got <= most
            assert most - got <= first_left_out
            short += got < most
        assert short > 20


@given(st.lists(st.integers(1, 20), max_size=12), st.integers(-5, 150))
def test_fitting_takes_in_order_and_skips(costs: list[int], limit: int) -> None:
    expected, left = [], limit
    for i in reversed(range(len(costs))):
        if costs[i] <= left:
            expected.append(i)
            left -= costs[i]
    order = np.arange(len(costs))[::-1]
    assert fitting(order, np.array(costs, dtype=np.int64), limit).tolist() == expected


def test_a_hundred_thousand_ranks_are_within_the_limit_and_near_the_relaxed_choice() -> None:
    """The relaxed choice is worth more than any; it differs by less than one rank's worth."""
    generator = np.random.default_rng(1)
    worth = generator.lognormal(sigma=2, size=100_000)
    costs = generator.choice(np.array([8192, 18432, 5120]), size=100_000)
    limit = int(costs.sum()) // 2
    kept = most_valuable(worth, costs, limit)
    assert costs[kept].sum() <= limit
    order = np.argsort(-worth / costs)
    cut = int(np.searchsorted(np.cumsum(costs[order]), limit))
    assert 0 <= worth[order[: cut + 1]].sum() - worth[kept].sum() < worth[order[cut]]
