"""Where ranks start, which are pruned and where as many grow: Algorithm 1 of ALoRA, on scores alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loralloc.allocate import by_score
from loralloc.budget import Budget, Modules
from loralloc.methods.ablora.settle import lowest


def deal(order: Sequence[int], room: Sequence[int], costs: Sequence[int], limit: int) -> list[int]:
    """Give out one rank to each module in turn, again and again, as long as there is room and the cost fits.

    Args:
        order: Modules in the order in which they are served; others get nothing.
        room: Most ranks that each module can take.
        costs: Cost of one rank of each module.
        limit: Most that all given ranks may cost together.

    Returns:
        Ranks given to each module.

    >>> deal(order=[2, 0, 1], room=[9, 9, 9], costs=[1, 1, 1], limit=8)
    [3, 2, 3]
    """
    dealt, open_handed = [0] * len(room), True
    while open_handed:
        open_handed = False
        for module in order:
            if dealt[module] < room[module] and costs[module] <= limit:
                dealt[module] += 1
                limit -= costs[module]
                open_handed = True
    return dealt


def starting_ranks(budget: Budget, modules: Modules, room: Sequence[int]) -> list[int]:
    """Return the ranks that each module starts with: as even as the budget allows, which is met from the start.

    Args:
        budget: The budget.
        modules: The adapted modules, with their capacity as ranks.
        room: Most ranks that each module can take.

    Raises:
        UserError: The modules cannot have the budget.
    """
    return deal(range(len(room)), room, modules.costs(budget.unit), budget.resolve(modules))


@dataclass(frozen=True)
class Move:
    """Ranks that leave and ranks that come.

    Attributes:
        pruned: Positions of the ranks that leave.
        grown: New ranks of each module.
        lost: What the budget lost because no module was left to receive (`keep_budget=False`).
    """

    pruned: Sequence[int]
    grown: Sequence[int]
    lost: int = 0


def reallocate(
    scores: Tensor,
    module: Sequence[int],
    candidates: Tensor,
    count: int,
    room: Sequence[int],
    costs: Sequence[int],
    spare: int = 0,
    keep_budget: bool = True,
) -> Move:
    """One round of ALoRA's Algorithm 1: prune the lowest scores, give their budget to modules that lost none.

    Modules that lost none are served in the order of their average score before pruning; modules without ranks have no
    average and come last. If they cannot take all that is pruned, or if there is no such module, less is pruned.

    Args:
        scores: [R], one for each rank that is open, in the order of modules.
        module: Module of each rank.
        candidates: Boolean [R]; ranks that may be pruned.
        count: Ranks to prune, n_A.
        room: Ranks that each module could grow by.
        costs: Cost of one rank of each module, in the unit of the budget; all 1 where ranks are counted.
        spare: Unspent budget, which is given out as well. If costs differ, some may stay unspent again: less than the
            last of the pruned ranks costs.
        keep_budget: Whether less is pruned if every module would lose a rank. If False, no rank grows then, and the
            budget shrinks by what was pruned (footnote 4 of the paper); one rank always stays.
    """
    by_score = candidates.nonzero()[:, 0][lowest(scores[candidates], count)].tolist()
    everyone = _by_average(scores, module, len(room))
    for size in range(len(by_score), 0, -1):
        pruned = by_score[:size]
        losers = {module[rank] for rank in pruned}
        receivers = [index for index in everyone if index not in losers]
        freed = sum(costs[module[rank]] for rank in pruned)
        if not receivers and not keep_budget:
            pruned = pruned[: max(0, len(scores) - 1)]
            return Move(pruned, [0] * len(room), sum(costs[module[rank]] for rank in pruned))
        grown = deal(receivers, room, costs, freed + spare)
        spent = sum(new * cost for new, cost in zip(grown, costs, strict=True))
        if spent >= freed or (spent and freed + spare - spent < costs[module[pruned[-1]]]):
            return Move(pruned, grown)
    return Move([], [0] * len(room))


def _by_average(scores: Tensor, module: Sequence[int], modules: int) -> list[int]:
    """Modules by the average score of their ranks, best first."""
    of = torch.tensor(module, dtype=torch.long)
    total = torch.zeros(modules, dtype=torch.float64).index_add_(0, of, scores.double().cpu())
    average = total / torch.bincount(of, minlength=modules)  # 0 / 0 is NaN: last
    return by_score(average).tolist()
