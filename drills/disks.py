"""Disks that are full or cannot be written any more, and outputs that are closed, at some write of a training.

What cannot be written ends a training with one clear error, the last checkpoint is whole, and the training goes on once
there is room. What nobody reads does not end it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

from drills.apart import Ended, command
from drills.outcome import Outcome
from drills.trainings import Training, fresh, what_is_wrong, whole
from drills.tries import Tried, tries
from drills.writes import Writes

FAILURES = (errno.ENOSPC, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO)
FULL = (errno.ENOSPC, errno.EDQUOT)
LINES = 40
"""Writes to a training's output, about."""


@contextmanager
def failing(run: Path, number: int, error: int, lasting: bool) -> Iterator[Callable[[], bool]]:
    """Let a write fail, and where it lasts, all that come later; gives a function that tells whether one has."""
    failed: list[Path] = []

    def fail(path: Path) -> None:
        if lasting or not failed:
            failed.append(path)
            raise OSError(error, os.strerror(error), str(path))

    Writes(run, number, fail, removals=False)
    yield lambda: bool(failed)


def _attempt(random: Random) -> Tried:
    return random.choice((_of_a_disk, _of_a_disk, _of_a_disk, _of_an_output))(random)


def _of_a_disk(random: Random) -> Tried:
    training = Training.drawn(random)
    number, error = random.randint(1, whole(training).makes), random.choice(FAILURES)
    lasting = random.random() < 0.5
    case = f"{training}, {errno.errorcode[error]} at write {number}{' and later' if lasting else ''}"
    with fresh() as folder:
        run = Path(folder, "run")
        ended = command(Path(folder), training.words, failing(run, number, error, lasting))
        if ended.code == 0:
            return Tried(case, lost=what_is_wrong(ended, run, training))
        if wrong := wrong_about(ended, error, run):
            return Tried(case, lost=wrong)
        told = ended.said.rpartition("go on with loralloc ")[2] if "go on with loralloc " in ended.said else ""
        return Tried(case, True, _goes_on(Path(folder), told.split() or [*training.words, "--resume"], training))


def wrong_about(ended: Ended, error: int, run: Path) -> str:
    """Say what is wrong about an error, or what it has left."""
    from loralloc.training.checkpoint import WRITTEN_LAST, damage

    if ended.code != 2 or not ended.said.startswith("error: ") or "Traceback" in ended.said:
        return f"exit code {ended.code}: {ended.said[-1500:]}"
    if error in FULL and "is full" not in ended.said:
        return f"a full disk is told as: {ended.said}"
    for checkpoint in run.rglob("checkpoint-*"):
        if (checkpoint / WRITTEN_LAST[0]).exists() and (reason := damage(checkpoint)):
            return f"{checkpoint.name} is not whole: {reason}"
    return ""


def _goes_on(folder: Path, words: list[Any], training: Training) -> str:
    """Say what is wrong about a training that goes on when there is room again, or starts anew as the words say."""
    ended = command(folder, words)
    if ended.code == 2:
        if "there is no folder run" in ended.said or "run is not a run: it has no recipe.yaml" in ended.said:
            ended = command(folder, training.words)
        elif "has finished; there is nothing to resume" in ended.said:
            ended = Ended(0)
    return what_is_wrong(ended, folder / "run", training)


class _Output:
    """An output that goes nowhere, and breaks at some write: its reader leaves, or its disk is full."""

    def __init__(self, breaks_at: int, full: bool) -> None:
        self._stream = open(os.devnull, "w", buffering=1, encoding="utf-8")  # noqa: SIM115 - until the process ends
        self._breaks_at, self._full, self._made = breaks_at, full, 0

    def write(self, text: str) -> int:
        self._made += 1
        if self._made == self._breaks_at:
            os.dup2(os.open("/dev/full", os.O_WRONLY) if self._full else _unread_pipe(), self._stream.fileno())
        return self._stream.write(text)

    def getvalue(self) -> str:
        """Nobody has kept what was written."""
        return ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _unread_pipe() -> int:
    reading, writing = os.pipe()
    os.close(reading)
    return writing


@contextmanager
def _breaking(breaks_at: int, full: bool, which: int) -> Iterator[None]:
    """Put such an output in the place of stdout (0) or stderr (1)."""
    outputs: list[Any] = [StringIO(), StringIO()]
    outputs[which] = _Output(breaks_at, full)
    with patch("cli.command.StringIO", lambda: outputs.pop(0)):
        yield


def _of_an_output(random: Random) -> Tried:
    training, full, which = Training.drawn(random), random.random() < 0.5, random.randrange(2)
    breaks_at, way = random.randint(1, LINES), random.choice(([], ["--json"], ["--quiet"], ["--verbose"]))
    case = f"{training} {way}, {('stdout', 'stderr')[which]} {'full' if full else 'closed'} at write {breaks_at}"
    with fresh() as folder:
        ended = command(Path(folder), [*training.words, *way], _breaking(breaks_at, full, which))
        return Tried(case, lost=what_is_wrong(ended, Path(folder, "run"), training))


def drill(seed: int, cases: int) -> Outcome:
    """Let writes fail, and let trainings go on."""
    return tries("disks and outputs", _attempt, cases, seed)
