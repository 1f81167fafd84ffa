"""Truncation: train at a high rank, then keep the largest singular values of the trained update.

The control for every method that looks at data to find ranks: this one looks at the result alone. At the end each
trained update s · B A = U Σ Vᵀ is decomposed, one threshold on σ for the whole model picks what stays under the budget,
and the truncated factors are written back balanced:

    B ← U_k √(Σ_k / s),      A ← √(Σ_k / s) V_kᵀ        so that  s · B A = U_k Σ_k V_kᵀ

By Eckart and Young (1936) that is the best approximation of its rank for every module, and for a budget in ranks the
global threshold makes Σ ‖ΔW − ΔW_k‖²_F over all modules as small as any choice of ranks can.

For a budget in parameters or bytes a rank is worth σ², what it adds to the squared norm, and the sum of what is kept is
as large as the budget allows (`knapsack`): the same error is made as small as it can be. Errors of different modules
are compared as they are, without data; a module whose inputs are small counts as much as any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loralloc.allocate import select
from loralloc.budget import Budget, Modules
from loralloc.gating import Site
from loralloc.methods.base import Method, agree, modules_of
from loralloc.methods.guards import check_capacity
from loralloc.schedule import ConstantSchedule


@dataclass(frozen=True)
class Truncate(Method):
    """Train every rank of `LoraConfig.r`, and keep the largest singular values at the end.

    The scale is lora_alpha / `LoraConfig.r`, as for the methods that prune.
    """

    id: ClassVar[str] = "truncate"
    label: ClassVar[str] = "truncation"

    budget: Budget

    def schedule(self, total_steps: int, start: int, target: int) -> ConstantSchedule:
        """Return the start throughout: ranks are chosen when the run ends."""
        return ConstantSchedule(total_steps, start, target, chosen_at_end=True)

    # The course of a run.

    def prepare(self, sites: Sequence[Site]) -> Sequence[Site]:
        """Leave the adapter as it is.

        Raises:
            UserError: A module has more ranks than dimensions, and so fewer singular values than ranks.
        """
        check_capacity(sites, "there are no more singular values than that")
        for site in sites:
            site.freeze_gate()
        return sites

    def finish(self, state: Sequence[Site], target: int) -> Tensor:
        """Replace every update by its best approximation under the budget."""
        parts = decompose([(site.A.detach(), site.B.detach() * site.scaling) for site in state])
        values = [sigma for _, sigma, _ in parts]
        keep = agree(keep_largest(values, self.budget, modules_of(state), target)).cpu()
        for site, part, kept in zip(state, parts, keep.split([site.rank for site in state]), strict=True):
            A, B = balanced(*part)
            site.A.copy_(A * kept.to(A)[:, None] / site.scaling**0.5)
            site.B.copy_(B * kept.to(B) / site.scaling**0.5)
            site.set_scale(kept.to(site.gate.device))
        return keep


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


def keep_largest(values: Sequence[Tensor], budget: Budget, modules: Modules, target: int) -> Tensor:
    """Choose singular values under one budget for all modules; where ranks cost the same, under one threshold.

    Args:
        values: Singular values of each module, [k], from large to small.
        budget: What may be kept.
        modules: The modules, with as many ranks as singular values.
        target: What the budget comes to.

    Returns:
        Boolean [R], the modules one after the other; of each module the first ones.
    """
    sigma = torch.cat([value.to(values[0].device) for value in values])
    return select(sigma.double().square(), budget, modules, target)


def balanced(U: Tensor, sigma: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """Return A = √Σ Vᵀ [k, in] and B = U √Σ [out, k].

    A direction with σ = 0 stays in A, with a zero in B: a rank that adds nothing is still a rank.
    """
    root = sigma.sqrt()
    return (torch.where(root > 0, root, 1.0) * V).T, U * root


def factor_svd(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular value decomposition of B A without forming it: [n, r, in], [n, out, r] -> (U, σ, V).

    With QR factorisations B = Q_B R_B and Aᵀ = Q_A R_A, that of the small core R_B R_Aᵀ = u σ vᵀ gives U = Q_B u and
    V = Q_A v. Computed in the dtype of the factors, float32 or wider.

    Returns:
        U [n, out, k], σ [n, k] from large to small, V [n, in, k], with k = min(r, in, out).
    """
    dtype = torch.promote_types(A.dtype, torch.float32)
    Q_B, R_B = torch.linalg.qr(B.to(dtype))
    Q_A, R_A = torch.linalg.qr(A.to(dtype).mT)
    u, sigma, v = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    return Q_B @ u, sigma, Q_A @ v.mT
