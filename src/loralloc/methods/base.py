"""What a method is: a dataclass of settings, what it declares about itself, and what it does in the course of a run.

What changes during a run lives in a separate state object that `prepare` returns and everything else receives. A
method sees sites, a step number and its schedule; never a Trainer, a data loader or PEFT.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from loralloc.budget import Budget, Modules, Unit, total_cost
from loralloc.gating import Site
from loralloc.methods.settings import check_settings, recorded
from loralloc.plan import ModuleRank, RankPlan
from loralloc.schedule import Schedule


class StepData(Protocol):
    """The data of a run, as far as a method may look at them.

    Looking has no side effect: parameters, their gradients, the optimizer, random states and the modes of modules are
    the same before and after.
    """

    def weights(self) -> list[Tensor]:
        """Everything that the optimizer trains, gates left out: the adapter's factors, and heads."""
        ...

    def train_losses(self, twice: bool = False) -> Iterator[Tensor]:
        """Losses of the current step's own batches, with the random numbers (dropout) they had; differentiable.

        Each is weighted as it was in the step, so that their gradients add up to the step's (on this process, and
        before clipping). Take the gradient of each loss before asking for the next: only one graph is alive at a time.

        Args:
            twice: Whether second derivatives will be taken. Fused losses have none, and are then computed with plain
                operations, which takes more memory.
        """
        ...

    def precision(self) -> torch.dtype:
        """The coarsest precision in which anything of the current step was computed."""
        ...

    def validation_loss(self) -> Tensor:
        """Loss of the next validation batch, in the mode that the model is in; differentiable."""
        ...

    def check_scoring(self) -> None:
        """Refuse a model or data for which `scoring` cannot work, before training has taken time."""
        ...

    def scoring(self, samples: int, draw: int) -> Ablations:
        """Return the losses of one scoring batch under any setting of the gates, dropout off.

        Args:
            samples: Validation samples in the batch; all there are, where there are fewer.
            draw: Which batch: equal numbers give equal batches.
        """
        ...


class Ablations(Protocol):
    """The loss of one scoring batch as a function of all gates: S(·) of the ALoRA paper with the sign turned."""

    @property
    def forwards(self) -> float:
        """What has been computed so far, in forward passes over the scoring batch."""
        ...

    def ablate(self, gates: Tensor) -> Tensor:
        """Losses (mean over labels), [K], of K settings of all R gates, [K, R]; no gradients."""
        ...

    def gate_gradients(self, gates: Tensor) -> tuple[Tensor, int]:
        """What each sample adds to the gradient of the loss at one setting, [n, R], and the number of labels."""
        ...


class TrainingBatch(Protocol):
    """A batch of training data before the first step."""

    @property
    def inputs(self) -> Mapping[str, Any]:
        """What the model takes, on its device."""
        ...

    def forward(self) -> Any:
        """Run the model on it in evaluation mode and return its output; hooks on the layers see the pass."""
        ...


@dataclass(frozen=True)
class StepContext:
    """Where a run stands when one of a method's functions is called.

    Attributes:
        step: 0-based optimizer step.
        schedule: The budget over the run.
        learning_rate: The optimizer's current learning rate for the adapter; None where no optimizer was shown.
        data: The data, for methods that look at them; None where there are none.
        optimizer: Name of the optimizer's class, for example `AdamW`; None where no optimizer was shown.
        sound: None if the step's gradients are known to be finite. Otherwise a boolean on the device that the host has
            not read yet; only methods with `masks_bad_steps` get this.
        max_grad_norm: The norm to which gradients are clipped, for methods that compute them anew; None for no
            clipping.
        skipped: Whether the host knows that the step was a bad one (its gradient was not finite): `on_gradients` was
            not called, and no weight has moved. `on_step` is still called, for what depends on the number of the step.
    """

    step: int
    schedule: Schedule
    learning_rate: float | None = None
    data: StepData | None = None
    optimizer: str | None = None
    sound: Tensor | None = None
    max_grad_norm: float | None = None
    skipped: bool = False


