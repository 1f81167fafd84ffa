"""Finds the lowest ranks as if all scores were measured, but measures only those that could change the result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FEWEST_LOOKS, MOST_LOOKS = 4, 16
"""Fewest and most ranks near the boundary that are measured at first: a 64th of all, within these limits.

As many others, drawn at random, are measured with them.
A few errors show how far off estimates may be, however many ranks there are (benchmarks/LOG.md)."""

SAFETY = 1.5
"""Factor by which an unseen error may exceed the largest error seen so far."""


@dataclass(frozen=True)
class Settled:
    """Scores of which enough are exact to know which ranks are lowest.

    Attributes:
        scores: [R], exact if measured, else the estimate, corrected by the mean error.
        ablated: Boolean [R]: which were measured.
        error: Largest error that was allowed for, in units of `spread`.
        corrected: Mean error of the estimates, by which they were corrected.
    """

    scores: Tensor
    ablated: Tensor
    error: float
    corrected: float


def settle(
    estimates: Tensor,
    spread: Tensor,
    counts: Sequence[tuple[Tensor, int]],
    exact: Callable[[Tensor], Tensor],
    generator: torch.Generator,
) -> Settled:
    """Find the lowest scores from estimates, measuring exact scores only if they could change the result.

    At first some ranks near the boundary and some random others (the audit) are measured. Their errors say how far off
    the estimates may be. Every rank that could then be on either side of the boundary is measured too: the nearest
    first, each time at most as many as are already measured, until none is left. The bound is empirical, not proven:
    it is `SAFETY` times the largest error seen.

    Args:
        estimates: [R], float64 on the CPU.
        spread: [R], positive: how large the error of each estimate is expected to be, up to one common factor.
        counts: For each group of ranks, (positions, how many of its lowest are wanted).
        exact: Returns the exact scores of ranks, given by position.
        generator: For the audit.
    """
    ablated = ~estimates.isfinite()
    scores = estimates.clone()
    if ablated.any():  # some estimates are unusable: measure all
        ablated[:] = True
        return Settled(exact(torch.arange(len(scores))).to(scores), ablated, 0.0, 0.0)
    looks = min(max(FEWEST_LOOKS, len(scores) // 64), MOST_LOOKS)
    members = torch.cat([positions for positions, _ in counts])
    near = members[_distance(estimates, counts)[members].argsort(stable=True)[:looks]]
    others = members[~torch.isin(members, near)]
    asked = torch.cat([near, others[torch.randperm(len(others), generator=generator)[:looks]]])
    while True:
        scores[asked] = torch.nan_to_num(exact(asked).to(scores), nan=-torch.inf, neginf=-torch.inf)
        ablated[asked] = True
        errors = (scores - estimates)[ablated]
        errors, scale = errors[errors.isfinite()], spread[ablated][errors.isfinite()]
        corrected = float(errors.mean()) if len(errors) else 0.0
        error = SAFETY * float(((errors - corrected).abs() / scale).max()) if len(errors) else 0.0
        scores = torch.where(ablated, scores, estimates + corrected)
        unsure = _unsure(scores, torch.where(ablated, 0.0, error * spread), counts) & ~ablated
        if not unsure.any():
            return Settled(scores, ablated, error, corrected)
        asked = unsure.nonzero()[:, 0]
        asked = asked[_distance(scores, counts)[asked].argsort(stable=True)[: int(ablated.sum())]]


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
