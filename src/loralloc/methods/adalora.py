"""AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning (ICLR 2023, arXiv 2303.10512).

The update of each matrix is kept in the form of a singular value decomposition,

    W = W⁰ + s · P Λ Q          P: [out, r] = B,   Λ = ρ · diag(λ), λ: [r] = gate,   Q: [r, in] = A

and under a falling budget b(t) the λ of the least important triplets (P_i, λ_i, Q_i) are set to zero. A triplet's
importance is the smoothed sensitivity × uncertainty of its entries, so a closed triplet can come back until the final
phase. A penalty keeps P and Q orthonormal.

Where we deviate, and why (`as_published` and the options give the paper's or the public code's letter):

* Budget: the numerator of eq. 14 is t − t_i, as in the public code; as printed the budget jumps above its start.
* Selection: exactly b(t) triplets stay; the public code compares with a threshold and drops all ties. NaN never stays.
* Order: sensitivities come from the weights and gradients of the same step (Algorithm 1). The public code multiplies
  the gradient with the weight *after* the step: `order="reference"`.
* Penalty: that of the public code, the mean unsquared norm (γ = 0.1 means that); `penalty="paper"` is eq. 4. Its
  gradient is added in closed form when the step's gradients are complete, after clipping, so that it depends on no
  loss function, wrapper or gradient accumulation and never shows in an evaluation loss.
* Start: where LoRA starts, so that LoRA's learning rate serves (docs/step-parity.md). Q is orthonormal, P = 0, and the
  gate ρ·λ is 1/√3, the length of LoRA's rows of A: the first optimizer step is as long as LoRA's and lowers the loss as
  much. ρ makes a step of λ count as much as one of P. As published, λ = 0, ρ = 1 and P, Q ~ N(0, 0.02²): only λ moves
  at first, and at LoRA's learning rate the run hardly learns.
* Ablation |λ|: the values that selection may zero are compared, that is after the step.
* Final phase: closed triplets are masked for good: no gradient, no share in the penalty. The public code only resets
  their λ after each step, so the rest drifts: `order="reference"` keeps that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from loralloc.allocate import keep_top, keep_within
from loralloc.budget import Budget, BudgetSchedule, cubic_schedule
from loralloc.errors import UserError, check_choice
from loralloc.gating import Site
from loralloc.methods.base import Decision, Moment, agree
from loralloc.methods.guards import FROM_THE_START, check_capacity, check_fresh
from loralloc.scores import Penalty, penalty_gradient, per_rank, sensitivity, smooth_

Importance = Literal["smoothed", "sensitivity", "magnitude"]
Order = Literal["paper", "reference"]
Parity = Literal["adam", "sgd"]

Symbol = Literal["A", "B", "gate"]

PUBLISHED_STD = 0.02

_RANK_DIMS: dict[Symbol, int] = {"A": 1, "B": 2, "gate": 1}


@dataclass(frozen=True)
class AdaLoRA:
    """Prune singular values by importance under a falling budget.

    Attributes:
        budget: What the final adapter may cost. The start is `LoraConfig.r` everywhere; about 1.5× the target is usual.
        warmup: t_i, steps (int) or fraction of the run (float) before anything is closed.
        cooldown: t_f, likewise: the last part of the run, at the final budget.
        interval: ΔT, steps between closings; None for about 500 over the run (the papers' settings).
        beta1: Smoothing of the sensitivity, in (0, 1).
        beta2: Smoothing of the uncertainty, in (0, 1).
        importance: `smoothed` (Ī·Ū, the paper), `sensitivity` (this step's I alone) or `magnitude` (|λ|): the two
            others are the paper's ablations.
        order: `paper` or `reference`, see the module's docstring.
        penalty: `reference` (mean of unsquared norms) or `paper` (sum of squared norms).
        gamma: Weight of the penalty; 0 turns it off.
        parity: Optimizer for which steps are matched with LoRA's: `adam` (any of its kind) or `sgd`; None for the
            published parametrisation.

    Raises:
        UserError: A number is out of its range.
    """

    id: ClassVar[str] = "adalora"
    masks_bad_steps: ClassVar[bool] = True

    budget: Budget
    warmup: float = 0.15
    cooldown: float = 0.45
    interval: int | None = None
    beta1: float = 0.85
    beta2: float = 0.85
    importance: Importance = "smoothed"
    order: Order = "paper"
    penalty: Penalty = "reference"
    gamma: float = 0.1
    parity: Parity | None = "adam"

    def __post_init__(self) -> None:
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            if not 0 < beta < 1:
                raise UserError(f"{name} must be in (0, 1), got {beta}")
        if not 0 <= self.gamma < math.inf:
            raise UserError(f"gamma must be at least 0 and finite, got {self.gamma}")
        choices = {"importance": Importance, "order": Order, "penalty": Penalty, "parity": Parity}
        for name, kinds in choices.items():
            if (name, getattr(self, name)) != ("parity", None):
                check_choice(name, getattr(self, name), get_args(kinds))

    @classmethod
    def as_published(cls, budget: Budget, **settings: float | str | None) -> AdaLoRA:
        """Return AdaLoRA in the paper's parametrisation: λ = 0, ρ = 1, P and Q ~ N(0, 0.02²)."""
        return cls(budget, parity=None, **settings)  # type: ignore[arg-type]

    @property
    def compacts(self) -> bool:
        """In the final phase; not as in the public code, where closed triplets live on."""
        return self.order == "paper"

    def schedule(self, total_steps: int, start: int, target: int) -> BudgetSchedule:
        """Return the cubic budget of eq. 14 (corrected) over the run."""
        return cubic_schedule(total_steps, self.warmup, self.cooldown, self.interval, start, target)

    # The five verbs.

    def prepare(self, sites: Sequence[Site]) -> AdaLoRAState:
        """Draw Q and set P or λ to 0; the adapted model equals the base model.

        Raises:
            UserError: An adapter has been trained already, or has more ranks than its layer has dimensions.
        """
        check_fresh(sites, "AdaLoRA would draw it anew", FROM_THE_START)
        check_capacity(sites, "more rows than that cannot be orthonormal")
        for site in sites:
            _initialise(site, self.parity)
        return AdaLoRAState(sites, _stacks(sites))

    def on_gradients(self, state: AdaLoRAState, now: Moment) -> None:
        """Add the penalty's gradient; measure importance (order `paper`)."""
        measure = now.step < now.schedule.final and self.importance != "magnitude"
        for stack in state.stacks:
            penalise = self.gamma > 0 and stack.symbol != "gate"
            if not (penalise or (measure and self.order == "paper")):
                continue
            weights = stack.weights()
            if penalise:
                matrices, resolution = 2 * len(state.sites), stack.resolution()
                gradient = penalty_gradient(weights, stack.rank_dim, stack.open, self.penalty, matrices, resolution)
                stack.add_to_gradients(gradient, self.gamma)
            if measure and self.order == "paper":
                self._measure(stack, weights, stack.gradients(), now.sound)
        state.measure_after_step = measure and self.order == "reference"

    def on_step(self, state: AdaLoRAState, now: Moment) -> Decision | None:
        """Close the least important triplets when the schedule says so."""
        schedule, step = now.schedule, now.step
        assert isinstance(schedule, BudgetSchedule)
        if state.measure_after_step:
            for stack in state.stacks:
                self._measure(stack, stack.weights(), stack.gradients(), now.sound)
            state.measure_after_step = False
        if not schedule.closes(step):
            return None
        if state.final is not None:
            if self.order == "reference":
                state.zero_gates(state.final)
            return None
        budget, final = schedule.budget(step), schedule.phase(step) == "final"
        keep = self._select(state, budget)
        state.zero_gates(keep)
        if final:
            state.final = keep
            if self.order == "paper":
                self._close_for_good(state, keep)
                return Decision(keep, budget, frozen=True, closed=~keep)
        return Decision(keep, budget, frozen=final)

    def finish(self, state: AdaLoRAState, target: int) -> Tensor:
        """Close down to the target if that has not happened (a run may stop early); return the kept triplets."""
        if state.final is None:
            state.final = self._select(state, target)
        self._close_for_good(state, state.final)
        return state.final

    def state_dict(self, state: AdaLoRAState) -> dict[str, Tensor]:
        """Running averages, and the final selection once it is made."""
        tensors = {} if state.final is None else {"final": state.final}
        if state.compact:
            return tensors  # nothing is selected any more
        for index, stack in enumerate(state.stacks):
            tensors |= {f"{index}.mean": stack.mean, f"{index}.uncertainty": stack.uncertainty}
        return tensors

    def load_state_dict(self, state: AdaLoRAState, tensors: Mapping[str, Tensor]) -> None:
        """Restore running averages and the final selection."""
        for index, stack in enumerate(state.stacks if "0.mean" in tensors else ()):
            stack.mean.copy_(tensors[f"{index}.mean"])
            stack.uncertainty.copy_(tensors[f"{index}.uncertainty"])
        state.final = tensors["final"].to(state.sites[0].gate.device) if "final" in tensors else None
        self._mask(state, None if self.order == "reference" else state.final)

    def resized(self, state: AdaLoRAState) -> None:
        """Group the tensors anew by their shapes."""
        state.compact = not state.compact
        state.stacks = _stacks(state.sites)

    def _measure(self, stack: _Stack, weights: Tensor, gradients: Tensor, sound: Tensor | None) -> None:
        """Update the importance of a stack's entries from one step's weights and gradients, if the step is sound."""
        current, beta1, beta2 = sensitivity(weights, gradients), self.beta1, self.beta2
        if sound is not None:
            sound = sound.to(current.device)
            current = torch.where(sound, current, 0.0 if self.importance == "smoothed" else stack.mean)
            beta1, beta2 = (torch.where(sound, beta, 1.0).to(current.dtype) for beta in (beta1, beta2))
        if self.importance == "smoothed":
            smooth_(stack.mean, stack.uncertainty, current, beta1, beta2)
        else:
            stack.mean.copy_(current)

    def _scores(self, state: AdaLoRAState) -> Tensor:
        """S_i = s(λ_i) + mean_j s(P_ji) + mean_j s(Q_ij) for every triplet, [R] (eq. 9)."""
        scores = torch.zeros_like(state.flat_gates())
        if self.importance == "magnitude":
            return state.flat_gates().abs()
        for stack in state.stacks:
            elements = stack.mean * stack.uncertainty if self.importance == "smoothed" else stack.mean
            positions = stack.positions.flatten().to(scores.device)
            scores.index_add_(0, positions, per_rank(elements, stack.rank_dim).flatten())
        return scores

    def _select(self, state: AdaLoRAState, budget: int) -> Tensor:
        """The triplets that stay under a budget, boolean [R]."""
        scores = self._scores(state)
        if self.budget.unit == "ranks":
            return agree(keep_top(scores, budget))
        return agree(keep_within(scores, state.costs(), budget))

    def _close_for_good(self, state: AdaLoRAState, keep: Tensor) -> None:
        """Zero triplets and mask them out of the model and of the penalty."""
        state.zero_gates(keep)
        self._mask(state, keep)

    def _mask(self, state: AdaLoRAState, keep: Tensor | None) -> None:
        """Let only these triplets take part in the model and in the penalty; all of them where None."""
        everything = torch.ones_like(state.flat_gates(), dtype=torch.bool)
        for site, kept in zip(state.sites, state.split(everything if keep is None else keep), strict=True):
            site.set_scale(kept, gain=gate_gain(site.outputs, self.parity))
        for stack in state.stacks:
            stack.open = None if keep is None else keep.to(stack.positions.device)[stack.positions]


def gate_gain(outputs: int, parity: Parity | None) -> float:
    """ρ: how much larger a gate must act for a step of λ to move the weights as far as a step of LoRA's B.

    With A as PEFT draws it (rows of expected squared norm 1/3) and triplets of length 1 (docs/step-parity.md):

        adam   ‖ΔW‖ = lr · s · √(out · r / 3) for LoRA, lr · s · ρ · √r here           ρ = √(out / 3)
        sgd    ‖ΔW‖ ≈ lr · s²/3 · √(r / in) · ‖G‖, lr · s² · ρ² · √(r / (in · out)) · ‖G‖   ρ = ⁴√out / √3

    >>> round(gate_gain(768, "adam"), 6), gate_gain(768, None)
    (16.0, 1.0)
    """
    if parity is None:
        return 1.0
    return math.sqrt(outputs / 3) if parity == "adam" else outputs**0.25 / math.sqrt(3)


@dataclass(eq=False)
class _Stack:
    """Equal-shaped tensors of one kind, and the running averages of their entries' sensitivities.

    Attributes:
        symbol: "A" (= Q), "B" (= P) or "gate" (= λ).
        rank_dim: The dimension of a stack that is the rank.
        parameters: The tensors, one a site. The optimizer holds the same objects, so they stay.
        positions: [n, r]: where their ranks stand among all ranks.
        open: Boolean [n, r], False for triplets closed for good; None while none is.
        mean: Ī, in the shape of the stack; this step's I where nothing is smoothed.
        uncertainty: Ū, likewise.
    """

    symbol: Symbol
    rank_dim: int
    parameters: Sequence[torch.nn.Parameter]
    positions: Tensor
    open: Tensor | None
    mean: Tensor
    uncertainty: Tensor

    def weights(self) -> Tensor:
        """Stack the values, in the dtype of the running averages. Under `no_grad`."""
        weights = torch.stack([*self.parameters]).to(self.mean.dtype)
        if self.mean.device != weights.device:  # the model was moved after attaching
            for name in ("mean", "uncertainty", "positions"):
                setattr(self, name, getattr(self, name).to(weights.device))
            self.open = None if self.open is None else self.open.to(weights.device)
        return weights

    def gradients(self) -> Tensor:
        """Stack the gradients; a parameter that took no part in the step has none and counts as zero."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        return torch.stack(gradients).to(self.mean.dtype)

    def resolution(self) -> float:
        """Relative rounding of the parameters themselves, which may be narrower than the averages."""
        return torch.finfo(self.parameters[0].dtype).eps

    def add_to_gradients(self, extra: Tensor, weight: float) -> None:
        """Add a weighted stack to the gradients that exist."""
        extras = extra.to(self.parameters[0].dtype).unbind()
        pairs = [(p.grad, e) for p, e in zip(self.parameters, extras, strict=True) if p.grad is not None]
        if pairs:
            torch._foreach_add_([grad for grad, _ in pairs], [e for _, e in pairs], alpha=weight)


@dataclass(eq=False)
class AdaLoRAState:
    """What changes during a run.

    Attributes:
        sites: The gated layers.
        stacks: Their tensors by kind and shape.
        final: The final selection, boolean [R]; None until it is made.
        measure_after_step: Whether the current step's sensitivities are still to be measured (order `reference`).
        compact: Whether closed triplets are out of the tensors; their scores have gone with them.
    """

    sites: Sequence[Site]
    stacks: Sequence[_Stack]
    final: Tensor | None = None
    measure_after_step: bool = False
    compact: bool = False

    @torch.no_grad()
    def flat_gates(self) -> Tensor:
        """All λ, [R], on the device of the first site."""
        device = self.sites[0].gate.device
        return torch.cat([site.gate.to(device) for site in self.sites])

    def costs(self) -> Tensor:
        """Parameters of each rank, [R]."""
        return torch.tensor([site.cost for site in self.sites for _ in range(site.rank)])

    def split(self, flat: Tensor) -> Sequence[Tensor]:
        """[R] to one [r] per site, each on the site's device."""
        parts = flat.split([site.rank for site in self.sites])
        return [part.to(site.gate.device) for part, site in zip(parts, self.sites, strict=True)]

    @torch.no_grad()
    def zero_gates(self, keep: Tensor) -> None:
        """λ ← 0 outside `keep`. P, Q and the optimizer's moments stay as they are."""
        gates = self.flat_gates()
        torch._foreach_copy_(
            [site.gate for site in self.sites],
            list(self.split(torch.where(keep.to(gates.device), gates, torch.zeros_like(gates)))),
        )


def _stacks(sites: Sequence[Site]) -> list[_Stack]:
    """Group the tensors of all sites by kind, shape and device."""
    first = dict(zip(sites, accumulate((site.rank for site in sites), initial=0), strict=False))
    stacks = []
    for symbol, rank_dim in _RANK_DIMS.items():
        groups: dict[tuple[torch.Size, torch.device], list[Site]] = {}
        for site in sites:
            tensor = getattr(site, symbol)
            groups.setdefault((tensor.shape, tensor.device), []).append(site)
        for (shape, device), members in groups.items():
            rank = members[0].rank
            zeros = torch.zeros(len(members), *shape, dtype=members[0].gate.dtype, device=device)
            positions = torch.tensor([[first[site] + i for i in range(rank)] for site in members], device=device)
            parameters = [getattr(site, symbol) for site in members]
            stacks.append(_Stack(symbol, rank_dim, parameters, positions, None, zeros, zeros.clone()))
    return stacks


@torch.no_grad()
def _initialise(site: Site, parity: Parity | None) -> None:
    """Draw the factors on the CPU, so that a seed means the same on every device; the product is 0."""
    ρ = gate_gain(site.outputs, parity)
    P, Q = (torch.empty(factor.shape, dtype=site.gate.dtype) for factor in (site.B, site.A))
    if parity is None:
        for factor in (P, Q):
            torch.nn.init.normal_(factor, std=PUBLISHED_STD)
        λ = 0.0
    else:
        torch.nn.init.zeros_(P)
        torch.nn.init.orthogonal_(Q)
        λ = 1 / (math.sqrt(3) * ρ)
    site.B.copy_(P)
    site.A.copy_(Q)
    site.gate.fill_(λ)
    site.set_scale(torch.ones_like(site.gate, dtype=torch.bool), gain=ρ)
