"""The optimizer's memory of ranks that close or start anew: shapes stay, so moments change in place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from loralloc.gating import Site


@torch.no_grad()
def clear_moments(optimizer: torch.optim.Optimizer, sites: Iterable[Site]) -> None:
    """Zero the optimizer's state of ranks that are closed for good, so that no momentum moves them any more.

    Args:
        optimizer: Any optimizer whose state holds tensors in the shape of the parameter (Adam's moments, momentum).
        sites: The sites; a scale of zero marks a closed rank.
    """
    for site in sites:
        closed = site.scale == 0
        for parameter, index in ((site.A, closed), (site.B, (slice(None), closed)), (site.gate, closed)):
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    value[index] = 0


class FreshRanks:
    """Ranks that were opened in the middle of a run, and their age in steps."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self.sites = sites

    def open(self, opened: Tensor) -> None:
        """Start ranks at age 0."""

    def before_step(self) -> None:
        """Keep what the correction after the step needs."""

    def after_step(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Correct the update."""

    def state_dict(self) -> dict[str, Tensor]:
        """Ages of fresh ranks."""
        return {}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore ages."""
