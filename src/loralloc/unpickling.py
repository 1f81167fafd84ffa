"""Nothing is unpickled: neither by this package, nor by the libraries that it asks to load something.

A pickle is a program. torch's restricted reader of pickles has had holes, so that it is not asked to read them at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from loralloc.errors import UserError


@contextmanager
def nothing_unpickled(cure: str) -> Iterator[None]:
    """Refuse pickles inside, wherever in a library `torch.load` is called.

    Args:
        cure: What to do instead, the end of the message.
    """

    def refuse(file: Any, *args: Any, **kwargs: Any) -> Any:
        name = file if isinstance(file, str) else getattr(file, "name", type(file).__name__)
        raise UserError(f"{name} is a pickle, which can run any code, and is not read; {cure}")

    reader = vars(torch)["load"]
    vars(torch)["load"] = refuse
    try:
        yield
    finally:
        vars(torch)["load"] = reader
