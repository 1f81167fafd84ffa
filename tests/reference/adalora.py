"""The naive twin of AdaLoRA (Zhang et al., ICLR 2023, https://arxiv.org/abs/2303.10512).

Plain and slow on purpose: read it beside the paper. It imports nothing from the package, so that a mistake
has to be made twice to go unnoticed. Symbols are the paper's: W = W0 + s · P Λ Q, triplet i of matrix k is
column i of P_k, value i of Λ_k and row i of Q_k.

Where the published code differs from the paper, both readings are here:

    what                 paper                                    published code ("reference")
    penalty              squared norms, summed                    plain norms, averaged over the 2n factors
    budget schedule      printed formula is wrong (see below)     corrected, other boundaries
    importance           weights before the step                  weights after the step
    selection            the top b                                prunes score <= threshold: ties go together
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

Mask = list[list[bool]]
"""keep[k][i]: triplet i of matrix k is kept."""

Matrix = Sequence[Sequence[float]] | Tensor
Vector = Sequence[float] | Tensor
Number = TypeVar("Number", float, Tensor)


# ---- The budget (equation 14) ----


def budget(
    step: int, start: int, target: int, warmup: int, final_start: int, interval: int = 1, paper: bool = False
) -> tuple[int, bool]:
    """How many triplets may live in `step`, and whether the others are zeroed in it.

    `final_start` is T - t_f. The paper's second and third case begin at t_i and T - t_f themselves
    (`paper=True`), the published code's one step later.

    >>> [budget(t, 216, 144, 10, 70)[0] for t in (0, 10, 11, 12, 20, 30, 40, 50, 60, 70)]
    [216, 216, 212, 209, 185, 165, 153, 146, 144, 144]
    """
    in_warmup = step < warmup if paper else step <= warmup
    in_final = step >= final_start if paper else step > final_start
    if in_warmup:
        return start, False
    if in_final:
        return target, True
    left = 1 - (step - warmup) / (final_start - warmup)
    return int(target + (start - target) * left**3), step % interval == 0


def printed_budget(step: int, start: int, target: int, warmup: int, final: int, total: int) -> float:
    """Equation 14 letter by letter, which is wrong: its numerator also subtracts t_f (here `final`).

    >>> printed_budget(10, start=216, target=144, warmup=10, final=30, total=100)  # above the start!
    387.0
    """
    if step < warmup:
        return start
    if step >= total - final:
        return target
    left = 1 - (step - warmup - final) / (total - warmup - final)
    return target + (start - target) * left**3


# ---- The orthogonality penalty (equation 4) ----


def penalty(P: Sequence[Tensor], Q: Sequence[Tensor], kind: str) -> Tensor:
    """R(P, Q) over all matrices, without γ. P[k] is out × r, Q[k] is r × in. Pruned triplets take part.

    "paper": the sum of ||PᵀP - I||² + ||QQᵀ - I||². "reference": the mean of the 2n norms, not squared.
    """
    distances = []
    for P_k, Q_k in zip(P, Q, strict=True):
        identity = torch.eye(P_k.shape[1], dtype=P_k.dtype)
        distances.append(P_k.T @ P_k - identity)
        distances.append(Q_k @ Q_k.T - identity)
    total = torch.zeros((), dtype=P[0].dtype)
    for distance in distances:
        if kind == "paper":
            total = total + (distance**2).sum()
        elif kind == "reference":
            # `norm` and not `sqrt`: its gradient at zero is zero, that of `sqrt` is not a number.
            total = total + torch.linalg.norm(distance) / len(distances)
        else:
            raise ValueError(f"kind is {kind!r}: it must be 'paper' or 'reference'")
    return total


# ---- The importance (equations 9 to 13) ----


def smooth(I_t: Number, I_bar: Number, U_bar: Number, beta1: float, beta2: float) -> tuple[Number, Number]:
    """One step of the averages of the sensitivity I_t = |w · ∂L/∂w| and of its uncertainty; both start at 0.

    >>> I_bar, U_bar = smooth(1.0, 0.0, 0.0, 0.85, 0.85)
    >>> round(I_bar * U_bar, 6)
    0.019125
    """
    I_bar = beta1 * I_bar + (1 - beta1) * I_t
    U_bar = beta2 * U_bar + (1 - beta2) * abs(I_t - I_bar)  # the average just updated
    return I_bar, U_bar


def triplet_scores(s_P: Matrix, s_lam: Vector, s_Q: Matrix) -> list[float]:
    """S_i = s(λ_i) + the mean of s over column i of P + the mean of s over row i of Q.

    >>> triplet_scores([[1, 0], [1, 4]], [1, 4], [[1, 9], [0, 0]])
    [7.0, 6.0]
    """
    scores = []
    for i in range(len(s_lam)):
        column = [float(s_P[j][i]) for j in range(len(s_P))]
        row = [float(value) for value in s_Q[i]]
        scores.append(float(s_lam[i]) + sum(column) / len(column) + sum(row) / len(row))
    return scores


# ---- The selection (equation 8) ----


def select(scores: list[list[float]], budget: int) -> Mask:
    """Keep the `budget` best of all triplets together; of equals the earlier matrix, then the earlier index.

    NaN counts as -inf: it survives only where the budget has room left after every real score.

    >>> select([[7.0, 6.0], [5.25, 8.0]], 2)
    [[True, False], [False, True]]
    """
    if budget < 0:
        raise ValueError(f"budget is {budget}: it must not be negative")
    ranking = []
    for k in range(len(scores)):
        for i in range(len(scores[k])):
            score = -math.inf if math.isnan(scores[k][i]) else scores[k][i]
            ranking.append((-score, k, i))
    best = {(k, i) for _, k, i in sorted(ranking)[:budget]}
    return [[(k, i) in best for i in range(len(scores[k]))] for k in range(len(scores))]


def select_reference(scores: list[list[float]], budget: int) -> Mask:
    """The published code's rule: prune every score that is <= the (number of scores - budget)-th smallest.

    Equal scores are pruned together, NaN is never pruned (and sorts last), and pruning nothing is an error.

    >>> select_reference([[1.0, 1.0], [1.0, 2.0]], 3)
    [[False, False], [False, True]]
    """
    every = sorted((score for row in scores for score in row), key=lambda score: (math.isnan(score), score))
    number = len(every) - budget
    if not 1 <= number <= len(every):
        raise ValueError(f"budget is {budget}: the reference rule needs 0 <= budget < {len(every)}")
    threshold = every[number - 1]
    return [[not score <= threshold for score in row] for row in scores]


# ---- The loop (algorithm 1) ----


@dataclass
class Site:
    """One adapted matrix; P, lam and Q are trained."""

    W0: Tensor  # out × in, frozen
    P: Tensor  # out × r
    lam: Tensor  # r
    Q: Tensor  # r × in
    scale: float

    def weight(self) -> Tensor:
        return self.W0 + self.scale * self.P @ torch.diag(self.lam) @ self.Q

    def parameters(self) -> list[Tensor]:
        return [self.P, self.lam, self.Q]


def published_start(W0: Tensor, r: int, alpha: float, generator: torch.Generator) -> Site:
    """A site as published: P and Q are N(0, 0.02²), Λ = 0, the scale is α / r for good."""
    P = 0.02 * torch.randn(W0.shape[0], r, generator=generator, dtype=W0.dtype)
    Q = 0.02 * torch.randn(r, W0.shape[1], generator=generator, dtype=W0.dtype)
    lam = torch.zeros(r, dtype=W0.dtype)
    return Site(W0, P.requires_grad_(), lam.requires_grad_(), Q.requires_grad_(), alpha / r)


@dataclass
class Record:
    """What one step did."""

    step: int
    loss: float  # without the penalty
    budget: int
    scores: list[list[float]]  # those the selection would use: frozen from `final_start` on
    kept: Mask | None  # None where nothing was masked


class ReferenceAdaLoRA:
    """AdaLoRA on explicit matrices: `step(loss)` is one turn of algorithm 1, `records` has an entry for each.

    Args:
        sites: the adapted matrices, with P, lam and Q as leaves that require gradients.
        optimizer: makes the optimizer from the parameters, ordered P, lam, Q site by site.
        target: b^(T); the start b^(0) is the number of all triplets.
        warmup: t_i.
        final_start: T - t_f.
        interval: ΔT.
        gamma: weight of the penalty.
        penalty_kind: "paper" or "reference".
        order: "paper" measures importance with the weights the gradient was taken at, "reference" with those
            the optimizer has just moved. The zeroing comes after the optimizer in both.
        importance: "smoothed" (s = Ī · Ū), "sensitivity" (I of this step) or "magnitude" (|λ|).
        beta1: decay of the sensitivity's average.
        beta2: decay of the uncertainty's average.
        rule: `select` or `select_reference`.
        paper_boundaries: the cases of the budget as the paper draws them.
        max_grad_norm: clip the gradients to this norm, over all sites together; importance sees them clipped.
        clip_penalty: whether the penalty's gradient is clipped with the others (as published) or added after.
    """

    def __init__(
        self,
        sites: list[Site],
        optimizer: Callable[[list[Tensor]], Optimizer],
        *,
        target: int,
        warmup: int,
        final_start: int,
        interval: int = 1,
        gamma: float = 0.1,
        penalty_kind: str = "reference",
        order: str = "reference",
        importance: str = "smoothed",
        beta1: float = 0.85,
        beta2: float = 0.85,
        rule: Callable[[list[list[float]], int], Mask] = select,
        paper_boundaries: bool = False,
        max_grad_norm: float | None = None,
        clip_penalty: bool = True,
    ) -> None:
        if order not in ("paper", "reference"):
            raise ValueError(f"order is {order!r}: it must be 'paper' or 'reference'")
        if importance not in ("smoothed", "sensitivity", "magnitude"):
            raise ValueError(f"importance is {importance!r}: it must be smoothed, sensitivity or magnitude")
        self.sites = sites
        self.parameters = [parameter for site in sites for parameter in site.parameters()]
        self.optimizer = optimizer(self.parameters)
        self.start = sum(len(site.lam) for site in sites)
        self.target, self.warmup, self.final_start, self.interval = target, warmup, final_start, interval
        self.gamma, self.penalty_kind = gamma, penalty_kind
        self.order, self.importance, self.rule = order, importance, rule
        self.beta1, self.beta2 = beta1, beta2
        self.paper_boundaries = paper_boundaries
        self.max_grad_norm, self.clip_penalty = max_grad_norm, clip_penalty
        # One entry for each parameter, in the order of `parameters`.
        self.I = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.I_bar = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.U_bar = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.scores = [[0.0] * len(site.lam) for site in sites]
        self.records: list[Record] = []

    def step(self, loss: Callable[[list[Tensor]], Tensor]) -> Record:
        """One step; `loss` maps the effective weights W0 + s · P Λ Q to the task loss."""
        t = len(self.records)
        value = self._gradients(loss)
        b, masks = budget(
            t, self.start, self.target, self.warmup, self.final_start, self.interval, self.paper_boundaries
        )
        if self.order == "paper" and t < self.final_start:
            self._measure()
        self.optimizer.step()
        if self.order == "reference" and t < self.final_start:
            self._measure()
        kept = self.rule(self.scores, b) if masks else None
        if kept is not None:
            self._zero(kept)
        self.records.append(Record(t, value, b, [list(scores) for scores in self.scores], kept))
        return self.records[-1]

    def living(self) -> Mask:
        """Which singular values are not zero now."""
        return [[value != 0 for value in site.lam.tolist()] for site in self.sites]

    def _gradients(self, loss: Callable[[list[Tensor]], Tensor]) -> float:
        """Leave the gradient of loss + γ · penalty in `.grad`."""
        value = loss([site.weight() for site in self.sites])
        of_loss = torch.autograd.grad(value, self.parameters)
        R = penalty([site.P for site in self.sites], [site.Q for site in self.sites], self.penalty_kind)
        of_penalty = torch.autograd.grad(R, self.parameters, materialize_grads=True)  # Λ takes no part: zeros
        for parameter, gradient in zip(self.parameters, of_loss, strict=True):
            parameter.grad = gradient.clone()
        if not self.clip_penalty:
            self._clip()
        for parameter, gradient in zip(self.parameters, of_penalty, strict=True):
            assert parameter.grad is not None
            parameter.grad += self.gamma * gradient
        if self.clip_penalty:
            self._clip()
        return value.item()

    def _clip(self) -> None:
        if self.max_grad_norm is not None:
            clip_grad_norm_(self.parameters, self.max_grad_norm)

    @torch.no_grad()
    def _measure(self) -> None:
        """Sensitivity, averages and triplet scores from the weights and gradients of this moment."""
        s = []
        for n, w in enumerate(self.parameters):
            assert w.grad is not None
            self.I[n] = abs(w * w.grad)
            self.I_bar[n], self.U_bar[n] = smooth(self.I[n], self.I_bar[n], self.U_bar[n], self.beta1, self.beta2)
            s.append(self.I[n] if self.importance == "sensitivity" else self.I_bar[n] * self.U_bar[n])
        for k, site in enumerate(self.sites):
            if self.importance == "magnitude":
                self.scores[k] = [abs(value) for value in site.lam.tolist()]
            else:
                self.scores[k] = triplet_scores(s[3 * k], s[3 * k + 1], s[3 * k + 2])

    @torch.no_grad()
    def _zero(self, kept: Mask) -> None:
        """Prune: Λ only. P, Q and the optimizer's moments stay, so that a triplet can come back."""
        for site, keep in zip(self.sites, kept, strict=True):
            for i in range(len(keep)):
                if not keep[i]:
                    site.lam[i] = 0.0
