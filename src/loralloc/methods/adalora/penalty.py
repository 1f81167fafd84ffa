"""The penalty that keeps P and Q of AdaLoRA orthonormal (eq. 4), in closed form."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import threshold

Penalty = Literal["reference", "paper"]


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

    The gradient of the unsquared norm keeps its length as E goes to 0, where its direction is only rounding noise. An
    optimizer such as Adam would turn this noise into full steps, so the gradient is set to zero there.

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
    kept: Tensor | float = 1.0
    if open_ranks is not None:
        factor = torch.where(open_ranks[:, :, None] if rank_dim == 1 else open_ranks[:, None, :], stack, 0.0)
        kept = open_ranks.to(stack.dtype)
    error = torch.bmm(factor, factor.mT) if rank_dim == 1 else torch.bmm(factor.mT, factor)
    error.diagonal(dim1=1, dim2=2).sub_(kept)
    if kind == "paper":
        error.mul_(4)
    else:
        norm = torch.linalg.vector_norm(error, dim=(1, 2), keepdim=True)
        eps = torch.finfo(stack.dtype).eps
        noise = eps * (16 * rank + width**0.5) + (resolution or eps) * rank / 4  # from sums, from entries
        # No longer than the noise: divided by ∞.
        error.div_(threshold(norm, noise, torch.inf).mul_(matrices / 2))
    return torch.bmm(error, factor) if rank_dim == 1 else torch.bmm(factor, error)


def penalty_value(stack: Tensor, rank_dim: int, kind: Penalty, matrices: int) -> Tensor:
    """The penalty itself, summed over a stack: Σ ‖E‖²_F (`paper`) or Σ ‖E‖_F / matrices (`reference`)."""
    gram = torch.bmm(stack, stack.mT) if rank_dim == 1 else torch.bmm(stack.mT, stack)
    norm = torch.linalg.matrix_norm(gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device))
    return norm.square().sum() if kind == "paper" else norm.sum() / matrices
