"""A rank allocation attached to a model: what the Trainer callback drives, and what an own loop calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from loralloc import trace
from loralloc._version import __version__
from loralloc.errors import UserError
from loralloc.gating import Site, attach_gates, fold_gates, put_back_on_error
from loralloc.methods.base import (
    Decision,
    Method,
    StepContext,
    modules_of,
    open_ranks,
    rank_plan,
    ranks_by_site,
    site_budget,
)
from loralloc.peft_layers import peft_model, unwrapped
from loralloc.plan import RankPlan
from loralloc.schedule import Schedule
from loralloc.training.attached import check_kept, check_trained, check_unmerged
from loralloc.training.bad_steps import StepChecks, can_skip
from loralloc.training.calibration import batches_of, check_start, without_a_trace
from loralloc.training.compaction import Compaction, check_compact, check_full
from loralloc.training.example import FirstBatch
from loralloc.training.fresh_ranks import FreshRanks
from loralloc.training.gated_files import GatedFiles
from loralloc.training.history import Recorded
from loralloc.training.optimizer import (
    GateWatch,
    MomentWatch,
    accumulates,
    check_holds_gates,
    check_unscaled,
    learning_rate,
    optimizer_name,
)
from loralloc.training.order import StepOrder
from loralloc.training.processes import check_agreement
from loralloc.training.resume import check_state, described, gate_checksum
from loralloc.training.shared_gradients import SharedGradients
from loralloc.training.statistics import kinds, rank_statistics
from loralloc.training.step_data import ObservedData


def attach(
    model: nn.Module, method: Method, total_steps: int, adapter: str | None = None, *, compact: bool = False
) -> AllocationRun:
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
        method: For example `AdaLoRA(Budget(average_rank=8))`. If it uses validation data, its `validation` has batches:
            mappings of the model's inputs, labels included.
        total_steps: Optimizer steps of the whole run.
        adapter: Name of the adapter; the active one by default.
        compact: Remove closed ranks from the tensors once the ranks are final. A step then costs as much as with plain
            LoRA at those ranks. One process only; `after_step` needs the optimizer.

    Raises:
        UserError: The model, the adapter, the budget or the schedule does not allow it; the message says why.
    """
    return AllocationRun(model, method, adapter, compact=compact, total_steps=total_steps)


