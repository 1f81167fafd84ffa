"""Which sizes are tried, and which one is recommended: pure functions of numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray

from loralloc.errors import UserError
from loralloc.tasks.students_t import t_probability, t_quantile

POINTS, SMALLEST = 12, 1 / 32
"""Number of budgets on a frontier, and the smallest budget as a share of the trained ranks."""

ALPHA = 0.05
"""Probability at which a difference is called significant."""


def spread(total: int, points: int = POINTS, smallest: float = SMALLEST) -> list[int]:
    """Choose budgets in ranks: a geometric sequence from the total downwards.

    Args:
        total: Ranks of the trained adapter.
        points: Number of budgets; fewer if some would be equal.
        smallest: The last budget as a share of the first; at least one rank.

    >>> spread(96, points=6)
    [96, 48, 24, 12, 6, 3]
    """
    ratio = smallest ** (1 / max(1, points - 1))
    return list(dict.fromkeys(max(1, round(total * ratio**k)) for k in range(points)))


def chosen(averages: Sequence[float], modules: int, total: int) -> list[int]:
    """Turn a user's average ranks into total ranks, the largest first.

    Args:
        averages: Average ranks per module.
        modules: Number of adapted modules.
        total: Ranks of the trained adapter.

    Raises:
        UserError: An average is above that of the trained adapter, or below one rank in all.
    """
    for average in averages:
        if not 0.5 <= average * modules <= total + 0.5:
            raise UserError(
                f"this adapter has an average rank of {total / modules:.4g} in {modules} modules, and one "
                f"rank in all is the least (an average of {1 / modules:.2g}), got {average:g}"
            )
    return sorted({max(1, min(total, round(average * modules))) for average in averages}, reverse=True)


@dataclass(frozen=True)
class Worse:
    """How much worse a point is than the best one, in loss per example.

    Attributes:
        mean: Mean difference.
        low: Lower end of its 95 % interval.
        high: Upper end.
        p: Two-sided p-value, corrected for all pairs of points; 1 for the best point.
    """

    mean: float
    low: float
    high: float
    p: float

    @property
    def significant(self) -> bool:
        """Whether it is significantly worse."""
        return self.p < ALPHA


def compare_points(losses: Sequence[NDArray[np.floating]]) -> list[Worse]:
    """Compare every point with the one of the lowest mean loss, example by example.

    Two-sided paired t tests. The best point is chosen by the same losses, so p is corrected for all pairs of points
    (Bonferroni): if all points were equal, fewer than 5 % of frontiers would call any of them worse.

    Args:
        losses: For each point, losses of the same examples in the same order, [n]. A point with a loss that is not
            finite counts as infinitely bad.

    Raises:
        UserError: There is one example alone, which cannot be compared.
    """
    table = np.asarray(losses, dtype=np.float64)
    if table.shape[1] < 2:
        raise UserError("sizes are compared by the losses of validation examples, and there is only one; give more")
    means = np.where(np.isfinite(table).all(1), table.mean(1), np.inf)
    best, pairs = int(means.argmin()), max(1, len(table) * (len(table) - 1) // 2)
    return [_worse(row - table[best], pairs) for row in table]


def _worse(differences: NDArray[np.floating], pairs: int) -> Worse:
    """How much worse a point is, from the differences of its losses to the best one's."""
    if not np.isfinite(differences).all():
        return Worse(math.inf, math.inf, math.inf, 0.0)
    count, mean = len(differences), float(differences.mean())
    error = float(differences.std(ddof=1)) / math.sqrt(count)
    if error == 0:
        return Worse(mean, mean, mean, 1.0 if mean == 0 else 0.0)
    half = error * t_quantile(0.975, count - 1)
    p = 2 * (1 - t_probability(abs(mean) / error, count - 1))
    return Worse(mean, mean - half, mean + half, min(1.0, pairs * p))


def recommend(sizes: Sequence[int], worse: Sequence[Worse]) -> int:
    """Return the index of the smallest size before one is significantly worse, going down from the best.

    The first significantly worse size ends the search. If a still smaller one is not significantly worse, its losses
    vary more, and the test has only failed to detect that it is worse.

    Args:
        sizes: Ranks of each point.
        worse: How much worse each point is than the best.
    """
    best = min(range(len(sizes)), key=lambda place: worse[place].mean)
    smaller = sorted((place for place, size in enumerate(sizes) if size < sizes[best]), key=lambda place: -sizes[place])
    return [best, *takewhile(lambda place: not worse[place].significant, smaller)][-1]
