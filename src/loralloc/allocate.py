"""Decide which ranks stay: exact selection under a budget, from scores alone.

Higher scores win; ties go to the earlier position; NaN counts as −∞. It is valid to keep no rank, or all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from loralloc import knapsack
from loralloc.budget import Budget, Modules

Keep = Callable[[Tensor, Tensor, int], Tensor]
"""A rule that chooses among ranks of different costs: from scores [R], costs [R] and a limit to boolean [R]."""


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
    return _marked(scores, by_score(scores)[:count])


def keep_within(scores: Tensor, costs: Tensor, limit: int) -> Tensor:
    """Keep ranks in the order of their scores as long as they fit; skip those that do not.

    The kept ranks never cost more than `limit`, and no further rank fits.

    Args:
        scores: [R].
        costs: [R], positive integers on the CPU.
        limit: Most the kept ranks may cost together.

    Returns:
        Boolean [R].

    >>> keep_within(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([5, 4, 3]), 8).tolist()
    [True, False, True]
    """
    order = by_score(scores).cpu().numpy()
    return _marked(scores, torch.from_numpy(knapsack.fitting(order, costs.numpy(), limit)))


def keep_most(scores: Tensor, costs: Tensor, limit: int) -> Tensor:
    """Keep the ranks whose scores add up to most, see `knapsack.most_valuable`.

    The kept ranks never cost more than `limit`, and no further rank fits.

    Args:
        scores: [R]: what keeping a rank is worth.
        costs: [R], positive integers on the CPU.
        limit: Most the kept ranks may cost together.

    Returns:
        Boolean [R].

    >>> keep_most(torch.tensor([3.0, 2.0, 2.0]), torch.tensor([5, 4, 4]), 8).tolist()
    [False, True, True]
    """
    found = knapsack.most_valuable(scores.detach().cpu().double().numpy(), costs.numpy(), limit)
    return _marked(scores, torch.from_numpy(found))


def select(scores: Tensor, budget: Budget, modules: Modules, limit: int, keep: Keep = keep_most) -> Tensor:
    """Keep the best ranks under a budget, at most its `max_rank` of each module.

    If all ranks cost the same, as in a budget in ranks, those with the highest scores stay; without a cap, the host
    does not have to wait for the device then. If costs differ, the scores are copied to the host once.

    Args:
        scores: [R], the modules one after the other. If costs differ, the default `keep` maximises the sum of the kept
            scores, so a score must then be what keeping the rank is worth.
        budget: The budget; its unit and its cap are used.
        modules: The modules, with as many ranks as there are scores.
        limit: What the budget allows now, in its unit: met exactly in ranks, never exceeded in parameters or bytes.
        keep: How ranks of different costs are chosen; use `keep_within` if scores define only an order.

    Returns:
        Boolean [R].

    >>> modules = Modules(ranks=[1, 2], parameters=[5, 4], bytes=[20, 16])
    >>> scores = torch.tensor([3.0, 2.0, 2.0])
    >>> select(scores, Budget(parameters=8), modules, 8).tolist()
    [False, True, True]
    >>> select(scores, Budget(parameters=8, max_rank=1), modules, 8).tolist()
    [True, False, False]
    """
    cap, costs = budget.cap(modules, limit), modules.costs(budget.unit)
    if cap is None:
        return _within(scores, modules.ranks, costs, limit, keep)
    best = best_of_each(scores, modules.ranks, cap)
    return _marked(scores, best, _within(scores[best], modules.capped(cap), costs, limit, keep))


def _within(scores: Tensor, ranks: Sequence[int], costs: Sequence[int], limit: int, keep: Keep) -> Tensor:
    """Keep ranks of modules, given what one of each costs."""
    if len({*costs}) == 1:
        return keep_top(scores, min(limit // costs[0], scores.numel()))
    return keep(scores, torch.tensor(costs).repeat_interleave(torch.tensor(ranks)), limit)


def best_of_each(scores: Tensor, ranks: Sequence[int], most: int) -> Tensor:
    """Positions of the best ranks of each module, ascending.

    Args:
        scores: [R], the modules one after the other.
        ranks: Ranks of each module.
        most: Ranks to take from each module; a module with fewer gives all of its ranks.

    >>> best_of_each(torch.tensor([1.0, 3.0, 2.0, 0.0]), [3, 1], 2).tolist()
    [1, 2, 3]
    """
    module = torch.arange(len(ranks)).repeat_interleave(torch.tensor(ranks)).to(scores.device)
    order = by_score(scores)
    by_module = order[torch.argsort(module[order], stable=True)]
    first, chosen = 0, []
    for rank in ranks:
        chosen += range(first, first + min(rank, most))
        first += rank
    return by_module[torch.tensor(chosen, device=scores.device)].sort().values


def break_ties(scores: Tensor, other: Tensor) -> Tensor:
    """Return places instead of scores: the same order, and equal scores ordered by the other ones.

    Args:
        scores: [R].
        other: [R], on any device.

    Returns:
        [R], float32: 0 for the best, −1 for the next, ...; exact up to 2²⁴ ranks.

    >>> break_ties(torch.tensor([0.5, 0.5, 0.7]), torch.tensor([1, 2, 0])).tolist()
    [-2.0, -1.0, -0.0]
    """
    order = by_score(other).to(scores.device)
    order = order[by_score(scores[order])]
    places = torch.empty(scores.shape, dtype=torch.float32, device=scores.device)
    places[order] = -torch.arange(len(order), dtype=torch.float32, device=scores.device)
    return places


def by_score(scores: Tensor) -> Tensor:
    """Positions from the best score to the worst."""
    comparable = torch.where(scores.isnan(), -torch.inf, scores)
    return torch.argsort(comparable, descending=True, stable=True)


def _marked(scores: Tensor, positions: Tensor, mark: Tensor | bool = True) -> Tensor:
    """Boolean [R], on the device of the scores."""
    marked = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    marked[positions.to(scores.device)] = mark
    return marked
