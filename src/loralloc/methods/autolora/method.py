"""AutoLoRA: Automatically Tuning Matrix Ranks in Low-Rank Adaptation Based on Meta Learning (NAACL 2024, 2403.09113).

The update of each matrix is a sum of rank-one parts, weighted by selection variables that sum to one,

    W = W⁰ + s · k · Σⱼ αⱼ · Bⱼ Aⱼ          α = softmax(β): [k] = gate,   β: [k] = logits

Training moves the weights W (factors and heads) on one part of the training data, the logits on another:

    W′ = W − η ∇_W L_tr(W, β)
    β  ← Adam(β, ∇_β L_val(W′, β) − η · ∇²_{β,W} L_tr(W, β) · v),   v = ∇_{W′} L_val(W′, β)

where the second derivative is a difference of gradients at W ± ε v, ε = R / ‖v‖. At the end a rank stays if αⱼ ≥ 1/k.
Weights and selection variables are then thrown away and plain LoRA is trained at these ranks, on all training data
(`loralloc train` does both; `lora_config(plan, model)` starts the second part in a script).

Where we deviate, and why (`as_published` and `mode` reproduce the paper or the public code exactly):

* Scale: with α = 1/k the update is k times smaller than LoRA's, so it is multiplied by k and the search starts as LoRA
  would, at LoRA's learning rate. `as_published` does without the factor.
* `mode="fast"` evaluates L_val at the weights after the optimizer's step, takes a one-sided difference against the
  step's own gradient, and does not repeat the step with the new logits, which differ only by their learning rate. It
  costs 3 steps of LoRA instead of 5. `mode="paper"` takes a virtual step and a central difference, and repeats the step
  with the new logits; `mode="exact"` does the same, but differentiates twice instead of taking a difference.
* `mode="reference"` is the formula of the public code: the difference is taken around W′ instead of W, and without η.
* All passes of a step share its dropout masks (the public code draws new ones, which the difference amplifies).
* W′ counts as a step of gradient descent whatever the optimizer, as in the paper's formula. `paper`, `exact` and
  `reference` compute it with the gradient that the optimizer gets, that is after clipping.
* Only what is trained is copied and moved. The threshold applies to α itself (a script of the public code applies it to
  raw logits), with a tolerance, so that equal α keep all ranks.

In half precision, a difference over such a short distance is mostly rounding error; it is multiplied by η, which keeps
it small, and `first_order` leaves it out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from loralloc.allocate import break_ties, keep_within, select
from loralloc.budget import Budget
from loralloc.errors import UserError
from loralloc.gating import Site
from loralloc.methods.autolora.hypergradient import (
    central_difference,
    copies,
    mixed_derivative,
    one_sided_difference,
    repeat_gradient,
    restored,
    validation_gradients,
)
from loralloc.methods.autolora.replay import check_replay, is_due
from loralloc.methods.autolora.state import AutoLoRAState, Before, keep_uniform_share, pad_rows, softmax_gradient
from loralloc.methods.base import (
    Decision,
    Method,
    Search,
    StepContext,
    StepData,
    agree,
    any_process,
    average_,
    modules_of,
    split_by_site,
)
from loralloc.methods.controls import uniform_scores
from loralloc.methods.guards import FROM_THE_START, check_fresh
from loralloc.methods.validation import check_validation
from loralloc.schedule import CutSchedule
from loralloc.setting_types import Count, Examples

Mode = Literal["fast", "paper", "exact", "first_order", "reference"]

EPS = 1e-8
"""Adam's epsilon for the logits."""

CHECKS = 50
"""Checks of the plan over a run, unless `check_every` is set."""


