"""The updates of torch's optimizers at a given age, for ranks that are younger than their parameter.

An optimizer counts steps once for a whole parameter, and uses the count to correct the bias of moments that start at 0.
If the count enters the update, the update is written here as a function of each rank's own age; if it does not, nothing
has to be corrected. This holds for exactly these classes: a subclass may do anything else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loralloc.methods.guards import gradients_gone, is_cleared

Group = Mapping[str, Any]

EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Rows:
    """Some ranks of one parameter in one step: rows (`dim` 0), columns (`dim` 1), or entries.

    Attributes:
        old: Their values before the step.
        parameter: The parameter, with the step's gradient.
        state: The optimizer's state of the parameter, after the step.
        group: The parameter's group, as in the step.
        chosen: Which ranks, int64.
        version: The gradient's `_version` before the step.
        age: Steps that each of them has taken, this one included.
        dim: The dimension along which ranks lie.
    """

    old: Tensor
    parameter: Tensor
    state: Mapping[str, Any]
    group: Group
    chosen: Tensor
    version: int
    age: Tensor
    dim: int

    def of(self, name: str) -> Tensor:
        """A moment of these ranks."""
        return self.state[name].index_select(self.dim, self.chosen)

    def wide(self, per_rank: Tensor) -> Tensor:
        """One number per rank, shaped to broadcast over the values; in their precision, but fp32 at least."""
        shape = (-1,) if self.old.dim() == 1 else (-1, 1) if self.dim == 0 else (1, -1)
        return per_rank.to(torch.promote_types(self.old.dtype, torch.float32)).view(shape)

    def power(self, beta: Any) -> Tensor:
        """β to the age, float64."""
        return torch.as_tensor(beta, dtype=torch.float64, device=self.age.device) ** self.age

    def missing(self, beta: Any) -> Tensor:
        """1 − βᵏ at each rank's age: the bias correction of moments that started at 0."""
        return self.wide(1 - self.power(beta))

    @property
    def rate(self) -> float:
        """The learning rate."""
        return float(self.group["lr"])

    def decayed(self) -> Tensor:
        """The old values after decoupled weight decay; the other kind is part of the gradient."""
        decay = self.group["weight_decay"] if self.group.get("decoupled_weight_decay", False) else 0.0
        return self.old * (1 - self.rate * decay)

    def gradient(self) -> Tensor:
        """The gradient as it entered the moments.

        Raises:
            UserError: It has been cleared already.
        """
        if self.parameter.grad is None or is_cleared(self.parameter, self.version):
            raise gradients_gone("the step of new ranks is computed again from its gradients")
        found = self.parameter.grad.index_select(self.dim, self.chosen)
        found = -found if self.group["maximize"] else found
        coupled = not self.group.get("decoupled_weight_decay", False)
        return found + self.group["weight_decay"] * self.old if coupled else found


def _adam(rows: Rows) -> Tensor:
    """θ ← (1 − lr · wd) θ₀ − lr / (1 − β₁ᵏ) · m / (√(v / (1 − β₂ᵏ)) + eps)."""
    beta1, beta2 = rows.group["betas"]
    m = rows.of("exp_avg") / rows.missing(beta1)
    v = rows.of("max_exp_avg_sq" if rows.group["amsgrad"] else "exp_avg_sq") / rows.missing(beta2)
    return rows.decayed() - rows.rate * (m / (v.sqrt() + rows.group["eps"]))


def _adamax(rows: Rows) -> Tensor:
    """θ ← θ₀ − lr / (1 − β₁ᵏ) · m / u."""
    return rows.old - rows.rate * (rows.of("exp_avg") / rows.missing(rows.group["betas"][0]) / rows.of("exp_inf"))


def _nadam(rows: Rows) -> Tensor:
    """θ ← (1 − lr · wd) θ₀ − lr · [(1 − μₖ) / (1 − Πμ) · g + μₖ₊₁ / (1 − Πμ · μₖ₊₁) · m] / (√(v / (1 − β₂ᵏ)) + eps)."""
    beta1, beta2 = rows.group["betas"]
    steps = torch.arange(1, int(rows.age.max()) + 2, dtype=torch.float64, device=rows.age.device)
    mu = beta1 * (1 - 0.5 * 0.96 ** (steps * rows.group["momentum_decay"]))
    product = mu.cumprod(0)
    now, following = mu[rows.age - 1], mu[rows.age]
    of_gradient = rows.wide((1 - now) / (1 - product[rows.age - 1]))
    of_moment = rows.wide(following / (1 - product[rows.age]))
    root = (rows.of("exp_avg_sq") / rows.missing(beta2)).sqrt() + rows.group["eps"]
    step = (of_gradient * rows.gradient() + of_moment * rows.of("exp_avg")) / root
    return rows.decayed() - rows.rate * step


def _radam(rows: Rows) -> Tensor:
    """θ ← (1 − lr · wd) θ₀ − lr · m / (1 − β₁ᵏ) · c, with c = r √(1 − β₂ᵏ) / (√v + eps) where ρₖ > 5, else 1."""
    beta1, beta2 = rows.group["betas"]
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * rows.age * rows.power(beta2) / (1 - rows.power(beta2))
    ratio = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    rectification = rows.wide((ratio.clamp(min=0) * (1 - rows.power(beta2))).sqrt())
    adapted = rectification / (rows.of("exp_avg_sq").sqrt() + rows.group["eps"])
    factor = torch.where(rows.wide((length > 5).double()) > 0, adapted, 1.0)
    return rows.decayed() - rows.rate * (rows.of("exp_avg") / rows.missing(beta1) * factor)


def _forgotten(group: Group, age: int) -> bool:
    """Whether k · βᵏ (the age k is a factor in RAdam) is negligible beside 1 in fp32."""
    return age * max(group["betas"]) ** age < EPS


@dataclass(frozen=True)
class Rule:
    """How an optimizer treats ranks that are younger than their parameter.

    Attributes:
        update: The values of ranks after a step at their own age; None where the age does not matter.
        outgrown: Whether a rank is so old that its age no longer matters.
        refused: Why a setting makes new ranks start wrongly; None if none does.
    """

    update: Callable[[Rows], Tensor] | None = None
    outgrown: Callable[[Group, int], bool] = _forgotten
    refused: Callable[[Group], str | None] = lambda group: None


def _dampened(group: Group) -> str | None:
    if group["momentum"] and group["dampening"]:
        return f"dampening={group['dampening']:g} is skipped for a parameter's first gradient, but not for a new rank's"
    return None


def _annealed(group: Group) -> str | None:
    if group["lr_decay"]:
        return f"lr_decay={group['lr_decay']:g} follows the steps of a whole parameter"
    if group["initial_accumulator_value"]:
        return f"initial_accumulator_value={group['initial_accumulator_value']:g}, but a new rank's sum starts at 0"
    return None


_ADAM = Rule(_adam, lambda group, age: max(group["betas"]) ** age < EPS)

RULES: Mapping[type, Rule] = {
    torch.optim.Adam: _ADAM,
    torch.optim.AdamW: _ADAM,
    torch.optim.Adamax: Rule(_adamax),
    torch.optim.NAdam: Rule(_nadam, lambda group, age: 0.96 ** (age * group["momentum_decay"]) < EPS),
    torch.optim.RAdam: Rule(_radam),
    torch.optim.SGD: Rule(refused=_dampened),
    torch.optim.RMSprop: Rule(),
    torch.optim.Adadelta: Rule(),
    torch.optim.Adagrad: Rule(refused=_annealed),
}
"""The optimizers of torch whose update is known, by their exact class."""
