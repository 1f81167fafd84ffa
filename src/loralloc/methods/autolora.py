"""AutoLoRA: Automatically Tuning Matrix Ranks in Low-Rank Adaptation Based on Meta Learning (NAACL 2024, 2403.09113).

The update of each matrix is a sum of rank-one parts, weighted by selection variables that sum to one,

    W = W⁰ + s · k · Σⱼ αⱼ · Bⱼ Aⱼ          α = softmax(β): [k] = gate,   β: [k] = logits

Training moves the weights W (factors and heads) on one part of the training data, the logits on another:

    W′ = W − η ∇_W L_tr(W, β)
    β  ← Adam(β, ∇_β L_val(W′, β) − η · ∇²_{β,W} L_tr(W, β) · v),   v = ∇_{W′} L_val(W′, β)

where the second derivative is a difference of gradients along v, R / ‖v‖ apart. At the end a rank stays if αⱼ ≥ 1/k.
Weights and selection variables are then thrown away and plain LoRA is trained at these ranks, on all training data
(`loralloc train` does both; `lora_config(plan, model)` starts the second part in a script).

Where we deviate, and why (`as_published` and `mode` give the paper's or the public code's letter):

* Scale: with α = 1/k the update is k times smaller than LoRA's, so it is multiplied by k and the search starts as LoRA
  would, at LoRA's learning rate. `as_published` does without the factor.
* `mode="fast"` evaluates L_val where the optimizer's step has led, takes the difference from one side against the
  step's own gradient, and does not repeat the step with the new logits, which differ by their learning rate: it costs 3
  steps of LoRA instead of 5. `mode="paper"` does all that; `mode="exact"` differentiates twice instead.
* `mode="reference"` is the formula of the public code: the difference is taken around W′ instead of W, and without η.
* All passes of a step share its dropout masks (the public code draws new ones, which the difference blows up).
* W′ is a step of gradient descent also where the optimizer is another one, as in the paper's formula; in `paper`,
  `exact` and `reference` with the gradient as the optimizer gets it, that is after clipping.
* Only what is trained is copied and moved. The threshold applies to α itself (a script of the public code applies it to
  raw logits), with a tolerance, so that equal α keep all ranks.

In half precision a difference along so short a way is mostly rounding; η keeps it small, `first_order` leaves it out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from loralloc.allocate import keep_top, keep_uniform_share, keep_within
from loralloc.budget import Budget, ConstantSchedule
from loralloc.errors import UserError, check_choice
from loralloc.gating import Site
from loralloc.methods.base import Decision, Moment, Probe, agree, any_process, average_
from loralloc.methods.guards import FROM_THE_START, check_fresh
from loralloc.methods.hypergradient import (
    central_difference,
    copies,
    mixed_derivative,
    one_sided_difference,
    repeat_gradient,
    restored,
    validation_gradients,
)
from loralloc.methods.replay import check_replay, is_due
from loralloc.methods.validation import check_validation

Mode = Literal["fast", "paper", "exact", "first_order", "reference"]

EPS = 1e-8
"""Of Adam on the logits."""

CHECKS = 50
"""How often a run looks at its plan unless told otherwise."""


@dataclass(frozen=True)
class AutoLoRA:
    """Learn selection variables on held-out data; keep the ranks whose variable is at least 1/k.

    Attributes:
        validation: Examples held out of the training data: batches in a loop of your own, examples as in the training
            set (tokenized alike) in a Trainer. They must not be among the training data, nor be the data that the
            result is evaluated on.
        budget: What the adapter may cost: the largest αⱼ stay, over all matrices, instead of those above 1/k. Not in
            the paper; None for the threshold.
        mode: How the gradient of the logits is computed: `fast`, `paper`, `exact`, `first_order` (without the second
            derivative) or `reference`, see the module's docstring. They cost 3, 5, about 6, 2 and 5 steps of LoRA. All
            but `first_order` compute a step's loss again, and refuse a loop with another loss than the model's own.
        logit_learning_rate: Step size of the logits; constant.
        beta1: Adam's β₁ for the logits, in [0, 1).
        beta2: Adam's β₂ for the logits, in [0, 1).
        radius: R, how far the weights are moved along v for the difference.
        check_every: Steps between two looks at the plan, which the trace records; None for about 50 over the run.
        patience: Settle when the plan has not changed at this many looks in a row: the logits stay as they are from
            then on, `run.settled` is true, and a Trainer stops. Not in the paper; None for the whole run.
        parity: Whether the update is multiplied by k, so that it starts as LoRA's.

    Raises:
        UserError: A number is out of its range, or there are no validation data.
    """

    id: ClassVar[str] = "autolora"

    validation: Any = field(default=None, repr=False, compare=False)
    budget: Budget | None = None
    mode: Mode = "fast"
    logit_learning_rate: float = 3e-4
    beta1: float = 0.5
    beta2: float = 0.999
    radius: float = 0.01
    check_every: int | None = None
    patience: int | None = None
    parity: bool = True

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, get_args(Mode))
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        for name in ("logit_learning_rate", "radius"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name} must be positive and finite, got {getattr(self, name)}")
        for name in ("check_every", "patience"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise UserError(f"{name} must be a whole number from 1 on, or None, got {value!r}")
        check_validation("AutoLoRA", self.validation)

    @classmethod
    def as_published(cls, validation: Any, **settings: Any) -> AutoLoRA:
        """Return AutoLoRA to the paper's letter: `mode="paper"`, and no factor k on the update."""
        return cls(validation, **{"mode": "paper", "parity": False, **settings})

    @property
    def compacts(self) -> bool:
        """No: ranks are closed when the search ends."""
        return False

    def schedule(self, total_steps: int, start: int, target: int) -> ConstantSchedule:
        """Return all ranks over the run: they are chosen when it ends."""
        return ConstantSchedule(total_steps, start, target, final=total_steps - 1)

    # The five verbs.

    def prepare(self, sites: Sequence[Site]) -> AutoLoRAState:
        """Set β = 0; the adapted model equals the base model.

        Raises:
            UserError: An adapter has been trained already.
        """
        check_fresh(sites, "AutoLoRA searches from the start", FROM_THE_START)
        for site in sites:
            gain = site.rank if self.parity else 1
            site.set_scale(torch.ones_like(site.gate, dtype=torch.bool), gain=gain)
        state = AutoLoRAState(sites, _logits([torch.zeros_like(site.gate.detach()) for site in sites]))
        state.write_gates()
        state.watch()
        return state

    def on_gradients(self, state: AutoLoRAState, now: Moment) -> None:
        """Learn the logits before the step and repeat its gradient, in the modes that do; note W in the others."""
        step_gradient = state.take_gate_gradients()
        state.sound = True
        if state.settled:
            return
        probe = _probe(now)
        rate = 0.0 if self.mode == "first_order" else _learning_rate(now)
        if self.mode == "first_order":
            state.before = _Before(rate, [], [])
            return
        state.steps += 1
        if is_due(state.steps):
            used = step_gradient if self.mode == "fast" else None
            if not check_replay(probe, state.gates(), used, self.mode, now.max_grad_norm):
                state.steps -= 1
        if self.mode == "fast":
            state.before = _Before(rate, copies(probe.weights()), step_gradient)
        elif self._learn(state, self._gradient_before_step(state, probe, rate)):
            repeat_gradient(probe, now.max_grad_norm)

    def on_step(self, state: AutoLoRAState, now: Moment) -> Decision | None:
        """Learn the logits after the step, in the modes that do; look at the plan now and then."""
        state.take_gate_gradients()  # those of a bad step
        (before, state.before), (sound, state.sound) = (state.before, None), (state.sound, False)
        if not sound:
            return None
        if before is not None:
            self._learn(state, self._gradient_after_step(state, _probe(now), before))
        every = self.check_every or max(1, round(now.schedule.total_steps / CHECKS))
        return None if (now.step + 1) % every else self._look_at_plan(state, now.schedule.target)

    def finish(self, state: AutoLoRAState, target: int) -> Tensor:
        """Close the ranks below the threshold, or beyond the budget; return those that stay."""
        kept = self._select(state, target)
        for site, open_ranks in zip(state.sites, state.split(kept), strict=True):
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

    def resized(self, state: AutoLoRAState) -> None:
        """Nothing to do: no rank leaves the tensors."""
        del state

    def _gradient_before_step(self, state: AutoLoRAState, probe: Probe, rate: float) -> list[Tensor]:
        """Gradient with respect to the gates around a virtual step of gradient descent."""
        weights, gates = probe.weights(), state.gates()
        gradients = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
        with restored(weights) as start:
            torch._foreach_add_(weights, gradients, alpha=-rate)
            direct, v = validation_gradients(probe, gates, weights, check=state.updates == 0)
            if self.mode != "reference":
                torch._foreach_copy_(weights, start)
            if self.mode == "exact":
                second = mixed_derivative(probe, gates, weights, v, check=state.updates == 0)
            else:
                second = central_difference(probe, gates, weights, v, self.radius)
        torch._foreach_sub_(direct, second, alpha=1.0 if self.mode == "reference" else rate)
        return direct

    def _gradient_after_step(self, state: AutoLoRAState, probe: Probe, before: _Before) -> list[Tensor]:
        """Gradient with respect to the gates where the optimizer's step has led."""
        weights, gates = probe.weights(), state.gates()
        direct, v = validation_gradients(probe, gates, weights, check=state.updates == 0)
        if self.mode == "fast":
            second = one_sided_difference(probe, gates, weights, v, self.radius, before.weights, before.gates)
            torch._foreach_sub_(direct, second, alpha=before.rate)
        return direct

    def _learn(self, state: AutoLoRAState, gate_gradients: list[Tensor]) -> bool:
        """One step of Adam on the logits; a gradient that is not finite moves nothing. Returns whether it was."""
        average_(gate_gradients)
        gradient = softmax_gradient(state.shares(), state.pad(gate_gradients))
        if any_process(~torch.isfinite(gradient).all()):
            state.skipped += 1
            return False
        state.updates += 1
        state.mean.lerp_(gradient, 1 - self.beta1)
        state.square.lerp_(gradient.square(), 1 - self.beta2)
        mean = state.mean / (1 - self.beta1**state.updates)
        root = (state.square / (1 - self.beta2**state.updates)).sqrt_()
        state.logits -= self.logit_learning_rate * mean / (root + EPS)
        state.write_gates()
        return True

    def _look_at_plan(self, state: AutoLoRAState, target: int) -> Decision:
        """Compare the plan as it would be now with that of the last look."""
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
            return agree(keep_uniform_share(shares)[state.real])
        scores = (shares * state.real.sum(1, keepdim=True))[state.real]  # relative to 1/k, which differs with k
        if self.budget.unit == "ranks":
            return agree(keep_top(scores, target))
        costs = torch.tensor([site.cost for site in state.sites for _ in range(site.rank)])
        return agree(keep_within(scores, costs, target))


