"""Decide which ranks stay: exact selection under a budget, from scores alone.

Higher scores win; ties go to the earlier position; NaN counts as −∞. Keeping none and keeping all are ordinary.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
    keep[_by_score(scores)[:count]] = True
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
    for position in _by_score(scores).tolist():
        if price[position] <= limit:
            keep[position] = True
            limit -= price[position]
    return torch.tensor(keep, dtype=torch.bool, device=scores.device)


def keep_uniform_share(shares: Tensor, tolerance: float = 1e-5) -> Tensor:
    """Keep, per row, what has at least the share that all would have if they were equal: αⱼ ≥ 1/k (AutoLoRA).

    In every row at least one stays (the best, whatever rounding does to the sum), and all of them where they are equal.

    Args:
        shares: [n, k], rows sum to 1. A row that is shorter than the others is padded with −1.
        tolerance: Relative: an equal share that rounding has put below 1/k stays.

    Returns:
        Boolean [n, k], False where a row is padded.

    >>> keep_uniform_share(torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.5, -1.0]])).tolist()
    [[True, False, False], [True, True, False]]
    """
    comparable = torch.where(shares.isnan(), -torch.inf, shares)
    size = (comparable != -1).sum(1, keepdim=True)
    keep = comparable * size >= 1 - tolerance
    return keep.scatter(1, comparable.argmax(1, keepdim=True), True)


def _by_score(scores: Tensor) -> Tensor:
    """Positions from the best score to the worst."""
    comparable = torch.where(scores.isnan(), -torch.inf, scores)
    return torch.argsort(comparable, descending=True, stable=True)
