"""Which sizes are tried, and which one is recommended: pure functions of numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loralloc.errors import UserError
from loralloc.tasks.metrics import holm

POINTS, SMALLEST = 12, 1 / 32
"""Budgets on a frontier, and the smallest as a share of what was trained."""

ALPHA = 0.05
"""Probability at which a difference is called significant."""


def spread(total: int, points: int = POINTS, smallest: float = SMALLEST) -> list[int]:
    """Choose budgets in ranks, from all of them downwards, each the same factor below the last.

    Args:
        total: Ranks that there are.
        points: How many budgets; fewer where some would be equal.
        smallest: The last one, as a share of the first; at least one rank.

    >>> spread(96, points=6)
    [96, 48, 24, 12, 6, 3]
    """
    ratio = smallest ** (1 / max(1, points - 1))
    return list(dict.fromkeys(max(1, round(total * ratio**k)) for k in range(points)))


def chosen(averages: Sequence[float], modules: int, total: int) -> list[int]:
    """Turn average ranks that a user names into ranks, from many to few.

    Args:
        averages: Ranks per module on average.
        modules: Adapted modules.
        total: Ranks that there are.

    Raises:
        UserError: One is above what there is, or below one rank in all.
    """
    for average in averages:
        if not 1 / modules <= average <= total / modules:
            raise UserError(
                f"--ranks: this adapter has an average rank of {total / modules:.4g} in {modules} modules, and one "
                f"rank in all is the least (an average of {1 / modules:.2g}), got {average:g}"
            )
    return sorted({max(1, int(float(f"{average * modules:.12g}"))) for average in averages}, reverse=True)


@dataclass(frozen=True)
class Worse:
    """How much worse a point is than the best one, in loss per example.

    Attributes:
        mean: Mean difference.
        low: Lower end of its 95 % interval.
        high: Upper end.
        p: Probability of so large a difference where there is none, corrected for the number of points; 1 for the best.
    """

    mean: float
    low: float
    high: float
    p: float

    @property
    def significant(self) -> bool:
        """Whether it is worse beyond doubt."""
        return self.p < ALPHA


def compare_points(losses: Sequence[NDArray[np.floating]]) -> list[Worse]:
    """Compare every point with the one of the lowest mean loss, example by example.

    One-sided paired tests (normal approximation), corrected by Holm for their number.

    Args:
        losses: Losses of the same examples in the same order, [n], for each point.

    Raises:
        UserError: There is one example alone, which cannot be compared.
    """
    table = np.asarray(losses, dtype=np.float64)
    if table.shape[1] < 2:
        raise UserError("sizes are compared by the losses of validation examples, and there is only one; give more")
    best = int(table.mean(1).argmin())
    differences = table - table[best]
    means = differences.mean(1)
    errors = differences.std(1, ddof=1) / math.sqrt(table.shape[1])
    raw = [_upper_tail(mean, error) for mean, error in zip(means, errors, strict=True)]
    others = [index for index in range(len(table)) if index != best]
    corrected = dict(zip(others, holm([raw[index] for index in others]), strict=True))
    return [
        Worse(float(mean), float(mean - 1.96 * error), float(mean + 1.96 * error), corrected.get(index, 1.0))
        for index, (mean, error) in enumerate(zip(means, errors, strict=True))
    ]


def _upper_tail(mean: float, error: float) -> float:
    """P(Z > mean / error); without spread, whether there is a difference decides."""
    if error == 0:
        return 0.0 if mean > 0 else 1.0
    return 0.5 * math.erfc(mean / error / math.sqrt(2))


def recommend(sizes: Sequence[int], worse: Sequence[Worse]) -> int:
    """Return the place of the smallest size that is not significantly worse than the best.

    Args:
        sizes: Ranks of each point.
        worse: How much worse each is.
    """
    return min((place for place, one in enumerate(worse) if not one.significant), key=lambda place: sizes[place])
