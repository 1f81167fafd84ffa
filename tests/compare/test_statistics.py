"""The statistics of a comparison, beside their naive twins, textbooks' tables, and data whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loralloc.compare.statistics import (
    LEVEL,
    POWER,
    Difference,
    Parts,
    differences,
    freedom,
    holm,
    rows_suffice,
    seeds_needed,
    t_probability,
    t_quantile,
    variance_parts,
)


def table(seeds: int, rows: int, between: float, row: float, noise: float, seed: int, shift: float = 0.0) -> np.ndarray:
    """Differences with an effect of every seed, one of every row, and noise."""
    draw = np.random.default_rng(seed)
    effects = draw.normal(0, between, (seeds, 1)) + draw.normal(0, row, (1, rows))
    return shift + effects + draw.normal(0, noise, (seeds, rows))


class TestVariance:
    def test_its_parts_are_those_of_the_naive_twin(self) -> None:
        data = table(4, 30, 0.3, 0.5, 0.2, seed=1)
        n, m = data.shape
        mean = sum(data[i, j] for i in range(n) for j in range(m)) / (n * m)
        seeds = [sum(data[i]) / m for i in range(n)]
        rows = [sum(data[:, j]) / n for j in range(m)]
        by_seed = sum((one - mean) ** 2 for one in seeds) / (n - 1) / n
        by_row = sum((one - mean) ** 2 for one in rows) / (m - 1) / m
        rest = sum((data[i, j] - seeds[i] - rows[j] + mean) ** 2 for i in range(n) for j in range(m))
        mixed = rest / ((n - 1) * (m - 1)) / (n * m)
        total = by_seed + by_row - mixed
        degrees = total**2 / (by_seed**2 / (n - 1) + by_row**2 / (m - 1) + mixed**2 / ((n - 1) * (m - 1)))
        found = variance_parts(data)
        for name, truth in (("total", total), ("seeds", by_seed), ("mixed", mixed), ("freedom", degrees)):
            assert getattr(found, name) == pytest.approx(truth), name
        assert found.rows == pytest.approx(by_row - mixed)

    @settings(max_examples=100)
    @given(st.integers(2, 6), st.integers(2, 40), st.tuples(*[st.floats(0, 1)] * 3), st.integers(0, 99))
    def test_it_is_no_less_than_that_of_the_seeds(
        self, seeds: int, rows: int, spreads: tuple[float, float, float], seed: int
    ) -> None:
        data = table(seeds, rows, *spreads, seed)
        parts = variance_parts(data)
        assert parts.total >= data.mean(axis=1).var(ddof=1) / seeds
        assert 1 <= parts.freedom <= seeds * rows

    def test_one_seed_has_no_part(self) -> None:
        data = table(1, 40, 0.0, 0.5, 0.0, seed=5)
        assert variance_parts(data) == Parts(
            pytest.approx(data.var(ddof=1) / 40), 0, pytest.approx(data.var(ddof=1) / 40), 0, 39
        )

    @pytest.mark.parametrize(
        ("seeds", "spreads"),
        [
            (3, (0.3, 0.1, 0.1)),
            (3, (0.0, 0.0, 1.0)),
            (5, (0.02, 0.05, 1.0)),
            (5, (0.0, 1.0, 0.3)),
            (5, (0.1, 0.3, 1.0)),
        ],
        ids=["by seed", "by both", "nearly by both", "by row", "by all"],
    )
    def test_the_truth_is_in_about_95_percent_of_the_intervals(
        self, seeds: int, spreads: tuple[float, float, float]
    ) -> None:
        held = [low <= 0 <= high for low, high in (interval(table(seeds, 300, *spreads, seed)) for seed in range(600))]
        assert 0.92 <= np.mean(held) <= 0.985

    def test_percentiles_of_three_seeds_hold_it_less_often(self) -> None:
        draw, held = np.random.default_rng(0), []
        for seed in range(150):
            data = table(3, 40, 0.3, 0.1, 0.1, seed)
            chosen = draw.integers(0, 3, (400, 3)), draw.integers(0, 40, (400, 40))
            means = data[chosen[0][:, :, None], chosen[1][:, None, :]].mean(axis=(1, 2))
            low, high = np.quantile(means, [0.025, 0.975])
            held.append(low <= 0 <= high)
        assert np.mean(held) < 0.88


def interval(data: np.ndarray) -> tuple[float, float]:
    (one,) = differences([data])
    return one.low, one.high


def test_a_difference_that_is_there_is_found() -> None:
    plain, shifted = differences([table(5, 200, 0.02, 0.1, 0.1, 6), table(5, 200, 0.02, 0.1, 0.1, 8, shift=-0.2)])
    assert not plain.significant
    assert shifted.significant
    assert shifted.high_all < 0
    assert shifted.low_all < shifted.low < shifted.mean < shifted.high < shifted.high_all
    assert (shifted.seeds, shifted.rows) == (5, 200)


def test_one_seed_is_never_significant_however_small_p_is() -> None:
    (one,) = differences([table(1, 400, 0.0, 0.01, 0.0, 7, shift=-1.0)])
    assert one.p < 1e-6
    assert not one.significant


def test_nothing_varies() -> None:
    same, other = differences([np.zeros((2, 5)), np.full((2, 5), -0.5)])
    assert (same.mean, same.p, same.low, same.high) == (0.0, 1.0, 0.0, 0.0)
    assert (other.mean, other.p) == (-0.5, 0.0)


class TestStudent:
    @pytest.mark.parametrize(
        ("probability", "degrees", "value"),
        [(0.975, 1, 12.706), (0.975, 2, 4.303), (0.95, 5, 2.015), (0.995, 10, 3.169), (0.975, 120, 1.980)],
    )
    def test_quantiles_are_those_of_the_tables(self, probability: float, degrees: float, value: float) -> None:
        assert t_quantile(probability, degrees) == pytest.approx(value, abs=6e-4)
        assert t_probability(value, degrees) == pytest.approx(probability, abs=2e-5)
        assert t_probability(-value, degrees) == pytest.approx(1 - probability, abs=2e-5)


class TestPower:
    @staticmethod
    def measured(between: float, rows: float) -> Difference:
        return Difference(0, 0, 0, 0, 0, 1, 1, Parts(between / 3 + rows, between / 3, rows, 0.0, 2), seeds=3, rows=600)

    @staticmethod
    def suffices(n: int, between: float, rows: float, margin: float, comparisons: int) -> bool:
        degrees = freedom(between / n, rows, 0.0, n, 600)
        reach = t_quantile(1 - LEVEL / comparisons / 2, degrees) + t_quantile(POWER, degrees)
        return margin >= reach * math.sqrt(between / n + rows)

    @pytest.mark.parametrize(("between", "rows", "comparisons"), [(1e-3, 1e-6, 1), (4e-4, 1e-5, 4), (1e-6, 1e-6, 9)])
    def test_the_number_is_the_first_that_suffices(self, between: float, rows: float, comparisons: int) -> None:
        found = seeds_needed(self.measured(between, rows), 0.02, comparisons)
        assert found == next(n for n in range(3, 101) if self.suffices(n, between, rows, 0.02, comparisons))

    def test_where_the_rows_alone_are_too_noisy_no_number_of_seeds_is_named(self) -> None:
        noisy, varied = self.measured(1e-6, 1e-3), self.measured(1e-1, 1e-6)
        assert seeds_needed(noisy, 0.02, 1) is None
        assert not rows_suffice(noisy, 0.02, 1)
        assert seeds_needed(varied, 0.02, 1) is None
        assert rows_suffice(varied, 0.02, 1)

    def test_more_seeds_help_where_rows_differ_in_another_way_with_every_seed(self) -> None:
        """The parts of a table's variance are those it was drawn with, and only the rows' own stays."""
        drawn = [variance_parts(table(4, 300, 0.02, 0.2, 0.4, seed)) for seed in range(40)]
        for name, truth in (("seeds", 0.02**2 / 4 + 0.4**2 / 1200), ("rows", 0.2**2 / 300), ("mixed", 0.4**2 / 1200)):
            assert np.mean([getattr(parts, name) for parts in drawn]) == pytest.approx(truth, rel=0.3), name
        (mixed,) = differences([table(3, 400, 0.0, 0.0, 0.4, 5)])
        assert rows_suffice(mixed, 0.02, 1)
        assert seeds_needed(mixed, 0.02, 1) is not None

    def test_so_many_seeds_find_it_also_where_rows_differ_in_another_way_with_every_seed(self) -> None:
        noise, margin = 0.4, 0.05
        truth = Parts(noise**2 / 600, noise**2 / 600, 0.0, noise**2 / 600, 2)
        n = seeds_needed(Difference(0, 0, 0, 0, 0, 1, 1, truth, seeds=3, rows=200), margin, 1)
        assert n is not None
        found = [differences([table(n, 200, 0.0, 0.0, noise, seed, shift=margin)])[0].p for seed in range(400)]
        assert np.mean([p < LEVEL for p in found]) >= POWER - 0.06

    def test_so_many_seeds_do_find_it_as_often_as_promised(self) -> None:
        between, margin = 0.05, 0.05
        n = seeds_needed(self.measured(between**2, 1e-8), margin, 1)
        assert n is not None
        draw = np.random.default_rng(0)
        means = draw.normal(margin, between, (4000, n))
        t = means.mean(axis=1) / (means.std(axis=1, ddof=1) / math.sqrt(n))
        assert np.mean(np.abs(t) > t_quantile(1 - LEVEL / 2, n - 1)) == pytest.approx(POWER, abs=0.05)


@given(st.lists(st.floats(0, 1), max_size=8))
def test_the_correction_for_many_is_holms(raw: list[float]) -> None:
    """Written as in the paper: the k-th smallest of m counts m − k + 1 times, and none less than one before it."""
    corrected = holm(raw)
    for index, probability in enumerate(raw):
        before = [other for place, other in enumerate(raw) if (other, place) <= (probability, index)]
        steps = [(len(raw) - rank) * value for rank, value in enumerate(sorted(before))]
        assert corrected[index] == pytest.approx(min(1.0, max(steps)))
