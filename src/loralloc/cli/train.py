"""`loralloc train`: train, allocate, export, evaluate, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loralloc.errors import UserError


def train(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file; see `loralloc init`.")],
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest complete checkpoint.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Start over in the folder of an earlier run.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Load everything, show budget and schedule, train nothing.")
    ] = False,
) -> None:
    """Train, allocate, export, evaluate. Every key of the recipe is also a flag: --training.learning_rate 5e-4."""
    if recipe.name.startswith("--"):
        raise UserError(f"name the recipe before the flags: loralloc train RECIPE {recipe} ...")
    if resume and replace:
        raise UserError("--resume continues a run and --replace starts it over: give one of them")
    from loralloc.cli.checks import check_inputs, check_output, is_alone
    from loralloc.recipe.schema import load_recipe, peek_recipe

    outline = peek_recipe(recipe, context.args) if is_alone() else None  # several check in `pipeline`: one ends all
    if outline is not None:
        check_inputs(outline)
        check_output(outline, resume, replace)
    settings = load_recipe(recipe, context.args)
    from loralloc.cli import terminal
    from loralloc.recipe import run

    terminal.quiet_libraries()
    act = run.rehearse if dry_run else run.run
    act(settings, resume=resume, start_over=replace, screen=terminal.Terminal())
