"""Several processes that train one adapter: who is who, errors that end all of them, and a check that they agree.

`torchrun` and `accelerate launch` start one process per device. All of them load, check, train and evaluate; the first
one alone writes and speaks.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from torch import nn

from loralloc.errors import UserError

_P = ParamSpec("_P")
_T = TypeVar("_T")

CHECK_EVERY = 100
"""Steps between two comparisons of the processes' weights; in the first hundred, after steps 1, 2, 4, 8, ..."""

_runs = itertools.count()  # equal on all processes, so that a message may be repeated in a later run
LONGEST_WAIT = timedelta(days=1)
"""How long processes wait for the one that exports; the usual half an hour is short for a large merged model."""


def on_cpu() -> bool:
    """Whether this machine has nothing to train on but its CPU."""
    return not torch.accelerator.is_available()


def join() -> None:
    """Join the other processes, where a launcher has started several: over gloo where they train on the CPU."""
    if on_cpu() or "LOCAL_RANK" in os.environ:
        PartialState(cpu=on_cpu())


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def launcher(count: int | None = None) -> str:
    """The command-line prefix that starts `loralloc` on so many processes of one machine, with a trailing space.

    Args:
        count: Processes; None for those that there are now.
    """
    count = world_size() if count is None else count
    return "" if count == 1 else f"torchrun --nproc-per-node={count} --no-python "


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this is the process that writes and speaks."""
    return rank() == 0


@functools.cache
def _errands() -> Any:
    """A process group for what is not training: on the CPU, with a long time-out."""
    return dist.new_group(backend="gloo", timeout=LONGEST_WAIT)


def gather(number: float) -> list[float]:
    """The number of every process, in their order.

    Raises:
        UserError: Another process has ended.
    """
    if world_size() == 1:
        return [number]
    mine = torch.tensor([number], dtype=torch.float64)
    found = [torch.zeros_like(mine) for _ in range(world_size())]
    try:
        dist.all_gather(found, mine, group=_errands())
    except RuntimeError as error:
        raise UserError("another process of this run has ended; its own message says why") from error
    return [tensor.item() for tensor in found]


@contextmanager
def together() -> Iterator[None]:
    """Run a block on every process; if it fails on one, all end, so that none waits for a process that has left.

    Inside the block, nothing may wait for the other processes.

    Raises:
        SystemExit: The block has failed on another process, which says why.
    """
    try:
        yield
    except Exception:
        with suppress(UserError):
            gather(1)
        raise
    if any(gather(0)):
        raise SystemExit(2)


def on_main(work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T | None:
    """Call a function in the first process while the others wait; where it fails, all end.

    Returns:
        What the function returned; None in the other processes.
    """
    with together():
        return work(*args, **kwargs) if is_main() else None


@contextmanager
def one_voice() -> Iterator[None]:
    """If several processes fail with the same message, let the first one report it and the others end silently.

    Raises:
        SystemExit: Another process has said the same.
    """
    run = next(_runs)
    try:
        yield
    except (UserError, FloatingPointError, OSError) as error:
        if world_size() > 1 and not _is_first_to_say(f"{run}: {error}"):
            raise SystemExit(2) from error
        raise


def _is_first_to_say(text: str) -> bool:
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT")
    key = f"loralloc/{attempt}/{hashlib.sha256(text.encode()).hexdigest()}"
    try:
        return dist.distributed_c10d._get_default_store().add(key, 1) == 1
    except RuntimeError:  # the process that holds the store has left: better twice than not at all
        return True


def refuse_several(verb: str) -> None:
    """Refuse what one process does alone, where a launcher has started several.

    Raises:
        UserError: A launcher has started several processes.
    """
    join()
    if world_size() > 1:
        with one_voice():
            raise UserError(
                f"{verb} takes one process, not {world_size()}: start it without torchrun or accelerate launch"
            )


def check_agreement(model: nn.Module, step: int, last: int) -> None:
    """Compare the trained weights of all processes, bit for bit, after the first steps, now and then, and at the end.

    Averaged gradients keep equal weights equal. Where they are not averaged, every process trains an adapter of its
    own, with nothing to show for it but a worse result.

    Args:
        model: Its trainable parameters are compared.
        step: Optimizer steps done.
        last: The last step of the run.

    Raises:
        UserError: They differ; on every process.
    """
    early = step < CHECK_EVERY and step & (step - 1) == 0
    if world_size() == 1 or not (early or step % CHECK_EVERY == 0 or step == last):
        return
    checksum = _checksum(model)
    found = [torch.empty_like(checksum) for _ in range(world_size())]
    dist.all_gather(found, checksum)
    apart = [index for index, theirs in enumerate(found) if not torch.equal(theirs, found[0])]
    if apart:
        raise UserError(
            f"the processes train apart: after step {step} the trained weights of process {apart[0]} are not those of "
            "process 0, because gradients are not averaged over the processes. trainer.evaluate() or "
            "trainer.predict() before trainer.train() makes accelerate leave the model out of DistributedDataParallel: "
            "call it after train(), or set eval_on_start=True. In a loop of your own, call what "
            "accelerator.prepare(model) or DistributedDataParallel(model) returns, not the model itself"
        )


def _checksum(model: nn.Module) -> torch.Tensor:
    """SHA-256 of the trainable parameters, on a device from which the process group can send it."""
    digest, device = hashlib.sha256(), torch.device("cpu")
    for parameter in model.parameters():
        if parameter.requires_grad:
            device = parameter.device
            digest.update(parameter.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8).to(device)