def softmax_gradient(shares: Tensor, gradient: Tensor) -> Tensor:
    """Gradient of the logits from that of α = softmax(β): (diag(α) − α αᵀ) ∂L/∂α, for every row of [n, k].

    >>> softmax_gradient(torch.tensor([[0.5, 0.5]]), torch.tensor([[3.0, 1.0]]))  # ¼ (g₁ − g₂) (1, −1)
    tensor([[ 0.5000, -0.5000]])
    """
    weighted = shares * gradient
    return weighted - shares * weighted.sum(1, keepdim=True)


@dataclass(frozen=True)
class _Before:
    """What the gradient after a step needs from before it.

    Attributes:
        rate: η.
        weights: W.
        gates: ∂L_tr/∂gates at W, on this process.
    """

    rate: float
    weights: list[Tensor]
    gates: list[Tensor]


@dataclass(eq=False)
class AutoLoRAState:
    """What changes during a run. Rows of [n, k] belong to sites; shorter ones are padded with logits of −∞.

    Attributes:
        sites: The gated layers.
        logits: β, [n, k].
        before: What was noted before the optimizer's step, during one.
        sound: Whether the gradient of the step was finite, during one.
        updates: Steps that the logits have taken.
        skipped: Steps that they have not taken because their gradient was not finite.
        planned: The plan at the last look, boolean [R].
        unchanged: Looks in a row at which it was the same as before.
        settled: Whether the logits stay as they are.
        steps: Steps of this process in which there was something to compare (`replay`).
    """

    sites: Sequence[Site]
    logits: Tensor
    before: _Before | None = None
    sound: bool = False
    updates: int = 0
    skipped: int = 0
    planned: Tensor | None = None
    unchanged: int = 0
    settled: bool = False
    steps: int = 0

    def __post_init__(self) -> None:
        self.real = self.logits != -torch.inf
        self.mean, self.square = torch.zeros_like(self.logits), torch.zeros_like(self.logits)
        self._caught: dict[int, Tensor] = {}  # gradients of gates since they were last taken
        self._hooks: list[Any] = []

    def gates(self) -> list[Tensor]:
        """The gates of all sites."""
        return [site.gate for site in self.sites]

    def shares(self) -> Tensor:
        """α = softmax(β), [n, k]; 0 where a row is padded."""
        return torch.softmax(self.logits, dim=1)

    def pad(self, rows: Sequence[Tensor]) -> Tensor:
        """One [r] per site to [n, k]."""
        return nn.utils.rnn.pad_sequence([row.to(self.logits) for row in rows], batch_first=True)

    def split(self, flat: Tensor) -> Sequence[Tensor]:
        """[R] to one [r] per site, each on the site's device."""
        parts = flat.split([site.rank for site in self.sites])
        return [part.to(site.gate.device) for part, site in zip(parts, self.sites, strict=True)]

    @torch.no_grad()
    def write_gates(self) -> None:
        """Set gate = softmax(β)."""
        torch._foreach_copy_(self.gates(), list(self.split(self.shares()[self.real])))

    def watch(self) -> None:
        """Take the gates' gradients out of `.grad` as they come.

        An optimizer leaves a parameter without a gradient alone, weight decay included, and clipping must neither count
        these gradients nor scale them: the difference against them would blow the factor up.
        """

        def catch(index: int, gate: Tensor) -> None:
            gradient, gate.grad = gate.grad, None
            assert gradient is not None
            before = self._caught.get(index)
            self._caught[index] = gradient if before is None else before + gradient

        for index, gate in enumerate(self.gates()):
            self._hooks.append(gate.register_post_accumulate_grad_hook(lambda gate, i=index: catch(i, gate)))

    def unwatch(self) -> None:
        """Leave the gates alone."""
        for hook in self._hooks:
            hook.remove()

    def take_gate_gradients(self) -> list[Tensor]:
        """The gradients since the last call; zero for gates that got none."""
        device = self.sites[0].gate.device
        if self.logits.device != device:  # the model was moved after attaching
            for name in ("logits", "mean", "square", "real"):
                setattr(self, name, getattr(self, name).to(device))
        caught, self._caught = self._caught, {}
        for gate in self.gates():
            gate.grad = None  # DistributedDataParallel puts zeros there
        return [caught.get(index, torch.zeros_like(gate)) for index, gate in enumerate(self.gates())]


def _logits(rows: Sequence[Tensor]) -> Tensor:
    """One [r] per site to [n, k], padded with −∞."""
    device = rows[0].device
    return nn.utils.rnn.pad_sequence([row.to(device) for row in rows], batch_first=True, padding_value=-math.inf)


def _probe(now: Moment) -> Probe:
    assert now.probe is not None, "there are validation data, so the run has a probe"
    return now.probe


def _learning_rate(now: Moment) -> float:
    if now.learning_rate is None:
        raise UserError(
            "AutoLoRA needs the learning rate of the step, and the optimizer that holds the adapter was not shown to "
            'it: call run.before_step(optimizer), or use mode="first_order", which needs none'
        )
    return now.learning_rate
