"""The selection variables of an AutoLoRA search, their Adam, and the plan they amount to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loralloc.gating import Site
from loralloc.methods.base import split_by_site


@dataclass(frozen=True)
class Before:
    """What the gradient after a step needs from before it.

    Attributes:
        rate: η.
        weights: W.
        gates: ∂L_tr/∂gates at W, on this process.
    """

    rate: float
    weights: list[Tensor]
    gates: list[Tensor]


def keep_uniform_share(shares: Tensor, tolerance: float = 1e-5) -> Tensor:
    """Keep, in each row, the entries with at least an equal share: αⱼ ≥ 1/k (AutoLoRA).

    The largest entry of a row always stays, whatever the rounding of the sum; if all are equal, all of them stay.

    Args:
        shares: [n, k], rows sum to 1. A row that is shorter than the others is padded with −1.
        tolerance: Relative: an equal share that rounding has put below 1/k stays.

    Returns:
        Boolean [n, k], False where a row is padded.

    >>> keep_uniform_share(torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.5, -1.0]])).tolist()
    [[True, False, False], [True, True, False]]
    """
    comparable = torch.where(shares.isnan(), -torch.inf, shares)
    size = (comparable != -1).sum(1, keepdim=True)
    keep = comparable * size >= 1 - tolerance
    return keep.scatter(1, comparable.argmax(1, keepdim=True), True)


def softmax_gradient(shares: Tensor, gradient: Tensor) -> Tensor:
    """Gradient of the logits from that of α = softmax(β): (diag(α) − α αᵀ) ∂L/∂α, for every row of [n, k].

    >>> softmax_gradient(torch.tensor([[0.5, 0.5]]), torch.tensor([[3.0, 1.0]]))  # ¼ (g₁ − g₂) (1, −1)
    tensor([[ 0.5000, -0.5000]])
    """
    weighted = shares * gradient
    return weighted - shares * weighted.sum(1, keepdim=True)


@dataclass(eq=False)
class AutoLoRAState:
    """What changes during a run. Rows of [n, k] belong to sites; shorter ones are padded with logits of −∞.

    Attributes:
        sites: The gated layers.
        logits: β, [n, k].
        before: What `on_gradients` has noted for `on_step` of the same step; None at other times.
        sound: Whether the current step's gradient was finite; False between steps.
        updates: Steps that the logits have taken.
        skipped: Steps that they have not taken because their gradient was not finite.
        planned: The plan at the last check, boolean [R].
        unchanged: Consecutive checks at which the plan was the same as before.
        settled: Whether the plan has settled, so that the logits stay as they are.
        steps: Steps of this process in which there was something to compare (`replay`).
    """

    sites: Sequence[Site]
    logits: Tensor
    before: Before | None = None
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

    @torch.no_grad()
    def write_gates(self) -> None:
        """Set gate = softmax(β)."""
        torch._foreach_copy_(self.gates(), split_by_site(self.shares()[self.real], self.sites))

    def watch(self) -> None:
        """Move the gates' gradients out of `.grad` as they arrive.

        An optimizer skips a parameter without a gradient, weight decay included. Clipping must neither count nor scale
        these gradients either: the difference between them and recomputed ones would amplify the factor.
        """

        def catch(index: int, gate: Tensor) -> None:
            gradient, gate.grad = gate.grad, None
            assert gradient is not None
            before = self._caught.get(index)
            self._caught[index] = gradient if before is None else before + gradient

        for index, gate in enumerate(self.gates()):
            self._hooks.append(gate.register_post_accumulate_grad_hook(lambda gate, i=index: catch(i, gate)))

    def unwatch(self) -> None:
        """Remove the hooks of `watch`."""
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


def pad_rows(rows: Sequence[Tensor]) -> Tensor:
    """One [r] per site to [n, k], padded with −∞."""
    device = rows[0].device
    return nn.utils.rnn.pad_sequence([row.to(device) for row in rows], batch_first=True, padding_value=-math.inf)
