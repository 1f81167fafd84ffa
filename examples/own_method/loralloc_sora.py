"""SoRA: Sparse Low-rank Adaptation of Pre-trained Language Models (EMNLP 2023, arXiv 2311.11696).

Each rank of the update has a gate, and the gates have an L1 penalty with the weight λ beside the loss L,

    W = W⁰ + s · B diag(g) A          g: [r] = gate          minimise L + λ Σ |g|

The penalty is not differentiated. A step of the optimizer on L alone is followed by a proximal step, which shrinks the
gates and leaves exact zeros (η is the learning rate of the step):

    g ← T_ηλ(g − η ∇_g L)             T_x(g) = sign(g) · max(|g| − x, 0)

A gate of 0 still has a gradient, so that a rank can come back while there is training. At the end ranks whose gate is 0
are closed. λ alone says how many those are: there is no budget.

Where we deviate, and why:

* Start: g = 1, so that a run starts where LoRA does and its learning rate serves. The public code draws g ~ N(0, 1).
* Optimizer: the one that trains A and B trains g too, with its moments and its weight decay. The public code has one
  for the gates alone, an AdamW without weight decay and with a learning rate of its own.
* Threshold: ηλ, as in the paper. The public code has a constant that does not follow the learning rate, and its three
  lines see each other's results, so that gates below two thresholds become 0 as well.
* Schedule: λ is constant. The paper's Algorithm 1 raises it in rounds, to see many sparsities in one run.
* Budget: not in the paper. With one, the largest |g| of all modules stay at the end, or those that add up to most where
  ranks differ in cost; where fewer are left than it allows, ranks with a gate of 0 fill it up, and λ is too large for
  it.
* A module may end with no rank. Where all gates of the model are 0 the adapter adds nothing: that is refused at once.

A gate falls by λ · Σ η over a run, and under Adam its gradients move it by at most about Σ η: ranks close where λ · Σ η
is about 1. That is λ ≈ 2 / (steps · learning rate) with a rate that falls linearly to 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from loralloc.allocate import select
from loralloc.budget import Budget
from loralloc.errors import UserError
from loralloc.gating import Site
from loralloc.methods.base import Decision, Method, StepContext, agree, modules_of
from loralloc.schedule import CutSchedule


@dataclass(frozen=True)
class SoRA(Method):
    """Shrink the gates of all ranks by an L1 penalty, and close those that are 0 at the end.

    `LoraConfig.r` is the rank at the start, everywhere.

    Raises:
        UserError: The penalty is not above 0.
    """

    id: ClassVar[str] = "sora"
    label: ClassVar[str] = "SoRA"
    paper: ClassVar[str] = "arXiv 2311.11696"

    penalty: Annotated[
        float, Field(gt=0, description="λ, the weight of the gates' L1 norm; about 2 / (steps * learning rate)")
    ]
    budget: Annotated[
        Budget | None, Field(description="null: every rank whose gate is not 0 stays; or the largest under a budget")
    ] = None

    def schedule(self, total_steps: int, start: int, target: int) -> CutSchedule:
        """Return all ranks over the run: which of them stay is known when it ends."""
        return CutSchedule(total_steps, start, target, cut=total_steps)

    # The course of a run.

    def prepare(self, sites: Sequence[Site]) -> SoRAState:
        """Leave the adapter as it is, and its gates at 1."""
        return SoRAState(sites)

    def on_step(self, state: SoRAState, now: StepContext) -> Decision | None:
        """Make the proximal step after the optimizer's, g − η ∇_g L, and tell which gates are not 0.

        Raises:
            UserError: η is not known, or all gates are 0.
        """
        if now.skipped:
            return None
        if now.learning_rate is None:
            raise UserError(
                "SoRA needs the learning rate of the step, and the optimizer that holds the adapter was not shown to "
                "it: call run.after_step(optimizer)"
            )
        # g ← T_ηλ(g)
        for site in state.sites:
            site.gate.copy_(soft_threshold(site.gate, now.learning_rate * self.penalty))
        # A rank takes part while its gate is not 0.
        kept = state.sizes() > 0
        if not kept.any():
            raise UserError(
                f"SoRA has closed every rank at step {now.step} of {now.schedule.total_steps}: the adapter adds "
                f"nothing any more; lower penalty={self.penalty:g} (method.penalty in a recipe)"
            )
        return Decision(kept, now.schedule.budget(now.step), frozen=False)

    def finish(self, state: SoRAState, target: int) -> Tensor:
        """Close the ranks whose gate is 0, or all but the largest gates under the budget; return those that stay."""
        sizes = state.sizes()
        if self.budget is None:
            kept = agree(sizes > 0)
        else:
            kept = agree(select(sizes, self.budget, modules_of(state.sites), target))
        for site, open_ranks in zip(state.sites, kept.split([site.rank for site in state.sites]), strict=True):
            site.set_scale(open_ranks.to(site.gate.device))
        return kept


@dataclass(eq=False)
class SoRAState:
    """What changes during a run; the gates come with the model.

    Attributes:
        sites: The gated layers.
    """

    sites: Sequence[Site]

    def sizes(self) -> Tensor:
        """|g| of all ranks, [R], on the device of the first site."""
        device = self.sites[0].gate.device
        return torch.cat([site.gate.detach().abs().to(device) for site in self.sites])


def soft_threshold(g: Tensor, x: float) -> Tensor:
    """Return T_x(g) = sign(g) · max(|g| − x, 0).

    >>> soft_threshold(torch.tensor([3.0, -3.0, 0.5]), 1.0).tolist()
    [2.0, -2.0, 0.0]
    """
    return g.sign() * (g.abs() - x).clamp(min=0)
