"""Truncation: train at a high rank, keep the largest singular values of the trained update, and let them recover.

The control for every method that looks at data to find ranks: this one looks at the result alone, with no scores and no
penalty. After a share of the steps each trained update s · B A = U Σ Vᵀ is decomposed, one threshold on σ for the whole
model picks what stays under the budget, and the truncated factors are written back balanced:

    B ← U_k √(Σ_k / s),      A ← √(Σ_k / s) V_kᵀ        so that  s · B A = U_k Σ_k V_kᵀ

By Eckart and Young (1936) that is the best approximation of its rank for every module, and for a budget in ranks the
global threshold makes Σ ‖ΔW − ΔW_k‖²_F over all modules as small as any choice of ranks can.

For a budget in parameters or bytes a rank is worth σ², what it adds to the squared norm, and the sum of what is kept is
as large as the budget allows (`knapsack`): the same error is made as small as it can be. Errors of different modules
are compared as they are, without data; a module whose inputs are small counts as much as any other.

Small errors of the weights may be large errors of the loss, so the rest of the run trains what was kept (`recover`).
The optimizer starts anew with the new factors, and its learning rate rises once more over a tenth of these steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from loralloc.allocate import select
from loralloc.budget import Budget, Modules
from loralloc.errors import UserError
from loralloc.gating import Site
from loralloc.methods.base import Decision, Method, StepContext, agree, modules_of, split_by_site
from loralloc.methods.guards import check_capacity
from loralloc.schedule import CutSchedule, phase_steps
from loralloc.setting_types import Phase, is_number

WARM_UP = 0.1
"""Share of the recovery in which the learning rate rises."""


@dataclass(eq=False)
class TruncateState:
    """The gated layers, and the ranks that were kept, boolean [R]; None before the cut."""

    sites: Sequence[Site]
    kept: Tensor | None = None


@dataclass(frozen=True)
class Truncate(Method):
    """Train every rank of `LoraConfig.r`, keep the largest singular values, and train these to the end.

    The scale is lora_alpha / `LoraConfig.r`, as for AdaLoRA.

    Raises:
        UserError: A setting is out of its range.
    """

    id: ClassVar[str] = "truncate"
    label: ClassVar[str] = "truncation"

    budget: Budget
    recover: Annotated[
        Phase,
        Field(description="train what is kept, after the cut: fraction of the run, or steps; 0 cuts at the end"),
    ] = 0.6

    @property
    def compacts(self) -> bool:
        """After the cut, where it is not at the end."""
        return self.recover > 0

    @property
    def restarts(self) -> bool:
        """At the cut, where it is not at the end."""
        return self.recover > 0

    @classmethod
    def broken_rules(cls, value: Callable[..., Any]) -> Iterator[tuple[tuple[str, ...], str]]:
        """All ranks must be trained for a step at least."""
        recover, steps = value("method", "recover"), value("training", "steps")
        if isinstance(recover, int) and is_number(steps) and recover >= steps:
            key = ("method", "recover")
            yield (
                key,
                f"method.recover is {recover} of {steps} steps: keep it below, so that all ranks are trained first",
            )

    def schedule(self, total_steps: int, start: int, target: int) -> CutSchedule:
        """Return all ranks up to the cut, and the budget after it.

        Raises:
            UserError: No step is left before the cut.
        """
        recovery = phase_steps("recover", self.recover, total_steps)
        if recovery >= total_steps:
            raise UserError(
                f"no step is left in which all ranks are trained: recover={self.recover} ({recovery} steps) fills the "
                f"{total_steps} steps of the run"
            )
        return CutSchedule(total_steps, start, target, cut=total_steps - recovery)

    # The course of a run.

    def prepare(self, sites: Sequence[Site]) -> TruncateState:
        """Leave the adapter as it is.

        Raises:
            UserError: A module has more ranks than dimensions, and so fewer singular values than ranks.
        """
        check_capacity(sites, "there are no more singular values than that")
        for site in sites:
            site.freeze_gate()
        return TruncateState(sites)

    def on_step(self, state: TruncateState, now: StepContext) -> Decision | None:
        """Cut when the schedule says so."""
        assert isinstance(now.schedule, CutSchedule)
        if not now.schedule.cuts_after(now.step):
            return None
        keep = self._cut(state, now.schedule.target)
        warmup = int(WARM_UP * (now.schedule.total_steps - now.schedule.cut))
        return Decision(keep, now.schedule.target, frozen=True, closed=~keep, warmup=warmup)

    def finish(self, state: TruncateState, target: int) -> Tensor:
        """Cut if that has not happened yet (`recover` is 0, or the run stops early); return the kept ranks."""
        return self._cut(state, target) if state.kept is None else state.kept

    def state_dict(self, state: TruncateState) -> dict[str, Tensor]:
        """The kept ranks, once there has been a cut."""
        return {} if state.kept is None else {"kept": state.kept}

    def load_state_dict(self, state: TruncateState, tensors: Mapping[str, Tensor]) -> None:
        """Restore them, and close the others; before the cut, all ranks are open."""
        everything = torch.ones(sum(site.rank for site in state.sites), dtype=torch.bool)
        self._close(state, tensors.get("kept", everything))
        if "kept" not in tensors:
            state.kept = None

    def _cut(self, state: TruncateState, target: int) -> Tensor:
        """Replace every update by its best approximation under the budget, the same in all processes."""
        sites = state.sites
        parts = decompose([(site.A.detach(), site.B.detach() * site.scaling) for site in sites])
        values = [sigma for _, sigma, _ in parts]
        keep = agree(keep_largest(values, self.budget, modules_of(sites), target)).cpu()
        for site, part, kept in zip(sites, parts, keep.split([site.rank for site in sites]), strict=True):
            A, B = balanced(*part)
            site.A.copy_(agree(A * kept.to(A)[:, None] / site.scaling**0.5))
            site.B.copy_(agree(B * kept.to(B) / site.scaling**0.5))
        return self._close(state, keep)

    def _close(self, state: TruncateState, keep: Tensor) -> Tensor:
        """Let only these ranks take part in the model, from now on; returns them."""
        state.kept = keep.cpu()
        for site, kept in zip(state.sites, split_by_site(state.kept, state.sites), strict=True):
            site.set_scale(kept)
        return state.kept


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