class AllocationRun(Recorded):
    """One method on one model, from attaching to the plain adapter.

    Attributes:
        step: Optimizer steps done.
        plan: The rank plan, once finished.
        settled: Whether the method's search is over, so that the run may end.
        max_grad_norm: The norm to which the loop clips gradients, None for no clipping. Set it if you clip, because
            methods that compute a step's gradient again clip it too. The Trainer callback sets it.
        checks: The verdicts on the steps; set its `say` and `say_every` to hear of skipped ones in another way.
        on_event: Called with every allocation event, a JSON-able dictionary (the lines of trace.jsonl).
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        adapter: str | None = None,
        *,
        compact: bool = False,
        total_steps: int | None = None,
    ) -> None:
        super().__init__()
        if compact:
            check_compact(method)
        model = unwrapped(model)
        self.method = method
        self.model = model
        self.sites: list[Site] = attach_gates(model, adapter)
        self._schedule: Schedule | None = None
        self._under_way = StepOrder(model, self.sites, own_loop=total_steps is not None)
        with put_back_on_error(self.sites):
            self.state = method.prepare(self.sites)
            self.unit, self.start, self.target = site_budget(self.sites, method.budget)
            if total_steps is not None:
                self.begin(total_steps)
            self._files = GatedFiles(peft_model(model), self.sites)
        self._first_batch = FirstBatch(peft_model(model))
        self._shared = SharedGradients(model)
        self.step = 0
        self.settled = False
        self.max_grad_norm: float | None = None
        self.plan: RankPlan | None = None
        self.on_event: Callable[[trace.Event], None] | None = None
        self.data = ObservedData.of(model, self.sites, method.examples)
        self._ranks = self._start_ranks = open_ranks(self.sites)
        self._peak = sum(self._ranks)
        self._budget: int | None = None  # that of the method's last decision; it may have shrunk below the schedule's
        self._fresh = FreshRanks(self.sites, method.restarts)
        self._shapes = {site.name: [site.rank, site.inputs, site.outputs, site.scaling] for site in self.sites}
        self._kinds = kinds({site.name: site.rank for site in self.sites})
        self._compact = compact
        self._final: Tensor | None = None
        self._compaction: Compaction | None = None
        self._gate_watch: GateWatch | None = GateWatch(self.sites)  # until an optimizer is shown
        self._moment_watch = MomentWatch(method, self.sites, compact)
        self.checks = StepChecks(model, lambda step: self._emit(trace.bad_step_event(step)))
        self._calibrated = False

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
        self._under_way.close()

    def calibrate(self, batches: Iterable[Mapping[str, Any]]) -> None:
        """Let the method look at training batches before the first step; a loop of one's own calls it after `attach`.

            run = attach(model, method, total_steps=1000)
            run.calibrate(islice(batches, 8))

        The model's modes, its gradients and the random states are the same before and after. Methods whose start does
        not depend on data leave the batches alone.

        Args:
            batches: Batches as the model's forward takes them.

        Raises:
            UserError: Steps have been made, or it has been called before, or a batch is no mapping.
        """
        check_start(self.step, finished=self.plan is not None, calibrated=self._calibrated)
        self._calibrated = True
        with torch.no_grad(), without_a_trace(self.model):
            self.method.calibrate(self.state, batches_of(self.model, batches, self.sites[0].A.device))
        if self.data is not None:
            self.data.forget()  # these were no passes of a step
        self._ranks = self._start_ranks = open_ranks(self.sites)
        self._peak = sum(self._ranks)
        self.unit, self.start, self.target = site_budget(self.sites, self.method.budget)
        if self._schedule is not None:
            self.begin(self._schedule.total_steps)

    @property
    def bad_steps(self) -> int:
        """Steps that were skipped because a gradient was not finite."""
        self.checks.settle()
        return self.checks.bad

    def before_step(self, optimizer: torch.optim.Optimizer | None = None, wait: bool = True) -> bool | None:
        """Run between `backward()` (and clipping) and `optimizer.step()`.

        A step with a non-finite gradient on any process is skipped everywhere: all gradients are set to None, so that
        the optimizer moves nothing, not even by momentum, and no score sees the step. While accelerate accumulates
        gradients, its optimizer makes no step, and neither does the run.

        Args:
            optimizer: The optimizer, or accelerate's wrapper of it; a method that needs the learning rate or rescales
                updates says so where it is missing.
            wait: Whether to wait for the device to know whether the step is sound. Without, a bad step is skipped on
                the device where that is possible (a GPU, a fused Adam or AdamW that is stepped by its own `step()`,
                a method with `masks_bad_steps`), and counted and reported a few steps later.

        Returns:
            Whether the step is sound; None where only the device knows, or where no step is due.

        Raises:
            UserError: The optimizer was built before the allocation was attached, all steps have been made, calls are
                missing or in the wrong order, or PEFT has switched the adapter off or changed its scale.
            FloatingPointError: More than `MAX_BAD_STEPS` bad steps in a row.
        """
        if self.plan is not None:
            raise RuntimeError("the run is finished: its gates are folded")
        if accumulates(optimizer):
            return None
        check_trained(self.sites)
        self._under_way.check_before(self.step, self.schedule.total_steps)
        if optimizer is not None and self._gate_watch is not None:
            self.check_optimizer(optimizer)
            self._gate_watch = None
        check_unscaled(optimizer)
        if self.step == 0:
            self.emit_start()
        if not wait and can_skip(optimizer, self.method, self.sites[0].gate.device):
            self._under_way.sound = self.checks.skip_if_bad(self.step, optimizer)
        elif not self.checks.is_sound(self.step, optimizer):
            self._under_way.open = self._under_way.skipped = True
            return False
        with torch.no_grad():
            self.method.on_gradients(self.state, self._now(optimizer))
            self._fresh.before_step(optimizer)
        self._under_way.open = True
        return True if self._under_way.sound is None else None

    def after_step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Run after `optimizer.step()`, before gradients are cleared.

        Args:
            optimizer: When given, the moments of ranks that are closed for good are cleared.

        Raises:
            UserError: Several processes train apart: their weights differ after the same step. Or `before_step` was
                not called, or gradients that the method still needs have been cleared.
        """
        if accumulates(optimizer):
            return
        self._under_way.check_after()
        if self._gate_watch is not None and not self.checks.bad_in_a_row:
            self._gate_watch.look()
        self._moment_watch.look(optimizer)
        with torch.no_grad():
            self._fresh.after_step(optimizer)
            decision = self.method.on_step(self.state, self._now(optimizer))
        if decision is not None:
            self._record(decision)
            self._fresh.follow(decision, optimizer)
            if decision.closed is not None and decision.frozen:
                self._final = decision.kept.clone()
                self._take_out_closed(optimizer)
        if self.data is not None:
            self.data.forget()
        self._under_way.close(optimizer)
        self.step += 1
        check_agreement(self.model, self.step, self.schedule.total_steps)

    def finish(self, provenance: Mapping[str, Any] | None = None) -> RankPlan:
        """Freeze the ranks, fold the gates into B and remove them: the model is plain LoRA from here on.

        With several processes, call it in all of them: one alone would wait for the others to agree on the ranks.

        Args:
            provenance: What to record in the plan beyond versions, settings and steps.

        Returns:
            The rank plan; it meets the budget, also when the run was stopped early.

        Raises:
            UserError: The adapter is merged or deleted, its scale has changed, or the only step has no `after_step`.
        """
        if self.plan is not None:
            raise RuntimeError("the run is finished already")
        check_kept(self.sites)
        check_unmerged(self.sites)
        self._under_way.check_finish(self.step)
        total_steps = 0 if self._schedule is None else self._schedule.total_steps  # 0: it was refused
        if self._compaction is not None:
            self._compaction.undo()
            self.method.resized(self.state)
        if self._gate_watch is not None:
            self._gate_watch.judge()
        with torch.no_grad():
            kept = self.method.finish(self.state, self.target)
        lost = 0 if self._budget is None else self.target - self._budget
        record = {
            "loralloc": __version__,
            "total_steps": total_steps,
            "steps": self.step,
            "bad_steps": self.checks.conclude(self.step),
            **({"budget_lost": lost} if lost > 0 else {}),
            **(provenance or {}),
        }
        self.plan = rank_plan(self.method, self.sites, kept, self._start_ranks, self._peak, record)
        if self.data is not None:
            self.data.close()
        self._ranks = list(self.plan.ranks.values())
        self._files.close()
        self._first_batch.forget()
        fold_gates(self.sites)
        self._emit(trace.finish_event(self.step, self._ranks, self.plan.parameters))
        return self.plan

    def statistics(self) -> dict[str, float]:
        """Return the rank statistics for a training log; `training.statistics` says what they are."""
        budget = self.schedule.budget(max(self.step - 1, 0))
        budget = budget if self._budget is None else min(budget, self._budget)
        return rank_statistics(self._kinds, self._ranks, budget, self._parameters())

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuse an optimizer that does not know the gates that are trained.

        Raises:
            UserError: It was built before the allocation was attached.
        """
        check_holds_gates(optimizer, self.sites)
        self._moment_watch.check(optimizer)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return (tensors, numbers) that a resumed run needs beyond the model's and the optimizer's own."""
        # Phases and budget are compared as resolved in the schedule, however they were written; it lacks only the cap.
        phases, cap = ("warmup", "cooldown", "interval"), getattr(self.method.budget, "max_rank", None)
        settings = {key: value for key, value in self.method.settings().items() if key not in phases}
        settings |= {} if cap is None else {"max_rank": cap}
        numbers = {
            "method": self.method.id,
            "settings": settings,
            "step": self.step,
            "bad_steps": self.bad_steps,
            "bad_in_a_row": self.checks.bad_in_a_row,
            "ranks": self._ranks,
            "sites": self._shapes,
            "schedule": asdict(self.schedule),  # type: ignore[call-overload]
            "gates": gate_checksum(self.sites) if self.plan is None else None,
            "peak": self._peak,
            "budget": self._budget,
            "settled": self.settled,
            "data": None if self.data is None else self.data.state_dict(),
        }
        final = {} if self._final is None else {"run.final": self._final}
        tensors = {**self.method.state_dict(self.state), **self._fresh.state_dict(), **final}
        return tensors, {**numbers, "tensors": described(tensors)}

    def load_state_dict(
        self,
        tensors: Mapping[str, Tensor],
        numbers: Mapping[str, Any],
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        """Restore what `state_dict` returned, after the weights of the model and the optimizer's state.

        Args:
            tensors: The tensors.
            numbers: The numbers.
            optimizer: The optimizer; a compact run needs it.

        Raises:
            UserError: The state is damaged, or is of another method, model, schedule or of other weights; the message
                says what differs. Or the run is compacted already.
        """
        check_full(self._compaction)
        check_state(tensors, numbers, *self.state_dict())
        self._under_way.close(optimizer)
        self.step = int(numbers["step"])
        self.checks.bad, self.checks.bad_in_a_row = int(numbers["bad_steps"]), int(numbers["bad_in_a_row"])
        self._ranks, self._peak = list(numbers["ranks"]), int(numbers["peak"])
        self._budget = numbers["budget"]
        self.settled = bool(numbers["settled"])
        if self.data is not None:
            self.data.load_state_dict(numbers["data"])
        self._fresh.load_state_dict(tensors)
        with torch.no_grad():
            self.method.load_state_dict(self.state, tensors)
        self._final = tensors.get("run.final")
        self._take_out_closed(optimizer)

    def _take_out_closed(self, optimizer: torch.optim.Optimizer | None) -> None:
        """In a compact run, let the closed ranks leave the tensors once the ranks are final."""
        if not self._compact or self._final is None:
            return
        if optimizer is None:
            raise UserError("compact=True shrinks the optimizer's state too: pass the optimizer to after_step()")
        self._fresh.take(self._final)
        self._compaction = Compaction(self.model, self.sites, self._final, optimizer)
        self.method.resized(self.state)

    def _now(self, optimizer: torch.optim.Optimizer | None) -> StepContext:
        """What a method is told besides its state."""
        return StepContext(
            step=self.step,
            schedule=self.schedule,
            learning_rate=learning_rate(optimizer, self.sites),
            data=self.data,
            optimizer=optimizer_name(optimizer),
            sound=self._under_way.sound,
            max_grad_norm=self.max_grad_norm,
            skipped=self._under_way.skipped,
        )

    def _parameters(self, ranks: Sequence[int] | None = None) -> int:
        """Parameters of these ranks, by default of those that are open."""
        ranks = self._ranks if ranks is None else ranks
        return sum(rank * site.cost for rank, site in zip(ranks, self.sites, strict=True))

    def _record(self, decision: Decision) -> None:
        ranks = ranks_by_site(self.sites, decision.kept)
        if decision.planned:
            self.settled = decision.frozen
            cost, details = self._parameters(ranks), decision.details
            self._emit(trace.plan_event(self.step, ranks, cost, settled=self.settled, details=details))
            return
        self._budget = decision.budget
        if ranks != self._ranks or decision.frozen or decision.details:
            self._ranks = ranks
            self._peak = max(self._peak, sum(ranks))
            cost, details = self._parameters(), decision.details
            event = trace.allocation_event(
                self.step, decision.budget, ranks, cost, final=decision.frozen, details=details
            )
            self._emit(event)

    def emit_start(self) -> None:
        """Emit the event that opens a trace."""
        sizes = [(site.inputs, site.outputs) for site in self.sites]
        target = None if self.method.budget is None else self.schedule.target
        names, costs = [site.name for site in self.sites], modules_of(self.sites).costs(self.unit)
        start = trace.start_event(self.method.label, names, sizes, self._ranks, self.schedule.total_steps)
        self._emit(start | trace.schedule_of(self.schedule, self.unit, costs, target))

    def _emit(self, event: trace.Event) -> None:
        if event["event"] != "bad_step":
            self.checks.settle()  # so that events come in the order of their steps
        self._remember(event)
        if self.on_event is not None:
            self.on_event(event)
