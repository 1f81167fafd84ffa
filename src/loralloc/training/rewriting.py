"""Checkpoints that are rewritten as a whole: a process that is killed meanwhile leaves the old one, or the new one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loralloc.files import sync_folder

NEW, OLD = ".new-", ".old-"
"""Prefixes of folder names: of a rewritten checkpoint that is not in its place yet, and of the one that it replaces.

transformers does not take such folders for checkpoints.
"""


@contextmanager
def rewritten(checkpoint: Path) -> Iterator[Path]:
    """Yield a copy of a checkpoint to change; at the end, the copy replaces the checkpoint.

    Args:
        checkpoint: Its folder; it stays as it was if the body fails.
    """
    new, old = (checkpoint.with_name(begin + checkpoint.name) for begin in (NEW, OLD))
    try:
        _copy(checkpoint, new)
        yield new
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    try:
        checkpoint.rename(old)
        new.rename(checkpoint)
    except BaseException:
        if not checkpoint.exists():
            old.rename(checkpoint)
        shutil.rmtree(new, ignore_errors=True)
        raise
    sync_folder(checkpoint.parent)
    shutil.rmtree(old)


def complete_rewriting(folder: Path) -> None:
    """Finish the rewriting of checkpoints during which a process has ended.

    A checkpoint is missing from its place only if its new copy was complete: the copy is used, or else the old one.

    Args:
        folder: Where checkpoints are; it may be missing.
    """
    for begin in (NEW, OLD):
        for path in folder.glob(f"{begin}checkpoint-*"):
            place = path.with_name(path.name.removeprefix(begin))
            if place.exists():
                shutil.rmtree(path)
            else:
                path.rename(place)


def _copy(folder: Path, target: Path) -> None:
    """Copy contents alone: some file systems keep neither times nor modes. The first error of a file is raised."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for path in sorted(folder.rglob("*")):
        place = target / path.relative_to(folder)
        if path.is_dir():
            place.mkdir()
        else:
            shutil.copyfile(path, place)
