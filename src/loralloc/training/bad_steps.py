"""Bad steps: those with a gradient that is not finite, on any process. They move nothing, are counted and reported.

Reading the verdict from a GPU makes the host wait until the backward pass is over, at every step. Where optimizer and
method can skip a step on the device, it need not: PyTorch's fused Adam and AdamW leave parameters, moments and their
step count alone where a tensor `found_inf` says so (that is how its loss scaler skips steps), and the verdict is read
when it has arrived. SGD is not among them: its fused kernel leaves a new momentum buffer uninitialised in a skipped
step.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from loralloc.methods.base import Method, any_process, on_any_process
from loralloc.training.optimizer import unwrapped
from loralloc.training.processes import is_main

logger = logging.getLogger(__name__)

MAX_BAD_STEPS = 50
"""Consecutive steps with a non-finite gradient after which a run is given up: more than any loss scaler needs."""

SAY_EVERY = 100
"""Steps from one warning about skipped steps to the next, where nobody sets another number."""


@dataclass(frozen=True)
class _Unread:
    """A verdict on its way to the host."""

    step: int
    bad: Tensor
    arrived: torch.cuda.Event | None


class StepChecks:
    """The verdicts on a run's steps.

    Args:
        model: Its gradients are looked at, and those of what else an optimizer holds that is shown.
        report: Called with the number of each bad step, in order.

    Attributes:
        good: Sound steps so far, as far as known.
        bad: Bad steps.
        bad_in_a_row: Bad steps since the last sound one.
        say: Called with a sentence when steps are skipped; a warning in the log by default.
        say_every: The first skipped step is told at once, those after it at most once in this many steps.
    """

    def __init__(self, model: nn.Module, report: Callable[[int], None]) -> None:
        self.good = self.bad = self.bad_in_a_row = 0
        self.say: Callable[[str], None] = _warn
        self.say_every = SAY_EVERY
        self._said: int | None = None
        self._model, self._report = model, report
        self._parameters: list[nn.Parameter] = []
        self._others: list[Tensor] = []
        self._held: tuple[int, ...] = ()
        self._unread: deque[_Unread] = deque()

    def is_sound(self, step: int, optimizer: Any = None) -> bool:
        """Wait for the verdict on a step; if it is bad, drop all gradients, so that not even momentum moves anything.

        Args:
            step: Its number.
            optimizer: The optimizer, or accelerate's wrapper of it; what it holds outside the model counts as well.

        Raises:
            FloatingPointError: More than `MAX_BAD_STEPS` bad steps in a row.
        """
        self.settle()
        bad = any_process(self._not_finite(optimizer))
        if bad:
            for parameter in (*self._model.parameters(), *self._others):
                parameter.grad = None
        self._count(step, bad)
        return not bad

    def skip_if_bad(self, step: int, optimizer: Any) -> Tensor:
        """Have the optimizer skip a bad step on the device; return whether the step is sound, boolean and unread.

        Raises:
            FloatingPointError: More than `MAX_BAD_STEPS` earlier steps in a row were bad.
        """
        self.settle(wait=len(self._unread) > MAX_BAD_STEPS)
        bad = on_any_process(self._not_finite(optimizer)).bool()
        inner = unwrapped(optimizer)
        inner.found_inf, inner.grad_scale = bad.to(torch.float32), None
        if bad.is_cuda:
            host = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(bad, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
            self._unread.append(_Unread(step, host, arrived))
        else:
            self._unread.append(_Unread(step, bad, None))
        return ~bad

    def settle(self, wait: bool = True) -> None:
        """Count and report the verdicts that have arrived, or all of them.

        Raises:
            FloatingPointError: More than `MAX_BAD_STEPS` bad steps in a row.
        """
        while self._unread and (wait or self._unread[0].arrived is None or self._unread[0].arrived.query()):
            verdict = self._unread.popleft()
            if verdict.arrived is not None:
                verdict.arrived.synchronize()
            self._count(verdict.step, bool(verdict.bad))

    def conclude(self, steps: int) -> int:
        """Say at the end how many of a run's steps were skipped, if any.

        Args:
            steps: Optimizer steps of the run.

        Returns:
            The number of skipped steps.
        """
        self.settle()
        if self.bad:
            self.say(f"{self.bad} of {steps} steps were skipped: their gradients were not finite")
        return self.bad

    def _not_finite(self, optimizer: Any) -> Tensor:
        """Whether any gradient of this process is not finite."""
        if not self._parameters:  # walking through a large model takes longer than the check itself
            self._parameters = list(self._model.parameters())
        self._look_for_others(optimizer)
        gradients = [gradient for p in self._parameters if (gradient := p.grad) is not None]
        gradients += [_numbers(p.grad) for p in self._others if p.grad is not None]
        if not gradients:
            return torch.zeros((), dtype=torch.bool, device=self._parameters[0].device)
        if all(gradient.is_cpu for gradient in gradients):
            return _any_not_finite(gradients)
        return _any_overflows(gradients)

    def _look_for_others(self, optimizer: Any) -> None:
        """Find what an optimizer holds outside the model: again once it is another one, or holds more or less."""
        groups = [] if optimizer is None else unwrapped(optimizer).param_groups
        held = (id(optimizer), *(len(group["params"]) for group in groups))
        if held != self._held:
            self._held, known = held, {id(parameter) for parameter in self._parameters}
            self._others = [p for group in groups for p in group["params"] if id(p) not in known]

    def _count(self, step: int, bad: bool) -> None:
        if not bad:
            self.good += 1
            self.bad_in_a_row = 0
            return
        self.bad += 1
        self.bad_in_a_row += 1
        self._report(step)
        if self._said is None or step - self._said >= self.say_every:
            self._said = step
            count = "" if self.bad == 1 else f" ({self.bad} so far)"
            self.say(f"step {step} was skipped{count}: a gradient was not finite")
        if self.bad_in_a_row > MAX_BAD_STEPS:
            raise FloatingPointError(
                f"{self.bad_in_a_row} optimizer steps in a row had a non-finite gradient (last: step {step}); "
                "lower the learning rate, or use bf16 instead of fp16"
            )


def _numbers(gradient: Tensor) -> Tensor:
    """The numbers of a gradient that this process has: sharded or sparse ones do not go with others into one call."""
    mine = gradient.to_local() if isinstance(gradient, DTensor) else gradient
    return mine._values() if mine.is_sparse else mine


def _any_not_finite(gradients: list[Tensor]) -> Tensor:
    """1 if any entry is not finite, else 0: PyTorch's loss scaler tells, here with a scale of 1, which changes nothing.

    It is one call; on a CPU norms would be one call for each gradient, as slow as a layer's product where it is small.
    """
    found, scale = torch.zeros(()), torch.ones(())
    torch._amp_foreach_non_finite_check_and_unscale_(gradients, found, scale)
    return found


def _any_overflows(tensors: list[Tensor]) -> Tensor:
    """Whether the largest entry of any tensor is not finite, on the device of the first."""
    norms = torch._foreach_norm(tensors, float("inf"))
    if len({(norm.device, norm.dtype) for norm in norms}) > 1:
        norms = [norm.to(norms[0].device, torch.float32) for norm in norms]
    return ~torch.isfinite(torch.stack(norms)).all()


def _warn(sentence: str) -> None:
    """The verdict is the same on all processes: one of them tells it."""
    if is_main():
        logger.warning(sentence)


def can_skip(optimizer: Any, method: Method | None, device: torch.device) -> bool:
    """Whether a bad step can be skipped without the host, and whether that saves anything.

    Args:
        optimizer: The optimizer.
        method: The method that allocates; None where nothing but the optimizer looks at gradients.
        device: Where the trained parameters are.
    """
    if on_host(device):
        return False
    inner = unwrapped(optimizer)
    fused = isinstance(inner, torch.optim.Adam) and all(group.get("fused") for group in inner.param_groups)
    scaled = getattr(optimizer, "scaler", None) is not None  # a loss scaler decides, and waits, for itself
    return fused and not scaled and (method is None or method.masks_bad_steps)


def forget(optimizer: Any) -> None:
    """Take back what `skip_if_bad` told the optimizer: the verdict is about one step."""
    for name in ("found_inf", "grad_scale"):
        vars(unwrapped(optimizer)).pop(name, None)


def on_host(device: torch.device) -> bool:
    """Whether reading a number there costs no waiting."""
    return device.type == "cpu"