@dataclass(frozen=True)
class Decision:
    """The outcome of one allocation.

    Attributes:
        kept: Boolean [R]: the ranks of all sites, one site after the other.
        budget: What the schedule allowed, in the budget's unit.
        frozen: Whether it is the final decision.
        closed: Boolean [R]: ranks that it closes for good; their optimizer moments are cleared. None for none.
        opened: Boolean [R]: ranks that start anew; their optimizer moments start at 0, with age 0. None for none.
        planned: Whether `kept` is only what the run would keep if it ended now, and nothing has been closed yet. Where
            it is `frozen` as well, the run has nothing left to find out and may end.
        warmup: If the method has rewritten the factors: steps over which the learning rate warms up again. The
            optimizer's state of the adapter is dropped. None if the factors are those that were trained.
        details: What else the trace should tell, JSON-able.
    """

    kept: Tensor
    budget: int
    frozen: bool
    closed: Tensor | None = None
    opened: Tensor | None = None
    planned: bool = False
    warmup: int | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Search:
    """Says that a method searches for ranks first, and that plain LoRA is trained at them afterwards.

    Attributes:
        default: Length of the search in a recipe: a share of the training that follows, or steps.
        description: What the recipe says of it.
    """

    default: float
    description: str = "length of the search: share of the training that follows, or steps"


