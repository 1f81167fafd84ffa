"""`loralloc estimate`: what a recipe will take, before it is trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from loralloc.recipe.estimate import Estimate


def estimate(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(help="The recipe; any of its keys can follow as --key value.")],
) -> None:
    """Make two real steps on the longest batch, throw them away, and show memory, tokens and time of the whole run."""
    from loralloc.cli.checks import check_inputs
    from loralloc.recipe.schema import load_recipe, peek_recipe

    if (peeked := peek_recipe(recipe, context.args)) is not None:
        check_inputs(peeked)
    settings = load_recipe(recipe, context.args)
    from loralloc.cli import terminal
    from loralloc.recipe.estimate import estimate as measure

    terminal.quiet_libraries()
    for name, value in rows(measure(settings)):
        terminal.console.print(f"  {name:10}{value}", soft_wrap=True)


def rows(found: Estimate) -> list[tuple[str, str]]:
    """What is shown: names and values."""
    epoch = "" if found.tokens_per_epoch is None else f", {found.tokens_per_epoch:,} tokens"
    examples = "streamed" if found.examples is None else f"{found.examples:,} examples{epoch}"
    memory = ", ".join(f"{part} {mebibytes(size)}" for part, size in found.memory.items())
    return [
        ("model", f"{found.base_parameters:,} parameters"),
        ("adapter", f"{found.start_parameters:,} at the start" + (f", budget {found.budget}" if found.budget else "")),
        ("data", examples),
        ("steps", f"{found.steps:,}, with {found.tokens_per_step:,} tokens in the longest"),
        ("memory", f"{memory}; with activations at most {mebibytes(found.peak)} {found.peak_of}"),
        ("time", f"{found.seconds_per_step:.2g} s a step, at most {roughly(found.seconds)} for the training"),
    ]


def mebibytes(size: int) -> str:
    """Write a size in memory.

    >>> mebibytes(2**18), mebibytes(30 * 2**20), mebibytes(5 * 2**30)
    ('0.25 MiB', '30 MiB', '5.0 GiB')
    """
    if size < 10 * 2**20:
        return f"{size / 2**20:.2g} MiB"
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def roughly(seconds: float) -> str:
    """Write a time that is estimated, without seconds that nobody knows.

    >>> roughly(59.6), roughly(125), roughly(7300)
    ('60 s', '2 min', '2 h 2 min')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
