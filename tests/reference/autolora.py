"""AutoLoRA as plain loops, read beside the paper (NAACL 2024, arXiv 2403.09113). Imports nothing from the package.

Weights and selection variables are lists of tensors; losses are functions of (weights, selection variables).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Loss = Callable[[list[Tensor], list[Tensor]], Tensor]


def softmax(logits: Sequence[float]) -> list[float]:
    """α_j = exp(β_j) / Σ_i exp(β_i)."""
    exponentials = [math.exp(logit) for logit in logits]
    return [e / sum(exponentials) for e in exponentials]


def softmax_jacobian(shares: Sequence[float]) -> list[list[float]]:
    """∂α_i/∂β_j = α_i (1[i = j] − α_j)."""
    k = range(len(shares))
    return [[shares[i] * ((i == j) - shares[j]) for j in k] for i in k]


def kept_by_softmax(logits: Sequence[float]) -> int:
    """How many α_j are at least 1/k, up to rounding."""
    return sum(share * len(logits) >= 1 - 1e-9 for share in softmax(logits))


def kept_by_raw_rule(logits: Sequence[float]) -> int:
    """The rule of a script of the public code: β_j / Σβ ≥ 1/k."""
    return sum(logit / sum(logits) >= 1 / len(logits) for logit in logits)


def gradient(loss: Loss, weights: list[Tensor], gates: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """(∂/∂weights, ∂/∂gates)."""
    w = [t.detach().clone().requires_grad_() for t in weights]
    g = [t.detach().clone().requires_grad_() for t in gates]
    found = torch.autograd.grad(loss(w, g), [*w, *g], materialize_grads=True)
    return list(found[: len(w)]), list(found[len(w) :])


def moved(weights: list[Tensor], direction: list[Tensor], by: float) -> list[Tensor]:
    return [w + by * d for w, d in zip(weights, direction, strict=True)]


def norm(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(float((t * t).sum()) for t in tensors))


def unrolled(train: Loss, validation: Loss, weights: list[Tensor], gates: list[Tensor], eta: float) -> list[Tensor]:
    """d/dg L_val(W − η ∇L_tr(W, g), g), by differentiating through the step itself."""
    w = [t.detach().clone().requires_grad_() for t in weights]
    g = [t.detach().clone().requires_grad_() for t in gates]
    step = torch.autograd.grad(train(w, g), w, create_graph=True)
    after = [t - eta * s for t, s in zip(w, step, strict=True)]
    return list(torch.autograd.grad(validation(after, g), g, materialize_grads=True))


def difference(
    train: Loss, weights: list[Tensor], gates: list[Tensor], v: list[Tensor], radius: float, sides: int = 2
) -> list[Tensor]:
    """[∂_g L_tr(W + εv) − ∂_g L_tr(W − εv)] / 2ε, ε = radius / ‖v‖; from one side with sides=1."""
    if norm(v) == 0:
        return [torch.zeros_like(g) for g in gates]
    eps = radius / norm(v)
    below_at = weights if sides == 1 else moved(weights, v, -eps)
    _, above = gradient(train, moved(weights, v, eps), gates)
    _, below = gradient(train, below_at, gates)
    return [(a - b) / (sides * eps) for a, b in zip(above, below, strict=True)]


def hypergradient(
    mode: str,
    train: Loss,
    validation: Loss,
    weights: list[Tensor],
    gates: list[Tensor],
    eta: float,
    radius: float = 0.01,
) -> list[Tensor]:
    """The gradient of the selection variables in each mode, around a step of gradient descent."""
    step, _ = gradient(train, weights, gates)
    after = moved(weights, step, -eta)
    v, direct = gradient(validation, after, gates)
    if mode == "first_order":
        return direct
    if mode == "reference":  # no η, and around W′
        return moved(direct, difference(train, after, gates, v, radius), -1.0)
    if mode == "exact":
        return unrolled(train, validation, weights, gates, eta)
    return moved(direct, difference(train, weights, gates, v, radius, sides=1 if mode == "fast" else 2), -eta)


def adam_steps(
    start: Tensor, gradients: Sequence[Tensor], lr: float, beta1: float, beta2: float, eps: float = 1e-8
) -> Tensor:
    """Adam, one number at a time."""
    values = start.double().flatten().tolist()
    means, squares = [0.0] * len(values), [0.0] * len(values)
    for t, gradient in enumerate(gradients, start=1):
        for i, g in enumerate(gradient.double().flatten().tolist()):
            means[i] = beta1 * means[i] + (1 - beta1) * g
            squares[i] = beta2 * squares[i] + (1 - beta2) * g * g
            root = math.sqrt(squares[i] / (1 - beta2**t))
            values[i] -= lr * (means[i] / (1 - beta1**t)) / (root + eps)
    return torch.tensor(values, dtype=torch.float64).view_as(start)
