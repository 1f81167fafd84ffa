"""Measure ranks and rows: sensitivity, orthogonality penalty, row norms, singular values, ablation.

Tensors in, tensors out. Sites of equal shape are stacked, so that each function is a few tensor operations for many
sites at once. Stacks of A are [n, r, in] (`rank_dim=1`), of B [n, out, r] (`rank_dim=2`), of gates [n, r]
(`rank_dim=1`).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Penalty = Literal["reference", "paper"]


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


def penalty_gradient(
    stack: Tensor,
    rank_dim: int,
    open_ranks: Tensor | None,
    kind: Penalty,
    matrices: int,
    resolution: float | None = None,
) -> Tensor:
    """Gradient of the orthogonality penalty with respect to a stack of factors.

    With G the r×r Gram matrix of a factor (Q Qᵀ or PᵀP) and E = G − I:

        paper      (eq. 4):  Σ ‖E‖²_F over all factors               gradient 4 E Q    or 4 P E
        reference  (code):   mean of ‖E‖_F over all factors          gradient 2 E Q / (‖E‖_F · matrices), likewise for P

    The unsquared norm has a gradient of constant length down to E = 0, where only rounding is left of its direction;
    an optimizer such as Adam would blow that noise up to full steps. It counts as zero there.

    Args:
        stack: [n, r, in] or [n, out, r].
        rank_dim: Which dimension is the rank: 1 or 2.
        open_ranks: Boolean [n, r]; ranks closed for good take no part. None where all are open.
        kind: Which of the two penalties.
        matrices: Number of factors over which `reference` averages: two per site.
        resolution: Relative rounding of the numbers in `stack`, where it is coarser than their dtype's.

    Returns:
        The gradient, in the shape of `stack`; rows (columns) of closed ranks are zero.
    """
    factor, rank, width = stack, stack.shape[rank_dim], stack.shape[3 - rank_dim]
    target = torch.eye(rank, dtype=stack.dtype, device=stack.device)
    if open_ranks is not None:
        factor = torch.where(open_ranks[:, :, None] if rank_dim == 1 else open_ranks[:, None, :], stack, 0.0)
        target = target * open_ranks[:, :, None]
    error = (torch.bmm(factor, factor.mT) if rank_dim == 1 else torch.bmm(factor.mT, factor)).sub_(target)
    if kind == "paper":
        error.mul_(4)
    else:
        norm = torch.linalg.vector_norm(error, dim=(1, 2), keepdim=True)
        eps = torch.finfo(stack.dtype).eps
        noise = eps * (16 * rank + width**0.5) + (resolution or eps) * rank / 4  # of the sums, of the numbers
        error.mul_(torch.where(norm > noise, 2 / (norm * matrices), 0.0))
    return torch.bmm(error, factor) if rank_dim == 1 else torch.bmm(factor, error)


def penalty_value(stack: Tensor, rank_dim: int, kind: Penalty, matrices: int) -> Tensor:
    """The penalty itself, summed over a stack: Σ ‖E‖²_F (`paper`) or Σ ‖E‖_F / matrices (`reference`)."""
    gram = torch.bmm(stack, stack.mT) if rank_dim == 1 else torch.bmm(stack.mT, stack)
    norm = torch.linalg.matrix_norm(gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device))
    return norm.square().sum() if kind == "paper" else norm.sum() / matrices


def row_norms(A: Tensor, gates: Tensor, B: Tensor) -> Tensor:
    """Norms of the rows of ΔW = B diag(g) A, without forming ΔW: [n, r, in], [n, r], [n, out, r] -> [n, out].

        ‖ΔW_i‖² = b_i (A Aᵀ) b_iᵀ     with b_i = B_i ∘ g

    r² (in + out) products instead of r · in · out. The Gram matrix squares the condition number of A, so it is formed
    in float64, whatever the dtype of the factors: the error is 1e-8 of ‖b_i‖ ‖A‖ at worst, below float32's own. A QR
    factorisation would not square it, but is r dependent steps per site where this is two products for all sites.

    Returns:
        The norms, in the dtype of the gates; rows of zeros have norm 0 exactly.
    """
    wide = torch.float32 if A.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    A, gated = A.to(wide), B.to(wide) * gates.to(wide)[:, None, :]
    return ((gated @ (A @ A.mT)) * gated).sum(dim=2).clamp_(min=0).sqrt_().to(gates.dtype)


def row_scales(norms: Tensor, eta: float) -> Tensor:
    """s_i = 1 / √(‖ΔW_i‖ + 1/η²), in (0, η]: the factor of an output row's gradient (ALLoRA, arXiv 2410.09692).

    >>> row_scales(torch.tensor([0.0, 0.25, 0.75]), eta=2.0)
    tensor([2.0000, 1.4142, 1.0000])
    """
    return torch.rsqrt(norms + eta**-2)


def factor_svd(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular value decomposition of B A without forming it: [n, r, in], [n, out, r] -> (U, σ, V).

    With QR factorisations B = Q_B R_B and Aᵀ = Q_A R_A, that of the small core R_B R_Aᵀ = u σ vᵀ gives U = Q_B u and
    V = Q_A v. Computed in the dtype of the factors, float32 or wider.

    Returns:
        U [n, out, k], σ [n, k] from large to small, V [n, in, k], with k = min(r, in, out).
    """
    dtype = torch.promote_types(A.dtype, torch.float32)
    Q_B, R_B = torch.linalg.qr(B.to(dtype))
    Q_A, R_A = torch.linalg.qr(A.to(dtype).mT)
    u, sigma, v = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    return Q_B @ u, sigma, Q_A @ v.mT


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

    Errors grow with curvature. Its root, with the mean as a floor, keeps one rank with an odd ratio from making all
    others look uncertain.
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
