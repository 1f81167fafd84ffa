"""A checkpoint that is rewritten is the old one or the new one, wherever a process ends."""

from __future__ import annotations

import errno
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
from transformers.trainer_utils import get_last_checkpoint, sort_checkpoints

from loralloc.files import disk_is_full
from loralloc.training import rewriting
from loralloc.training.checkpoint import newest_whole
from loralloc.training.manifest import Manifest, read_manifest, write_manifest
from loralloc.training.rewriting import complete_rewriting, rewritten


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint-8"
    folder.mkdir()
    (folder / "weights").write_text("before")
    write_manifest(folder, Manifest(step=8, processes=1))
    return folder


def rewrite(checkpoint: Path) -> None:
    with rewritten(checkpoint) as copy:
        (copy / "weights").write_text("after")
        write_manifest(copy, read_manifest(copy))


def left(checkpoint: Path) -> str:
    """What a run that goes on finds in the checkpoint, which is whole; nothing else is there."""
    complete_rewriting(checkpoint.parent)
    assert newest_whole(checkpoint.parent).checkpoint == checkpoint
    assert list(checkpoint.parent.iterdir()) == [checkpoint]
    return (checkpoint / "weights").read_text()


def test_it_is_rewritten(checkpoint: Path) -> None:
    rewrite(checkpoint)
    assert list(checkpoint.parent.iterdir()) == [checkpoint]
    assert left(checkpoint) == "after"


class KilledError(BaseException):
    """Stands for the signal that ends a process, after which nothing is cleared away."""


@pytest.mark.parametrize(
    ("name", "calls", "found"),
    [("copyfile", 1, "before"), ("rename", 1, "before"), ("rename", 2, "after"), ("sync_folder", 1, "after")],
)
def test_killed_at_any_place(
    name: str, calls: int, found: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = {"copyfile": shutil, "rename": Path, "sync_folder": rewriting}[name]
    alive, made = getattr(where, name), []

    def die(*words: object) -> object:
        made.append(words)
        if len(made) == calls:
            monkeypatch.setattr(rewriting.shutil, "rmtree", lambda *_, **__: None)
            monkeypatch.setattr(Path, "exists", lambda path: True)  # so that nothing is put back
            raise KilledError
        return alive(*words)

    monkeypatch.setattr(where, name, die)
    with pytest.raises(KilledError):
        rewrite(checkpoint)
    monkeypatch.undo()
    assert left(checkpoint) == found


@pytest.mark.parametrize("calls", [1, 2])
def test_interrupted_while_it_is_moved(calls: int, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second Ctrl-C ends the process in the middle, and what clears away must not clear away the checkpoint."""
    alive, made = Path.rename, []

    def interrupted(path: Path, target: Path) -> Path:
        made.append(path)
        if len(made) == calls:
            raise KeyboardInterrupt
        return alive(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rewrite(checkpoint)
    monkeypatch.undo()
    assert list(checkpoint.parent.iterdir()) == [checkpoint]
    assert left(checkpoint) == "before"


def test_a_full_disk_is_told_as_one(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*words: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space left") as error:
        rewrite(checkpoint)
    assert disk_is_full(error.value)
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


def test_transformers_takes_neither_for_a_checkpoint(checkpoint: Path) -> None:
    for begin in (rewriting.NEW, rewriting.OLD):
        shutil.copytree(checkpoint, checkpoint.with_name(f"{begin}checkpoint-9"))
    assert get_last_checkpoint(str(checkpoint.parent)) == str(checkpoint)
    assert sort_checkpoints(str(checkpoint.parent)) == [str(checkpoint)]


def test_what_cannot_be_moved_stays(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive = Path.rename

    def move(path: Path, target: Path) -> Path:
        if path.name.startswith(rewriting.NEW):
            raise OSError("no")
        return alive(path, target)

    monkeypatch.setattr(Path, "rename", move)
    with pytest.raises(OSError, match="no"):
        rewrite(checkpoint)
    monkeypatch.undo()
    assert list(checkpoint.parent.iterdir()) == [checkpoint]
    assert left(checkpoint) == "before"


def test_an_error_inside_leaves_it_as_it_was(checkpoint: Path) -> None:
    full = OSError("full")
    with suppress(OSError), rewritten(checkpoint) as copy:
        (copy / "weights").write_text("after")
        raise full
    assert list(checkpoint.parent.iterdir()) == [checkpoint]
    assert left(checkpoint) == "before"
