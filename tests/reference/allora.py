"""ALLoRA (arXiv 2410.09692) as plain as it can be written: the update matrix is formed, and a hook scales its gradient.

Imports nothing from the package. One pass of the paper's section on the method, per layer:

    ΔW = B A                                    formed in full, [out, in]
    s_i = 1 / sqrt(‖ΔW_i‖ + 1/η²)               row by row, a constant to autograd
    y = W x + ΔW x                              ∂L/∂ΔW is multiplied by s, row by row, before it reaches A and B
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def row_norm(delta: Tensor, i: int) -> float:
    """‖ΔW_i‖, entry by entry."""
    return math.sqrt(sum(float(entry) ** 2 for entry in delta[i]))


def row_scale(delta: Tensor, eta: float) -> Tensor:
    """s, [out]."""
    return torch.tensor([1 / math.sqrt(row_norm(delta, i) + 1 / eta**2) for i in range(len(delta))], dtype=delta.dtype)


def layer(
    x: Tensor, W: Tensor, A: Tensor, B: Tensor, eta: float, share: float = 1.0, g: Tensor | None = None
) -> Tensor:
    """The output of an adapted layer; gradients of A and B are scaled by s · share."""
    delta = B @ A
    s = row_scale(delta.detach(), eta) * share
    if delta.requires_grad:
        delta.register_hook(lambda gradient: s[:, None] * gradient)
    # x meets the values of ΔW, whose gradient is not scaled; ΔW meets the values of x.
    return x @ W.T + x @ delta.detach().T + (scaled := x.detach() @ delta.T) - scaled.detach()
