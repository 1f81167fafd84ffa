"""ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws (arXiv 2410.09692).

Plain LoRA without dropout and without a scaling factor, in which the gradient of each row i of the update is divided by
the square root of that row's norm:

    W = W⁰ + B A,      ∂L/∂(BA)_i ← s_i · ∂L/∂(BA)_i,      s_i = 1 / √(‖(BA)_i‖ + 1/η²)

For A and B that means  ∂B = S G Aᵀ  and  ∂A = Bᵀ S G  with G = ∂L/∂(BA) and S = diag(s). The gradient that flows to
lower layers is not scaled, and s is a constant to autograd.

Where we deviate, and why:

* Row norms come from r×r matrices (`rows.row_norms`); BA is never formed. s depends on the weights alone, so it is
  computed once per optimizer step for all layers together, not in every forward pass as in the paper's listing.
* Exactness: A's gradient cannot be made from plain LoRA's, because S stands inside a sum over rows. The scaling is in
  the kernel's backward pass, before accumulation, averaging over processes and clipping.
* Optimizer: the paper does not name one. Adam's step does not change when a row's gradient is scaled by a constant, so
  under Adam η hardly matters and a larger η makes training *slower*; `paper` warns once. We add two modes:

      hybrid   gradients scaled by s/η, and the step of A and B multiplied by η. With SGD this is the paper's method,
               except that weight decay and AdaLoRA's penalty, which are not scaled by s/η, count η-fold. With Adam it
               is, at first, LoRA at the learning rate η · lr (also for decoupled weight decay, a part of the step)
      post     gradients unscaled; then the step of B's row i is multiplied by s_i, and that of A by the mean
               s̄ = ‖S B‖_F / ‖B‖_F  (η while B = 0)

  The fair baseline of all three is plain LoRA at the learning rate η · lr.
* Budget: the paper has none. `allocate=` takes a method that has one and that decides ranks and schedule; the rows are
  then those of the gated product s · B diag(g) A. Gates are trained with their plain gradient and step. Scores from
  gradients of A and B (AdaLoRA's) use the row-scaled gradients, or in `post` unscaled ones. AutoLoRA is refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from loralloc.budget import Budget
from loralloc.errors import UserError
from loralloc.gating import Site
from loralloc.methods.allora.rows import row_norms, row_scales
from loralloc.methods.allora.state import ALLoRAState, check_dropout, check_scales, groups_of, stacked
from loralloc.methods.base import Decision, Method, StepContext
from loralloc.methods.scaling import averages
from loralloc.schedule import ConstantSchedule, Schedule
from loralloc.setting_types import is_number

Mode = Literal["paper", "hybrid", "post"]

ADAPTIVE = ("adam", "adagrad", "adadelta", "rmsprop", "rprop", "adafactor", "lion", "lamb", "muon")
"""Optimizers whose step does not change when a gradient is multiplied by a constant, by parts of their names."""


@dataclass(frozen=True)
class ALLoRA(Method):
    """Scale the gradient of each output row by the inverse square root of its norm.

    Takes an adapter with `lora_alpha` = r and no dropout; keeps every rank, unless another method allocates them.

    Raises:
        UserError: A number is out of its range.
    """

    id: ClassVar[str] = "allora"
    label: ClassVar[str] = "ALLoRA"
    paper: ClassVar[str] = "arXiv 2410.09692"

    eta: Annotated[
        float, Field(gt=0, description="factor of a row that is still zero; a row of norm 1/eta² has eta/√2")
    ] = 2.0
    mode: Annotated[Mode, Field(description="paper: scale gradients, fit for SGD; hybrid and post: fit for Adam")] = (
        "paper"
    )
    allocate: Annotated[
        Method | None, Field(description="a method that allocates the ranks, with its defaults; null keeps them all")
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.allocate, ALLoRA):
            raise UserError("allocate must be a method that allocates ranks, such as AdaLoRA; ALLoRA keeps them all")
        if self.allocate is not None and self.allocate.search is not None:
            raise UserError(
                "allocate must be a method that allocates ranks while it trains, such as AdaLoRA: AutoLoRA's search "
                "looks ahead by one step of plain LoRA, and ALLoRA's steps are different"
            )

    @property
    def budget(self) -> Budget | None:  # type: ignore[override]
        """The allocating method's; None without one."""
        return None if self.allocate is None else self.allocate.budget

    @property
    def allocator(self) -> Method | None:
        """The allocating method."""
        return self.allocate

    @property
    def examples(self) -> Any:
        """The allocating method's; None where it looks at none."""
        return None if self.allocate is None else self.allocate.examples

    @property
    def compacts(self) -> bool:
        """Whether the allocating method does."""
        return self.allocate is not None and self.allocate.compacts

    @property
    def opens_ranks(self) -> bool:
        """Whether the allocating method does."""
        return self.allocate is not None and self.allocate.opens_ranks

    @property
    def restarts(self) -> bool:
        """Whether the allocating method does."""
        return self.allocate is not None and self.allocate.restarts

    @property
    def masks_bad_steps(self) -> bool:
        """Whether the allocating method does; true without one.

        ALLoRA itself has nothing to protect: row scales depend on weights alone, and a skipped step is zero anyway.
        """
        return self.allocate is None or self.allocate.masks_bad_steps

    @classmethod
    def broken_rules(cls, value: Callable[..., Any]) -> Iterator[tuple[tuple[str, ...], str]]:
        """Check that the recipe sets a scale of 1 and no dropout."""
        allocate = value("method", "allocate")
        r, alpha, dropout = (value("lora", key) for key in ("r", "alpha", "dropout"))
        average = value("method", "budget", "average_rank")
        unit, name = (average, "the average rank") if averages(cls.id, allocate) else (r, "lora.r")
        if isinstance(unit, int) and is_number(alpha) and unit != alpha:  # fractions of a rank are rounded: known later
            told = f"lora.alpha is {alpha}, but ALLoRA has no scaling factor: set lora.alpha to {name}, which is {unit}"
            yield ("lora", "alpha"), told
        if value("lora", "peft", "use_rslora"):
            yield ("lora", "peft", "use_rslora"), "ALLoRA has no scaling factor: leave lora.peft.use_rslora out"
        if is_number(dropout) and dropout > 0:
            yield ("lora", "dropout"), f"lora.dropout is {dropout}, but ALLoRA trains without dropout: set it to 0"

    def schedule(self, total_steps: int, start: int, target: int) -> Schedule:
        """Return the allocating method's schedule; all ranks throughout without one."""
        if self.allocate is not None:
            return self.allocate.schedule(total_steps, start, target)
        return ConstantSchedule(total_steps, start, target)

    # The course of a run.

    def prepare(self, sites: Sequence[Site]) -> ALLoRAState:
        """Leave the gates at 1, or to the allocating method; scale the rows.

        Raises:
            UserError: The adapter has dropout or a scale other than 1.
        """
        # No dropout, no scaling factor.
        check_dropout(sites)
        inner = None
        if self.allocate is None:
            for site in sites:
                site.freeze_gate()
        else:
            inner = self.allocate.prepare(sites)
        check_scales(sites)
        state = ALLoRAState(sites, groups_of(sites), inner)
        self._scale_rows(state)
        return state

    def on_gradients(self, state: ALLoRAState, now: StepContext) -> None:
        """Copy the factors in the modes that rescale the step; the kernel has scaled the gradients (not in `post`)."""
        self._warn_once(state, now)
        if self.mode != "paper":
            state.before = [factor.detach().clone() for factor in state.factors()]
        if self.allocate is not None:
            self.allocate.on_gradients(state.inner, now)

    def on_step(self, state: ALLoRAState, now: StepContext) -> Decision | None:
        """Rescale the step (`hybrid`, `post`), let the allocating method decide, then update the row scales."""
        self._warn_once(state, now)
        if state.before is not None:
            self._stretch(state, state.before)
            state.before = None
        decision = None if self.allocate is None else self.allocate.on_step(state.inner, now)
        self._scale_rows(state)
        return decision

    def finish(self, state: ALLoRAState, target: int) -> Tensor:
        """Keep every rank, or what the allocating method keeps."""
        if self.allocate is not None:
            return self.allocate.finish(state.inner, target)
        return torch.cat([(site.scale != 0).cpu() for site in state.sites])

    def state_dict(self, state: ALLoRAState) -> dict[str, Tensor]:
        """The allocating method's; s is a function of the weights."""
        return {} if self.allocate is None else self.allocate.state_dict(state.inner)

    def load_state_dict(self, state: ALLoRAState, tensors: Mapping[str, Tensor]) -> None:
        """Restore the allocating method; scale the rows by the weights that were loaded."""
        if self.allocate is not None:
            self.allocate.load_state_dict(state.inner, tensors)
        state.before = None  # of a step that was interrupted
        self._scale_rows(state)

    def resized(self, state: ALLoRAState) -> None:
        """Group the factors anew by their shapes."""
        if self.allocate is not None:
            self.allocate.resized(state.inner)
        state.groups = groups_of(state.sites)
        self._scale_rows(state)

    @torch.no_grad()
    def _scale_rows(self, state: ALLoRAState) -> None:
        """Compute s for every site, group by group, and hand it to the kernel or keep it, as the mode wants it."""
        state.stretch = []
        for group in state.groups:
            A, B, gates = stacked(group.A), stacked(group.B), group.gates(fixed=self.allocate is None)
            # s_i = 1 / √(‖(BA)_i‖ + 1/η²), a constant to autograd.
            s = row_scales(row_norms(A, gates, B), self.eta)
            if self.mode == "post":
                B = B.to(s.dtype) * (group.scales() != 0)[:, None]  # closed ranks are gone
                mean = torch.linalg.matrix_norm(s[:, :, None] * B) / torch.linalg.matrix_norm(B)
                mean = torch.where(B.flatten(1).any(1), mean, self.eta)
                for mean_of_site, s_of_site in zip(mean, s, strict=True):
                    state.stretch += [mean_of_site - 1, s_of_site[:, None] - 1]
                continue
            # The kernel multiplies the weights' gradients of row i by it; what flows to lower layers is not scaled.
            for site, scale in zip(group.sites, (s / self.eta if self.mode == "hybrid" else s).unbind(), strict=True):
                site.set_row_scale(scale)

    @torch.no_grad()
    def _stretch(self, state: ALLoRAState, before: list[Tensor]) -> None:
        """Multiply the step that the optimizer has just made; with a factor of 1 it stays as it is, bit for bit."""
        factors = state.factors()
        steps = torch._foreach_sub(factors, before)
        if self.mode == "hybrid":  # gradients were scaled by s/η: the step makes up for 1/η
            torch._foreach_add_(factors, steps, alpha=self.eta - 1)
        else:
            torch._foreach_mul_(steps, [extra.to(step) for extra, step in zip(state.stretch, steps, strict=True)])
            torch._foreach_add_(factors, steps)

    def _warn_once(self, state: ALLoRAState, now: StepContext) -> None:
        if self.mode != "paper" or now.optimizer is None or state.optimizer_seen:
            return
        state.optimizer_seen = True
        if any(part in now.optimizer.lower() for part in ADAPTIVE):
            warnings.warn(
                f'ALLoRA(mode="paper") with {now.optimizer}: its step does not change when a row\'s gradient is scaled '
                "by a constant, so eta hardly matters and a larger eta makes training slower; "
                'use mode="hybrid" or mode="post", or SGD',
                stacklevel=2,
            )
