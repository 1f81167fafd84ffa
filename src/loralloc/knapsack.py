"""The knapsack problem for ranks: which of them have the largest total worth under a limit on their total cost.

Among ranks of equal cost the best are kept, so a choice is a number of ranks for each cost. The relaxed problem, in
which one rank may be kept in part, is solved by taking ranks in the order of worth per cost; let μ be the worth per
cost of the rank that is cut. Any other choice is worth less than the relaxed solution, by

    Σ |worth − μ · cost|  over the ranks in which the two differ,  plus  μ · the part of the limit that it does not use

so choices that lose more than the greedy one can be skipped. What remains is a few ranks on either side of the cut for
each cost; dynamic programming over the costs goes through their combinations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Positions = NDArray[np.intp]
Costs = NDArray[np.int64]
Worth = NDArray[np.float64]

MOST_COMBINATIONS = 500_000
"""Most combinations that a search may visit: about a tenth of a second. Models have two to five costs and need some
thousands; dozens of costs without a common divisor may need any number."""


def fitting(order: Positions, costs: Costs, limit: int) -> Positions:
    """Take positions one after the other as long as they fit, and skip those that do not.

    Args:
        order: Positions, the first to take first.
        costs: [R], positive.
        limit: Most that they may cost together.

    >>> fitting(np.array([0, 1, 2]), np.array([5, 4, 3]), 8).tolist()
    [0, 2]
    """
    taken = [order[:0]]
    while (order := order[costs[order] <= limit]).size:
        paid = np.cumsum(costs[order])
        count = int(np.searchsorted(paid, limit, side="right"))
        taken.append(order[:count])
        limit -= int(paid[count - 1])
        order = order[count:]
    return np.concatenate(taken)


def most_valuable(worth: Worth, costs: Costs, limit: int) -> Positions:
    """Find the ranks with the largest total worth, and fill up with others until no further rank fits.

    The sum of the positive worths is optimal, up to rounding. If that would take more than `MOST_COMBINATIONS`, the
    result is the greedy choice by worth per cost, or the one that starts with the most valuable rank if that is worth
    more. It reaches at least half of the optimum, and falls short of it by at most the worth of the first rank that the
    greedy choice had to leave out.

    Ranks whose worth is 0, negative or NaN come last, in the order of their worth, and only fill what is left. Among
    ranks of equal cost and worth, earlier positions are kept.

    Args:
        worth: [R].
        costs: [R], positive.
        limit: Most that the kept ranks may cost together.

    Returns:
        Positions, in no order.
    """
    worth = np.where(np.isnan(worth), -np.inf, worth)
    useful = np.flatnonzero((worth > 0) & (costs <= limit))
    kept = useful[_best(_scaled(worth[useful]), costs[useful], limit)] if useful.size else useful
    rest = np.ones(len(worth), dtype=bool)
    rest[kept] = False
    others = np.flatnonzero(rest)
    others = others[np.argsort(-worth[others], kind="stable")]
    return np.concatenate([kept, fitting(others, costs, limit - int(costs[kept].sum()))])


def _scaled(worth: Worth) -> Worth:
    """Divide by a power of two, so that sums are finite; an infinite worth exceeds the sum of all finite ones."""
    finite = worth[np.isfinite(worth)]
    largest = np.frexp(finite.max())[1] if finite.size else 0
    return np.where(np.isfinite(worth), np.ldexp(worth, -largest), len(worth) + 1.0)


@dataclass(frozen=True)
class _Group:
    """The ranks of one cost, from the most worth to the least.

    Attributes:
        cost: What each of them costs.
        members: Their positions.
        count: How many of them the relaxed choice keeps.
        fewer: Worth lost by keeping 1, 2, ... fewer than `count`.
        more: Worth lost by keeping 1, 2, ... more than `count`.
    """

    cost: int
    members: Positions
    count: int
    fewer: Worth
    more: Worth

    def changes(self, reach: int, most: float) -> tuple[NDArray[np.int64], Worth]:
        """Return the changes of `count`, up to `reach` either way, that lose less than `most`, and their losses."""
        fewer, more = (lost[: min(reach, int(np.searchsorted(lost, most)))] for lost in (self.fewer, self.more))
        steps = np.concatenate([-np.arange(len(fewer), 0, -1), np.arange(len(more) + 1)])
        return steps, np.concatenate([fewer[::-1], [0.0], more])


def _best(worth: Worth, costs: Costs, limit: int) -> Positions:
    """As `most_valuable`, for ranks of positive worth that each fit alone, and without filling up."""
    kinds, group = np.unique(costs, return_inverse=True)
    unit = int(np.gcd.reduce(kinds))
    ratio = worth / costs
    order = np.lexsort((-worth, -ratio))
    paid = np.cumsum(costs[order])
    cut = int(np.searchsorted(paid, limit, side="right"))
    if cut == len(order):
        return order
    μ, spare = float(ratio[order[cut]]), limit - (int(paid[cut - 1]) if cut else 0)
    counts = np.bincount(group[order[:cut]], minlength=len(kinds))
    greedy = np.concatenate([order[:cut], fitting(order[cut:], costs, spare)])
    groups = [_group(worth, np.flatnonzero(group == g), int(kinds[g]), int(counts[g]), μ) for g in range(len(kinds))]
    lost = _lost_by(groups, np.bincount(group[greedy], minlength=len(kinds)), μ, limit)
    if lost <= np.finfo(np.float64).eps * worth[greedy].sum():  # optimal up to rounding
        return greedy
    # Some optimal choice is near the relaxed one: if more ranks of a cost changed, some exchanges would cancel out.
    reach = 2 * int(kinds[-1]) // unit
    try:
        # Mostly the best choice loses far less than the greedy one: try tight bounds first, which few choices meet.
        tries = (_search(groups, reach, lost / share, μ, spare) for share in (64, 8, 1))
        found = next((steps for steps in tries if steps is not None), None)
    except _TooManyError:
        single = int(worth.argmax())
        others = order[order != single]
        alone = np.append(fitting(others, costs, limit - int(costs[single])), single)
        return max(greedy, alone, key=lambda choice: float(worth[choice].sum()))
    if found is None:
        return greedy
    return np.concatenate([g.members[: g.count + step] for g, step in zip(groups, found, strict=True)])


def _group(worth: Worth, members: Positions, cost: int, count: int, μ: float) -> _Group:
    members = members[np.argsort(-worth[members], kind="stable")]
    lost = worth[members] - μ * cost
    fewer, more = np.maximum(lost[:count][::-1], 0), np.maximum(-lost[count:], 0)
    return _Group(cost, members, count, np.cumsum(fewer), np.cumsum(more))


def _lost_by(groups: Sequence[_Group], counts: NDArray[np.int64], μ: float, limit: int) -> float:
    """How much less a choice is worth than the relaxed one."""
    lost = 0.0
    for group, count in zip(groups, counts.tolist(), strict=True):
        limit -= count * group.cost
        more = count - group.count
        lost += float(group.more[more - 1] if more > 0 else group.fewer[-more - 1] if more else 0)
    return lost + μ * limit


class _TooManyError(Exception):
    """There are more combinations than it is worth looking at."""


def _search(groups: Sequence[_Group], reach: int, most: float, μ: float, spare: int) -> list[int] | None:
    """Find the change of each group's count with the least total loss; None if that loss is `most` or more.

    Raises:
        _TooManyError: The search would take too long.
    """
    spent, lost = np.zeros(1, dtype=np.int64), np.zeros(1)  # one entry per combination that is still kept
    trail, looked = [], 0
    for group in groups:
        steps, losses = group.changes(reach, most)
        looked += len(spent) * len(steps)
        if looked > MOST_COMBINATIONS:
            raise _TooManyError
        new_lost = np.add.outer(lost, losses)
        before, step = np.nonzero(new_lost < most)
        new_spent, new_lost = spent[before] + group.cost * steps[step], new_lost[before, step]
        order = np.lexsort((new_lost, new_spent))  # keep the least loss for each amount spent
        first = order[np.diff(new_spent[order], prepend=np.iinfo(np.int64).min) != 0]
        spent, lost = new_spent[first], new_lost[first]
        trail.append((before[first], steps[step[first]]))
    lost = np.where(spent <= spare, lost + μ * (spare - spent), np.inf)
    at = int(lost.argmin())
    if not lost[at] < most:
        return None
    chosen = []
    for before, steps in reversed(trail):
        chosen.append(int(steps[at]))
        at = int(before[at])
    return chosen[::-1]
