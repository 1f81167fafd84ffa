"""A full disk ends a run with one message, wherever it strikes; the last checkpoint is whole, and the run can go on."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from safetensors import SafetensorError
from transformers import TrainerState

from loralloc import files as written
from loralloc.recipe import run as pipeline
from loralloc.recipe.run_folder import RunFolder
from loralloc.training import callback, checkpoint, gated_files, log_file, manifest, trainer

from .command import done, loralloc
from .deaths import differences

pytestmark = pytest.mark.usefixtures("unreported")

WORDS = ["--steps", 12, "--save_every", 4, "--log_every", 3, "--lora.dropout", 0.1]
FULL = OSError(errno.ENOSPC, "No space left on device")
RUST = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
"""What safetensors says."""


@contextmanager
def full(where: Any, name: str, calls: int, error: Exception = FULL) -> Iterator[list[int]]:
    """The disk is full when a function is called for the n-th time; yields how often it was called."""
    alive, made = getattr(where, name), [0]

    def write(*args: Any, **kwargs: Any) -> Any:
        made[0] += 1
        if made[0] == calls:
            raise error
        return alive(*args, **kwargs)

    with patch.object(where, name, write):
        yield made


PLACES = {
    "factors": (gated_files, "save_file", 2, RUST),
    "optimizer": (checkpoint, "save_file", 2, RUST),
    "state of the optimizer": (checkpoint, "write_atomically", 4, FULL),
    "state of the trainer": (TrainerState, "save_to_json", 2, FULL),
    "state of the allocation": (callback, "save_file", 2, RUST),
    "marker": (callback, "write_atomically", 4, FULL),
    "window": (trainer, "write_atomically", 2, FULL),
    "reading back": (manifest, "sync_folder", 4, FULL),
    "list of files": (manifest, "write_atomically", 2, FULL),
}
"""Where the second checkpoint, that of step 8, is written."""


@pytest.mark.parametrize("place", PLACES)
def test_in_a_checkpoint(place: str, recipe: Path) -> None:
    done("train", recipe, *WORDS)
    Path("run").rename("whole")
    where, name, calls, error = PLACES[place]
    with full(where, name, calls, error) as made:
        result = loralloc("train", recipe, *WORDS)
    assert made[0] >= calls
    assert (result.code, result.err) == (
        2,
        "error: the disk with run is full; checkpoint-4 in run/checkpoints is not touched. Make room, then go on with "
        "loralloc train run/recipe.yaml --resume\n",
    )
    assert [path.name for path in Path("run/checkpoints").iterdir()] == ["checkpoint-4"], (
        "what was half written is gone"
    )
    assert manifest.damage(Path("run/checkpoints/checkpoint-4")) is None
    done("train", "run/recipe.yaml", "--resume")
    assert differences(Path("run"), Path("whole")) == []


@pytest.mark.parametrize(
    ("where", "name", "calls"),
    [
        (log_file.LogFile, "on_log", 2),
        (callback.trace, "append", 3),
        (RunFolder, "write_json", 1),
        (RunFolder, "keep_trained", 1),
        (pipeline, "export_adapter", 1),
        (pipeline, "write_card", 1),
        (pipeline, "write_report", 1),
    ],
)
def test_elsewhere(where: Any, name: str, calls: int, recipe: Path) -> None:
    with full(where, name, calls):
        result = loralloc("train", recipe, *WORDS)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert result.err.startswith("error: the disk with run is full")
    assert result.err.endswith("Make room, then go on with loralloc train run/recipe.yaml --resume\n")
    done("train", "run/recipe.yaml", "--resume")


@pytest.mark.parametrize(
    ("where", "name", "calls", "cure"),
    [(RunFolder, "create", 1, "start again"), (log_file.LogFile, "on_log", 2, "start over with --replace")],
)
def test_where_nothing_was_saved(where: Any, name: str, calls: int, cure: str, recipe: Path) -> None:
    words = ["train", recipe, "--steps", 6, "--log_every", 3]
    with full(where, name, calls):
        result = loralloc(*words)
    assert (result.code, result.err) == (2, f"error: the disk with run is full. Make room, then {cure}\n")
    done(*words, *cure.split()[3:])


@pytest.mark.parametrize(
    "error", [OSError(errno.EFBIG, "File too large"), SafetensorError("I/O error: File too large (os error 27)")]
)
def test_a_file_that_would_be_too_large(error: Exception, recipe: Path) -> None:
    with full(manifest, "write_atomically", 2, error):
        result = loralloc("train", recipe, *WORDS)
    assert (result.code, result.err) == (
        2,
        "error: a file in run would be larger than this process may write; checkpoint-4 in run/checkpoints is not "
        "touched. Raise ulimit -f, then go on with loralloc train run/recipe.yaml --resume\n",
    )
    done("train", "run/recipe.yaml", "--resume")


def test_in_the_export_of_a_run_without_checkpoints(recipe: Path) -> None:
    with full(pipeline, "export_adapter", 1, OSError(errno.EFBIG, "File too large")):
        assert "error: a file in run would be larger" in loralloc("train", recipe, "--steps", 6).err
    with full(pipeline, "export_adapter", 1):
        result = loralloc("train", recipe, "--steps", 6, "--replace")
    again = "start over with --replace; what it trained is kept: loralloc export run"
    assert (result.code, result.err) == (2, f"error: the disk with run is full. Make room, then {again}\n")
    done("export", "run")
    assert Path("run/adapter/adapter_model.safetensors").exists()


def test_tensors_that_cannot_be_written(recipe: Path) -> None:
    said = "Error while serializing: I/O error: Read-only file system (os error 30)"
    with full(checkpoint, "save_file", 2, SafetensorError(said)):
        result = loralloc("train", recipe, *WORDS)
    assert (result.code, result.err) == (2, f"error: run: tensors could not be written or read: {said}\n")
    done("train", "run/recipe.yaml", "--resume")


def test_other_errors_of_files_are_what_they_are(recipe: Path) -> None:
    with full(log_file.LogFile, "on_log", 2, PermissionError(errno.EACCES, "Permission denied", "log.jsonl")):
        result = loralloc("train", recipe, *WORDS)
    assert (result.code, result.err) == (2, "error: [Errno 13] Permission denied: 'log.jsonl'\n")


@pytest.mark.parametrize(
    ("error", "is_full"),
    [
        (FULL, True),
        (RUST, True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (SafetensorError("I/O error: Disk quota exceeded (os error 122)"), True),
        (OSError(errno.EACCES, "Permission denied"), False),
        (SafetensorError("invalid header"), False),
    ],
)
def test_how_a_full_disk_is_told(error: Exception, is_full: bool) -> None:
    assert written.disk_is_full(error) == is_full
    assert not written.file_is_too_large(error)