@dataclass(frozen=True)
class AutoLoRA(Method):
    """Learn selection variables on held-out data; keep the ranks whose variable is at least 1/k.

    `validation` has examples held out of the training data: batches in your own loop, examples in the form of the
    training set (tokenized) in a Trainer. They must not be among the training data, nor the data on which the result is
    evaluated. All modes except `first_order` compute a step's loss again, and refuse a loop whose loss is not the
    model's own; see the module's docstring. A budget and patience are not in the paper. Under a budget, ranks are taken
    in the order of k · αⱼ, their share relative to an equal one, as long as they fit. With patience, the logits stop
    changing once the plan has settled; then `run.settled` is true, and a Trainer stops.

    Raises:
        UserError: A number is out of its range, or there are no validation data.
    """

    id: ClassVar[str] = "autolora"
    label: ClassVar[str] = "AutoLoRA"
    paper: ClassVar[str] = "arXiv 2403.09113"
    search: ClassVar[Search | None] = Search(default=0.5)

    validation: Annotated[
        Any,
        Examples("share of the training data that the search learns the ranks on", default=0.3, held_out=True),
    ] = field(default=None, repr=False, compare=False)
    budget: Annotated[
        Budget | None,
        Field(description="null: ranks with at least an equal share stay; or the largest shares under a budget"),
    ] = None
    mode: Annotated[
        Mode,
        Field(
            description="how the gradient of the selection variables is computed; it costs 3 (fast), 5 "
            "(paper), 6 (exact), 2 (first_order) or 5 (reference) steps of LoRA"
        ),
    ] = "fast"
    logit_learning_rate: Annotated[
        float, Field(gt=0, description="learning rate of the selection variables, constant")
    ] = 3e-4
    beta1: Annotated[float, Field(ge=0, lt=1, description="Adam's beta1 for them")] = 0.5
    beta2: Annotated[float, Field(ge=0, lt=1, description="Adam's beta2 for them")] = 0.999
    radius: Annotated[float, Field(gt=0, description="how far weights move for the difference of gradients")] = 0.01
    check_every: Annotated[
        Count | None, Field(description="steps between checks of the plan; null: about 50 checks over the search")
    ] = None
    patience: Annotated[
        Count | None, Field(description="end the search when this many checks found the same plan; null: never")
    ] = None
    parity: Annotated[bool, Field(description="start with LoRA's scale; false is the paper's, r times smaller")] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_validation("AutoLoRA", self.validation)

    @classmethod
    def as_published(cls, validation: Any, **settings: Any) -> AutoLoRA:
        """Return AutoLoRA exactly as in the paper: `mode="paper"`, and no factor k on the update."""
        return cls(validation, **{"mode": "paper", "parity": False, **settings})

    @property
    def examples(self) -> Any:
        """What the selection variables are learned on."""
        return self.validation

    def schedule(self, total_steps: int, start: int, target: int) -> CutSchedule:
        """Return all ranks over the run: they are chosen when it ends."""
        return CutSchedule(total_steps, start, target, cut=total_steps)

    # The course of a run.

    def prepare(self, sites: Sequence[Site]) -> AutoLoRAState:
        """Set β = 0; the adapted model equals the base model.

        Raises:
            UserError: An adapter has been trained already.
        """
        check_fresh(sites, "AutoLoRA searches from the start", FROM_THE_START)
        for site in sites:
            gain = site.rank if self.parity else 1
            site.set_scale(torch.ones_like(site.gate, dtype=torch.bool), gain=gain)
        # ΔW = Σ αⱼ Bⱼ Aⱼ with α = softmax(β), and β = 0 at first: equal shares of 1/k.
        state = AutoLoRAState(sites, pad_rows([torch.zeros_like(site.gate.detach()) for site in sites]))
        state.write_gates()
        state.watch()
        return state

    def on_gradients(self, state: AutoLoRAState, now: StepContext) -> None:
        """Update the logits and recompute the gradient (`paper`, `exact`, `reference`), or prepare for `on_step`."""
        step_gradient = state.take_gate_gradients()
        state.sound = True
        if state.settled:
            return
        data = _data(now)
        rate = 0.0 if self.mode == "first_order" else _learning_rate(now)
        if self.mode == "first_order":
            state.before = Before(rate, [], [])
            return
        state.steps += 1
        if is_due(state.steps):
            used = step_gradient if self.mode == "fast" else None
            if not check_replay(data, state.gates(), used, self.mode, now.max_grad_norm):
                state.steps -= 1
        # α is learned before W. `fast` waits for the optimizer's own step instead of a virtual one.
        if self.mode == "fast":
            state.before = Before(rate, copies(data.weights()), step_gradient)
        elif self._learn(state, self._gradient_before_step(state, data, rate)):
            repeat_gradient(data, now.max_grad_norm)  # the step of W is taken with the new α

    def on_step(self, state: AutoLoRAState, now: StepContext) -> Decision | None:
        """Update the logits after the step (`fast`, `first_order`); check the plan every `check_every` steps."""
        state.take_gate_gradients()  # those of a bad step
        (before, state.before), (sound, state.sound) = (state.before, None), (state.sound, False)
        if not sound:
            return None
        if before is not None:
            self._learn(state, self._gradient_after_step(state, _data(now), before))
        every = self.check_every or max(1, round(now.schedule.total_steps / CHECKS))
        return None if (now.step + 1) % every else self._look_at_plan(state, now.schedule.target)

    def finish(self, state: AutoLoRAState, target: int) -> Tensor:
        """Close the ranks below the threshold, or beyond the budget; return those that stay."""
        kept = self._select(state, target)
        for site, open_ranks in zip(state.sites, split_by_site(kept, state.sites), strict=True):
            site.set_scale(open_ranks, gain=site.rank if self.parity else 1)
        state.unwatch()
        return kept

    def state_dict(self, state: AutoLoRAState) -> dict[str, Tensor]:
        """Logits and their optimizer; what has been seen of the plan."""
        tensors = {name: getattr(state, name)[state.real] for name in ("logits", "mean", "square")}
        tensors["counts"] = torch.tensor([state.updates, state.skipped, state.unchanged])
        return tensors if state.planned is None else {**tensors, "planned": state.planned}

    def load_state_dict(self, state: AutoLoRAState, tensors: Mapping[str, Tensor]) -> None:
        """Restore them; the gates come with the model."""
        for name in ("logits", "mean", "square"):
            getattr(state, name)[state.real] = tensors[name].to(state.logits)
        state.updates, state.skipped, state.unchanged = tensors["counts"].tolist()
        state.planned = tensors["planned"].to(state.logits.device) if "planned" in tensors else None
        state.settled = self._is_settled(state)
        state.before, state.sound = None, False  # of a step that was interrupted
        state.take_gate_gradients()

    def resized(self, state: AutoLoRAState) -> None:
        """Nothing to do: no rank leaves the tensors."""
        del state

    def _gradient_before_step(self, state: AutoLoRAState, data: StepData, rate: float) -> list[Tensor]:
        """Gradient with respect to the gates around a virtual step of gradient descent."""
        weights, gates = data.weights(), state.gates()
        gradients = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
        with restored(weights) as start:
            # One step ahead, W′ = W − η ∇_W L_tr(W, α).
            torch._foreach_add_(weights, gradients, alpha=-rate)
            # The first part of the gradient, ∂L_val(W′, α)/∂α, and v = ∂L_val/∂W′ for the second.
            direct, v = validation_gradients(data, gates, weights, check=state.updates == 0)
            if self.mode != "reference":
                torch._foreach_copy_(weights, start)
            # The second part: η ∂²L_tr/∂α∂W · v, as a difference of gradients at W ± εv, or exactly.
            if self.mode == "exact":
                second = mixed_derivative(data, gates, weights, v, check=state.updates == 0)
            else:
                second = central_difference(data, gates, weights, v, self.radius)
        torch._foreach_sub_(direct, second, alpha=1.0 if self.mode == "reference" else rate)
        return direct

    def _gradient_after_step(self, state: AutoLoRAState, data: StepData, before: Before) -> list[Tensor]:
        """Gradient with respect to the gates at the weights after the optimizer's step."""
        weights, gates = data.weights(), state.gates()
        direct, v = validation_gradients(data, gates, weights, check=state.updates == 0)
        if self.mode == "fast":
            second = one_sided_difference(data, gates, weights, v, self.radius, before.weights, before.gates)
            torch._foreach_sub_(direct, second, alpha=before.rate)
        return direct

    def _learn(self, state: AutoLoRAState, gate_gradients: list[Tensor]) -> bool:
        """One step of Adam on the logits; a gradient that is not finite is skipped. Returns whether they moved."""
        average_(gate_gradients)
        # Through the softmax: ∂/∂β = (diag(α) − ααᵀ) ∂/∂α.
        gradient = softmax_gradient(state.shares(), state.pad(gate_gradients))
        if any_process(~torch.isfinite(gradient).all()):
            state.skipped += 1
            return False
        state.updates += 1
        # Adam on β, with its correction for the first steps.
        state.mean.lerp_(gradient, 1 - self.beta1)
        state.square.lerp_(gradient.square(), 1 - self.beta2)
        mean = state.mean / (1 - self.beta1**state.updates)
        root = (state.square / (1 - self.beta2**state.updates)).sqrt_()
        state.logits -= self.logit_learning_rate * mean / (root + EPS)
        state.write_gates()
        return True

    def _look_at_plan(self, state: AutoLoRAState, target: int) -> Decision:
        """Compare the plan as it would be now with that of the last check."""
        planned = self._select(state, target)
        same = state.planned is not None and torch.equal(planned, state.planned.to(planned.device))
        state.unchanged = state.unchanged + 1 if same else 0
        state.planned, state.settled = planned, self._is_settled(state)
        details = {"unchanged": state.unchanged, "skipped": state.skipped}
        return Decision(planned, int(planned.sum()), frozen=state.settled, planned=True, details=details)

    def _is_settled(self, state: AutoLoRAState) -> bool:
        return self.patience is not None and state.unchanged >= self.patience

    def _select(self, state: AutoLoRAState, target: int) -> Tensor:
        """The ranks that stay, boolean [R]."""
        shares = state.shares().masked_fill(~state.real, -1)
        if self.budget is None:
            # The threshold: the ranks with αⱼ ≥ 1/k are kept.
            return agree(keep_uniform_share(shares)[state.real])
        # Under a budget the threshold moves. A share says how a rank compares with others of its matrix, not what it is
        # worth beside one of another size: ranks are taken in the order of their shares, not by share per cost.
        scores = (shares * state.real.sum(1, keepdim=True))[state.real]  # relative to 1/k, which differs with k
        # Matrices take turns at shares that are equal up to rounding, so that an idle search leaves plain LoRA.
        scores = break_ties(scores.round(decimals=5), uniform_scores([site.rank for site in state.sites]))
        return agree(select(scores, self.budget, modules_of(state.sites), target, keep_within))


def _data(now: StepContext) -> StepData:
    assert now.data is not None, "there are validation data, so the run lets them be seen"
    return now.data


def _learning_rate(now: StepContext) -> float:
    if now.learning_rate is None:
        raise UserError(
            "AutoLoRA needs the learning rate of the step, and the optimizer that holds the adapter was not shown to "
            'it: call run.before_step(optimizer), or use mode="first_order", which needs none'
        )
    return now.learning_rate
