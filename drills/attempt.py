"""One attempt at something with files of strangers, and what must not come of it."""

from __future__ import annotations

import contextlib
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
LONGEST = 20.0
"""Seconds after which an attempt is taken to hang."""
LONGEST_REFUSAL = 1.0
"""Processor seconds that a refusal may take, with those of the processes that it has started."""
MESSAGE = 2**21
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


class _Hangs(BaseException):
    """An attempt has taken too long; no `except Exception` holds it up."""


_events: list[str] | None = None


def _watch(event: str, args: tuple[Any, ...]) -> None:
    if _events is not None and event in (
        "pickle.find_class",
        "socket.connect",
        "os.system",
        "os.exec",
        "os.posix_spawn",
    ):
        _events.append(f"{event} {args}"[:200])


_hooked = False


def attempts(
    name: str, cases: SearchStrategy[Any], run: Callable[[Place, Any], object], number: int, start: int
) -> Outcome:
    """Draw cases and run each in a place of its own.

    Args:
        name: What the drill is called.
        cases: Where the cases come from.
        run: Writes a case into its place and does what is asked; it may raise what the command line tells in words.
        number: How many cases.
        start: The seed.
    """
    global _hooked
    if not _hooked:
        sys.addaudithook(_watch)
        _hooked = True
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
            reason = _attempt(Path(root), run, case, outcome)
        if reason:
            outcome.lost.append(f"{name}: {reason}; case: {case!r:.2000}")

    each()
    return outcome


def _attempt(root: Path, run: Callable[[Place, Any], object], case: Any, outcome: Outcome) -> str:
    """Run a case; return what was lost by it."""
    global _events
    from loralloc.errors import UserError

    place = Place(root / "sent", root / "mine.txt", root / "out")
    place.inside.mkdir()
    place.written.mkdir()
    place.outside.write_text(SECRET)
    before, message, _events = _processor_seconds(), "", []
    try:
        with _stopped_after(LONGEST):
            run(place, case)
    except (UserError, OSError, FloatingPointError) as error:  # what the command line tells in words
        message = str(error)
        if not message:
            return f"{type(error).__name__} without a word"
    except _Hangs:
        return f"takes more than {LONGEST:g} s"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    finally:
        events, _events = _events, None
    seconds = _processor_seconds() - before
    if events:
        return f"did {events[0]}"
    if message and seconds > LONGEST_REFUSAL:
        return f"refused after {seconds:.1f} s of processor time: {message[:300]}"
    if len(message) > MESSAGE:
        return f"a message of {len(message):,} characters"
    if place.outside.read_text() != SECRET or {path.name for path in root.iterdir()} != {"sent", "mine.txt", "out"}:
        return "a file outside was changed"
    if SECRET in message or any(_tells(path) for path in _made(place)):
        return "the secret was told"
    outcome.refused += bool(message)
    outcome.done += not message
    return ""


def _made(place: Place) -> Iterator[Path]:
    """What may have been written: pages and records."""
    for folder in (place.inside, place.written):
        yield from (path for path in folder.rglob("*") if path.suffix in (".html", ".json", ".md"))


def _tells(path: Path) -> bool:
    return (
        not path.is_symlink()
        and path.is_file()
        and path.stat().st_size < 2**26
        and SECRET.encode() in path.read_bytes()
    )


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + used.ru_utime + used.ru_stime


@contextlib.contextmanager
def _stopped_after(seconds: float) -> Iterator[None]:
    def stop(*args: Any) -> None:
        raise _Hangs

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
