"""Tiny trainings by the command line, one of every method: what they would come to if nothing befell them."""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

# All that a training needs is there before the first fork.
import matplotlib.backends.backend_agg
import matplotlib.backends.backend_svg
import matplotlib.pyplot  # noqa: F401
import peft.tuners.lora.bnb  # noqa: F401
import trl.trainer.dpo_config
import trl.trainer.sft_config  # noqa: F401

import loralloc.recipe.run
import loralloc.report.page
import loralloc.tasks.sequence_classification  # noqa: F401
from drills.apart import Ended, command
from drills.writes import NEVER, Writes

WAYS: dict[str, dict[str, Any]] = {
    "two checkpoints kept": {},
    "one checkpoint kept": {"trainer": "{save_total_limit: 1}"},
    "saved at the end alone": {"save_every": 12},
    "a process that loads data": {"trainer": "{dataloader_num_workers: 1}"},
}
"""How a training keeps its state; by default after steps 4, 8 and 12 of 12."""


@dataclass(frozen=True)
class Training:
    """A training.

    Attributes:
        method: Its method.
        way: How it keeps its state, of `WAYS`.
    """

    method: str
    way: str = next(iter(WAYS))

    @classmethod
    def drawn(cls, random: Random) -> Training:
        """Any of them."""
        from cli.deaths import METHODS

        return cls(random.choice(list(METHODS)), random.choice(list(WAYS)))

    @property
    def words(self) -> list[Any]:
        """The command."""
        from cli.deaths import words

        way = dict(WAYS[self.way])
        trainer = way.pop("trainer", None)
        return [*words(self.method, **way), *(["--training.trainer", trainer] if trainer else [])]


@dataclass(frozen=True)
class Whole:
    """A training that nothing has befallen.

    Attributes:
        run: Its run folder.
        seconds: Of processor time that it took.
        writes: How often it wrote, removals among them.
        makes: How often without them.
    """

    run: Path
    seconds: float
    writes: int
    makes: int


@functools.cache
def _home() -> tempfile.TemporaryDirectory[str]:
    """The folder with model and data; it goes with this process."""
    from cli.command import examples, save_encoder, write_rows

    home = tempfile.TemporaryDirectory(prefix="loralloc-drill-")
    save_encoder(Path(home.name, "encoder"))
    for seed, (name, count) in enumerate({"train": 48, "validation": 21}.items()):
        write_rows(Path(home.name, f"{name}.jsonl"), examples(count, seed))
    return home


def fresh() -> tempfile.TemporaryDirectory[str]:
    """A folder with the recipe, and nothing else; the run will be in `run`."""
    from cli.command import RECIPE

    folder = tempfile.TemporaryDirectory(prefix="case-", dir=_home().name)
    text = RECIPE.format(encoder=Path(_home().name, "encoder"), data=_home().name)
    Path(folder.name, "recipe.yaml").write_text(text, encoding="utf-8")
    return folder


@functools.cache
def whole(training: Training) -> Whole:
    """Train without an incident, once."""
    folder = fresh()
    root = Path(folder.name)
    _kept.append(folder)

    @contextmanager
    def counting() -> Iterator[Any]:
        every, making = (Writes(root / "run", NEVER, Path, removals) for removals in (True, False))
        yield lambda: (time.process_time(), every.made, making.made)

    ended = command(root, training.words, counting())
    if ended.code:
        raise RuntimeError(f"{training} does not train: {ended.said}")
    return Whole(root / "run", *ended.noted)


_kept: list[tempfile.TemporaryDirectory[str]] = []
"""Folders that stay as long as this process."""


def unlike(run: Path, training: Training, checkpoints: bool = True) -> list[str]:
    """Files in which a run differs from one that nothing has befallen, but for times.

    Args:
        run: Its folder.
        training: What it should be.
        checkpoints: Whether checkpoints count; one that a signal has asked for is one more.
    """
    from cli.deaths import unlike as found

    names = [name for name in found(run, whole(training).run) if name != "report.html" and "figures/" not in name]
    if not (run / "report.html").is_file():
        names.append("report.html")
    return [name for name in names if checkpoints or "checkpoints/" not in name]


def what_is_wrong(ended: Ended, run: Path, training: Training, checkpoints: bool = True) -> str:
    """Say what is wrong about a run that should have come to its end; nothing where it is as it should be."""
    if ended.code:
        return f"exit code {ended.code}: {ended.said[-600:]}"
    different = unlike(run, training, checkpoints)
    return f"another run than the one that was not ended: {', '.join(different)}" if different else ""
