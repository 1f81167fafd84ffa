"""What an AdaLoRA run remembers between steps, in stacks of equal shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from loralloc.budget import Modules
from loralloc.gating import Site
from loralloc.methods.base import split_by_site

Parity = Literal["adam", "sgd"]

Symbol = Literal["A", "B", "gate"]

PUBLISHED_STD = 0.02

_RANK_DIMS: dict[Symbol, int] = {"A": 1, "B": 2, "gate": 1}


@dataclass(eq=False)
class Stack:
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
        weights = self._stacked([*self.parameters])
        if self.mean.device != weights.device:  # the model was moved after attaching
            for name in ("mean", "uncertainty", "positions"):
                setattr(self, name, getattr(self, name).to(weights.device))
            self.open = None if self.open is None else self.open.to(weights.device)
        return weights

    def gradients(self) -> Tensor:
        """Stack the gradients; a parameter that took no part in the step has none and counts as zero."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        return self._stacked(gradients)

    def _stacked(self, tensors: list[Tensor]) -> Tensor:
        """As `torch.stack`, without its view of every tensor: for many small ones, these take longer than the copy."""
        return torch.cat(tensors).view(self.mean.shape).to(self.mean.dtype)

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
        modules: What the budget must know of them, at the start.
        final: The final selection, boolean [R]; None until it is made.
        measure_after_step: Whether the current step's sensitivities are still to be measured (order `reference`).
        gradients: The parameters that had a gradient before the current step, and its version (see `is_cleared`).
        compact: Whether closed triplets are out of the tensors; their scores have gone with them.
    """

    sites: Sequence[Site]
    stacks: Sequence[Stack]
    modules: Modules
    final: Tensor | None = None
    measure_after_step: bool = False
    gradients: Sequence[tuple[Tensor, int]] = ()
    compact: bool = False

    @torch.no_grad()
    def flat_gates(self) -> Tensor:
        """All λ, [R], on the device of the first site."""
        device = self.sites[0].gate.device
        return torch.cat([site.gate.to(device) for site in self.sites])

    def versions(self) -> list[tuple[Tensor, int]]:
        """The parameters that have a gradient, and its version."""
        parameters = (parameter for stack in self.stacks for parameter in stack.parameters)
        return [(p, p.grad._version) for p in parameters if p.grad is not None]

    @torch.no_grad()
    def zero_gates(self, keep: Tensor) -> None:
        """λ ← 0 outside `keep`. P, Q and the optimizer's moments stay as they are."""
        gates = self.flat_gates()
        torch._foreach_copy_(
            [site.gate for site in self.sites],
            split_by_site(torch.where(keep.to(gates.device), gates, torch.zeros_like(gates)), self.sites),
        )


def stacks_of(sites: Sequence[Site]) -> list[Stack]:
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
            stacks.append(Stack(symbol, rank_dim, parameters, positions, None, zeros, zeros.clone()))
    return stacks


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


@torch.no_grad()
def initialise(site: Site, parity: Parity | None) -> None:
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
