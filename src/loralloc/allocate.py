"""Decide which ranks stay, and where freed ranks go: exact selection under a budget, from scores alone.

Higher scores win; ties go to the earlier position; NaN counts as −∞. Keeping none and keeping all are ordinary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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


FIRST_LOOKS = 4
"""Ranks whose score is looked up at first: at least this many near the boundary, and as many others."""

SAFETY = 1.5
"""How much larger than the largest error seen so far an unseen one may be."""


@dataclass(frozen=True)
class Settled:
    """Scores of which enough are exact to know which ranks are lowest.

    Attributes:
        scores: [R], exact where looked up, else the estimate, corrected by the mean error.
        known: Boolean [R]: which were looked up.
        error: Largest error that was allowed for, in units of `spread`.
        corrected: Mean error, which was taken out.
    """

    scores: Tensor
    known: Tensor
    error: float
    corrected: float


def settle(
    estimates: Tensor,
    spread: Tensor,
    counts: Sequence[tuple[Tensor, int]],
    exact: Callable[[Tensor], Tensor],
    generator: torch.Generator,
) -> Settled:
    """Find the lowest scores from estimates, looking up exact scores only where they could decide.

    At first some ranks near the boundary and some random others (the audit) are looked up. Their errors say how far off
    the estimates may be; every rank that could then stand on either side of the boundary is looked up as well, nearest
    first and at most as many at a time as are known, until none is left. The bound is empirical, not proven: it is
    `SAFETY` times the largest error seen.

    Args:
        estimates: [R], float64 on the CPU.
        spread: [R], positive: how large the error of each estimate is expected to be, up to one common factor.
        counts: For each group of ranks, (positions, how many of its lowest are wanted).
        exact: Returns the exact scores of ranks, given by position.
        generator: For the audit.
    """
    known = ~estimates.isfinite()
    scores = estimates.clone()
    if known.any():  # nothing to go by
        known[:] = True
        return Settled(exact(torch.arange(len(scores))).to(scores), known, 0.0, 0.0)
    looks = max(FIRST_LOOKS, len(scores) // 64)
    members = torch.cat([positions for positions, _ in counts])
    near = members[_distance(estimates, counts)[members].argsort(stable=True)[:looks]]
    others = members[~torch.isin(members, near)]
    asked = torch.cat([near, others[torch.randperm(len(others), generator=generator)[:looks]]])
    while True:
        scores[asked] = torch.nan_to_num(exact(asked).to(scores), nan=-torch.inf, neginf=-torch.inf)
        known[asked] = True
        errors = (scores - estimates)[known]
        errors, scale = errors[errors.isfinite()], spread[known][errors.isfinite()]
        corrected = float(errors.mean()) if len(errors) else 0.0
        error = SAFETY * float(((errors - corrected).abs() / scale).max()) if len(errors) else 0.0
        scores = torch.where(known, scores, estimates + corrected)
        unsure = _unsure(scores, torch.where(known, 0.0, error * spread), counts) & ~known
        if not unsure.any():
            return Settled(scores, known, error, corrected)
        asked = unsure.nonzero()[:, 0]
        asked = asked[_distance(scores, counts)[asked].argsort(stable=True)[: int(known.sum())]]


def _distance(scores: Tensor, counts: Sequence[tuple[Tensor, int]]) -> Tensor:
    """How far each score is from its group's boundary: the middle between the last one in and the first one out."""
    distance = torch.full_like(scores, torch.inf)
    for positions, count in counts:
        ordered = scores[positions].sort().values
        if 0 < count < len(ordered):
            distance[positions] = (scores[positions] - (ordered[count - 1] + ordered[count]) / 2).abs()
    return torch.nan_to_num(distance, nan=torch.inf)


def _unsure(scores: Tensor, slack: Tensor, counts: Sequence[tuple[Tensor, int]]) -> Tensor:
    """Which scores could stand on the other side of their group's boundary, if each may be off by its slack."""
    unsure = torch.zeros(len(scores), dtype=torch.bool)
    for positions, count in counts:
        own, off = scores[positions], slack[positions]
        low = torch.zeros(len(own), dtype=torch.bool)
        low[lowest(own, count)] = True
        if not 0 < count < len(own):
            continue
        ceiling, floor = (own + off)[low].max(), (own - off)[~low].min()
        unsure[positions] = torch.where(low, own + off > floor, own - off < ceiling)
    return unsure


def lowest(scores: Tensor, count: int) -> Tensor:
    """Positions of the `count` lowest scores, ascending; ties go to the earlier position, NaN comes first.

    >>> lowest(torch.tensor([0.5, 0.1, 0.1, 0.9]), 2).tolist()
    [1, 2]
    """
    comparable = torch.where(scores.isnan(), -torch.inf, scores)
    return torch.argsort(comparable, stable=True)[:count]


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
    given, open_handed = [0] * len(room), True
    while open_handed:
        open_handed = False
        for module in order:
            if given[module] < room[module] and costs[module] <= limit:
                given[module] += 1
                limit -= costs[module]
                open_handed = True
    return given


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

    Modules that lost none are served in the order of their average score before pruning; those without a rank have none
    and come last. If they cannot take all that is pruned, or if there are none, less is pruned.

    Args:
        scores: [R], one for each rank that is open, in the order of modules.
        module: Module of each rank.
        candidates: Boolean [R]; ranks that may be pruned.
        count: Ranks to prune, n_A.
        room: Ranks that each module could grow by.
        costs: Cost of one rank of each module, in the unit of the budget; all 1 where ranks are counted.
        spare: Budget left over, which is given out as well; where costs differ, something may be left over again, too
            little for the last of the pruned ranks.
        keep_budget: Whether less is pruned where every module would lose a rank. Without, none receives, the budget
            shrinks by what was pruned (footnote 4 of the paper), and one rank always stays.
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
    return _by_score(average).tolist()
