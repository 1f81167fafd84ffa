"""The optimizer's state of ranks that close or start anew: shapes stay, so moments are changed in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from loralloc.gating import Site
from loralloc.methods.base import Decision
from loralloc.training.optimizer import check_clears, unwrapped
from loralloc.training.restart import WarmUp, check_shown, forget_adapter
from loralloc.training.updates import RULES, Group, Rows


@torch.no_grad()
def clear_moments(optimizer: torch.optim.Optimizer, sites: Sequence[Site], opened: Tensor | None = None) -> None:
    """Zero the optimizer's state of ranks that are closed for good, so that no momentum moves them any more.

    Args:
        optimizer: Any optimizer whose state holds tensors in the shape of the parameter (Adam's moments, momentum).
        sites: The sites; a scale of zero marks a closed rank.
        opened: Boolean [R]; ranks that start anew, whose state is zeroed as well.

    Raises:
        UserError: The state is quantized: writing 0 into it does not make a moment 0.
    """
    check_clears(optimizer, sites)
    parts = [None] * len(sites) if opened is None else opened.split([site.rank for site in sites])
    for site, part in zip(sites, parts, strict=True):
        gone = site.scale == 0 if part is None else (site.scale == 0) | part.to(site.gate.device)
        for parameter, index in ((site.A, gone), (site.B, (slice(None), gone)), (site.gate, gone)):
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    value[index] = 0


class FreshRanks:
    """Ranks that were opened in the middle of a run, and their age in steps.

    Adam counts steps once for a whole parameter. After t steps its bias corrections are near 1, and a rank that starts
    with moments of zero at step t would move (1 − β₁ᵏ) / √(1 − β₂ᵏ) times too far at its age k: with β = (0.9, 0.999),
    3.2 times too far in its first step and 6.5 times in its tenth. After each step, such ranks (and their gates, if
    these are trained) are therefore set to what the optimizer would have computed at their own age (`updates`), until
    that no longer makes a difference in fp32. If an optimizer's update does not depend on a step count, nothing is
    corrected; an optimizer about which neither is known is refused (`optimizer.MomentWatch`).

    Args:
        sites: The gated layers.
        restarts: Whether the method will reset the optimizer, which must then be passed in at every step.
    """

    def __init__(self, sites: Sequence[Site], restarts: bool = False) -> None:
        self.sites, self._restarts = sites, restarts
        self._ages: dict[int, tuple[Tensor, Tensor]] = {}  # site -> (positions of its fresh ranks, their ages)
        self._before: dict[int, list[tuple[Tensor, int] | None]] = {}
        self._optimizer: torch.optim.Optimizer | None = None  # the last one that was shown
        self._groups: dict[int, Group] = {}  # of each parameter of the optimizer, before the step
        self._youngest = 0
        self._kept: Tensor | None = None
        self._warm_up = WarmUp()

    def follow(self, decision: Decision, optimizer: torch.optim.Optimizer | None) -> None:
        """Update the optimizer's state after a decision that closes or opens ranks, or rewrites the factors.

        Raises:
            UserError: Its state of a rank cannot be cleared, or the optimizer is needed and was not passed.
        """
        if decision.warmup is not None:
            forget_adapter(optimizer, self.sites)
            self._warm_up.begin(decision.warmup)
        elif optimizer is not None and (decision.closed is not None or decision.opened is not None):
            clear_moments(optimizer, self.sites, decision.opened)
        if decision.opened is not None:
            self.open(decision.opened)

    def take(self, kept: Tensor) -> None:
        """Keep only the ages of ranks that stay in the tensors, before a compaction.

        Args:
            kept: Boolean [R]: the ranks that stay in the tensors.
        """
        self._kept = kept.cpu()
        parts = self._kept.split([site.rank for site in self.sites])
        for index, (fresh, age) in list(self._ages.items()):
            part = parts[index].to(fresh.device)
            stay = part[fresh]
            self._ages[index] = (part.cumsum(0) - 1)[fresh[stay]], age[stay]

    def open(self, opened: Tensor) -> None:
        """Start ranks at age 0.

        Args:
            opened: Boolean [R].
        """
        ages = self._all_ages().masked_fill(opened.cpu(), 0)
        self._set(ages)

    @torch.no_grad()
    def before_step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Copy the values of fresh ranks before the step, and note the version of the gradient, where there is one.

        Args:
            optimizer: The optimizer, or accelerate's wrapper of it; its rate is lowered in a warm-up. None for the last
                one that was shown.
        """
        if self._restarts:
            check_shown(optimizer)
        self._warm_up.before_step(optimizer)
        self._optimizer = self._optimizer if optimizer is None else unwrapped(optimizer)
        self._groups = _groups(self._optimizer) if self._ages and self._optimizer is not None else {}
        for index, (fresh, _) in self._ages.items():
            self._before[index] = [
                None if parameter.grad is None else (parameter.index_select(dim, fresh), parameter.grad._version)
                for parameter, dim in _parameters(self.sites[index])
            ]

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Correct the step of fresh ranks. After a step that was skipped there is nothing to do, and they do not age.

        Args:
            optimizer: The optimizer, or accelerate's wrapper of it.
        """
        if self._restarts:
            check_shown(optimizer)
        before, self._before = self._before, {}
        groups, self._groups = self._groups, {}
        inner = self._optimizer = unwrapped(optimizer)
        self._warm_up.after_step()
        if not before or inner is None:
            return
        rule = RULES.get(type(inner))
        if rule is None or rule.update is None:
            self._ages = {}
            return
        groups = groups or _groups(inner)
        for index, rows in before.items():
            if all(row is None for row in rows):  # the layer took no part
                continue
            fresh, age = self._ages[index]
            age += 1
            for (parameter, dim), row in zip(_parameters(self.sites[index]), rows, strict=True):
                state, group = inner.state.get(parameter, {}), groups.get(id(parameter))
                if row is not None and group is not None and "exp_avg" in state:
                    old, version = row
                    new = rule.update(Rows(old, parameter, state, group, fresh, version, age, dim))
                    parameter.index_copy_(dim, fresh, new.to(old.dtype))
        self._youngest += 1
        if all(rule.outgrown(group, self._youngest) for group in inner.param_groups):
            self._ages = {}

    def state_dict(self) -> dict[str, Tensor]:
        """Ages of fresh ranks, −1 for all others, [R], and where a warm-up stands; nothing where there are none."""
        warm_up = self._warm_up.state_dict()
        if not self._ages:
            return warm_up
        ages = self._all_ages()
        if self._kept is not None:
            ages = torch.full_like(self._kept, -1, dtype=torch.long).masked_scatter_(self._kept, ages)
        return {"fresh.ages": ages, **warm_up}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore ages and a warm-up."""
        self._before = {}
        self._warm_up.load_state_dict(tensors)
        self._ages = {}
        if "fresh.ages" in tensors:
            self._set(tensors["fresh.ages"])

    def _all_ages(self) -> Tensor:
        ages = [torch.full((site.rank,), -1, dtype=torch.long) for site in self.sites]
        for index, (fresh, age) in self._ages.items():
            ages[index][fresh.cpu()] = age.cpu()
        return torch.cat(ages)

    def _set(self, ages: Tensor) -> None:
        parts = ages.split([site.rank for site in self.sites])
        self._ages, self._youngest = {}, int(ages.max())
        for index, (part, site) in enumerate(zip(parts, self.sites, strict=True)):
            (fresh,) = (part >= 0).nonzero(as_tuple=True)
            if len(fresh):
                self._youngest = min(self._youngest, int(part[fresh].min()))
                self._ages[index] = fresh.to(site.A.device), part[fresh].to(site.A.device)


def _groups(optimizer: torch.optim.Optimizer) -> dict[int, Group]:
    """The group of each parameter as it is now: a scheduler may set another rate, or other betas, after the step."""
    groups: dict[int, Group] = {}
    for group in optimizer.param_groups:
        now = {name: value.clone() if isinstance(value, Tensor) else value for name, value in group.items()}
        groups |= {id(parameter): now for parameter in group["params"]}
    return groups


def _parameters(site: Site) -> tuple[tuple[Tensor, int], ...]:
    """A site's parameters, each with the dimension along which its ranks lie."""
    return (site.A, 0), (site.B, 1), (site.gate, 0)
