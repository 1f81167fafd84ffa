"""AB-LoRA's scores of ranks (eq. 6 of ALoRA), computed in three ways: all ablations, none, or those that matter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from loralloc.allocate import settle
from loralloc.methods.base import Ablations
from loralloc.scores import (
    ablation_importance,
    ablation_settings,
    ablation_spread,
    rank_correlation,
    two_point_importance,
)

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
        scores, measured = two_point_importance(on, off, labels), {}
        if mode == "fast":
            place = torch.full(gates.shape, -1, dtype=torch.long)
            place[ranks] = torch.arange(len(ranks))
            groups = [(place[members & (place >= 0)], count) for members, count in counts]
            spread = ablation_spread(on, off, labels)
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
        return ablation_importance(ablations.ablate(settings)).double().cpu()

    settled = settle(estimates, spread, groups, exact, generator)
    known = settled.known
    return settled.scores, {
        "ablated": int(known.sum()),
        "correlation": rank_correlation(estimates[known], settled.scores[known]),
        "error_allowed": float((settled.error * spread).median()),
        "score_spread": float(settled.scores.std(correction=0)),
    }


def _sampling_error(contributions: Tensor) -> Tensor:
    """Standard error of a sum over samples, from its terms, [n, R] -> [R]: how far another batch may be."""
    count = len(contributions)
    return contributions.std(0, correction=min(1, count - 1)) * count**0.5
