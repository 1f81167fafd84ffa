"""Removes closed ranks from the tensors: from the final phase on, a step costs as much as plain LoRA at those ranks.

Parameters stay the same objects, so the optimizer keeps them; its state shrinks with them. What is saved keeps the full
shapes, with zeros for closed ranks: a checkpoint looks the same on both sides of the boundary, and a run resumed from
it starts full and is compacted again. Averages that ranks share, as in Adafactor, cannot shrink: the optimizer starts
them anew, and they are saved as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from loralloc.errors import UserError
from loralloc.gating import Site
from loralloc.methods.base import Method
from loralloc.peft_layers import peft_model
from loralloc.training.optimizer import unwrapped
from loralloc.training.processes import world_size


def check_compact(method: Method) -> None:
    """Refuse to compact a run in which no rank could leave.

    Raises:
        UserError: There are several processes, or the method decides nothing before the run ends.
    """
    refuse_several()
    if not method.compacts:
        raise UserError(
            f"compact=True needs a decision, before the run ends, on which ranks are closed for good, and {method.id} "
            "with these settings makes none; leave it out"
        )


def refuse_several() -> None:
    """Refuse to compact a run on several processes, which may have joined only after it was attached.

    Raises:
        UserError: There are several processes.
    """
    if world_size() > 1:
        raise UserError(
            "compact=True removes ranks from the tensors, which DDP's gradient buckets do not follow; leave it out, "
            "or train with one process"
        )


def check_full(compaction: Compaction | None) -> None:
    """Refuse to go back in a process in which closed ranks have left the tensors, and their numbers with them.

    Raises:
        UserError: They have.
    """
    if compaction is not None:
        raise UserError(
            "closed ranks have left the tensors of this run already (compact=True), so it cannot go back in this "
            "process; build model, optimizer and run (with a Trainer: model, callback and Trainer) anew and load the "
            "checkpoint into these"
        )


@dataclass(frozen=True)
class _Shrunk:
    """One parameter that lost ranks: `kept` of `capacity` positions along `dim` are left."""

    dim: int
    kept: Tensor
    capacity: int

    def take(self, full: Tensor) -> Tensor:
        """The kept positions of a full tensor."""
        return full.index_select(self.dim, self.kept.to(full.device))

    def put_back(self, small: Tensor) -> Tensor:
        """A full tensor with zeros for closed ranks."""
        shape = list(small.shape)
        shape[self.dim] = self.capacity
        return small.new_zeros(shape).index_copy_(self.dim, self.kept.to(small.device), small)


_Change = Callable[[_Shrunk, Tensor, torch.Size], Tensor]
"""What becomes of a tensor of the optimizer's state, given the small shape of its parameter."""


