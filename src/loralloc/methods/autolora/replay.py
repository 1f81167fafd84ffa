"""Checks that recomputing a step gives the gradient that the training loop had, before anything is learned from it.

Recomputed is the loss that the model returns, weighted as in the training loop. If the loop adds a term to this loss,
the term is missing. It would be lost in modes that replace the step's gradient, and taken for a second derivative in
the mode that subtracts the two gradients. Such a term may be 0 at first (a divergence from the base model, a penalty on
B, a weight that is warmed up), so one check is not enough: steps 1, 2, 4, 8, ... of a process are compared.
"""

from __future__ import annotations

import torch

from loralloc.errors import UserError
from loralloc.methods.autolora.hypergradient import Tensors, global_norm, train_gradients
from loralloc.methods.base import StepData, any_process, average_

ALLOWED = {torch.bfloat16: 2.0**-5, torch.float16: 2.0**-8}
"""Largest relative error of a recomputed gradient: four times the machine epsilon of its precision."""

ALLOWED_IN_FULL = 1e-3
"""The same in fp32 and wider, where nothing but the order of summation differs."""

CLIP_EPS = 1e-6
"""What `clip_grad_norm_` adds to a norm that it divides by."""


def is_due(step: int) -> bool:
    """Whether a step, counted from 1, is compared: the powers of 2.

    >>> [step for step in range(1, 20) if is_due(step)]
    [1, 2, 4, 8, 16]
    """
    return step & (step - 1) == 0


@torch.no_grad()
def check_replay(
    data: StepData, gates: Tensors, gate_gradients: Tensors | None, mode: str, max_grad_norm: float | None
) -> bool:
    """Compare the step's gradient with the one that comes out when it is computed again.

    Args:
        data: The step's data; the weights have the gradients that the optimizer is about to get.
        gates: The gates.
        gate_gradients: The gates' gradients in the step, not clipped, on this process, for a mode that uses nothing
            else of the step; the length of the other gradients then does not matter. None for modes that replace the
            step's gradients by recomputed ones.
        mode: The method's mode, for the message.
        max_grad_norm: The norm to which the gradients computed again will be clipped.

    Returns:
        Whether there was something to compare: not where both gradients are 0.

    Raises:
        UserError: On some process they differ by more than rounding does.
    """
    weights = data.weights()
    step = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]
    found = train_gradients(data, [*weights, *gates], check=True)
    again, of_gates = found[: len(weights)], found[len(weights) :]
    average_(again)
    length, size = float(global_norm(step)), float(global_norm(again))
    if length == size == 0:
        return False
    allowed = ALLOWED.get(data.precision(), ALLOWED_IN_FULL)
    factor = length / size if size else 0.0
    off = _distance(step, again, factor)
    if gate_gradients is None:
        expected = 1.0 if max_grad_norm is None else min(1.0, max_grad_norm / (size + CLIP_EPS))
    else:
        expected, off = factor, max(off, _distance(gate_gradients, of_gates, 1.0))
    turned, stretched = not off <= allowed, not abs(factor - expected) <= allowed * expected
    if any_process(torch.tensor(turned or stretched, device=weights[0].device)):
        raise UserError(
            f'mode="{mode}" computes the gradient of a step again, from the loss that the model returns, and '
            + (
                _turned(off, allowed)
                if turned
                else _stretched(factor, expected, max_grad_norm)
                if stretched
                else "on another process the gradient does not come back: see its message"
            )
        )
    return True


def _distance(step: Tensors, again: Tensors, factor: float) -> float:
    """‖step − factor · again‖ / ‖step‖; 1 where the step's is 0 and the other is not."""
    difference = torch._foreach_sub(step, torch._foreach_mul(again, factor))
    length, apart = float(global_norm(step)), float(global_norm(difference))
    return apart / length if length else float(apart > 0)


def _turned(off: float, allowed: float) -> str:
    return (
        f"it is off from the one that the training loop has by {off:.2g} of its length (rounding: {allowed:.2g}). "
        "The loop adds a term to that loss, changes gradients, or draws random numbers outside of torch: train "
        'on model(**batch).loss alone, or use mode="first_order", which computes no step again'
    )


def _stretched(factor: float, expected: float, max_grad_norm: float | None) -> str:
    return (
        f"the training loop has {factor:.3g} times that gradient, where max_grad_norm={max_grad_norm} would leave "
        f"{expected:.3g} times. Set run.max_grad_norm to the norm that your loop clips to (None for no clipping), and "
        'change gradients in no other way, or use mode="first_order", which computes no step again'
    )
