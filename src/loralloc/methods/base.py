"""What a method is: five verbs over gated sites.

A method is the frozen dataclass of its hyper-parameters; what changes during a run lives in a separate state object
that `prepare` returns and every other verb receives. A method sees sites, a step number and its schedule; never a
Trainer, a data loader or PEFT.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from loralloc.budget import Budget, BudgetSchedule, start_budget
from loralloc.gating import Site
from loralloc.plan import ModuleRank, RankPlan

Probe = Callable[[str], Tensor]
"""Loss of the next batch of a stream, "train" or "validation": a scalar."""


@dataclass(frozen=True)
class Decision:
    """The outcome of one allocation.

    Attributes:
        kept: Boolean [R]: the ranks of all sites, one site after the other.
        budget: What the schedule allowed, in the budget's unit.
        frozen: Whether it is the final decision.
    """

    kept: Tensor
    budget: int
    frozen: bool


class Method(Protocol):
    """The interface of a method. The five verbs stand in this order in every method's file."""

    id: ClassVar[str]

    @property
    def budget(self) -> Budget:
        """What the final adapter may cost."""
        ...

    def schedule(self, total_steps: int, start: int, target: int) -> BudgetSchedule:
        """Lay the budget over the run; raises UserError where it does not fit."""
        ...

    def prepare(self, sites: Sequence[Site]) -> Any:
        """Initialise the adapter and return the method's state. Runs before the optimizer exists."""
        ...

    def on_gradients(self, state: Any, schedule: BudgetSchedule, step: int) -> None:
        """Gradients are complete (and clipped), weights still old."""
        ...

    def on_step(self, state: Any, schedule: BudgetSchedule, step: int, probe: Probe | None) -> Decision | None:
        """Weights are updated; return what was decided, if anything was."""
        ...

    def finish(self, state: Any, target: int) -> Tensor:
        """Close what is above the target, for good, and return the kept ranks, boolean [R]."""
        ...

    def state_dict(self, state: Any) -> dict[str, Tensor]:
        """Everything a resumed run needs beyond the model's and the optimizer's own tensors."""
        ...

    def load_state_dict(self, state: Any, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        ...


def site_budget(sites: Sequence[Site], budget: Budget) -> tuple[int, int]:
    """Return (start, target) of a budget over sites, in the budget's unit."""
    ranks, costs = [site.rank for site in sites], [site.cost for site in sites]
    return start_budget(ranks, costs, budget.unit), budget.resolve(ranks, costs)


def agree(decision: Tensor) -> Tensor:
    """Make one decision for all processes: the first one's. Float ties must not let replicas diverge."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast(decision, src=0)
    return decision


def any_process(flag: Tensor) -> bool:
    """Whether a flag is set on any process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        flag = flag.to(torch.int32)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return bool(flag.item())


def settings_of(method: Method) -> dict[str, Any]:
    """Return the hyper-parameters of a method; the budget, which several spellings may name, stands elsewhere."""
    return {key: value for key, value in asdict(method).items() if key != "budget"}  # type: ignore[call-overload]


def ranks_by_site(sites: Sequence[Site], kept: Tensor) -> list[int]:
    """Count the kept ranks of each site; one transfer from the device."""
    flags = iter(kept.tolist())
    return [sum(islice(flags, site.rank)) for site in sites]


def rank_plan(method: Method, sites: Sequence[Site], kept: Tensor, provenance: Mapping[str, Any]) -> RankPlan:
    """Write the kept ranks down as a plan."""
    modules = {
        site.name: ModuleRank(rank, site.rank, site.inputs, site.outputs, site.scaling)
        for site, rank in zip(sites, ranks_by_site(sites, kept), strict=True)
    }
    return RankPlan(
        method=method.id,
        modules=modules,
        budget=method.budget.to_dict(),
        peak=sum(site.rank for site in sites),
        provenance={**provenance, "settings": settings_of(method)},
    )
