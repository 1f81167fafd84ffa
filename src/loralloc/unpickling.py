"""Nothing is unpickled: neither by this package, nor by the libraries that it asks to load something.

A pickle is a program. torch's restricted reader of pickles has had security holes, so pickles are not read at all,
unless a recipe allows it for a base model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from loralloc.errors import UserError

_STOCK = torch.load
_guards: list[Callable[..., Any]] = []
_lock = threading.Lock()


@contextmanager
def nothing_unpickled(cure: str) -> Iterator[None]:
    """Refuse pickles inside, wherever in a library they would be read.

    Args:
        cure: What to do instead, the end of the message.
    """

    def refuse(file: Any, *args: Any, **kwargs: Any) -> Any:
        raise UserError(f"{_name(file)} is a pickle, which can run any code, and is not read; {cure}")

    with _in_place_of_torchs(refuse):
        yield


@contextmanager
def only_tensors_unpickled() -> Iterator[None]:
    """Read pickles of tensors inside, with torch's restricted reader; refuse those of anything else."""

    def restricted(file: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return _STOCK(file, *args, **{**kwargs, "weights_only": True})
        except Exception as error:  # the class of the error is one of pickle's
            if not str(error).startswith("Weights only load failed"):
                raise
            raise UserError(
                f"{_name(file)} is a pickle with more than tensors, which could run any code, and is refused"
            ) from error

    with _in_place_of_torchs(restricted):
        yield


@contextmanager
def _in_place_of_torchs(load: Callable[..., Any]) -> Iterator[None]:
    """Replace `torch.load`, which libraries look up at every call.

    This also applies in other threads, since some libraries load with several. If contexts are nested, the newest
    replacement is used; after the last one has ended, torch's own function is restored.
    """
    with _lock:
        _guards.append(load)
        torch.load = _guarded
    try:
        yield
    finally:
        with _lock:
            _guards.remove(load)
            if not _guards:
                torch.load = _STOCK


def _guarded(*args: Any, **kwargs: Any) -> Any:
    return (_guards[-1] if _guards else _STOCK)(*args, **kwargs)


def _name(file: Any) -> str:
    return str(file) if isinstance(file, str) or hasattr(file, "__fspath__") else getattr(file, "name", "a file")
