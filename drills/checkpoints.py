"""Checkpoints with a file that is damaged: cut, flipped, lengthened, emptied, lost, or another file in its place.

A run that is resumed falls back to the checkpoint before, says so, and comes to the run that was never ended.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

from drills.apart import command
from drills.outcome import Outcome
from drills.trainings import Training, fresh, what_is_wrong
from drills.tries import Tried, tries

KILLED = 9
"""The step of the kill: checkpoints of steps 4 and 8 are left."""


def _cut(random: Random, path: Path) -> None:
    path.write_bytes(path.read_bytes()[: random.randrange(path.stat().st_size)])


def _flip(random: Random, path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    path.write_bytes(bytes(content))


def _lengthen(random: Random, path: Path) -> None:
    with path.open("ab") as file:
        file.write(random.randbytes(random.choice((1, 4096))))


def _empty(random: Random, path: Path) -> None:
    path.write_bytes(b"")


def _zero(random: Random, path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def _lose(random: Random, path: Path) -> None:
    path.unlink()


def _swap(random: Random, path: Path) -> None:
    """With another file of the checkpoint, or the same one of the checkpoint before."""
    others = [other for other in path.parent.iterdir() if other.read_bytes() != path.read_bytes()]
    earlier = path.parents[1] / "checkpoint-4" / path.name
    if earlier.exists() and earlier.read_bytes() != path.read_bytes() and random.random() < 0.5:
        shutil.copyfile(earlier, path)
    else:
        shutil.copyfile(random.choice(sorted(others)), path)


DAMAGES: tuple[Callable[[Random, Path], None], ...] = (_cut, _flip, _flip, _lengthen, _empty, _zero, _lose, _swap)


@functools.cache
def _killed(method: str) -> TemporaryDirectory[str]:
    """A folder with a run that was killed; it goes with this process."""
    from cli.deaths import killed_at

    folder, training = fresh(), Training(method)
    ended = command(Path(folder.name), training.words, killed_at(KILLED))
    if ended.said != "ended":
        raise RuntimeError(f"{training} was not killed: {ended.said}")
    return folder


def _attempt(random: Random) -> Tried:
    from cli.deaths import METHODS

    training = Training(random.choice(list(METHODS)))
    both = random.random() < 0.1
    with fresh() as root:
        run = Path(shutil.copytree(Path(_killed(training.method).name, "run"), Path(root, "run")))
        newest = next(run.rglob("checkpoint-8"))
        done = []
        for checkpoint in (newest, newest.with_name("checkpoint-4"))[: 1 + both]:
            name = random.choice(sorted(path.name for path in checkpoint.iterdir() if path.stat().st_size))
            damage = random.choice(DAMAGES)
            damage(random, checkpoint / name)
            done.append(f"{damage.__name__} {checkpoint.name}/{name}")
        ended = command(Path(root), [*training.words, "--resume"])
        case = f"{training.method}, {', '.join(done)}"
        if both:
            refused = ended.code == 2 and ended.said.startswith("error: no checkpoint is whole any more")
            return Tried(case, refused, "" if refused else f"exit code {ended.code}: {ended.said[-600:]}")
        wrong = what_is_wrong(ended, run, training)
        if not wrong and "checkpoint-8 is not whole: " not in ended.printed:
            wrong = "it went on without a word"
        return Tried(case, lost=wrong)


def drill(seed: int, cases: int) -> Outcome:
    """Damage checkpoints, and let runs go on."""
    return tries("checkpoints", _attempt, cases, seed)
