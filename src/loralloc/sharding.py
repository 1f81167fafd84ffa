"""Models whose weights are spread over processes: which are supported, and what stays whole.

Under FSDP2 (`torch.distributed.fsdp.fully_shard`) every process keeps a part of each base weight, and a block's weights
are gathered only while it computes. The adapter stays whole on every process, because methods score, close and rewrite
whole ranks. docs/scale.md has the arithmetic.

    for block in blocks:
        fully_shard(block, ignored_params=kept_whole(model))
    fully_shard(model, ignored_params=kept_whole(model))

This works before or after attaching. FSDP2 neither averages the gradients of ignored parameters nor moves them to a
device; `training.shared_gradients` averages them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from loralloc.errors import UserError
from loralloc.peft_layers import LoraLayer, adapter_modules, is_quantized

WHOLE = "ignored_params=loralloc.kept_whole(model)"


def kept_whole(model: nn.Module) -> set[nn.Parameter]:
    """Return the parameters that must not be sharded with the base model: `fully_shard(ignored_params=...)`.

    These are the parameters of all adapters (gates among them, trained or not), of modules that are saved whole, and
    whatever else is trained.

    Args:
        model: A `PeftModel`, or a model that holds one, before or after `attach`.
    """
    inside = {parameter for module in adapter_modules(model) for parameter in module.parameters()}
    return inside | {parameter for parameter in model.parameters() if parameter.requires_grad}


def is_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` has been applied to the model or a part of it."""
    return bool(sharded_parts(model))


def check_sharding(model: nn.Module) -> None:
    """Refuse a model that is spread over processes in a way that makes scoring ranks impossible.

    Raises:
        UserError: The model uses tensor parallelism or ZeRO-3, or FSDP2 shards the adapter or quantised weights; the
            message says what to use.
    """
    parameters = dict(model.named_parameters())
    if any(hasattr(parameter, "ds_id") for parameter in parameters.values()):
        raise UserError(
            "DeepSpeed ZeRO-3 has taken the weights apart, so that no process holds a factor of the adapter; shard the "
            f"base model with FSDP2 instead, fully_shard(block, {WHOLE})"
        )
    sharded = {name: p for name, p in parameters.items() if isinstance(p.data, DTensor)}
    if not sharded:
        return
    check_quantized(model)
    split = [name for name, p in sharded.items() if _is_tensor_parallel(p.data)]
    if split or not is_sharded(model):
        raise UserError(
            f"the weights are split by tensor parallelism ({next(iter(split or sharded))}, ...), where a layer's "
            "output is spread over processes; load the model without tp_plan, and shard it with FSDP2 instead, "
            f"fully_shard(block, {WHOLE})"
        )
    apart = [name for name, p in parameters.items() if p in kept_whole(model) and isinstance(p.data, DTensor)]
    if apart:
        raise UserError(
            f"fully_shard has spread the adapter over the processes as well ({apart[0]}, ...), and ranks are scored "
            f"and closed whole; build the model anew and give {WHOLE} to every call of fully_shard"
        )


def check_quantized(model: nn.Module) -> None:
    """Refuse to shard a base model that is kept in fewer bits.

    Raises:
        UserError: With what to do instead.
    """
    if any(is_quantized(module) for module in model.modules() if isinstance(module, LoraLayer)):
        raise UserError(
            "FSDP2 does not shard weights in 4 or 8 bits as they are, so that every process would hold all of them; "
            "start with torchrun (DDP), or load the base model in 16 bits"
        )


def _is_tensor_parallel(weight: Any) -> bool:
    """Whether a weight is split in another way than by FSDP2, which splits once and along the first dimension."""
    shards = [placement for placement in weight.placements if isinstance(placement, Shard)]
    return len(shards) > 1 or any(placement.dim != 0 for placement in shards)


def compute_dtypes(model: nn.Module) -> set[torch.dtype]:
    """What FSDP2 converts weights and inputs to (its MixedPrecisionPolicy); empty where it converts nothing."""
    policies: list[Any] = [module._get_fsdp_state()._mp_policy for module in sharded_parts(model)]
    return {policy.param_dtype for policy in policies if policy.param_dtype is not None}


def defers_gradients(model: nn.Module) -> bool:
    """Whether the loop accumulates unsynchronised gradients: `set_requires_gradient_sync(False)`, or `no_sync`."""
    states: list[Any] = [module._get_fsdp_state() for module in sharded_parts(model)]
    return any(not group.reduce_grads for state in states for group in state._fsdp_param_groups)


def sharded_parts(model: nn.Module) -> list[FSDPModule]:
    """The modules to which `fully_shard` has been applied."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@contextmanager
def callable_inside(parts: Sequence[FSDPModule], inner: nn.Module) -> Iterator[None]:
    """Gather what a part of a sharded model needs to be called by itself inside; every process must do so.

    Weights of the modules around it (often the embeddings and the head) are otherwise gathered only when those modules
    are called.

    Args:
        parts: The sharded parts of the whole model.
        inner: The part that is called.
    """
    within = set(inner.modules())
    with ExitStack() as stack:
        for module in parts:
            if module not in within:
                module.unshard()
                stack.callback(module.reshard)
        yield


@contextmanager
def own_place(model: nn.Module, path: Path) -> Iterator[Path]:
    """Yield the path to which a process writes a file that the processes of a sharded model compute together.

    The first process writes to `path`, and so does every process if the model is not sharded. The others write into a
    temporary folder that is removed afterwards.
    """
    if not is_sharded(model) or dist.get_rank() == 0:
        yield path
        return
    with TemporaryDirectory(prefix="loralloc-") as scratch:
        yield Path(scratch) / path.name
