"""Standard output and error that cannot end a run: if their reader has gone, only the rest of the output is lost.

A character that their encoding lacks is a question mark there.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any


class Lasting:
    """A stream whose writes do not fail: after the first error, all output is discarded.

    Args:
        stream: The stream to write to.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write the text, or discard it."""
        with self._or_nowhere():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream, or discard what it holds."""
        with self._or_nowhere():
            self._stream.flush()

    @contextmanager
    def _or_nowhere(self) -> Iterator[None]:
        """Redirect a broken stream to the null device, so that flushing its buffer at exit does not fail again."""
        try:
            yield
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def replace_what_cannot_be_shown() -> None:
    """Let standard output and error show a question mark for what their encoding lacks, unless told otherwise."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")


@contextmanager
def lasting_streams() -> Iterator[None]:
    """Inside, printing does not fail when nobody reads the output, or when the process has no output streams."""
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
