"""Whether two methods differ: paired differences over seeds and rows, intervals made for few seeds, Holm's correction.

A paired difference is between the losses of one row in two runs with the same seed. Seeds and rows are both random
samples, crossed: all seeds share the rows. The variance of the mean is the sum of both parts, by moments, and gives a t
interval with the degrees of freedom of Satterthwaite (1946): few if most of the variance comes from the seeds, many if
it comes from the rows. A bootstrap over both counts three times what differs from row to row in another way with every
seed (Owen, 2007), and a percentile interval over three seeds would be far too short.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loralloc.tasks.students_t import t_probability, t_quantile

Floats = NDArray[np.float64]

LEVEL = 0.05
"""Significance level of every test; intervals are 95 % intervals."""
POWER = 0.8
"""Power for which `seeds_needed` counts seeds: the probability of detecting a real difference."""
MOST_SEEDS = 100
"""Most seeds that `seeds_needed` recommends."""
ANY_NUMBER = 10**9
"""As many seeds as could be, for `rows_suffice`."""


@dataclass(frozen=True)
class Parts:
    """Where the variance of a mean difference comes from.

    Attributes:
        total: Variance of the mean, over seeds and rows.
        seeds: The part that more seeds reduce; 0 for one seed, for which it is unknown.
        rows: The part of the rows, which more seeds do not reduce.
        mixed: Of `seeds`, what differs from row to row in another way with every seed; 0 for one seed.
        freedom: Degrees of freedom.
    """

    total: float
    seeds: float
    rows: float
    mixed: float
    freedom: float


@dataclass(frozen=True)
class Difference:
    """The mean difference of two methods' losses.

    Attributes:
        mean: Below 0 where the first method is better.
        low: Lower end of its 95 % interval.
        high: Upper end.
        low_all: Lower end of the simultaneous interval, 95 % for all comparisons together (Bonferroni).
        high_all: Upper end.
        p: Two-sided p-value without a correction.
        adjusted: p after Holm's correction.
        parts: Where its variance comes from.
        seeds: Number of seeds.
        rows: Number of rows.
    """

    mean: float
    low: float
    high: float
    low_all: float
    high_all: float
    p: float
    adjusted: float
    parts: Parts
    seeds: int
    rows: int

    @property
    def known(self) -> bool:
        """Whether it has an interval and a p: a single number, of one seed and one row, has none."""
        return math.isfinite(self.parts.total)

    @property
    def significant(self) -> bool:
        """Whether it differs from 0 after Holm's correction; never with one seed, which says nothing about others."""
        return self.seeds > 1 and self.adjusted < LEVEL


def differences(tables: Sequence[Floats]) -> list[Difference]:
    """Compare several methods with the same baseline.

    Args:
        tables: For each method, its losses minus the baseline's, [seeds, rows].

    Returns:
        Their differences, corrected for the number of methods.
    """
    known = [(float(table.mean()), variance_parts(table)) for table in tables]
    values = [p_value(mean, parts) for mean, parts in known]
    found = []
    for (mean, parts), p, adjusted, table in zip(known, values, holm(values), tables, strict=True):
        error = math.sqrt(parts.total)
        one, all_ = (error * t_quantile(1 - level / 2, parts.freedom) for level in (LEVEL, LEVEL / len(tables)))
        ends = (mean - one, mean + one, mean - all_, mean + all_)
        found.append(Difference(mean, *ends, p, adjusted, parts, *table.shape))
    return found


def variance_parts(table: Floats) -> Parts:
    """Return the variance of a table's mean, and its degrees of freedom.

    Of the model y = μ + seed + row + rest, with n seeds and m rows: the variance of the seeds' means over n has an
    expected value of σ²(seed)/n + σ²(rest)/nm, that of the rows' means over m of σ²(row)/m + σ²(rest)/nm. Their sum
    counts the rest twice, so one is subtracted; what is left for the rows is no less than 0.

    Args:
        table: [seeds, rows].
    """
    n, m = table.shape
    if n * m == 1:  # the variance of a single number is unknown
        return Parts(math.inf, 0.0, 0.0, 0.0, 1.0)
    by_seed = float(table.mean(axis=1).var(ddof=1)) / n if n > 1 else 0.0
    by_row = float(table.mean(axis=0).var(ddof=1)) / m if m > 1 else 0.0
    mixed = _interaction(table) / (n * m)
    rows = max(0.0, by_row - mixed)
    return Parts(by_seed + rows, by_seed, rows, mixed, freedom(by_seed, rows, mixed, n, m))


