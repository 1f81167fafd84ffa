"""Truncation: train at a high rank, then keep the largest singular values of the trained update.

The control for every method that looks at data to find ranks: this one looks at the result alone. At the end each
trained update s · B A = U Σ Vᵀ is decomposed, one threshold on σ for the whole model picks what stays under the budget,
and the truncated factors are written back balanced:

    B ← U_k √(Σ_k / s),      A ← √(Σ_k / s) V_kᵀ        so that  s · B A = U_k Σ_k V_kᵀ

By Eckart and Young (1936) that is the best approximation of its rank for every module, and for a budget in ranks the
global threshold makes Σ ‖ΔW − ΔW_k‖²_F over all modules as small as any choice of ranks can.

For a budget in parameters the value of a rank is σ² per parameter it costs, σ² / (in + out), in that order as long as
ranks fit: the usual approximation of the knapsack. Errors of different modules are compared as they are, without data;
a module whose inputs are small counts as much as any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loralloc.allocate import keep_top, keep_within
from loralloc.budget import Budget, ConstantSchedule
from loralloc.gating import Site
from loralloc.methods.base import Decision, Moment, agree
from loralloc.methods.guards import check_capacity
from loralloc.scores import factor_svd


@dataclass(frozen=True)
class Truncate:
    """Train every rank of `LoraConfig.r`, and keep the largest singular values at the end.

    The scale is lora_alpha / `LoraConfig.r`, as for the methods that prune.

    Attributes:
        budget: What the final adapter may cost.
    """

    id: ClassVar[str] = "truncate"

    budget: Budget

    @property
    def compacts(self) -> bool:
        """No: no rank is closed while training."""
        return False

    def schedule(self, total_steps: int, start: int, target: int) -> ConstantSchedule:
        """Return the start throughout: ranks are chosen when the run ends."""
        return ConstantSchedule(total_steps, start, target, final=total_steps - 1)

    # The five verbs.

    def prepare(self, sites: Sequence[Site]) -> Sequence[Site]:
        """Leave the adapter as it is.

        Raises:
            UserError: A module has more ranks than dimensions, and so fewer singular values than ranks.
        """
        check_capacity(sites, "there are no more singular values than that")
        for site in sites:
            site.freeze_gate()
        return sites

    def on_gradients(self, state: Sequence[Site], now: Moment) -> None:
        """Nothing to do."""
        del state, now

    def on_step(self, state: Sequence[Site], now: Moment) -> Decision | None:
        """Decide nothing yet."""
        del state, now

    def finish(self, state: Sequence[Site], target: int) -> Tensor:
        """Replace every update by its best approximation under the budget."""
        parts = decompose([(site.A.detach(), site.B.detach() * site.scaling) for site in state])
        keep = agree(select([sigma for _, sigma, _ in parts], [site.cost for site in state], self.budget, target))
        keep = keep.cpu()
        for site, part, kept in zip(state, parts, keep.split([site.rank for site in state]), strict=True):
            A, B = balanced(*part)
            site.A.copy_(A * kept.to(A)[:, None] / site.scaling**0.5)
            site.B.copy_(B * kept.to(B) / site.scaling**0.5)
            site.set_scale(kept.to(site.gate.device))
        return keep

    def state_dict(self, state: Sequence[Site]) -> dict[str, Tensor]:
        """Nothing: the singular values are those of the weights."""
        del state
        return {}

    def load_state_dict(self, state: Sequence[Site], tensors: Mapping[str, Tensor]) -> None:
        """Nothing to restore."""
        del state, tensors

    def resized(self, state: Sequence[Site]) -> None:
        """Nothing to do: no rank leaves the tensors."""
        del state


Part = tuple[Tensor, Tensor, Tensor]
"""The decomposition of one update: U [out, k], its k singular values, V [in, k]."""


@torch.no_grad()
def decompose(factors: Sequence[tuple[Tensor, Tensor]]) -> list[Part]:
    """Decompose the updates B A of pairs (A [r, in], B [out, r]), equal shapes together, in float32 or wider."""
    groups: dict[tuple[torch.Size, torch.Size, torch.device], list[int]] = {}
    for index, (A, B) in enumerate(factors):
        groups.setdefault((A.shape, B.shape, A.device), []).append(index)
    parts: dict[int, Part] = {}
    for members in groups.values():
        A, B = (torch.stack([factors[index][which] for index in members]) for which in (0, 1))
        parts |= dict(zip(members, zip(*factor_svd(A, B), strict=True), strict=True))  # type: ignore[arg-type]
    return [parts[index] for index in range(len(factors))]


def select(values: Sequence[Tensor], costs: Sequence[int], budget: Budget, target: int) -> Tensor:
    """Choose singular values under one threshold for all modules.

    Args:
        values: Singular values of each module, [k], from large to small.
        costs: Parameters of one rank of each module, in + out.
        budget: Only its unit counts here.
        target: The budget in that unit.

    Returns:
        Boolean [R], the modules one after the other; of each module the first ones.
    """
    sigma = torch.cat([value.to(values[0].device) for value in values])
    if budget.unit == "ranks":
        return keep_top(sigma, target)
    counts = torch.tensor([len(value) for value in values])
    cost = torch.tensor(costs).repeat_interleave(counts)
    return keep_within(sigma.double().square() / cost.to(sigma.device), cost, target)


def balanced(U: Tensor, sigma: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """Return A = √Σ Vᵀ [k, in] and B = U √Σ [out, k].

    A direction with σ = 0 stays in A, with a zero in B: a rank that adds nothing is still a rank.
    """
    root = sigma.sqrt()
    return (torch.where(root > 0, root, 1.0) * V).T, U * root
