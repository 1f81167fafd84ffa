"""One process at a time works in a run folder, and none is kept out by one that is no more."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from loralloc.errors import UserError
from loralloc.recipe.lock import locked
from loralloc.recipe.run_folder import LOCK

HOLD = "import sys, time\nfrom pathlib import Path\nfrom loralloc.recipe.lock import locked\n"
HOLD += "with locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)\n"


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that is at work in `run`."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_another_process_is_named_until_it_ends(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    words = f"run is in use: process {holder.pid} on .*; wait for it, or end it"
    with pytest.raises(UserError, match=words), locked(tmp_path / "run"):
        pass
    holder.kill()
    holder.wait()
    assert (tmp_path / "run" / LOCK).is_file(), "it was killed"
    with locked(tmp_path / "run"):
        assert (tmp_path / "run" / LOCK).read_text().startswith(f"process {os.getpid()} on ")
    assert not (tmp_path / "run" / LOCK).exists()


def test_a_process_that_it_has_forked_holds_nothing(tmp_path: Path) -> None:
    """Workers that load data notice only after seconds that the process that trains was killed."""
    reading, writing = os.pipe()
    waiting, ending = os.pipe()
    holder = os.fork()
    if holder == 0:
        with locked(tmp_path / "run"):
            if os.fork() == 0:  # the worker, which lives until nobody can write to it any more
                os.write(writing, str(os.getpid()).encode())
                os.close(ending)
                os.read(waiting, 1)
                os._exit(0)
            signal.pause()
    worker = int(os.read(reading, 20))
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    os.kill(worker, 0)
    with locked(tmp_path / "run"):
        pass
    for descriptor in (reading, writing, waiting, ending):
        os.close(descriptor)


def test_a_folder_that_was_made_for_nothing_goes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="refused"), locked(tmp_path / "run"):
        raise UserError("refused")
    assert not (tmp_path / "run").exists()
    (tmp_path / "mine").mkdir()
    with locked(tmp_path / "mine"):
        pass
    assert (tmp_path / "mine").is_dir()


def test_a_file_that_was_removed_by_its_holder_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the opening and the locking, the other process may have ended."""
    real, turns = fcntl.flock, iter([True, False])

    def flock(file: int, operation: int) -> None:
        if next(turns):
            (tmp_path / LOCK).unlink()
        real(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path):
        assert (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()} on ")


def test_where_files_cannot_be_locked_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path):
        assert (tmp_path / LOCK).is_file()
