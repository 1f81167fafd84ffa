"""Standard output and errors that a run survives: a reader that has left costs the rest of the words, not the run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any


class Lasting:
    """A stream whose writes do not fail: after the first that does, what is written goes nowhere.

    Args:
        stream: What is written to; None where the process was started without it.
    """

    def __init__(self, stream: IO[str] | None) -> None:
        self._stream: IO[str] = stream or _nowhere()

    def write(self, text: str) -> int:
        """Write, or lose it."""
        try:
            return self._stream.write(text)
        except OSError:
            self._give_up()
            return len(text)

    def flush(self) -> None:
        """Hand on what was written, or lose it."""
        try:
            self._stream.flush()
        except OSError:
            self._give_up()

    def _give_up(self) -> None:
        """Leave the broken stream; what it still holds would fail again when the interpreter ends."""
        broken, self._stream = self._stream, _nowhere()
        try:
            os.dup2(self._stream.fileno(), broken.fileno())
        except (OSError, ValueError):  # it is no file
            return

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _nowhere() -> IO[str]:
    return open(os.devnull, "w", encoding="utf-8")


@contextmanager
def lasting_streams() -> Iterator[None]:
    """Let nothing inside fail because nobody reads what it prints."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (Lasting(stream) for stream in before)  # type: ignore[assignment]
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before
