"""What a process writes below a folder, counted, so that something may happen at one of the writes.

A write is a file that is opened for writing, a tensor file and its first half, a sync, a name that is made, moved or
removed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import safetensors.torch
from safetensors import SafetensorError

MAKING = ("os.mkdir", "os.rename", "os.link", "os.symlink")
"""Events of Python's audit that make a name."""
REMOVING = ("os.remove", "os.rmdir")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT

NEVER = sys.maxsize
"""The number of a write that does not come."""


class Writes:
    """The writes of this process, until it ends.

    Args:
        root: The folder below which they count.
        number: Of the first one before which to act, from 1; from there on it is done before every one.
        act: Called with the path; it may end the process, or raise the OSError that the system would.
        removals: Whether to count what is removed, too.

    Attributes:
        made: How many there were.
    """

    def __init__(self, root: Path, number: int, act: Callable[[Path], object], removals: bool) -> None:
        self._root, self._number, self._act, self.made = root, number, act, 0
        self._names = (*MAKING, *REMOVING) if removals else MAKING
        self._sync, self._serialize = os.fsync, safetensors.torch.serialize_file
        patch.object(os, "fsync", self._look_at_sync).start()
        patch.object(safetensors.torch, "serialize_file", self._look_at_tensors).start()
        sys.addaudithook(self._look)

    def _count(self, path: Any) -> None:
        if self._counts(path):
            self.made += 1
            if self.made >= self._number:
                self._act(Path(os.fsdecode(path)))

    def _counts(self, path: Any) -> bool:
        """Whether it is the path of something below the folder, wherever the process is; a descriptor is not."""
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        return Path(os.path.abspath(os.fsdecode(path))).is_relative_to(self._root)

    def _look(self, event: str, args: tuple[Any, ...]) -> None:
        if event in self._names or (event == "open" and isinstance(args[2], int) and args[2] & WRITING):
            self._count(args[0])

    def _look_at_sync(self, descriptor: int) -> None:
        self._count(os.readlink(f"/proc/self/fd/{descriptor}"))
        self._sync(descriptor)

    def _look_at_tensors(self, tensors: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        """Rust writes them, unseen by Python: something may happen before, and in the middle."""
        try:
            self._count(path)
            self._serialize(tensors, path, *args, **kwargs)
            if self.made + 1 >= self._number and self._counts(path):
                written = Path(path).read_bytes()
                os.truncate(path, len(written) // 2)
                self._count(path)
                Path(path).write_bytes(written)  # a signal that is only noted lets the writing go on
            else:
                self._count(path)
        except OSError as error:
            said = f"Error while serializing: I/O error: {error.strerror} (os error {error.errno})"
            raise SafetensorError(said) from error
