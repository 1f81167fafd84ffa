"""The order in which a training loop makes its calls: gradients, `before_step`, the optimizer's step, `after_step`.

A call that is missing, or comes when the gradients are cleared, would let a method judge ranks by nothing: it would go
on to the end, with ranks that mean nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from loralloc.errors import UserError
from loralloc.gating import Site
from loralloc.training.bad_steps import forget

ORDER = "backward(), run.before_step(optimizer), optimizer.step(), run.after_step(optimizer), optimizer.zero_grad()"
INTERRUPTED = "if the step was interrupted, end it with run.after_step(optimizer) first"


class StepOrder:
    """The step that is under way, from `before_step` to `after_step`.

    Args:
        model: The model that is trained.
        sites: Its gated layers.
        own_loop: Whether the calls are made by a loop of the user's own. A Trainer makes them all, so that a step
            without an end has been interrupted.

    Attributes:
        open: Whether a step is under way.
        skipped: Whether the host knows that it is a bad one.
        sound: Whether it is sound, where only the device knows; else None.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site], own_loop: bool) -> None:
        self._model, self._sites, self._own_loop = model, sites, own_loop
        self._has_seen_gradients = False
        self.open = self.skipped = False
        self.sound: Tensor | None = None

    def check_before(self, step: int, total_steps: int) -> None:
        """Check that a step may begin.

        A batch may leave the whole adapter without a gradient, but the first one should not.

        Args:
            step: Steps made.
            total_steps: Steps that the run was planned for.

        Raises:
            UserError: The last one has no end, there are no gradients, or all steps have been made.
        """
        if self.open:
            raise UserError(
                "before_step() was called again, without after_step() in between: the ranks would never be allocated; "
                f"call in every step, skipped ones too: {ORDER}; {INTERRUPTED}"
            )
        if step >= total_steps:
            raise UserError(
                f"the run was planned for {total_steps} optimizer steps, and they have been made: finish() it; give "
                "attach() as many total_steps as optimizer.step() updates the weights (with gradient accumulation, "
                "once in several batches)"
            )
        if not self._has_seen_gradients and not has_gradients(self._model, self._sites):
            raise UserError(
                "nothing that is trained has a gradient in before_step(): the ranks would be allocated without them; "
                f"call in every step: {ORDER}"
            )
        self._has_seen_gradients = True

    def check_after(self) -> None:
        """Check that there is a step to end.

        Raises:
            UserError: None has begun.
        """
        if not self.open:
            raise UserError(
                "after_step() was called without before_step(): the method would not see the gradients of the step; "
                f"call in every step: {ORDER}"
            )

    def check_finish(self, step: int) -> None:
        """Check that a run that ends in the middle of a step has ended others.

        Args:
            step: Steps made.

        Raises:
            UserError: It has not, so that the loop seems to lack `after_step`.
        """
        if self.open and self._own_loop and step == 0:
            raise UserError(
                "after_step() has not been called after before_step(), so the run has made no step; call in every "
                f"step: {ORDER}; {INTERRUPTED}"
            )

    def close(self, optimizer: Any = None) -> None:
        """End the step, or forget one that was interrupted.

        Args:
            optimizer: The optimizer; None if it is not known.
        """
        if self.sound is not None and optimizer is not None:
            forget(optimizer)
        self.open, self.skipped, self.sound = False, False, None


def has_gradients(model: nn.Module, sites: Sequence[Site]) -> bool:
    """Whether anything has a gradient, other than the zeros that `zero_grad(set_to_none=False)` writes over it.

    The adapter is asked first, since a large model has many parameters.

    Args:
        model: The model that is trained.
        sites: Its gated layers.
    """
    adapter = (parameter for site in sites for parameter in (site.B, site.A, site.gate))
    gradients = (parameter.grad for parameter in chain(adapter, model.parameters()))
    return any(gradient is not None and _is_left(gradient) for gradient in gradients)


def _is_left(gradient: Tensor) -> bool:
    """Whether zeros have not been written over a gradient; the part of a sharded one that is here cannot say."""
    return isinstance(gradient, DTensor) or gradient._version == 0 or bool(gradient.any())
