"""What a run needs of the optimizer: rate, class, whether it holds the gates, and whether ranks can close and open."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState

from loralloc.errors import UserError
from loralloc.gating import Site
from loralloc.methods.base import Method
from loralloc.training.updates import RULES

GATES_HAVE_MOVED_BY = 10
"""Sound step by which trained gates must have moved; a learning-rate warm-up may well start from zero."""

LEAST_STEPS = 3
"""Sound steps without which nothing can be said of the gates."""

PAIRS = "LoraFAOptimizer"
"""PEFT's optimizer for LoRA-FA: it tells factors by the order of parameters whose names hold "lora"."""

TRAINS_B = (
    "use torch.optim.AdamW; to train B alone, as LoRA-FA does, freeze A after attaching: "
    "[site.A.requires_grad_(False) for site in run.sites]"
)

WITHOUT_GATES = "it was built before the allocation was attached; let the Trainer build it, or build it after attach()"


def unwrapped(optimizer: Any) -> Any:
    """The optimizer itself, where accelerate (or another) has wrapped it."""
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def accumulates(optimizer: Any) -> bool:
    """Whether accelerate is accumulating gradients, so that its optimizer's `step()` will do nothing."""
    state = getattr(optimizer, "gradient_state", None)
    return state is not None and not state.sync_gradients


def check_unscaled(optimizer: Any) -> None:
    """Refuse gradients that are still multiplied by accelerate's fp16 loss scale: scores are computed from them.

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
    for factor in (sites[0].A, sites[0].B):
        for group in groups:
            if any(parameter is factor for parameter in group["params"]):
                return float(group["lr"])
    return None


def optimizer_name(optimizer: torch.optim.Optimizer | None) -> str | None:
    """The class of an optimizer, for example `AdamW`; None without an optimizer."""
    return None if optimizer is None else type(unwrapped(optimizer)).__name__


def check_holds_gates(optimizer: torch.optim.Optimizer, sites: Sequence[Site]) -> None:
    """Refuse an optimizer that does not know the gates that are trained, or takes them for factors.

    Raises:
        UserError: It was built before the allocation was attached, or is PEFT's LoRA-FA, built afterwards.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if optimizer_name(optimizer) == PAIRS and any(site.gate_is_trained or id(site.gate) in held for site in sites):
        raise UserError(
            f"{PAIRS} of PEFT takes the parameters of LoRA layers two at a time, A and B, and the gates of the rank "
            f"allocation are a third; {TRAINS_B}"
        )
    missing = [site.name for site in sites if site.gate_is_trained and id(site.gate) not in held]
    if missing:
        raise UserError(
            f"the optimizer does not hold the gates of {len(missing)} modules ({missing[0]}, ...): {WITHOUT_GATES}"
        )


class GateWatch:
    """Detects an optimizer without the gates if it is never passed to the run: gates have gradients but do not move.

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
        """Judge by the steps so far, unless there are too few: a learning-rate warm-up may start from zero.

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
    """Whether an optimizer has moved a gate; entries of zero do not count, since the method sets them."""
    return gate.shape != start.shape or bool(((gate != start.to(gate.device)) & (gate != 0)).any())


FULL_PRECISION = 'use an optimizer in full precision, such as torch.optim.AdamW (optim="adamw_torch" in a Trainer)'

STARTS_RANKS = (
    'use torch.optim.AdamW (optim="adamw_torch" in a Trainer) or another one of torch: '
    + ", ".join(sorted(kind.__name__ for kind in RULES))
    + "; or a method that opens no ranks while it trains, such as AdaLoRA"
)


def check_clears(optimizer: torch.optim.Optimizer, sites: Sequence[Site]) -> None:
    """Refuse an optimizer with a state in which a moment cannot be set to 0.

    Raises:
        UserError: The state is quantized: a 0 in it is some other number.
    """
    for parameter, _, value in _moments(optimizer, sites):
        if isinstance(value, Tensor) and value.shape == parameter.shape and not value.is_floating_point():
            raise UserError(
                f"{optimizer_name(optimizer)} keeps its moments in {value.dtype}, where those of closed ranks cannot "
                f"be cleared; {FULL_PRECISION}"
            )


