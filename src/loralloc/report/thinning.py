"""Fewer points for the same picture: what a line of many thousand steps needs to be drawn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MOST = 2000
"""Points of a line; a figure is some hundred pixels wide."""

Points = Sequence[tuple[int, float]]


def thinned(points: Points, most: int = MOST) -> Points:
    """Keep of every stretch of a line its first point, its lowest, its highest, and a gap where there is one.

    So that no spike is lost. The last point stays as well.

    Args:
        points: (step, value), values may be NaN.
        most: How many points may stay as they are; of more, at most so many are kept.
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
        values: One that is not finite stays a gap, and counts for no mean.

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
