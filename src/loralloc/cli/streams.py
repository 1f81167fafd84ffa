"""Standard output and errors that a run survives: a reader that has left costs the rest of the words, not the run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any


class Lasting:
    """A stream whose writes do not fail: from the first that would on, what is written goes nowhere.

    Args:
        stream: What is written to.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, or lose it."""
        with self._or_nowhere():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Hand on what was written, or lose it."""
        with self._or_nowhere():
            self._stream.flush()

    @contextmanager
    def _or_nowhere(self) -> Iterator[None]:
        """Lead a broken stream to nowhere, with what it still holds: else it would fail again when the process ends."""
        try:
            yield
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def lasting_streams() -> Iterator[None]:
    """Let nothing inside fail because nobody reads what it prints, or the process has no output at all."""
    before = sys.stdout, sys.stderr
    with ExitStack() as stack:
        sys.stdout, sys.stderr = (  # type: ignore[assignment]
            Lasting(stream or stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))) for stream in before
        )
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            sys.stdout, sys.stderr = before
