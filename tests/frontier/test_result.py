"""What a frontier says in a sentence."""

from __future__ import annotations

import math
from typing import Any

import pytest

from loralloc.frontier.budgets import compare_points, recommend
from loralloc.frontier.page import _limits
from loralloc.frontier.point import Measured, Point
from loralloc.frontier.result import Frontier, Recovery

NOWHERE: Any = None


def verdict(*losses: float) -> str:
    """Of sizes with these losses, the largest first; examples differ by a hundredth."""
    points = [
        Point(32 >> place, 1000 >> place, 4000 >> place, 8, Measured({}, (loss, loss + 0.01, loss - 0.01), 1.0))
        for place, loss in enumerate(losses)
    ]
    worse = compare_points([point.best.array for point in points])
    best = recommend([point.ranks for point in points], worse)
    return Frontier(NOWHERE, "singular_value", Recovery(0, 1, 0), "loss", points, worse, best, 4).verdict()


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ([1.0], "Average rank 8 (32 ranks, 4 kB) is the only size that was tried."),
        (
            [1.0, 2.0],
            "Take average rank 8 (32 ranks, 4 kB): it has the lowest loss of all sizes that were tried; the next "
            "smaller one is worse; a larger one may be better still.",
        ),
        (
            [2.0, 1.0],
            "Take average rank 4 (16 ranks, 2 kB): it has the lowest loss of all sizes that were tried.",
        ),
        (
            [1.0, 1.0, 2.0],
            "Take average rank 4 (16 ranks, 2 kB), 50% of the largest that was tried: from the best size down to it, "
            "none is significantly worse on 3 validation examples.",
        ),
    ],
)
def test_a_verdict_says_the_size_and_why(losses: list[float], said: str) -> None:
    assert verdict(*losses) == said


def test_a_size_whose_loss_is_not_finite_is_the_worst() -> None:
    """It is neither the best size nor kept when a recovery has mended it, and the curve leaves it out."""
    nan = math.nan
    assert verdict(1.0, nan).startswith("Take average rank 8")
    broken, mended = (Measured({}, (loss, 1.0, 1.0), 1.0) for loss in (nan, 1.1))
    assert Point(1, 1, 1, 1, broken, mended).gained
    assert not Point(1, 1, 1, 1, mended, broken).gained
    assert _limits([broken, mended], [broken, mended]) == _limits([mended], [mended])
    assert _limits([broken], [mended]) == _limits([mended], [mended]), "all recoveries may have diverged"
    assert all(map(math.isfinite, _limits([broken], [broken])))