class MomentWatch:
    """Detects an optimizer whose state of single ranks cannot be cleared or reset, before that is due.

    What torch's own optimizers do is known. Others are judged by their state after the first steps: if it consists only
    of tensors in the shapes of the adapter's parameters, and nothing counts steps, then a rank with zeros is a new one.

    Args:
        method: Says whether ranks are closed (`compacts`) or opened (`opens_ranks`) while it trains.
        sites: The gated layers.
        compact: Whether closed ranks leave the tensors, and the optimizer's state shrinks with them.
    """

    def __init__(self, method: Method, sites: Sequence[Site], compact: bool = False) -> None:
        # If the optimizer is reset when ranks are closed, there is nothing to clear; compaction still shrinks state.
        self._closes, self._opens = method.compacts and (compact or not method.restarts), method.opens_ranks
        self._sites, self._looking = sites, self._closes or self._opens or method.restarts
        self._numbers: dict[tuple[int, str], int] | None = None  # those in the groups at the first look

    def check(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuse by its class an optimizer that is known to be unfit; can be called before the first step.

        Raises:
            UserError: It is one of torch's that starts new ranks wrongly, at all or with its settings.
        """
        inner = unwrapped(optimizer)
        if not self._opens or not type(inner).__module__.startswith("torch.optim"):
            return
        rule = RULES.get(type(inner))
        why = ["its update of a new rank is not known"] if rule is None else map(rule.refused, inner.param_groups)
        self._refuse(inner, next(filter(None, why), None))

    def look(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Look at the state after a step, until enough has been seen: that is after two steps.

        Raises:
            UserError: Ranks could not be closed, or not be opened, when it is due.
        """
        inner = unwrapped(optimizer)
        if not self._looking or inner is None:
            return
        self.check(inner)
        _check_keys(inner)
        if not (self._closes or self._opens):
            self._looking = not inner.state
            return
        check_clears(inner, self._sites)
        moments = list(_moments(inner, self._sites))
        if not moments or type(inner) in RULES or not self._opens:
            self._looking = not moments  # a step that was skipped shows nothing
            return
        for parameter, name, value in moments:
            shape = getattr(value, "shape", torch.Size())
            if value is not None and shape != parameter.shape:
                what = (
                    "is shared by ranks" if shape else "is one number for all ranks of a layer, as a count of steps is"
                )
                self._refuse(inner, f'"{name}" in its state {what}')
        before, self._numbers = self._numbers, _numbers(inner)
        counts = [name for (at, name), value in self._numbers.items() if before and before.get((at, name)) != value]
        self._refuse(inner, f'"{counts[0]}" in its groups counts steps' if counts else None)
        self._looking = before is None

    def _refuse(self, optimizer: torch.optim.Optimizer, why: str | None) -> None:
        if why is not None:
            raise UserError(
                f"{type(optimizer).__name__} does not fit a method that opens ranks while it trains: {why}, so that "
                f"new ranks would start with steps of a wrong size; {STARTS_RANKS}"
            )


def _check_keys(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer whose state is not found under its parameters, as that of PEFT's LoRA-FA is not.

    Raises:
        UserError: It has a state under a name.
    """
    if any(isinstance(key, str) for key in optimizer.state):
        raise UserError(
            f"{optimizer_name(optimizer)} keeps its state by names and not by parameters, so that of ranks that close "
            f"or start anew would not be found; {TRAINS_B}"
        )


def _moments(optimizer: torch.optim.Optimizer, sites: Sequence[Site]) -> Iterator[tuple[Tensor, str, Any]]:
    """All that an optimizer remembers of an adapter: (parameter, name, value)."""
    for site in sites:
        for parameter in (site.A, site.B, site.gate):
            for name, value in optimizer.state.get(parameter, {}).items():
                yield parameter, name, value


def _numbers(optimizer: torch.optim.Optimizer) -> dict[tuple[int, str], int]:
    """The whole numbers in an optimizer's groups, by group and name; rates, which schedules change, left out."""
    numbers = ((at, *item) for at, group in enumerate(optimizer.param_groups) for item in group.items())
    return {(at, name): value for at, name, value in numbers if type(value) is int and not name.endswith("lr")}
