"""One attempt at something with files of strangers, and what must not come of it."""

from __future__ import annotations

import contextlib
import functools
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

from drills.outcome import Outcome

SECRET = "the-secret-of-this-machine-7f3a"
"""What stands in a file beside the folder that a stranger has sent."""
LONGEST = 60.0
"""Seconds after which an attempt is taken to hang."""
LONGEST_REFUSAL = 1.0
"""Processor seconds that a refusal may take, with those of the processes that it has started."""
LONGEST_MESSAGE = 2**21
"""Characters of a message, which may quote a value."""


@dataclass(frozen=True)
class Place:
    """Where an attempt is made.

    Attributes:
        inside: An empty folder for what the stranger has sent.
        outside: A file of this machine, which holds `SECRET`.
        written: An empty folder for what is written.
    """

    inside: Path
    outside: Path
    written: Path


class _HangsError(BaseException):
    """An attempt has taken too long; no `except Exception` holds it up."""


FORBIDDEN = ("pickle.find_class", "socket.connect", "os.system", "os.exec")
"""Events of Python's audit that no file of a stranger may cause."""

Run = Callable[[Place, Any], object]
"""Writes a case into its place, and does what is asked; it may raise what the command line tells in words."""


class _Watch:
    """Notes forbidden events while somebody looks; Python keeps such a hook until the process ends."""

    def __init__(self) -> None:
        self.seen: list[str] | None = None
        sys.addaudithook(self._note)

    def _note(self, event: str, args: tuple[Any, ...]) -> None:
        if self.seen is not None and event in FORBIDDEN:
            self.seen.append(f"{event} {args}"[:200])

    @contextlib.contextmanager
    def looking(self) -> Iterator[list[str]]:
        """Give the list of what is seen inside."""
        self.seen = seen = []
        try:
            yield seen
        finally:
            self.seen = None


@functools.cache
def _watch() -> _Watch:
    return _Watch()


def attempts(name: str, cases: SearchStrategy[Any], run: Run, number: int, start: int) -> Outcome:
    """Draw cases and run each in a place of its own.

    Args:
        name: What the drill is called.
        cases: Where the cases come from.
        run: What is done with each.
        number: How many cases.
        start: The seed.
    """
    outcome = Outcome(name)

    @seed(start)
    @settings(
        max_examples=number,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases)
    def each(case: Any) -> None:
        with tempfile.TemporaryDirectory(prefix="loralloc-drill-") as root:
            place = Place(Path(root, "sent"), Path(root, "mine.txt"), Path(root, "out"))
            message, reason = _attempt(place, run, case)
            reason = reason or _harm(place, message)
        if reason:
            outcome.lost.append(f"{name}: {reason}; case: {case!r:.2000}")
        else:
            outcome.refused += bool(message)
            outcome.done += not message

    each()
    return outcome


def _attempt(place: Place, run: Run, case: Any) -> tuple[str, str]:
    """Run a case; return the words in which it was refused, and what was wrong about that."""
    from loralloc.errors import UserError

    place.inside.mkdir()
    place.written.mkdir()
    place.outside.write_text(SECRET)
    before, message = _processor_seconds(), ""
    with _watch().looking() as seen:
        try:
            with _stopped_after(LONGEST):
                run(place, case)
        except (UserError, OSError, FloatingPointError) as error:  # what the command line tells in words
            message = str(error)
            if not message:
                return "", f"{type(error).__name__} without a word"
        except _HangsError:
            return "", f"takes more than {LONGEST:g} s"
        except BaseException as error:
            return "", f"{type(error).__name__}: {str(error)[:300]}"
    if seen:
        return message, f"did {seen[0]}"
    seconds = _processor_seconds() - before
    slow = message and seconds > LONGEST_REFUSAL
    return message, f"refused after {seconds:.1f} s of processor time: {message[:300]}" if slow else ""


def _harm(place: Place, message: str) -> str:
    """What was told or changed that belongs to this machine."""
    around = {path.name for path in place.inside.parent.iterdir()}
    if around != {"sent", "mine.txt", "out"} or place.outside.read_bytes() != SECRET.encode():
        return "a file outside was changed"
    if len(message) > LONGEST_MESSAGE:
        return f"a message of {len(message):,} characters"
    return "the secret was told" if SECRET in message or any(map(_tells, _made(place))) else ""


def _made(place: Place) -> Iterator[Path]:
    """What may have been written: pages and records."""
    for folder in (place.inside, place.written):
        yield from (path for path in folder.rglob("*") if path.suffix in (".html", ".json", ".md"))


def _tells(path: Path) -> bool:
    small = not path.is_symlink() and path.is_file() and path.stat().st_size < 2**26
    return small and SECRET.encode() in path.read_bytes()


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + used.ru_utime + used.ru_stime


@contextlib.contextmanager
def _stopped_after(seconds: float) -> Iterator[None]:
    def stop(*args: Any) -> None:
        raise _HangsError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
