"""A rank allocation attached to a model: what the Trainer callback drives, and what an own loop calls."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from loralloc._version import __version__
from loralloc.budget import Schedule
from loralloc.errors import UserError
from loralloc.gating import Site, attach_gates, fold_gates
from loralloc.methods.base import (
    Decision,
    Method,
    Moment,
    any_process,
    open_ranks,
    rank_plan,
    ranks_by_site,
    settings_of,
    site_budget,
)
from loralloc.plan import RankPlan
from loralloc.training.moments import FreshRanks, clear_moments
from loralloc.training.probe import DataProbe

MAX_BAD_STEPS = 50
"""Consecutive steps with a non-finite gradient after which a run is given up: more than any loss scaler needs."""

GATES_HAVE_MOVED_BY = 10
"""Sound step by which trained gates must have moved; a learning-rate warm-up may well start from zero."""

OPTIMIZER_WITHOUT_GATES = (
    "it was built before the allocation was attached; let the Trainer build it, or build it after attach()"
)

Event = dict[str, Any]


def attach(model: nn.Module, method: Method, total_steps: int, adapter: str | None = None) -> AllocationRun:
    """Attach a method to a `PeftModel` for a training loop of your own.

    Call it before the optimizer is built, since gates are parameters:

        run = attach(model, AdaLoRA(Budget(average_rank=8)), total_steps=1000)
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
        for batch in batches:
            model(**batch).loss.backward()
            run.before_step(optimizer)
            optimizer.step()
            run.after_step(optimizer)
            optimizer.zero_grad()
        plan = run.finish()

    Args:
        model: A `PeftModel` with one active LoRA adapter, fresh.
        method: For example `AdaLoRA(Budget(average_rank=8))`. Where it looks at validation data, `validation` holds
            batches here: mappings of what the model's forward takes, labels included.
        total_steps: Optimizer steps of the whole run.
        adapter: Name of the adapter; the active one by default.

    Raises:
        UserError: The model, the adapter, the budget or the schedule does not allow it; the message says why.
    """
    run = AllocationRun(model, method, adapter)
    try:
        run.begin(total_steps)
    except BaseException:
        fold_gates(run.sites)
        raise
    return run


class AllocationRun:
    """One method on one model, from attaching to the plain adapter.

    Attributes:
        step: Optimizer steps done.
        bad_steps: Steps that were skipped because a gradient was not finite.
        plan: The rank plan, once finished.
        settled: Whether the method has nothing left to find out: the run may end.
        max_grad_norm: The norm to which the loop clips gradients, None for no clipping. Methods that compute a step's
            gradient anew clip it alike, so set it where you clip; the Trainer callback does.
        on_event: Called with every allocation event, a JSON-able dictionary (the lines of trace.jsonl).
    """

    def __init__(self, model: nn.Module, method: Method, adapter: str | None = None) -> None:
        self.method = method
        self.model = model
        self.sites: list[Site] = attach_gates(model, adapter)
        try:
            self.state = method.prepare(self.sites)
            self.unit, self.start, self.target = site_budget(self.sites, method.budget)
        except BaseException:
            fold_gates(self.sites)
            raise
        self.step = 0
        self.bad_steps = 0
        self.settled = False
        self.max_grad_norm: float | None = None
        self.plan: RankPlan | None = None
        self.on_event: Callable[[Event], None] | None = None
        self.probe = DataProbe.of(model, self.sites, getattr(method, "validation", None))
        self._schedule: Schedule | None = None
        self._ranks = open_ranks(self.sites)
        self._peak = sum(self._ranks)
        self._fresh = FreshRanks(self.sites)
        self._gates_at_start = [site.gate.detach().clone() for site in self.sites]
        self._good_steps = 0
        self._bad_in_a_row = 0

    @property
    def schedule(self) -> Schedule:
        """The budget over the run; known once the number of steps is."""
        if self._schedule is None:
            raise RuntimeError("the run has not begun: call begin(total_steps) first")
        return self._schedule

    def begin(self, total_steps: int) -> None:
        """Fix the schedule.

        Raises:
            UserError: The phases do not fit into this many steps.
        """
        self._schedule = self.method.schedule(total_steps, self.start, self.target)

    def before_step(self, optimizer: torch.optim.Optimizer | None = None) -> bool:
        """Run between `backward()` (and clipping) and `optimizer.step()`.

        A step with a non-finite gradient on any process is skipped everywhere: all gradients are set to None, so that
        the optimizer moves nothing, not even by momentum, and no score sees the step.

        Args:
            optimizer: The optimizer; a method that needs the learning rate or rescales updates says so where it is
                missing.

        Returns:
            Whether the step is sound.

        Raises:
            FloatingPointError: More than `MAX_BAD_STEPS` bad steps in a row.
        """
        if self.plan is not None:
            raise RuntimeError("the run is finished: its gates are folded")
        if self.step == 0:
            self.emit_start()
        if self._gradients_are_finite():
            self._good_steps += 1
            self._bad_in_a_row = 0
            with torch.no_grad():
                self.method.on_gradients(self.state, self._now(optimizer))
                self._fresh.before_step()
            return True
        self.bad_steps += 1
        self._bad_in_a_row += 1
        self._emit({"event": "bad_step", "step": self.step})
        for parameter in self.model.parameters():
            parameter.grad = None
        if self._bad_in_a_row > MAX_BAD_STEPS:
            raise FloatingPointError(
                f"{self._bad_in_a_row} optimizer steps in a row had a non-finite gradient (last: step {self.step}); "
                "lower the learning rate, or use bf16 instead of fp16"
            )
        return False

    def after_step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Run after `optimizer.step()`, before gradients are cleared.

        Args:
            optimizer: When given, the moments of ranks that are closed for good are cleared.
        """
        if self._good_steps == GATES_HAVE_MOVED_BY:
            self._check_gates_moved()
        with torch.no_grad():
            self._fresh.after_step(optimizer)
            decision = self.method.on_step(self.state, self._now(optimizer))
        if decision is not None:
            self._record(decision)
            if decision.closed is not None and optimizer is not None:
                clear_moments(optimizer, self.sites)
            if decision.opened is not None:
                self._fresh.open(decision.opened)
        if self.probe is not None:
            self.probe.forget()
        self.step += 1

    def finish(self, provenance: Mapping[str, Any] | None = None) -> RankPlan:
        """Freeze the ranks, fold the gates into B and remove them: the model is plain LoRA from here on.

        Args:
            provenance: What to record in the plan beyond versions, settings and steps.

        Returns:
            The rank plan; it meets the budget, also when the run was stopped early.
        """
        if self.plan is not None:
            raise RuntimeError("the run is finished already")
        total_steps = 0 if self._schedule is None else self._schedule.total_steps  # 0: it was refused
        with torch.no_grad():
            kept = self.method.finish(self.state, self.target)
        record = {
            "loralloc": __version__,
            "total_steps": total_steps,
            "steps": self.step,
            "bad_steps": self.bad_steps,
            **(provenance or {}),
        }
        self.plan = rank_plan(self.method, self.sites, kept, self._peak, record)
        if self.probe is not None:
            self.probe.close()
        self._ranks = list(self.plan.ranks.values())
        fold_gates(self.sites)
        self._emit({"event": "finish", "step": self.step, "ranks": self._ranks, "parameters": self.plan.parameters})
        return self.plan

    def statistics(self) -> dict[str, float]:
        """Return the rank statistics for a training log."""
        return {
            "rank/total": sum(self._ranks),
            "rank/min": min(self._ranks),
            "rank/max": max(self._ranks),
            "budget": self.schedule.budget(max(self.step - 1, 0)),
            "params/active": self._parameters(),
        }

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuse an optimizer that does not know the gates.

        Raises:
            UserError: It was built before the allocation was attached.
        """
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        missing = [site.name for site in self.sites if id(site.gate) not in known]
        if missing:
            raise UserError(
                f"the optimizer does not hold the gates of {len(missing)} modules ({missing[0]}, ...): "
                f"{OPTIMIZER_WITHOUT_GATES}"
            )

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return (tensors, numbers) that a resumed run needs beyond the model's and the optimizer's own."""
        # How the phases were spelled is not the point: the schedule says what they came to.
        phases = ("warmup", "cooldown", "interval")
        settings = {key: value for key, value in settings_of(self.method).items() if key not in phases}
        numbers = {
            "method": self.method.id,
            "settings": settings,
            "step": self.step,
            "bad_steps": self.bad_steps,
            "bad_in_a_row": self._bad_in_a_row,
            "ranks": self._ranks,
            "sites": {site.name: [site.rank, site.inputs, site.outputs, site.scaling] for site in self.sites},
            "schedule": asdict(self.schedule),  # type: ignore[call-overload]
            "gates": self._gate_checksum() if self.plan is None else None,
            "peak": self._peak,
            "settled": self.settled,
            "probe": None if self.probe is None else self.probe.state_dict(),
        }
        return {**self.method.state_dict(self.state), **self._fresh.state_dict()}, numbers

    def load_state_dict(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, after the model's own weights have been restored.

        Raises:
            UserError: The state is of another method, model, schedule or of other weights; the message says what
                differs.
        """
        _, mine = self.state_dict()
        for key in ("method", "settings", "sites", "schedule"):
            if numbers[key] != mine[key]:
                raise UserError(
                    f"the checkpoint belongs to another run: its {key} {_difference(numbers[key], mine[key])}; resume "
                    "with the settings it was made with"
                )
        if numbers["gates"] != mine["gates"]:
            raise UserError(
                "the allocation's state was taken with other weights than those loaded; resume from the folder in "
                "which both were saved"
            )
        self.step, self.bad_steps = int(numbers["step"]), int(numbers["bad_steps"])
        self._bad_in_a_row = int(numbers["bad_in_a_row"])
        self._ranks, self._peak = list(numbers["ranks"]), int(numbers["peak"])
        self.settled = bool(numbers["settled"])
        if self.probe is not None:
            self.probe.load_state_dict(numbers["probe"])
        self._fresh.load_state_dict(tensors)
        with torch.no_grad():
            self.method.load_state_dict(self.state, tensors)

    def _now(self, optimizer: torch.optim.Optimizer | None) -> Moment:
        """What a method is told besides its state."""
        rate = learning_rate(optimizer, self.sites)
        return Moment(self.step, self.schedule, rate, self.probe, self.max_grad_norm)

    def _check_gates_moved(self) -> None:
        """Notice an optimizer that does not hold the gates, also where nobody has shown it to us."""
        pairs = zip(self.sites, self._gates_at_start, strict=True)
        trained = [(site, start) for site, start in pairs if site.gate.grad is not None and site.gate.grad.any()]
        if trained and all(torch.equal(site.gate, start.to(site.gate.device)) for site, start in trained):
            raise UserError(
                f"the gates do not move although they have gradients; does the optimizer hold them? Maybe "
                f"{OPTIMIZER_WITHOUT_GATES}"
            )

    def _gradients_are_finite(self) -> bool:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        if not gradients:
            return True
        device = gradients[0].device
        norms = torch.stack([norm.to(device, torch.float32) for norm in torch._foreach_norm(gradients, float("inf"))])
        return not any_process(~torch.isfinite(norms).all())

    def _gate_checksum(self) -> str:
        """Tie the state to the weights it was taken with."""
        digest = hashlib.sha256()
        for site in self.sites:
            digest.update(site.gate.detach().cpu().numpy().tobytes())
        return digest.hexdigest()

    def _parameters(self, ranks: Sequence[int] | None = None) -> int:
        """Parameters of these ranks, by default of those that are open."""
        ranks = self._ranks if ranks is None else ranks
        return sum(rank * site.cost for rank, site in zip(ranks, self.sites, strict=True))

    def _record(self, decision: Decision) -> None:
        ranks = ranks_by_site(self.sites, decision.kept)
        if decision.planned:
            self.settled = decision.frozen
            record = {"ranks": ranks, "parameters": self._parameters(ranks), "settled": self.settled}
            self._emit({"event": "plan", "step": self.step, **record, **decision.details})
            return
        if ranks != self._ranks or decision.frozen:
            self._ranks = ranks
            self._peak = max(self._peak, sum(ranks))
            event = "freeze" if decision.frozen else "allocate"
            self._emit(
                {
                    "event": event,
                    "step": self.step,
                    "budget": decision.budget,
                    "ranks": ranks,
                    "parameters": self._parameters(),
                    **decision.details,
                }
            )

    def emit_start(self) -> None:
        """Emit the event that opens a trace."""
        schedule, common = self.schedule, ("total_steps", "start", "target")
        self._emit(
            {
                "event": "start",
                "step": 0,
                "total_steps": schedule.total_steps,
                "schedule": {key: value for key, value in asdict(schedule).items() if key not in common},  # type: ignore[call-overload]
                "unit": self.unit,
                "start_budget": schedule.start,
                "target_budget": None if self.method.budget is None else schedule.target,
                "sites": [site.name for site in self.sites],
                "in": [site.inputs for site in self.sites],
                "out": [site.outputs for site in self.sites],
                "ranks": self._ranks,
            }
        )

    def _emit(self, event: Event) -> None:
        if self.on_event is not None:
            self.on_event(event)


def learning_rate(optimizer: torch.optim.Optimizer | None, sites: Sequence[Site]) -> float | None:
    """The rate of the group that holds the adapter; None without an optimizer."""
    groups = () if optimizer is None else optimizer.param_groups
    first = sites[0].A
    return next((float(group["lr"]) for group in groups if any(p is first for p in group["params"])), None)


def _difference(theirs: Any, mine: Any) -> str:
    """Name the first entry in which two records differ."""
    if isinstance(theirs, dict) and isinstance(mine, dict):
        for key in [*theirs, *mine]:
            if theirs.get(key) != mine.get(key):
                return f"has {key}={json.dumps(theirs.get(key))} where this run has {json.dumps(mine.get(key))}"
    return f"is {theirs!r}, this run's is {mine!r}"
