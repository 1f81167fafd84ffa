"""A command in a process of its own, which may be ended at any moment.

The process is a fork of one that has imported everything: an end costs a second then, and not the ten that the
libraries take. The one that forks trains nothing itself.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
import traceback
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

LONGEST = 300.0
"""Seconds after which a command is taken to hang, on a machine that has other things to do."""


@dataclass(frozen=True)
class Ended:
    """How a command has ended.

    Attributes:
        code: Its exit code, as a shell tells it: 128 and the signal where one has ended it.
        said: What it said on stderr, on one line; nothing where it could not any more.
        printed: What it said on stdout, likewise.
        noted: What was noted while it ran.
    """

    code: int
    said: str = ""
    printed: str = ""
    noted: Any = None


NOTHING: AbstractContextManager[Any] = nullcontext()


class HangsError(Exception):
    """A command has taken too long."""


def command(folder: Path, words: list[Any], around: AbstractContextManager[Any] = NOTHING) -> Ended:
    """Run `loralloc` in a folder.

    Args:
        folder: Where.
        words: What comes after its name.
        around: Entered in the new process; what it gives is asked for a note when the command has ended.
    """
    with tempfile.TemporaryFile() as told:
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            _live(told, folder, words, around)
        code = _waited_for(child)
        told.seek(0)
        found = told.read()
    return Ended(code, *json.loads(found)) if found else Ended(code)


def _live(told: IO[bytes], folder: Path, words: list[Any], around: AbstractContextManager[Any]) -> None:
    """Be the new process; never returns."""
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell runs in the background ignores it
        os.chdir(folder)
        code, said, *more = _run(words, around)
        told.write(json.dumps([said, *more]).encode())
        told.flush()
    finally:
        os._exit(code)


def _run(words: list[Any], around: AbstractContextManager[Any]) -> tuple[int, str, str, Any]:
    from cli.command import loralloc

    try:
        with around as note:
            result = loralloc(*words)
            said, printed = (" ".join(text.split()) for text in (result.err, result.out))
            return result.code, said, printed, None if note is None else note()
    except BaseException:  # the command line lets nothing through: what comes here is a traceback to the user
        return 1, traceback.format_exc(), "", None
    return 1, "ended", "", None  # by what was around it


def _waited_for(child: int) -> int:
    end = time.monotonic() + LONGEST
    while time.monotonic() < end:
        gone, status = os.waitpid(child, os.WNOHANG)
        if gone:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise HangsError(f"takes more than {LONGEST:g} s")
