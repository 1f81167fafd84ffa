"""Gradients of a validation loss with respect to gates, through one step of training.

With W′ = W − η ∇_W L_tr(W, g), the gradient of L_val(W′(g), g) is (DARTS, arXiv 1806.09055, eq. 7 and 8)

    ∂L_val/∂g (W′, g) − η · (∂²L_tr / ∂g ∂W)(W, g) · v,        v = ∂L_val/∂W (W′, g)

The functions below give its parts. Gradients are taken outside of `.grad`, and weights that are moved come back bit for
bit. Weights and gates are lists of tensors; what is returned has a tensor for each of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from loralloc.errors import UserError
from loralloc.methods.base import StepData, any_process, average_

Tensors = list[Tensor] | tuple[Tensor, ...]


def validation_gradients(
    data: StepData, gates: Tensors, weights: Tensors, check: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """Return (∂L_val/∂gates, v = ∂L_val/∂weights) of the next validation batch; v is the same on all processes.

    Where the loss is not finite, ∂L_val/∂gates is NaN.
    With `check`, refuse a model whose gradients would not be right (`check_graph`).
    """
    with torch.enable_grad():
        loss = data.validation_loss()
    if check:
        check_graph(loss)
    found = _gradients(loss, [*gates, *weights])
    # Where all labels are -100 the loss is NaN, but its gradients are 0: they must not count as an answer.
    direct = [gradient + (0 * loss.detach()).to(gradient) for gradient in found[: len(gates)]]
    v = found[len(gates) :]
    average_(v)
    return direct, v


@torch.no_grad()
def central_difference(data: StepData, gates: Tensors, weights: Tensors, v: Tensors, radius: float) -> list[Tensor]:
    """(∂²L_tr / ∂gates ∂weights) · v at the present weights: [g(W + εv) − g(W − εv)] / 2ε, ε = radius / ‖v‖."""
    step = _step_along(v, radius)
    if step == 0:
        return [torch.zeros_like(gate) for gate in gates]
    with restored(weights) as start:
        torch._foreach_add_(weights, v, alpha=step)
        above = train_gradients(data, gates)
        torch._foreach_copy_(weights, start)
        torch._foreach_add_(weights, v, alpha=-step)
        below = train_gradients(data, gates)
    torch._foreach_sub_(above, below)
    torch._foreach_div_(above, 2 * step)
    return above


@torch.no_grad()
def one_sided_difference(
    data: StepData,
    gates: Tensors,
    weights: Tensors,
    v: Tensors,
    radius: float,
    origin: Tensors,
    gradient: Tensors,
) -> list[Tensor]:
    """The same at `origin`, from one side: [g(origin + εv) − gradient] / ε, where gradient = g(origin) is known."""
    step = _step_along(v, radius)
    if step == 0:
        return [torch.zeros_like(gate) for gate in gates]
    with restored(weights):
        torch._foreach_copy_(weights, origin)
        torch._foreach_add_(weights, v, alpha=step)
        above = train_gradients(data, gates)
    torch._foreach_sub_(above, gradient)
    torch._foreach_div_(above, step)
    return above


def mixed_derivative(data: StepData, gates: Tensors, weights: Tensors, v: Tensors, check: bool = False) -> list[Tensor]:
    """The same by differentiating twice: ∂/∂gates of ⟨∂L_tr/∂weights, v⟩. Attention is computed in plain operations.

    With `check`, refuse a model whose second derivatives would not be right (`check_graph`).
    """
    total = [torch.zeros_like(gate) for gate in gates]
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        for loss in data.train_losses(twice=True):
            first = _gradients(loss, weights, create_graph=True)
            along = inner_product(first, v)
            if check:
                check_graph(along)
            if along.requires_grad:
                torch._foreach_add_(total, _gradients(along, gates))
    return total


def train_gradients(data: StepData, with_respect_to: Tensors, check: bool = False) -> list[Tensor]:
    """Gradient of the step's own loss, one batch of it at a time; `check` as in `validation_gradients`."""
    total = [torch.zeros_like(tensor) for tensor in with_respect_to]
    with torch.enable_grad():
        for loss in data.train_losses():
            if check:
                check_graph(loss)
            torch._foreach_add_(total, _gradients(loss, with_respect_to))
    return total


def repeat_gradient(data: StepData, max_grad_norm: float | None) -> None:
    """Recompute the step's gradient with the new logits and clip it; keep the old one if the new is not finite."""
    weights = [weight for weight in data.weights() if weight.grad is not None]
    gradients = train_gradients(data, weights)
    average_(gradients)
    if any_process(~torch.isfinite(global_norm(gradients))):
        return
    torch._foreach_copy_([weight.grad for weight in weights if weight.grad is not None], gradients)
    if max_grad_norm is not None:
        nn.utils.clip_grad_norm_(weights, max_grad_norm)


def _gradients(loss: Tensor, with_respect_to: Tensors, create_graph: bool = False) -> list[Tensor]:
    """Gradients outside of `.grad`; zero where the loss does not depend on a tensor."""
    return list(torch.autograd.grad(loss, with_respect_to, create_graph=create_graph, materialize_grads=True))


def check_graph(root: Tensor) -> None:
    """Refuse models for which `torch.autograd.grad` would silently return wrong gradients.

    Raises:
        UserError: A part of the model is hidden in reentrant checkpoints, or has no further derivative.
    """
    nodes, seen = [root.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "CheckpointFunctionBackward":
            raise UserError(
                "AutoLoRA takes gradients that reentrant gradient checkpointing cannot give; use "
                'gradient_checkpointing_kwargs={"use_reentrant": False}'
            )
        if node.name().endswith(("::Error", "::NotImplemented")):
            raise UserError(
                'mode="exact" needs second derivatives, and a layer of this model has none; load it with '
                'attn_implementation="sdpa" or "eager", or use mode="paper"'
            )
        nodes += [following for following, _ in node.next_functions]


def global_norm(tensors: Tensors) -> Tensor:
    """One norm over all of them."""
    norms = torch._foreach_norm(list(tensors))
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device, torch.float64) for norm in norms]))


def inner_product(left: Tensors, right: Tensors) -> Tensor:
    """⟨left, right⟩ over all tensors, which may be on several devices, on the device of the first."""
    device = left[0].device
    terms = ((one * other).sum().to(device) for one, other in zip(left, right, strict=True))
    return sum(terms, torch.zeros((), device=device))


def _step_along(v: Tensors, radius: float) -> float:
    """ε = radius / ‖v‖; 0 where v has no direction."""
    norm = float(global_norm(v))
    return radius / norm if 0 < norm < math.inf else 0.0


def copies(tensors: Tensors) -> list[Tensor]:
    """Copy values."""
    return [tensor.detach().clone() for tensor in tensors]


@contextmanager
def restored(weights: Tensors) -> Iterator[list[Tensor]]:
    """Restore weights, which may be changed inside, bit for bit at the end; yields the original values."""
    start = copies(weights)
    try:
        yield start
    finally:
        with torch.no_grad():
            torch._foreach_copy_(weights, start)
