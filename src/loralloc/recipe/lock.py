"""One process at a time works in a run folder."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from loralloc.errors import UserError
from loralloc.recipe.run_folder import LOCK

WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
"""Errors of file systems that cannot lock files."""


_held: set[IO[str]] = set()


def _let_go() -> None:
    """Close the lock in forked children: a data-loading worker may outlive its killed parent by seconds."""
    for file in _held:
        file.close()
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of a run folder, which is created if it is missing.

    The system releases the lock when the process ends, however it ends: a lock file left by a killed process blocks
    nobody.

    Args:
        folder: The run folder.

    Raises:
        UserError: Another process is at work in it.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    file = _lock(path)
    _held.add(file)
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield
    finally:
        path.unlink(missing_ok=True)
        _held.discard(file)
        file.close()
        if made:
            with suppress(OSError):  # a run that was refused leaves no empty folder
                folder.rmdir()


def _lock(path: Path) -> IO[str]:
    while True:
        file = path.open("a+", encoding="utf-8")  # opened for writing, as locks over NFS require
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in WITHOUT_LOCKS:
                return file
            file.seek(0)
            holder = file.read() or "another process"
            file.close()
            raise UserError(
                f"{path.parent} is in use: {holder} is at work in it; wait for it, or end it. A run folder takes one "
                "process at a time"
            ) from error
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # whoever held it has removed the file meanwhile
