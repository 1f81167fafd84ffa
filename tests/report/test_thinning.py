"""Fewer points for the same picture, and the smoothed line."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loralloc.report.thinning import smoothed, thinned

VALUES = st.lists(st.one_of(st.floats(-1e6, 1e6), st.just(math.nan), st.just(math.inf)), min_size=1, max_size=400)


def smoothed_naively(values: list[float]) -> list[float]:
    """The definition: a mean over a window that is as wide as both ends allow."""
    widest, means = max(1, len(values) // 30), []
    for i, value in enumerate(values):
        half = min(widest, i, len(values) - 1 - i)
        window = [v for v in values[i - half : i + half + 1] if math.isfinite(v)]
        means.append(sum(window) / len(window) if math.isfinite(value) else math.nan)
    return means


@given(VALUES)
def test_smoothing_is_the_mean_of_the_window(values: list[float]) -> None:
    assert smoothed(values) == pytest.approx(smoothed_naively(values), rel=1e-6, abs=1e-3, nan_ok=True)


@given(VALUES, st.integers(5, 60))
def test_thinning_loses_no_extreme_and_no_gap(values: list[float], most: int) -> None:
    points = list(enumerate(values))
    kept = thinned(points, most)
    assert len(kept) <= max(most, len(points) if len(points) <= most else 0)
    assert [step for step, _ in kept] == sorted({step for step, _ in kept})
    assert {step for step, _ in kept} <= {step for step, _ in points}
    assert (kept[0][0], kept[-1][0]) == (0, len(points) - 1)
    found, expected = ([v for _, v in of if math.isfinite(v)] for of in (kept, points))
    assert bool(found) == bool(expected)
    if expected:
        assert (min(found), max(found)) == (min(expected), max(expected))
    assert any(not math.isfinite(v) for _, v in kept) == any(not math.isfinite(v) for v in values)


def test_a_line_that_is_short_enough_stays_as_it_is() -> None:
    points = [(step, 0.5) for step in range(60)]
    assert thinned(points, 60) == points
    assert len(thinned(points, 59)) < 59


def test_every_stretch_of_a_long_line_is_drawn() -> None:
    points = [(step, math.sin(step / 1000)) for step in range(30_000)]
    steps = [step for step, _ in thinned(points, 400)]
    assert max(b - a for a, b in itertools.pairwise(steps)) < 30_000 / 99
