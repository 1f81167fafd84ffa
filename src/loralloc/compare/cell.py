"""One run of a comparison, in a process of its own.

A crash ends only this run. An interrupted run continues from its newest checkpoint, if it has one. A finished run is
not repeated.
"""

from __future__ import annotations

import fcntl
import math
import sys
from pathlib import Path

import torch

from loralloc.compare.peers import train_peer
from loralloc.errors import UserError
from loralloc.recipe.changes import NotResumableError
from loralloc.recipe.run import run
from loralloc.recipe.run_folder import RunFolder
from loralloc.recipe.schema import Recipe, load_recipe
from loralloc.recipe.screen import Screen

REFUSED = 2
"""The exit code of a run that would fail again, because its recipe is refused or its training diverges."""


def run_cell(recipe: Path, peer: str | None, threads: int) -> int:
    """Run a cell; errors, warnings and notes go to its log (stderr).

    Args:
        recipe: The file of its recipe.
        peer: The name of a peer, which is a variant of LoRA from PEFT; None for any other contender.
        threads: Processor threads.

    Returns:
        The exit code: 0, or `REFUSED`.
    """
    torch.set_num_threads(threads)
    with recipe.open("r+") as own:  # open for writing, which locks over NFS need
        fcntl.flock(own, fcntl.LOCK_EX)  # a run whose comparison was killed may still be at work: wait for it
        try:
            train(recipe, peer)
        except (UserError, FloatingPointError) as error:
            sys.stderr.write(f"error: {error}\n")
            return REFUSED
    return 0


def train(path: Path, peer: str | None) -> None:
    """Train a recipe, unless its folder holds the finished run."""
    recipe = load_recipe(path)
    folder = RunFolder.of(recipe)
    if not folder.is_run():
        folder.clear()  # what a process that was killed has left to remove would be taken for somebody's own
    same = folder.holds(recipe)
    if same and folder.metrics.is_file():
        return
    begun = any(path for one in (folder, folder.search) for path in one.checkpoints.glob("checkpoint-*"))
    resume = same and (begun or folder.search.plan.is_file())
    try:
        _train(recipe, peer, resume)
    except NotResumableError as error:
        Said().warning(f"{error}. The run starts over")
        _train(recipe, peer, resume=False)


def _train(recipe: Recipe, peer: str | None, resume: bool) -> None:
    if peer is None:
        run(recipe, resume=resume, start_over=not resume, untrained=math.nan, report=False, screen=Said())
    else:
        train_peer(recipe, peer, resume=resume, screen=Said())


class Said(Screen):
    """Writes warnings and notes into the run's log."""

    def warning(self, sentence: str) -> None:
        """A sentence that must not be overlooked."""
        sys.stderr.write(f"{sentence}\n")

    def note(self, sentence: str) -> None:
        """A sentence about what the run does by itself."""
        sys.stderr.write(f"{sentence}\n")

    def cure_of_divergence(self, rate: float) -> str:
        """Say what to do about a run that has diverged: its rate is one of those that the comparison tries."""
        return (
            f"the learning rate is {rate:g}: lower ones in compare.learning_rates may do better, and --retry repeats "
            "this run"
        )
