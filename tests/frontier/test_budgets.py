"""Which sizes are tried, and which is recommended."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loralloc import UserError
from loralloc.frontier.budgets import Worse, chosen, compare_points, recommend, spread
from loralloc.tasks.metrics import holm


@given(st.integers(1, 5000), st.integers(1, 20))
def test_sizes_fall_from_all_ranks_to_one_at_least(total: int, points: int) -> None:
    sizes = spread(total, points)
    assert sizes[0] == total
    assert sizes == sorted(set(sizes), reverse=True)
    assert 1 <= len(sizes) <= points
    assert sizes[-1] == (max(1, round(total / 32)) if points > 1 else total)


def test_average_ranks_become_ranks() -> None:
    assert chosen([1, 8, 2.5, 2.5], modules=36, total=288) == [288, 90, 36]
    for outside in (8.1, 0.02):
        with pytest.raises(
            UserError,
            match=rf"^--ranks: .* an average rank of 8 in 36 modules, .* \(an average of 0.028\), got {outside}$",
        ):
            chosen([outside], modules=36, total=288)


@given(st.lists(st.floats(0, 1), max_size=8))
def test_the_correction_for_many_is_holms(raw: list[float]) -> None:
    """Written as in the paper: the k-th smallest of m counts m − k + 1 times, and none less than one before it."""
    corrected = holm(raw)
    for index, probability in enumerate(raw):
        before = [other for place, other in enumerate(raw) if (other, place) <= (probability, index)]
        steps = [(len(raw) - rank) * value for rank, value in enumerate(sorted(before))]
        assert corrected[index] == pytest.approx(min(1.0, max(steps)))


def losses(*offsets: float, noise: float = 0.01, n: int = 200) -> list[np.ndarray]:
    """Losses of equal examples at several sizes, which differ by an offset and a little noise."""
    generator = np.random.default_rng(0)
    hard = generator.exponential(size=n)
    return [hard + offset + noise * generator.standard_normal(n) for offset in offsets]


def test_the_smallest_size_that_is_not_worse_is_recommended() -> None:
    table = losses(0.0, 0.0001, 0.0, 0.05, 0.5)
    worse = compare_points(table)
    assert [one.significant for one in worse] == [False, False, False, True, True]
    assert recommend([16, 8, 4, 2, 1], worse) == 2
    assert sum(one.mean == 0 for one in worse) == 1


def test_what_makes_examples_hard_does_not_hide_a_difference() -> None:
    """Unpaired, 0.05 is nothing against a spread of 1."""
    table = losses(0.0, 0.05)
    worse = compare_points(table)[1]
    assert worse.significant
    assert worse.low < 0.05 < worse.high
    spread_of_means = math.hypot(*(losses.std() / len(losses) ** 0.5 for losses in table))
    assert 1.96 * spread_of_means > 0.05


def test_noise_alone_makes_no_size_worse() -> None:
    worse = compare_points(losses(*[0.0] * 12, noise=0.3))
    assert not any(one.significant for one in worse)
    assert recommend(range(12, 0, -1), worse) == 11


def test_equal_losses_are_equal() -> None:
    same = np.arange(4.0)
    assert compare_points([same, same])[1] == Worse(0, 0, 0, 1)
    assert compare_points([same, same + 1])[1].significant


def test_one_example_cannot_be_compared() -> None:
    with pytest.raises(UserError, match=r"^sizes are compared by .* and there is only one; give more$"):
        compare_points([np.ones(1), np.ones(1)])