def _interaction(table: Floats) -> float:
    """The variance of a table's entries around the means of their rows and columns; 0 for a single row or column."""
    n, m = table.shape
    rest = table - table.mean(axis=0) - table.mean(axis=1, keepdims=True) + table.mean()
    return float((rest**2).sum()) / max(1, (n - 1) * (m - 1))


def freedom(seeds: float, rows: float, mixed: float, n: int, m: int) -> float:
    """Return Satterthwaite's degrees of freedom of a mean's variance, which is that by seeds + that by rows − mixed.

    Args:
        seeds: As in `Parts`.
        rows: As in `Parts`.
        mixed: As in `Parts`.
        n: Number of seeds.
        m: Number of rows.

    >>> freedom(1.0, 0.0, 0.0, 3, 100), freedom(0.0, 1.0, 0.0, 3, 9), freedom(1.0, 1.0, 0.0, 5, 5)
    (2.0, 8.0, 8.0)
    """
    known = [(seeds, n - 1), (rows + mixed, m - 1), (mixed, (n - 1) * (m - 1))]
    spread = sum(variance**2 / degrees for variance, degrees in known if degrees > 0)
    return max(1.0, (seeds + rows) ** 2 / spread) if spread > 0 else 1.0


def p_value(mean: float, parts: Parts) -> float:
    """Return the two-sided p of a mean difference; 1 where nothing varies and nothing differs."""
    if parts.total == 0:
        return 1.0 if mean == 0 else 0.0
    return 2 * (1 - t_probability(abs(mean) / math.sqrt(parts.total), parts.freedom))


def holm(probabilities: Sequence[float]) -> list[float]:
    """Correct probabilities for their number (Holm, 1979), in the order given.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(probabilities)), key=probabilities.__getitem__)
    corrected, highest = [0.0] * len(order), 0.0
    for place, index in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - place) * probabilities[index]))
        corrected[index] = highest
    return corrected


def seeds_needed(difference: Difference, margin: float, comparisons: int) -> int | None:
    """Return how many seeds it takes to detect a difference as large as the margin.

    The smallest n with margin ≥ (t(1 − α/2) + t(0.8)) · √(s²/n + v). s² is the variance between seeds, v that of the
    rows, which more seeds do not reduce. α is corrected for all comparisons; t has the degrees of freedom of n seeds.

    Args:
        difference: As measured.
        margin: The smallest difference that matters.
        comparisons: Number of comparisons that are made together.

    Returns:
        The number of seeds, 3 or more; None where more than `MOST_SEEDS` are needed.
    """
    tried = range(3, MOST_SEEDS + 1)
    place = bisect_left(tried, True, key=lambda n: _suffice(difference, n, margin, comparisons))
    return tried[place] if place < len(tried) else None


def rows_suffice(difference: Difference, margin: float, comparisons: int) -> bool:
    """Whether a difference as large as the margin could be detected on these rows, given any number of seeds.

    Args:
        difference: As measured.
        margin: The smallest difference that matters.
        comparisons: Number of comparisons that are made together.
    """
    return _suffice(difference, ANY_NUMBER, margin, comparisons)


def _suffice(difference: Difference, n: int, margin: float, comparisons: int) -> bool:
    """Whether n seeds detect a difference as large as the margin."""
    parts = difference.parts
    seeds, mixed = (part * difference.seeds / n for part in (parts.seeds, parts.mixed))
    degrees = freedom(seeds, parts.rows, mixed, n, difference.rows)
    reach = t_quantile(1 - LEVEL / comparisons / 2, degrees) + t_quantile(POWER, degrees)
    return margin >= reach * math.sqrt(seeds + parts.rows)
