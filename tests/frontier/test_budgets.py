"""Which sizes are tried, and which is recommended."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loralloc import UserError
from loralloc.frontier.budgets import Worse, chosen, compare_points, recommend, spread


@given(st.integers(1, 5000), st.integers(1, 20))
def test_sizes_fall_from_all_ranks_to_one_at_least(total: int, points: int) -> None:
    sizes = spread(total, points)
    assert sizes[0] == total
    assert sizes == sorted(set(sizes), reverse=True)
    assert 1 <= len(sizes) <= points
    assert sizes[-1] == (max(1, round(total / 32)) if points > 1 else total)


def test_average_ranks_become_ranks() -> None:
    assert chosen([1, 8, 2.5, 2.5], modules=36, total=288) == [288, 90, 36]
    for outside in (8.1, 0.01):
        with pytest.raises(
            UserError,
            match=rf"^this adapter has an average rank of 8 in 36 modules, .* \(an average of 0.028\), got {outside}$",
        ):
            chosen([outside], modules=36, total=288)


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


def test_a_size_below_one_that_is_worse_is_not_recommended() -> None:
    """Its examples differ more, so that the test does not find what it has lost."""
    table = losses(0.0, 0.0001, 0.05, 0.1)
    noise = np.random.default_rng(0).standard_normal(200)
    table[3] = table[3] + 3 * (noise - noise.mean())
    worse = compare_points(table)
    assert [one.significant for one in worse] == [False, False, True, False]
    assert recommend([8, 4, 2, 1], worse) == 1
    assert recommend([1, 4, 2, 8], [worse[at] for at in (3, 1, 2, 0)]) == 1


def test_sizes_above_the_best_are_no_reason_to_stop() -> None:
    worse = compare_points(losses(0.5, 0.0, 0.0001))
    assert worse[0].significant
    assert recommend([4, 2, 1], worse) == 2


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


def test_equal_sizes_are_seldom_called_worse_however_few_examples_there_are() -> None:
    """The best of them is chosen by the same losses: with Holm over the others it would be a quarter of all."""
    generator, wrong = np.random.default_rng(0), 0
    for trial in range(90):
        table = list(generator.standard_normal((12, (4, 16, 200)[trial % 3])))
        wrong += any(one.significant for one in compare_points(table))
    assert wrong < 0.1 * 90  # 5 % are meant, and 90 trials are few


def test_a_loss_that_is_not_finite_is_the_worst() -> None:
    table = losses(0.0, 0.01)
    table.insert(0, np.where(np.arange(200) == 7, np.nan, table[0]))
    worse = compare_points(table)
    assert worse[0].significant
    assert recommend([1, 8, 4], worse) != 0


def test_equal_losses_are_equal() -> None:
    same = np.arange(4.0)
    assert compare_points([same, same])[1] == Worse(0, 0, 0, 1)
    assert compare_points([same, same + 1])[1].significant


def test_one_example_cannot_be_compared() -> None:
    with pytest.raises(UserError, match=r"^sizes are compared by .* and there is only one; give more$"):
        compare_points([np.ones(1), np.ones(1)])
