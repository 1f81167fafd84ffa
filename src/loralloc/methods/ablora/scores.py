"""AB-LoRA's scores of ranks (eq. 6 of ALoRA), computed in three ways: all ablations, none, or those that matter.

Processes that train together compute the same numbers, up to rounding that differs between devices. Which ranks are
ablated next depends on them, and a pass through a sharded model needs every process, so every number that such a choice
is made from is the first process's (`agree`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from loralloc.methods.ablora.settle import settle
from loralloc.methods.base import Ablations, agree

Mode = Literal["fast", "exact", "taylor"]


def score_ranks(
    mode: Mode,
    ablations: Ablations,
    gates: Tensor,
    counts: Sequence[tuple[Tensor, int]],
    generator: torch.Generator,
) -> tuple[Tensor, dict[str, Any]]:
    """Score all open ranks, up to a constant that is the same for all.

    Args:
        mode: `exact`, `taylor` or `fast`.
        ablations: The losses of the scoring batch.
        gates: [R], 1 for open ranks and 0 for closed ones.
        counts: For each group of ranks, (boolean [R], how many of its lowest are to be known).
        generator: Draws the audit of `fast`.

    Returns:
        Scores [R], float64 on the CPU, NaN for closed ranks; and what the trace should tell.
    """
    ranks = (gates != 0).nonzero()[:, 0].cpu()
    if mode == "exact":
        scores, measured = _exact(ablations, gates, ranks)
    else:
        on, labels = ablations.gate_gradients(gates)
        off, _ = ablations.gate_gradients(torch.zeros_like(gates))
        on, off = (contributions[:, ranks.to(gates.device)].double().cpu() for contributions in (on, off))
        scores, measured = _agreed(two_point_importance(on, off, labels), gates), {}
        if mode == "fast":
            place = torch.full(gates.shape, -1, dtype=torch.long)
            place[ranks] = torch.arange(len(ranks))
            groups = [(place[members & (place >= 0)], count) for members, count in counts]
            spread = _agreed(ablation_spread(on, off, labels), gates)
            scores, measured = _settled(ablations, gates, ranks, scores, spread, groups, generator)
        measured["sampling_error"] = float(_sampling_error(on + off).median())
    everywhere = torch.full(gates.shape, torch.nan, dtype=torch.float64)
    everywhere[ranks] = scores
    return everywhere, {"mode": mode, "forwards": round(ablations.forwards, 2), **measured}


def _exact(ablations: Ablations, gates: Tensor, ranks: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """IS(r) = S(M) − S(M without r) + S(M with r alone); S(M) is computed among the others."""
    ends = torch.stack([gates, torch.zeros_like(gates)])
    losses = ablations.ablate(torch.cat([ends, ablation_settings(gates, ranks.to(gates.device))])).double().cpu()
    return ablation_importance(losses[2:]) - losses[0], {"loss": float(losses[0]), "loss_without": float(losses[1])}


def _settled(
    ablations: Ablations,
    gates: Tensor,
    ranks: Tensor,
    estimates: Tensor,
    spread: Tensor,
    groups: Sequence[tuple[Tensor, int]],
    generator: torch.Generator,
) -> tuple[Tensor, dict[str, Any]]:
    """Estimates, replaced by exact scores wherever those could decide."""

    def exact(asked: Tensor) -> Tensor:
        settings = ablation_settings(gates, ranks[asked].to(gates.device))
        return _agreed(ablation_importance(ablations.ablate(settings)), gates)

    settled = settle(estimates, spread, groups, exact, generator)
    ablated = settled.ablated
    return settled.scores, {
        "ablated": int(ablated.sum()),
        "correlation": rank_correlation(estimates[ablated], settled.scores[ablated]),
        "error_allowed": float((settled.error * spread).median()),
        "score_spread": float(settled.scores.std(correction=0)),
    }


def _agreed(numbers: Tensor, gates: Tensor) -> Tensor:
    """The first process's numbers, float64 on the CPU; they travel on the device that the gates are on."""
    return agree(numbers.double().to(gates.device)).cpu()


def _sampling_error(contributions: Tensor) -> Tensor:
    """Standard error of a sum over samples, from its terms, [n, R] -> [R]: how far another batch may be."""
    count = len(contributions)
    return contributions.std(0, correction=min(1, count - 1)) * count**0.5


def ablation_settings(gates: Tensor, ranks: Tensor) -> Tensor:
    """Settings of all gates in which each of some ranks is the only one off, then the only one on.

    Args:
        gates: [R], as trained; 0 for ranks that are closed.
        ranks: [K], positions of the ranks to ablate.

    Returns:
        [2K, R]: K settings without the rank, then K with the rank alone.

    >>> ablation_settings(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([1])).tolist()
    [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    """
    chosen = torch.zeros(len(ranks), len(gates), dtype=torch.bool, device=gates.device)
    chosen[torch.arange(len(ranks), device=gates.device), ranks] = True
    return torch.cat([torch.where(chosen, 0.0, gates), torch.where(chosen, gates, 0.0)])


def ablation_importance(losses: Tensor) -> Tensor:
    """CS(r) = −S(M without r) + S(M with r alone), S = −loss (ALoRA, eq. 6 up to S(M), which is the same for all).

    Args:
        losses: [2K], those of `ablation_settings`.

    Returns:
        [K].
    """
    without, alone = losses.chunk(2)
    return without - alone


def two_point_importance(on: Tensor, off: Tensor, labels: int) -> Tensor:
    """Estimate IS(r) − S(no rank) from the gradients at both ends of the path along which all gates open.

        IS(r) − S(∅)  ≈  gᵣ(1) + Fᵣ/2 + gᵣ(0)         g = dS/dα,   Fᵣ = N Σₙ cₙᵣ²

    cₙᵣ is what sample n adds to dLoss/dαᵣ, the loss being the mean over N labels. In the sum of both gradients the
    second-order errors of removing a rank and of adding it cancel up to a third derivative; F is the empirical Fisher
    information, which is the curvature where the model fits the data: with the ranks on, and only there.

    Args:
        on: [n, R], contributions with all gates as trained.
        off: [n, R], with all gates at zero.
        labels: N.

    Returns:
        [R].
    """
    return -on.sum(0) + 0.5 * labels * on.square().sum(0) - off.sum(0)


def ablation_spread(on: Tensor, off: Tensor, labels: int) -> Tensor:
    """How far off `two_point_importance` may be for each rank, up to a common factor, [R]; positive.

    Errors grow with curvature. The square root of the curvature is used, plus its mean over ranks: otherwise one rank
    with an unusual ratio of error to curvature would make all others look uncertain.
    """
    root = (labels * (on.square().sum(0) + off.square().sum(0))).sqrt()
    return root + root.mean().clamp(min=1e-30)


def rank_correlation(left: Tensor, right: Tensor) -> float:
    """Spearman's correlation of two vectors without ties; NaN for fewer than two numbers.

    >>> rank_correlation(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.1, 0.3, 0.2]))
    0.5
    """
    if len(left) < 2:
        return float("nan")
    places = torch.stack([left.argsort().argsort(), right.argsort().argsort()]).double()
    return round(float(torch.corrcoef(places)[0, 1]), 6)
