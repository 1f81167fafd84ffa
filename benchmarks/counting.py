"""Counts that do not depend on the machine: calls into the tensor library, and calls that make the host wait.

A call is one operator as PyTorch dispatches it, below autograd. A call makes the host wait for the device if its
result, or the shape of its result, is needed on the host. On a CPU nothing waits, but the same calls are made.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITING = ("_local_scalar_dense", "is_nonzero", "item", "nonzero", "equal", "masked_select", "_unique2")


class Calls(TorchDispatchMode):
    """Count operators while active.

    Attributes:
        by_name: Calls by operator.
        waiting: Those among them for which the host waits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()
        self.waiting: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """All calls."""
        return self.by_name.total()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one operator and run it."""
        name = func.overloadpacket.__name__
        self.by_name[name] += 1
        if name in WAITING or (name in ("index", "index_put", "index_put_") and _by_mask(args)):
            self.waiting[name] += 1
        result = func(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_") and _to_host(args, result):
            self.waiting[name] += 1
        return result


def _by_mask(args: Any) -> bool:
    """Whether an index is boolean: the number of its True decides the shape."""
    return any(isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in args[1])


def _to_host(args: Any, result: Any) -> bool:
    sources = [arg for arg in args if isinstance(arg, torch.Tensor)]
    return result.device.type == "cpu" and any(source.device.type != "cpu" for source in sources)


@contextmanager
def device_waits() -> Iterator[list[str]]:
    """Collect the warnings of CUDA's own check for synchronisation; the list is filled on exit."""
    found: list[str] = []
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield found
    finally:
        torch.cuda.set_sync_debug_mode(before)
    found += [f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]


def count(part: Callable[[], object]) -> Calls:
    """Run something and return its calls."""
    with Calls() as calls:
        part()
    return calls
