"""Fixed ranks dealt out one at a time, as one would by hand. Imports nothing from the package."""

from __future__ import annotations

from collections.abc import Sequence


def deal(weights: Sequence[float], capacity: Sequence[int], total: int) -> list[int]:
    """Give each next rank to the module that is furthest behind its share (Webster): largest weight / (2 rank + 1)."""
    ranks = [0] * len(weights)
    for _ in range(total):
        behind = [-1.0 if r == c else w / (2 * r + 1) for w, r, c in zip(weights, ranks, capacity, strict=True)]
        ranks[behind.index(max(behind))] += 1
    return ranks
