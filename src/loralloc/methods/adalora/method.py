"""AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning (ICLR 2023, arXiv 2303.10512).

The update of each matrix is kept in the form of a singular value decomposition,

    W = W⁰ + s · P Λ Q          P: [out, r] = B,   Λ = ρ · diag(λ), λ: [r] = gate,   Q: [r, in] = A

and under a falling budget b(t) the λ of the least important triplets (P_i, λ_i, Q_i) are set to zero. A triplet's
importance is the smoothed sensitivity × uncertainty of its entries, so a closed triplet can come back until the final
phase. A penalty keeps P and Q orthonormal.

Where we deviate, and why (`as_published` and the options reproduce the paper or the public code exactly):

* Budget: the numerator of eq. 14 is t − t_i, as in the public code; as printed the budget jumps above its start.
* Selection: exactly b(t) triplets stay; the public code compares with a threshold and drops all ties. NaN never stays.
* Order: sensitivities come from the weights and gradients of the same step (Algorithm 1). The public code multiplies
  the gradient with the weight *after* the step: `order="reference"`.
* Penalty: that of the public code, the mean unsquared norm (γ = 0.1 means that); `penalty="paper"` is eq. 4. Its
  gradient is added in closed form when the step's gradients are complete, after clipping, so that it depends on no
  loss function, wrapper or gradient accumulation and never shows in an evaluation loss.
* Start: like LoRA's, so that LoRA's learning rate fits (docs/step-parity.md). Q is orthonormal, P = 0, and the gate ρ·λ
  is 1/√3, the length of LoRA's rows of A: the first optimizer step is as long as LoRA's and lowers the loss as much. ρ
  makes a step of λ count as much as one of P. As published, λ = 0, ρ = 1 and P, Q ~ N(0, 0.02²): only λ moves at first,
  and at LoRA's learning rate the run hardly learns.
* `importance="magnitude"` (the paper's ablation with |λ|) compares the gates |ρ·λ| after the step; as published ρ is 1.
* Final phase: closed triplets are masked for good: no gradient, no share in the penalty. The public code only resets
  their λ after each step, so their P and Q keep moving: `order="reference"` does the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from loralloc.allocate import select
from loralloc.budget import Budget
from loralloc.gating import Site
from loralloc.methods.adalora.importance import per_rank, sensitivity, smooth_
from loralloc.methods.adalora.penalty import Penalty, penalty_gradient
from loralloc.methods.adalora.state import AdaLoRAState, Parity, Stack, gate_gain, initialise, stacks_of
from loralloc.methods.base import Decision, Method, StepContext, agree, modules_of, split_by_site
from loralloc.methods.guards import (
    FROM_THE_START,
    check_capacity,
    check_drawn_at_random,
    check_fresh,
    gradients_gone,
    is_cleared,
)
from loralloc.schedule import BudgetSchedule, cubic_schedule
from loralloc.setting_types import Count, Phase, is_number

Importance = Literal["smoothed", "sensitivity", "magnitude"]
Order = Literal["paper", "reference"]


@dataclass(frozen=True)
class AdaLoRA(Method):
    """Prune singular values by importance under a falling budget.

    `LoraConfig.r` is every module's rank at the start; about 1.5 times the target is usual. If ranks differ in cost, as
    with a budget in parameters, the set with the largest total importance stays. `max_rank` applies as soon as the
    falling budget can be met under it, and at the latest from the final phase on.

    Raises:
        UserError: A setting is out of its range.
    """

    id: ClassVar[str] = "adalora"
    label: ClassVar[str] = "AdaLoRA"
    paper: ClassVar[str] = "arXiv 2303.10512"

    budget: Budget
    warmup: Annotated[Phase, Field(description="start at full rank: fraction of the run, or steps")] = 0.15
    cooldown: Annotated[Phase, Field(description="end at the final budget: fraction of the run, or steps")] = 0.45
    interval: Annotated[
        Count | None, Field(description="steps between two allocations; null: about 500 allocations over the run")
    ] = None
    beta1: Annotated[float, Field(gt=0, lt=1, description="smoothing of the sensitivity")] = 0.85
    beta2: Annotated[float, Field(gt=0, lt=1, description="smoothing of the uncertainty")] = 0.85
    importance: Annotated[
        Importance, Field(description="score of a rank: smoothed is sensitivity times uncertainty")
    ] = "smoothed"
    order: Annotated[
        Order, Field(description="score weights before the update (paper) or after it (reference code)")
    ] = "paper"
    penalty: Annotated[
        Penalty,
        Field(description="orthogonality penalty: mean norm (reference code) or summed squares (paper)"),
    ] = "reference"
    gamma: Annotated[float, Field(ge=0, description="weight of the penalty; 0 turns it off")] = 0.1
    parity: Annotated[
        Parity | None, Field(description="optimizer for which LoRA's learning rate is to fit; none: as in the paper")
    ] = "adam"

    @classmethod
    def as_published(cls, budget: Budget, **settings: float | str | None) -> AdaLoRA:
        """Return AdaLoRA in the paper's parametrisation: λ = 0, ρ = 1, P and Q ~ N(0, 0.02²)."""
        return cls(budget, parity=None, **settings)  # type: ignore[arg-type]

    @property
    def masks_bad_steps(self) -> bool:
        """Importance and penalty leave everything as it is where the gradients are not finite."""
        return True

    @property
    def compacts(self) -> bool:
        """In the final phase, unless closed triplets keep moving as in the public code (`order="reference"`)."""
        return self.order == "paper"

    @classmethod
    def broken_rules(cls, value: Callable[..., Any]) -> Iterator[tuple[tuple[str, ...], str]]:
        """The budget must have steps left in which it can fall."""
        steps = value("training", "steps")
        phases = {name: value("method", name) for name in ("warmup", "cooldown")}
        terms = " + ".join(f"method.{name} ({length})" for name, length in phases.items())
        key = ("method", "cooldown" if phases["cooldown"] != cls.cooldown else "warmup")
        total = sum(length for length in phases.values() if is_number(length))
        rest = "so that the budget can fall in between"
        if all(isinstance(length, float) for length in phases.values()) and round(total, 9) >= 1:
            yield key, f"{terms} is {total:g} of the run: keep it below 1, {rest}"
        if all(isinstance(length, int) for length in (*phases.values(), steps)) and total >= steps:
            yield key, f"{terms} is {total} of {steps} steps: keep it below, {rest}"

    def schedule(self, total_steps: int, start: int, target: int) -> BudgetSchedule:
        """Return the cubic budget of eq. 14 (corrected) over the run."""
        return cubic_schedule(total_steps, self.warmup, self.cooldown, self.interval, start, target)

    # The course of a run.

    def prepare(self, sites: Sequence[Site]) -> AdaLoRAState:
        """Draw Q and set P or λ to 0; the adapted model equals the base model.

        Raises:
            UserError: An adapter has been trained already, was computed from data, or has more ranks than its layer has
                dimensions.
        """
        check_fresh(sites, "AdaLoRA would draw it anew", FROM_THE_START)
        check_drawn_at_random(sites, "AdaLoRA would draw it anew")
        check_capacity(sites, "more rows than that cannot be orthonormal")
        # ΔW = P Λ Q, with ΔW = 0 at first.
        for site in sites:
            initialise(site, self.parity)
        return AdaLoRAState(sites, stacks_of(sites), modules_of(sites))

    def on_gradients(self, state: AdaLoRAState, now: StepContext) -> None:
        """Add the penalty's gradient; measure importance (order `paper`)."""
        # The averages stop at step T − t_f, as in the public code: two steps before the ranks are final.
        measure = now.step + 2 < now.schedule.steps_until_final and self.importance != "magnitude"
        for stack in state.stacks:
            penalise = self.gamma > 0 and stack.symbol != "gate"
            if not (penalise or (measure and self.order == "paper")):
                continue
            weights = stack.weights()
            if penalise:
                # Eq. 4: C + γ Σ R(P, Q). Its gradient, added when the loss's own is complete and clipped.
                matrices, resolution = 2 * len(state.sites), stack.resolution()
                gradient = penalty_gradient(weights, stack.rank_dim, stack.open, self.penalty, matrices, resolution)
                stack.add_to_gradients(gradient, self.gamma)
            if measure and self.order == "paper":
                # Algorithm 1: importance from this step's weights and gradients.
                self._measure(stack, weights, stack.gradients(), now.sound)
        state.measure_after_step = measure and self.order == "reference"
        state.gradients = state.versions() if state.measure_after_step else ()

    def on_step(self, state: AdaLoRAState, now: StepContext) -> Decision | None:
        """Close the least important triplets when the schedule says so.

        Raises:
            UserError: The gradients to measure by (order `reference`) have been cleared already.
        """
        schedule, step = now.schedule, now.step
        assert isinstance(schedule, BudgetSchedule)
        if state.measure_after_step:  # the public code multiplies the gradient with the weight after its update
            if state.gradients and all(is_cleared(*had) for had in state.gradients):  # zeros keep the first ranks
                raise gradients_gone('AdaLoRA(order="reference") measures ranks by the gradients of the step just made')
            for stack in state.stacks:
                self._measure(stack, stack.weights(), stack.gradients(), now.sound)
            state.measure_after_step = False
        # Algorithm 1: ranks are closed every ΔT steps.
        if not schedule.closes(step):
            return None
        if state.final is not None:
            if self.order == "reference":
                state.zero_gates(state.final)
            return None
        # Eq. 14: the budget b(t). Eq. 8: λ stays for the b(t) most important triplets of all matrices, else it is 0.
        budget, final = schedule.budget(step), schedule.phase(step) == "final"
        keep = self._select(state, budget)
        state.zero_gates(keep)
        if final:  # the final phase: what is closed now stays closed
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
        state.measure_after_step = False  # of a step that was interrupted
        self._mask(state, None if self.order == "reference" else state.final)

    def resized(self, state: AdaLoRAState) -> None:
        """Group the tensors anew by their shapes."""
        state.compact = not state.compact
        state.stacks = stacks_of(state.sites)

    def _measure(self, stack: Stack, weights: Tensor, gradients: Tensor, sound: Tensor | None) -> None:
        """Update the importance of a stack's entries from one step's weights and gradients, if the step is sound."""
        # Eq. 10: I(w) = |w · ∂L/∂w|.
        current, beta1, beta2 = sensitivity(weights, gradients), self.beta1, self.beta2
        if sound is not None:  # not known to the host yet: in a bad step, β = 1 leaves the averages unchanged
            sound = sound.to(current.device)
            current = torch.where(sound, current, 0.0 if self.importance == "smoothed" else stack.mean)
            beta1, beta2 = (torch.where(sound, beta, 1.0).to(current.dtype) for beta in (beta1, beta2))
        if self.importance == "smoothed":
            # Eq. 11 and 12: running averages of the sensitivity and of its uncertainty.
            smooth_(stack.mean, stack.uncertainty, current, beta1, beta2)
        else:
            stack.mean.copy_(current)

    def _scores(self, state: AdaLoRAState) -> Tensor:
        """S_i = s(λ_i) + mean_j s(P_ji) + mean_j s(Q_ij) for every triplet, [R] (eq. 9)."""
        gates = state.flat_gates()
        if self.importance == "magnitude":  # |Λ|: λ alone is in a unit of its layer's width
            gains = [gate_gain(site.outputs, self.parity) for site in state.sites]
            ranks = torch.tensor([site.rank for site in state.sites])
            return gates.abs() * torch.tensor(gains, dtype=gates.dtype).repeat_interleave(ranks).to(gates.device)
        scores = torch.zeros_like(gates, dtype=state.stacks[0].mean.dtype)  # gates may have been cast since
        for stack in state.stacks:
            # Eq. 13: s(w) = Ī · Ū; eq. 9 averages it over the entries of a triplet's P and Q.
            elements = stack.mean * stack.uncertainty if self.importance == "smoothed" else stack.mean
            positions = stack.positions.flatten().to(scores.device)
            scores.index_add_(0, positions, per_rank(elements, stack.rank_dim).flatten().to(scores.device))
        return scores

    def _select(self, state: AdaLoRAState, budget: int) -> Tensor:
        """The triplets that stay under a budget, boolean [R]."""
        return agree(select(self._scores(state), self.budget, state.modules, budget))

    def _close_for_good(self, state: AdaLoRAState, keep: Tensor) -> None:
        """Zero triplets and mask them out of the model and of the penalty."""
        state.zero_gates(keep)
        self._mask(state, keep)

    def _mask(self, state: AdaLoRAState, keep: Tensor | None) -> None:
        """Let only these triplets take part in the model and in the penalty; all of them where None."""
        everything = torch.ones_like(state.flat_gates(), dtype=torch.bool)
        parts = split_by_site(everything if keep is None else keep, state.sites)
        for site, kept in zip(state.sites, parts, strict=True):
            site.set_scale(kept, gain=gate_gain(site.outputs, self.parity))
        for stack in state.stacks:
            stack.open = None if keep is None else keep.to(stack.positions.device)[stack.positions]
