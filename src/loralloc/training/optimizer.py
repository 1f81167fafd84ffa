"""What a run asks of the optimizer: its learning rate, its kind, and whether it holds the gates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState

from loralloc.errors import UserError
from loralloc.gating import Site

GATES_HAVE_MOVED_BY = 10
"""Sound step by which trained gates must have moved; a learning-rate warm-up may well start from zero."""

LEAST_STEPS = 3
"""Sound steps without which nothing can be said of the gates."""

WITHOUT_GATES = "it was built before the allocation was attached; let the Trainer build it, or build it after attach()"


def unwrapped(optimizer: Any) -> Any:
    """The optimizer itself, where accelerate (or another) has wrapped it."""
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def accumulates(optimizer: Any) -> bool:
    """Whether accelerate is only collecting gradients: its optimizer's `step()` will do nothing."""
    state = getattr(optimizer, "gradient_state", None)
    return state is not None and not state.sync_gradients


def check_unscaled(optimizer: Any) -> None:
    """Refuse gradients that still carry the factor of accelerate's fp16 scaler: scores are made of them.

    Raises:
        UserError: They have not been unscaled before `before_step`.
    """
    scaler = getattr(optimizer, "scaler", None)
    if scaler is None or not scaler.is_enabled():
        return
    if scaler._per_optimizer_states[id(unwrapped(optimizer))]["stage"] is OptState.READY:
        raise UserError(
            "the gradients still carry the factor of the fp16 loss scaler; call accelerator.unscale_gradients() (or "
            "accelerator.clip_grad_norm_, which does it) before run.before_step(optimizer), or use bf16"
        )


def learning_rate(optimizer: torch.optim.Optimizer | None, sites: Sequence[Site]) -> float | None:
    """The rate of the group that holds the adapter: A, or B where A is frozen. None without an optimizer."""
    groups = [] if optimizer is None else optimizer.param_groups
    rates = {id(parameter): float(group["lr"]) for group in groups for parameter in group["params"]}
    return rates.get(id(sites[0].A), rates.get(id(sites[0].B)))


def optimizer_name(optimizer: torch.optim.Optimizer | None) -> str | None:
    """The class of an optimizer, for example `AdamW`; None without an optimizer."""
    return None if optimizer is None else type(unwrapped(optimizer)).__name__


def check_holds_gates(optimizer: torch.optim.Optimizer, sites: Sequence[Site]) -> None:
    """Refuse an optimizer that does not know the gates that are trained.

    Raises:
        UserError: It was built before the allocation was attached.
    """
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [site.name for site in sites if site.gate_is_trained and id(site.gate) not in known]
    if missing:
        raise UserError(
            f"the optimizer does not hold the gates of {len(missing)} modules ({missing[0]}, ...): {WITHOUT_GATES}"
        )


class GateWatch:
    """Notices an optimizer that does not hold the gates where nobody shows it to us: gates with gradients stand still.

    Args:
        sites: The gated layers, before training.
    """

    def __init__(self, sites: Sequence[Site]) -> None:
        self._sites = [(site, site.gate.detach().clone()) for site in sites]
        self._have_gradients: set[str] = set()
        self._steps = 0

    def look(self) -> None:
        """Look after each sound step, and judge when there have been enough.

        Raises:
            UserError: The gates had gradients and have not moved.
        """
        if self._steps == GATES_HAVE_MOVED_BY:
            return
        self._steps += 1
        self._have_gradients |= {s.name for s, _ in self._sites if s.gate.grad is not None and s.gate.grad.any()}
        if self._steps == GATES_HAVE_MOVED_BY:
            self.judge()

    def judge(self) -> None:
        """Judge by the steps so far, if they are more than a warm-up of the learning rate could begin with.

        Raises:
            UserError: The gates had gradients and have not moved.
        """
        if self._steps < LEAST_STEPS:
            return
        self._steps = GATES_HAVE_MOVED_BY
        trained = [(site, start) for site, start in self._sites if site.name in self._have_gradients]
        if trained and not any(_moved(site.gate.detach(), start) for site, start in trained):
            raise UserError(
                "the gates do not move although they have gradients; does the optimizer hold them? Maybe "
                f"{WITHOUT_GATES}"
            )


def _moved(gate: Tensor, start: Tensor) -> bool:
    """Whether an optimizer has moved a gate; to zero it is the method that moves it."""
    return gate.shape != start.shape or bool(((gate != start.to(gate.device)) & (gate != 0)).any())
