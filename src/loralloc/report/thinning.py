"""Thin a line of many thousand steps: fewer points, the same picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MOST = 2000
"""Points of a line; a figure is some hundred pixels wide."""

Points = Sequence[tuple[int, float]]


def thinned(points: Points, most: int = MOST) -> Points:
    """Thin a line, but keep its spikes and gaps.

    The line is split into stretches. Each keeps its first, lowest and highest point, and one gap (a value that is not
    finite) if it has any; the last point of the line stays as well.

    Args:
        points: (step, value), values may be NaN.
        most: Most points of the result; a line with no more points is returned as it is.
    """
    if len(points) <= most:
        return points
    values = np.array([value for _, value in points], dtype=np.float64)
    kept = {len(points) - 1}
    for places in np.array_split(np.arange(len(points)), (most - 1) // 4):
        part = values[places]
        finite = places[np.isfinite(part)]
        kept.add(int(places[0]))
        if len(finite):
            kept |= {int(finite[values[finite].argmin()]), int(finite[values[finite].argmax()])}
        if len(finite) < len(places):
            kept.add(int(places[~np.isfinite(part)][0]))
    return [points[place] for place in sorted(kept)]


def smoothed(values: Sequence[float]) -> list[float]:
    """Return the means over a window of about a fifteenth of the values; it narrows towards both ends.

    Args:
        values: Values; those that are not finite stay gaps (NaN) and are left out of the means.

    >>> smoothed([1.0, 5.0, 3.0])
    [1.0, 3.0, 3.0]
    """
    found = np.asarray(values, dtype=np.float64)
    finite = np.isfinite(found)
    place, count = np.arange(len(found)), len(found)
    half = np.minimum(np.minimum(max(1, count // 30), place), count - 1 - place)
    sums, counts = (
        np.concatenate([[0.0], np.cumsum(of)]) for of in (np.where(finite, found, 0.0), finite.astype(np.float64))
    )
    low, high = place - half, place + half + 1
    means = (sums[high] - sums[low]) / np.maximum(counts[high] - counts[low], 1)
    return np.where(finite, means, np.nan).tolist()
