"""Trainings that are killed, or told to end, at some moment: in a step, in a checkpoint, in the export, in the report.

One that is resumed, and is perhaps killed again, comes to the run that nobody has killed, bit for bit.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from drills.apart import Ended, command
from drills.outcome import Outcome
from drills.trainings import Training, Whole, fresh, what_is_wrong, whole
from drills.tries import Tried, tries
from drills.writes import Writes

KILLING = (signal.SIGKILL,) * 4
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
CODES = {signal.SIGKILL: 137, signal.SIGTERM: 143, signal.SIGUSR1: 143, signal.SIGINT: 130}
GO_ON = "go on with loralloc "
MOST = 3
"""How often a training is killed before it is let alone."""


@dataclass(frozen=True)
class Death:
    """When a process is sent a signal.

    Attributes:
        signal: Which.
        write: Before which of its writes; None where time decides.
        seconds: After how much processor time.
    """

    signal: signal.Signals
    write: int | None = None
    seconds: float = 0.0

    @classmethod
    def drawn(cls, random: Random, life: Whole) -> Death:
        """Some moment of a life."""
        number = random.choice((*KILLING, *ENDING))
        if random.random() < 0.7:
            return cls(number, write=random.randint(1, life.writes))
        return cls(number, seconds=random.uniform(0.05, 1.0) * life.seconds)

    @contextmanager
    def comes(self, run: Path) -> Iterator[Callable[[], bool]]:
        """Let it come to this process; gives a function that tells whether it has."""
        sent: list[int] = []

        def send(*args: Any) -> None:
            if not sent:
                sent.append(self.signal)
                os.kill(os.getpid(), self.signal)

        if self.write is not None:
            Writes(run, self.write, send, removals=True)
        else:
            # Unhandled, it ends a process at once as SIGKILL does, in the middle of whatever it does.
            signal.signal(signal.SIGPROF, signal.SIG_DFL if self.signal == signal.SIGKILL else send)
            signal.setitimer(signal.ITIMER_PROF, self.seconds)
        yield lambda: bool(sent)

    def wrong(self, ended: Ended) -> str:
        """Say what is wrong about an end; nothing where it is as it should be."""
        if self.signal == signal.SIGKILL and ended.code in (137, 128 + signal.SIGPROF):
            return ""
        if ended.code in (0, 2) and not ended.noted:
            return ""
        if ended.code == 0 and "Exception ignored in" in ended.said:  # Python held it up, and no training came after
            return ""
        if ended.code != CODES[self.signal]:
            return f"{self.signal.name}: exit code {ended.code}: {ended.said[-600:]}"
        return "" if f"stopped by {self.signal.name}" in ended.said else f"{self.signal.name}: it said {ended.said!r}"


def _attempt(random: Random) -> Tried:
    training = Training.drawn(random)
    life = whole(training)
    return tried(training, [Death.drawn(random, life) for _ in range(random.choice((1, 1, 1, 2, MOST)))])


def tried(training: Training, deaths: Sequence[Death]) -> Tried:
    """Let a training die in turn, go on each time, and compare what it comes to."""
    case = f"{training}, {deaths}"
    with fresh() as folder:
        run = Path(folder, "run")
        words = training.words
        for death in deaths:
            ended = command(Path(folder), words, death.comes(run))
            if wrong := death.wrong(ended):
                return Tried(case, lost=wrong)
            if ended.code == 2:  # it is over, or there is nothing to go on from
                break
            words = _going_on(ended, training)
        ended, anew = _to_the_end(Path(folder), words, training)
        told = any(death.signal != signal.SIGKILL for death in deaths)
        return Tried(case, anew, what_is_wrong(ended, run, training, checkpoints=not told))


def _going_on(ended: Ended, training: Training) -> list[Any]:
    """The command that goes on: the one that was told, or the same with `--resume`."""
    told = ended.said.partition(GO_ON)[2]
    return told.split() if told else [*training.words, "--resume"]


def _to_the_end(folder: Path, words: list[Any], training: Training) -> tuple[Ended, bool]:
    """Let a training go on to its end; where there is nothing to go on from, start anew as the message says."""
    ended = command(folder, words)
    if ended.code != 2:
        return ended, False
    if "has finished; there is nothing to resume" in ended.said:
        return Ended(0), False
    if "there is no folder run" in ended.said or "run is not a run: it has no recipe.yaml" in ended.said:
        return command(folder, training.words), True
    return ended, False


def drill(seed: int, cases: int) -> Outcome:
    """Kill trainings, and let them go on."""
    return tries("kills", _attempt, cases, seed)