class Method(ABC):
    """The interface of a method: a frozen dataclass of settings that is derived from this class.

    Nine things may happen in a run, in this order: `schedule`, `prepare`, `calibrate`; in every step `on_gradients` and
    `on_step`; `resized` where closed ranks leave memory; `finish`; and for checkpoints `state_dict` and
    `load_state_dict`. Three must be written: `schedule`, `prepare` and `finish`; the others have defaults. Every
    method's file has them in the order of this class.

    Attributes:
        id: What recipes and plans call it.
        label: What its paper calls it.
        paper: Where it is published; empty for none.
        search: Whether it searches first, and how long; None for a method that allocates while it trains.
        budget: What the final adapter may cost; None for a method that needs no budget.
    """

    id: ClassVar[str]
    label: ClassVar[str]
    paper: ClassVar[str] = ""
    search: ClassVar[Search | None] = None

    budget: Any  # Budget | None, which a dataclass may narrow

    def __post_init__(self) -> None:
        """Refuse settings out of their range; a method with further rules calls this first."""
        check_settings(self)

    @property
    def masks_bad_steps(self) -> bool:
        """Whether the method itself leaves its state as it is if `now.sound` is false; if not, the host waits."""
        return False

    @property
    def compacts(self) -> bool:
        """Whether ranks are closed for good by a final decision before the run ends, so that they may leave memory."""
        return False

    @property
    def opens_ranks(self) -> bool:
        """Whether new ranks open in mid-run, which not every optimizer supports (`training.updates`)."""
        return False

    @property
    def restarts(self) -> bool:
        """Whether it rewrites the factors in mid-run, so that the optimizer's state of the adapter is dropped."""
        return False

    @property
    def examples(self) -> Any:
        """The examples that it looks at besides the training data; None for none."""
        return None

    @property
    def allocator(self) -> Method | None:
        """The other method that allocates the ranks, for a method that is composed with one; else None."""
        return None

    @classmethod
    def broken_rules(cls, value: Callable[..., Any]) -> Iterator[tuple[tuple[str, ...], str]]:
        """Check the rules of a recipe that involve several settings.

        Args:
            value: Looks a key up, for example `value("lora", "r")`: its value, which may be of any type, or its
                default; None where it has neither.

        Yields:
            The key that a rule is about, and what is wrong with it.
        """
        del value
        yield from ()

    def settings(self) -> dict[str, Any]:
        """Return its settings that are numbers or words, and under `allocate` those of the method inside it."""
        inner = self.allocator
        return recorded(self) | ({} if inner is None else {"allocate": {"name": inner.id, **inner.settings()}})

    @classmethod
    def looks_at_examples(cls, value: Callable[..., Any]) -> bool:
        """Whether a recipe's settings make it look at the examples that it takes, if it takes any.

        Args:
            value: Looks a key up, see `broken_rules`.
        """
        del value
        return True

    @abstractmethod
    def schedule(self, total_steps: int, start: int, target: int) -> Schedule:
        """Lay the budget over the run; raises UserError where it does not fit."""

    @abstractmethod
    def prepare(self, sites: Sequence[Site]) -> Any:
        """Initialise the adapter and return the method's state. Runs before the optimizer exists."""

    def calibrate(self, state: Any, batches: Iterable[TrainingBatch]) -> None:
        """Look at training data for a start that depends on them; called once before the first step, if at all.

        Factors, gates and scales may change, as in `prepare`. Gradients are off: to take some, use
        `torch.autograd.grad` under `torch.enable_grad`. Each process has its own batches, so make results equal on all
        processes with `average_` or `agree`.

        Args:
            state: The method's state.
            batches: Training batches, to go through once.
        """
        del state, batches

    def on_gradients(self, state: Any, now: StepContext) -> None:
        """Use the complete (and clipped) gradients, before the weights are updated."""
        del state, now

    def on_step(self, state: Any, now: StepContext) -> Decision | None:
        """Act after the weights are updated; return the decision, if there was one."""
        del state, now

    @abstractmethod
    def finish(self, state: Any, target: int) -> Tensor:
        """Close what is above the target, for good, and return the kept ranks, boolean [R]."""

    def state_dict(self, state: Any) -> dict[str, Tensor]:
        """Everything a resumed run needs beyond the model's and the optimizer's own tensors.

        A run checks names, shapes and dtypes of what comes back, and that all of it is finite.
        """
        del state
        return {}

    def load_state_dict(self, state: Any, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        del state, tensors

    def resized(self, state: Any) -> None:
        """Adapt to new shapes: closed ranks were removed after the final decision, or put back for `finish`."""
        del state


def site_budget(sites: Sequence[Site], budget: Budget | None) -> tuple[Unit, int, int]:
    """Return (unit, start, target): what the open ranks cost now and may cost in the end.

    Without a budget both are the open ranks, counted in ranks.
    """
    ranks = open_ranks(sites)
    if budget is None:
        return "ranks", sum(ranks), sum(ranks)
    modules = modules_of(sites)
    return budget.unit, total_cost(ranks, modules.costs(budget.unit)), budget.resolve(modules)


def modules_of(sites: Sequence[Site]) -> Modules:
    """Return what a budget must know of the sites, at the ranks that are in their tensors."""
    return Modules(
        ranks=[site.rank for site in sites],
        parameters=[site.cost for site in sites],
        bytes=[site.bytes for site in sites],
        base_parameters=sites[0].base_parameters,
    )


def open_ranks(sites: Sequence[Site]) -> list[int]:
    """Count the ranks of each site that are not closed for good."""
    return [int((site.scale != 0).sum()) for site in sites]


def split_by_site(flat: Tensor, sites: Sequence[Site]) -> list[Tensor]:
    """[R] to one [r] per site, each on the site's device."""
    parts = flat.split([site.rank for site in sites])
    return [part.to(site.gate.device) for part, site in zip(parts, sites, strict=True)]


def agree(decision: Tensor) -> Tensor:
    """Return a decision as the first process has made it, so that rounding does not let processes diverge."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        decision = decision.contiguous()  # NCCL sends nothing else
        torch.distributed.broadcast(decision, src=0)
    return decision


def average_(tensors: Sequence[Tensor]) -> None:
    """Average tensors over all processes, in place."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        flat = torch.cat([tensor.flatten().to(tensors[0].device) for tensor in tensors])
        torch.distributed.all_reduce(flat)
        flat /= torch.distributed.get_world_size()
        parts = flat.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))


def on_any_process(flag: Tensor) -> Tensor:
    """Whether a flag is set on any process, as a tensor on the device that is not zero if so."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        flag = flag.to(torch.int32)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return flag


def any_process(flag: Tensor) -> bool:
    """Whether a flag is set on any process."""
    return bool(on_any_process(flag).item())


def ranks_by_site(sites: Sequence[Site], kept: Tensor) -> list[int]:
    """Count the kept ranks of each site; one transfer from the device."""
    flags = iter(kept.tolist())
    return [sum(islice(flags, site.rank)) for site in sites]


def rank_plan(
    method: Method, sites: Sequence[Site], kept: Tensor, start: Sequence[int], peak: int, provenance: Mapping[str, Any]
) -> RankPlan:
    """Write the kept ranks down as a plan; `start` are the ranks at first, `peak` the most that were open together."""
    modules = {
        site.name: ModuleRank(rank, first, site.inputs, site.outputs, site.plan_scale)
        for site, first, rank in zip(sites, start, ranks_by_site(sites, kept), strict=True)
    }
    return RankPlan(
        method=method.id,
        modules=modules,
        budget={} if method.budget is None else method.budget.to_dict(),
        peak=peak,
        provenance={**provenance, "label": method.label, "settings": method.settings()},
    )
