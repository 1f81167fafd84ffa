"""Norms of the rows of s · B diag(g) A, and the factors of their gradients."""

from __future__ import annotations

import torch
from torch import Tensor


def row_norms(A: Tensor, gates: Tensor, B: Tensor) -> Tensor:
    """Norms of the rows of ΔW = B diag(g) A, without forming ΔW: [n, r, in], [n, r], [n, out, r] -> [n, out].

        ‖ΔW_i‖² = B_i K B_iᵀ     with K = diag(g) A Aᵀ diag(g)

    r² (in + out) products instead of r · in · out. The Gram matrix squares the condition number of A, so it is formed
    in float64, whatever the dtype of the factors: the error is 1e-8 of ‖B_i ∘ g‖ ‖A‖ at worst, below float32's own. A
    QR factorisation would not square it, but is r dependent steps per site where this is two products for all sites.

    Returns:
        The norms, in the dtype of the gates; rows of zeros have norm 0 exactly.
    """
    wide = torch.float32 if A.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    A, B, g = A.to(wide), B.to(wide), gates.to(wide)
    K = torch.bmm(A, A.mT).mul_(g[:, :, None]).mul_(g[:, None, :])
    return torch.bmm(B, K).mul_(B).sum(dim=2).clamp_(min=0).sqrt_().to(gates.dtype)


def row_scales(norms: Tensor, eta: float) -> Tensor:
    """s_i = 1 / √(‖ΔW_i‖ + 1/η²), in (0, η]: the factor of an output row's gradient (ALLoRA, arXiv 2410.09692).

    >>> row_scales(torch.tensor([0.0, 0.25, 0.75]), eta=2.0)
    tensor([2.0000, 1.4142, 1.0000])
    """
    return torch.rsqrt(norms + eta**-2)
