"""AdaLoRA's importance of weights and triplets: sensitivity, its running averages, their sum (eq. 8 to 12)."""

from __future__ import annotations

from torch import Tensor


def sensitivity(weights: Tensor, gradients: Tensor) -> Tensor:
    """I(w) = |w · ∂L/∂w| (AdaLoRA, eq. 10): to first order, the change of the loss if w were set to zero."""
    return (weights * gradients).abs_()


def smooth_(mean: Tensor, uncertainty: Tensor, current: Tensor, beta1: float | Tensor, beta2: float | Tensor) -> None:
    """Update the two running averages of AdaLoRA in place (eq. 11 and 12, no bias correction).

        mean        ← β₁ · mean        + (1 − β₁) · I
        uncertainty ← β₂ · uncertainty + (1 − β₂) · |I − mean|      with the mean just updated

    `current` is used up as work space. With β₁ = β₂ = 1 and a finite `current` nothing changes.
    """
    mean.lerp_(current, 1 - beta1)
    uncertainty.lerp_(current.sub_(mean).abs_(), 1 - beta2)


def per_rank(element_scores: Tensor, rank_dim: int) -> Tensor:
    """Average a stack of element scores over the features of each rank (eq. 9): [n, r, in] or [n, out, r] -> [n, r]."""
    return element_scores if element_scores.dim() == 2 else element_scores.mean(dim=3 - rank_dim)
