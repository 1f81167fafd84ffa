"""What a run asks of the optimizer: its learning rate, its kind, and whether it holds the gates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from loralloc.errors import UserError
from loralloc.gating import Site

GATES_HAVE_MOVED_BY = 10
"""Sound step by which trained gates must have moved; a learning-rate warm-up may well start from zero."""

WITHOUT_GATES = "it was built before the allocation was attached; let the Trainer build it, or build it after attach()"


def unwrapped(optimizer: Any) -> Any:
    """The optimizer itself, where accelerate (or another) has wrapped it."""
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


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
        self._pairs = [(site, site.gate.detach().clone()) for site in sites]

    def look(self, sound_steps: int) -> None:
        """Look once, when enough sound steps are done.

        Raises:
            UserError: The gates have gradients and have not moved.
        """
        if sound_steps < GATES_HAVE_MOVED_BY or not self._pairs:
            return
        pairs, self._pairs = self._pairs, []
        trained = [(site, start) for site, start in pairs if site.gate.grad is not None and site.gate.grad.any()]
        if trained and all(torch.equal(site.gate, start.to(site.gate.device)) for site, start in trained):
            raise UserError(
                "the gates do not move although they have gradients; does the optimizer hold them? Maybe "
                f"{WITHOUT_GATES}"
            )
