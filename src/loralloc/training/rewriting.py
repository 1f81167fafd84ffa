"""Checkpoints that are rewritten as a whole: a process that is killed meanwhile leaves the old one, or the new one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loralloc.files import sync_folder

NEW, OLD = ".new", ".old"
"""Endings of a checkpoint that is not in its place yet, and of the one that was there before."""


@contextmanager
def rewritten(checkpoint: Path) -> Iterator[Path]:
    """Give a copy of a checkpoint to be changed, which takes its place at the end.

    Args:
        checkpoint: Its folder; as it was where what is done inside fails.
    """
    new, old = (checkpoint.with_name(checkpoint.name + ending) for ending in (NEW, OLD))
    try:
        shutil.rmtree(new, ignore_errors=True)
        shutil.copytree(checkpoint, new)
        yield new
        checkpoint.rename(old)
        try:
            new.rename(checkpoint)
        except OSError:
            old.rename(checkpoint)
            raise
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    sync_folder(checkpoint.parent)
    shutil.rmtree(old)


def complete_rewriting(folder: Path) -> None:
    """Put a checkpoint into its place where a process was killed between taking the old one away and that.

    Args:
        folder: Where checkpoints are.
    """
    for new in folder.glob(f"checkpoint-*{NEW}"):
        place = new.with_suffix("")
        if place.exists():
            shutil.rmtree(new)
        else:
            new.rename(place)
    for old in folder.glob(f"checkpoint-*{OLD}"):
        shutil.rmtree(old)
