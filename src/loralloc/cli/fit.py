"""How many steps of two runs fit into a time, by what a few steps and one evaluation take on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from loralloc.cli import terminal
from loralloc.cli.progress import clock, console
from loralloc.recipe import stages
from loralloc.recipe.estimate import StepTimes
from loralloc.recipe.from_recipe import task_data
from loralloc.recipe.run_folder import RunFolder
from loralloc.recipe.schema import Recipe

FIRST, TIMED = 2, 5
"""Warm-up steps, and steps that are timed."""

SLACK = 0.9
"""The share of the time that is planned: later, the machine may be busier."""


@dataclass(frozen=True)
class Measured:
    """What one machine needs for a recipe.

    Attributes:
        step: Seconds of an optimizer step.
        evaluations: Seconds of the evaluations after a training.
        untrained: The metric before training.
    """

    step: float
    evaluations: float
    untrained: float


def measure(recipe: Recipe) -> Measured:
    """Evaluate the untrained model, and take a few steps of a training that is thrown away.

    Args:
        recipe: The recipe; with test data.
    """
    training = recipe.training.model_copy(update={"steps": FIRST + TIMED, "epochs": None})
    short = recipe.model_copy(update={"training": training})
    data = task_data(short)
    with TemporaryDirectory(prefix="loralloc-") as scratch, terminal.silence():
        screen, folder = terminal.Terminal(), RunFolder(Path(scratch))
        stage = stages.prepare_training(short, data, folder, screen, after_search=False)
        begun = clock()
        untrained = stage.evaluate("untrained")[data.metric]
        seconds = clock() - begun
        times = StepTimes()
        stage.trainer.add_callback(times)
        stage.train()
    assert data.test is not None
    evaluated = len(data.test) + (1 + recipe.evaluate.cuts) * len(data.validation)
    return Measured(median(times.seconds[FIRST:]), seconds * evaluated / len(data.test), untrained)


def steps_within(seconds: float, measured: Measured, runs: int, least: int, most: int) -> int:
    """Choose how many steps each of some runs may take, so that all train within a time.

    Args:
        seconds: The time.
        measured: What a step takes.
        runs: Runs that share the time.
        least: Never fewer.
        most: Never more.

    >>> steps_within(180, Measured(0.5, 11.0, 0.1), runs=2, least=40, most=300)
    162
    """
    return max(least, min(most, int(SLACK * seconds / runs / measured.step)))


def show_measuring() -> None:
    """Say why nothing is shown for a while."""
    console.print("[bold]demo[/]      measuring an evaluation and a few steps on this machine")


def show_steps(steps: int, seconds: float, measured: Measured, runs: int, most: int) -> None:
    """Say how many steps are taken, and why.

    Args:
        steps: The steps of each run.
        seconds: The time that is meant.
        measured: What a step and the evaluations of a run take.
        runs: Runs that share the time.
        most: The most steps that are wanted.
    """
    training = runs * steps * measured.step
    why = f"as many as fit into {seconds:.0f} s of training"
    if training > seconds:
        why = "the fewest in which ranks can be allocated"
    elif steps == most:
        why = "as in the recipes"
    together = training + runs * measured.evaluations
    step, evaluations = f"{measured.step:.2g} s a step", f"{measured.evaluations:.2g} s for the evaluations of a run"
    console.print(f"  measured  {step}, {evaluations}")
    console.print(f"  steps     {steps} for each of {runs} runs, {why}; with evaluations about {together:.0f} s\n")
