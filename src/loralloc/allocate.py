"""Decide which ranks stay, and where freed ranks go: exact selection under a budget, from scores alone.

Higher scores win; ties go to the earlier position; NaN counts as −∞. Keeping none and keeping all are ordinary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loralloc.budget import Unit


def keep_top(scores: Tensor, count: int) -> Tensor:
    """Keep exactly `count` ranks with the highest scores.

    Args:
        scores: [R], any floating dtype.
        count: 0 ≤ count ≤ R.

    Returns:
        Boolean [R] with exactly `count` True.

    Raises:
        ValueError: `count` is out of range.

    >>> keep_top(torch.tensor([0.5, 0.5, float("nan"), 0.1]), 2).tolist()
    [True, True, False, False]
    """
    if not 0 <= count <= scores.numel():
        raise ValueError(f"cannot keep {count} of {scores.numel()} ranks")
    keep = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    keep[by_score(scores)[:count]] = True
    return keep


def keep_within(scores: Tensor, costs: Tensor, limit: int) -> Tensor:
    """Keep ranks in the order of their scores as long as they fit; skip those that do not.

    The kept ranks never cost more than `limit`, and no further rank fits.

    Args:
        scores: [R].
        costs: [R], positive integers.
        limit: Most the kept ranks may cost together.

    Returns:
        Boolean [R].

    >>> keep_within(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([5, 4, 3]), 8).tolist()
    [True, False, True]
    """
    keep = [False] * scores.numel()
    price = costs.tolist()
    for position in by_score(scores).tolist():
        if price[position] <= limit:
            keep[position] = True
            limit -= price[position]
    return torch.tensor(keep, dtype=torch.bool, device=scores.device)


def select(scores: Tensor, costs: Sequence[int], unit: Unit, target: int) -> Tensor:
    """Keep the best ranks under a budget.

    Args:
        scores: [R].
        costs: [R], parameters of each rank; only for a budget in parameters.
        unit: What the budget counts.
        target: The budget: met exactly in ranks, never exceeded in parameters.

    Returns:
        Boolean [R].

    >>> select(torch.tensor([3.0, 2.0, 1.0]), [5, 4, 3], "parameters", 8).tolist()
    [True, False, True]
    """
    return keep_top(scores, target) if unit == "ranks" else keep_within(scores, torch.tensor(costs), target)


def by_score(scores: Tensor) -> Tensor:
    """Positions from the best score to the worst."""
    comparable = torch.where(scores.isnan(), -torch.inf, scores)
    return torch.argsort(comparable, descending=True, stable=True)
