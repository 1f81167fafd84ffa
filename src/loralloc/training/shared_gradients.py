"""Gradients of an adapter that every process holds whole, over a base model that is sharded.

FSDP2 averages the gradients of what it has sharded and ignores the rest. Here the rest is kept equal: before the first
forward pass, the first process's adapter is copied to all others; after every backward pass, gradients are averaged
over the processes as by DistributedDataParallel, even of parameters that a process has not used. While a loop
accumulates gradients (`set_requires_gradient_sync(False)`), they are not averaged until the last pass.

The adapter of a 70B model is some hundred times smaller than its base, so this is one all-reduce after a backward pass
that has gathered every block of the base twice. It does not overlap with the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from loralloc.methods.base import agree
from loralloc.sharding import check_sharding, defers_gradients, is_sharded
from loralloc.training.processes import world_size

BUCKET = 2**25
"""Most numbers that are sent at once: 128 MB in fp32."""


class SharedGradients:
    """Keeps an adapter the same on all processes while the base model is sharded; does nothing where it is not.

    Whether it is sharded is decided when the model is first called, since it may be sharded after this object is made,
    and the processes may only then have joined.

    Args:
        model: The model that the training loop calls.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._parameters: list[nn.Parameter] = []
        self._handles: list[Any] = []
        self._queued = False
        self._handles.append(model.register_forward_pre_hook(self._look))

    def _look(self, module: nn.Module, args: Any) -> None:
        """Before a forward pass. A compiled model of one process is one graph: nothing is done in it."""
        if world_size() > 1:
            self._begin()  # pyright: ignore[reportAttributeAccessIssue]
        elif not torch.compiler.is_compiling():
            self._end_if_trained()

    @torch.compiler.disable
    def _begin(self) -> None:
        """Agree on the adapter where the base is sharded by now."""
        if is_sharded(self._model):
            check_sharding(self._model)
            self._parameters = [p for p in self._model.parameters() if p.requires_grad]
            for parameter in self._parameters:
                parameter.data.copy_(agree(parameter.data))
            self._forget_hooks()
            self._handles += [p.register_post_accumulate_grad_hook(self._arrived) for p in self._parameters]
        else:
            self._end_if_trained()

    def _end_if_trained(self) -> None:
        """Once it is trained as it is, nothing will be sharded any more; a calibration before that is no training."""
        if torch.is_grad_enabled() and self._model.training:
            self._forget_hooks()

    def _forget_hooks(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _arrived(self, parameter: nn.Parameter) -> None:
        """A gradient is complete on this process: once the backward pass is over, average."""
        if not self._queued:
            self._queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self._average)  # type: ignore[attr-defined]

    def _average(self) -> None:
        self._queued = False
        if not defers_gradients(self._model):
            held = {id(parameter) for parameter in self._model.parameters()}  # gates are gone once they are folded
            average_gradients([parameter for parameter in self._parameters if id(parameter) in held])


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace gradients by their means over the processes, at least in fp32.

    If a process has no gradient, it counts as zeros and receives the mean; if no process has one, none is created.

    Args:
        parameters: The same on every process, in the same order.
    """
    for bucket in _buckets(parameters):
        missing = [parameter.grad is None for parameter in bucket]
        flat = torch.cat(
            [*map(_flat_gradient, bucket), torch.tensor(missing).logical_not().to(_flat_gradient(bucket[0]))]
        )
        dist.all_reduce(flat)
        sums, holders = flat[: -len(bucket)] / dist.get_world_size(), flat[-len(bucket) :]
        anywhere = holders.tolist() if any(missing) else [1.0] * len(bucket)
        for parameter, mean, held in zip(bucket, sums.split([p.numel() for p in bucket]), anywhere, strict=True):
            if parameter.grad is not None:
                parameter.grad.copy_(mean.view_as(parameter))
            elif held:
                parameter.grad = mean.view_as(parameter).to(parameter.dtype, copy=True)


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters of one device and dtype together, as many as fit."""
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        alike = bucket and (bucket[0].device, bucket[0].dtype) == (parameter.device, parameter.dtype)
        if bucket and (not alike or sum(p.numel() for p in bucket) + parameter.numel() > BUCKET):
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


def _flat_gradient(parameter: nn.Parameter) -> Tensor:
    """A gradient as one row in fp32 or wider; zeros where there is none."""
    found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return found.flatten().to(torch.promote_types(parameter.dtype, torch.float32))