class Compaction:
    """A model from whose tensors the closed ranks have been removed.

    Args:
        model: The model, which is a `PeftModel` or holds one; `state_dict` and `load_state_dict` of both continue to
            use full shapes.
        sites: Its gated layers.
        kept: Boolean [R]: the ranks that stay.
        optimizer: The optimizer; its state of closed ranks is removed too. None if there is no optimizer yet.

    Raises:
        UserError: There are several processes by now.
    """

    def __init__(
        self, model: nn.Module, sites: Sequence[Site], kept: Tensor, optimizer: torch.optim.Optimizer | None
    ) -> None:
        refuse_several()
        self.sites = sites
        self._kept = [part.nonzero().flatten() for part in kept.split([site.rank for site in sites])]
        self._capacity = [site.rank for site in sites]
        self._shrunk = dict(self._parameters())
        peft = peft_model(model)  # which may be saved by itself; its hooks serve a model around it as well
        self._names = {name: p for name, p in peft.named_parameters() if p in self._shrunk}
        self._optimizer: torch.optim.Optimizer | None = unwrapped(optimizer)  # to which hooks belong
        self._shrink()
        self._hooks = [
            peft.register_state_dict_post_hook(partial(self._fill_model)),  # a bound method takes no attributes
            peft.register_load_state_dict_pre_hook(self._cut_model),
        ]
        if self._optimizer is not None:
            self._hooks.append(self._optimizer.register_state_dict_post_hook(self._fill_optimizer))
            self._hooks.append(self._optimizer.register_load_state_dict_pre_hook(self._cut_optimizer))

    @torch.no_grad()
    def undo(self) -> None:
        """Give every tensor its full shape again, with zeros for closed ranks."""
        for hook in self._hooks:
            hook.remove()
        for parameter, shrunk in self._shrunk.items():
            self._reshape(parameter, shrunk.put_back)
        for site in self.sites:
            site.put_back_scale()

    def _parameters(self) -> Iterator[tuple[nn.Parameter, _Shrunk]]:
        for site, kept, capacity in zip(self.sites, self._kept, self._capacity, strict=True):
            for parameter, dim in ((site.A, 0), (site.B, 1), (site.gate, 0)):
                yield parameter, _Shrunk(dim, kept, capacity)

    @torch.no_grad()
    def _shrink(self) -> None:
        for parameter, shrunk in self._shrunk.items():
            self._reshape(parameter, shrunk.take)
        for site, kept in zip(self.sites, self._kept, strict=True):
            site.take_scale(kept)

    def _reshape(self, parameter: nn.Parameter, change: Callable[[Tensor], Tensor]) -> None:
        """Change the shape of a parameter, and of its state in the optimizer likewise."""
        before, data = parameter.shape, change(parameter.data)
        parameter.grad = None
        # Autograd keeps the old shape as long as a graph of an earlier step is alive, unless the dtype changes.
        parameter.data = data.new_empty(0, dtype=torch.float64 if data.dtype != torch.float64 else torch.float32)
        parameter.data = data
        state = {} if self._optimizer is None else self._optimizer.state.get(parameter, {})
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == before:
                state[key] = change(value)
        if self._optimizer is not None and not _fits(state, parameter.shape):
            del self._optimizer.state[parameter]  # as before its first step

    def _fill_model(self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for name, parameter in self._names.items():
            if prefix + name in state:
                state[prefix + name] = self._shrunk[parameter].put_back(state[prefix + name])

    def _cut_model(self, module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name, parameter in self._names.items():
            value, shrunk = state.get(prefix + name), self._shrunk[parameter]
            if isinstance(value, Tensor) and value.shape[shrunk.dim] == shrunk.capacity:
                state[prefix + name] = shrunk.take(value)

    def _fill_optimizer(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        def fill(shrunk: _Shrunk, value: Tensor, small: torch.Size) -> Tensor:
            return shrunk.put_back(value) if value.shape == small else value

        return self._changed(optimizer, state, fill)

    def _cut_optimizer(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        def cut(shrunk: _Shrunk, value: Tensor, small: torch.Size) -> Tensor:
            full = (*small[: shrunk.dim], shrunk.capacity, *small[shrunk.dim + 1 :])
            return shrunk.take(value) if value.shape == full else value

        return self._changed(optimizer, state, cut)

    def _changed(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any], change: _Change) -> dict[str, Any]:
        """A copy of an optimizer's state dictionary with the state of shrunk parameters changed."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        entries = dict(state["state"])
        for index, parameter in enumerate(parameters):
            shrunk = self._shrunk.get(parameter)
            if shrunk is not None and index in entries:
                entries[index] = {
                    key: change(shrunk, value, parameter.shape) if isinstance(value, Tensor) else value
                    for key, value in entries[index].items()
                }
        return {**state, "state": entries}


def _fits(state: Mapping[str, Any], shape: torch.Size) -> bool:
    """Whether a parameter's state may be of this shape: averages over its rows and columns (Adafactor) tell theirs."""
    shared = [v.shape for v in state.values() if isinstance(v, Tensor) and v.numel() != 1 and v.shape != shape]
    return not shared or _sizes(*shared) == _sizes(shape)


def _sizes(*shapes: torch.Size) -> list[int]:
    """All sizes of some shapes, in order; those of 1 left out, which an average may keep or not."""
    return sorted(size for shape in shapes for size in shape if size != 1)
