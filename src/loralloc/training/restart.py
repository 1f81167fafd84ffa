"""Resets the optimizer for an adapter whose factors have been rewritten in mid-run.

Adam's moments are averages along the directions of the old factors and mean nothing for the new ones. So the moments
and the step count are dropped, and the learning rate warms up again, as at the start of a run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from loralloc.errors import UserError
from loralloc.gating import Site
from loralloc.training.optimizer import unwrapped

SHOW = (
    "the method writes new factors in mid-run and resets the optimizer's state, so it needs the optimizer: pass it to "
    "both run.before_step(optimizer) and run.after_step(optimizer)"
)


def check_shown(optimizer: torch.optim.Optimizer | None) -> None:
    """Refuse a step without the optimizer, in a run that will reset the optimizer.

    Raises:
        UserError: No optimizer was shown.
    """
    if optimizer is None:
        raise UserError(SHOW)


def forget_adapter(optimizer: torch.optim.Optimizer | None, sites: Sequence[Site]) -> None:
    """Drop an optimizer's state of an adapter, as if it had not made a step yet; heads keep theirs.

    Args:
        optimizer: The optimizer, or accelerate's wrapper of it.
        sites: The gated layers.

    Raises:
        UserError: No optimizer was shown.
    """
    check_shown(optimizer)
    inner = unwrapped(optimizer)
    for parameter in (parameter for site in sites for parameter in (site.A, site.B, site.gate)):
        state = inner.state.pop(parameter, None)
        if state is not None and isinstance(inner, torch.optim.Adagrad):  # which makes its state when it is built
            inner.state[parameter] = type(inner)([parameter], **inner.defaults).state[parameter]


class WarmUp:
    """A learning rate that rises once more: step i of n after a restart is made with i / (n + 1) of it.

    The rate in the optimizer's groups is lowered for the step alone, so that schedulers and logs do not see it.
    """

    def __init__(self) -> None:
        self._done, self._steps = 0, 0
        self._rates: list[tuple[dict[str, Any], Any]] = []  # groups with a lowered rate, and their own rates
        self._hook: RemovableHandle | None = None

    def begin(self, steps: int) -> None:
        """Start with the next step.

        Args:
            steps: Length; 0 for none.
        """
        self._done, self._steps = 0, steps

    def before_step(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Lower the learning rate for a step.

        Args:
            optimizer: The optimizer, or accelerate's wrapper of it; it has been shown.
        """
        self.after_step()
        if self._done == self._steps:
            return
        inner = unwrapped(optimizer)
        self._done += 1
        for group in inner.param_groups:
            self._rates.append((group, group["lr"]))
            group["lr"] = group["lr"] * (self._done / (self._steps + 1))
        self._hook = inner.register_step_post_hook(lambda *_: self._put_back())  # before a scheduler reads the rate

    def after_step(self) -> None:
        """Forget the step, also one that the optimizer has not made."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        self._put_back()

    def _put_back(self) -> None:
        for group, rate in self._rates:
            group["lr"] = rate
        self._rates = []

    def state_dict(self) -> dict[str, Tensor]:
        """Steps made and planned; nothing where there is no warm-up going on."""
        return {} if self._done == self._steps else {"warm_up": torch.tensor([self._done, self._steps])}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on where another run stopped."""
        self._done, self._steps = tensors["warm_up"].tolist() if "warm_up" in tensors else (0, 0)
