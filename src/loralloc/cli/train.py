"""`loralloc train`: train, allocate, export, evaluate, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loralloc.cli import completion
from loralloc.errors import UserError


def train(
    context: typer.Context,
    recipe: Annotated[
        Path,
        typer.Argument(help="The recipe, a YAML file; see `loralloc init`.", autocompletion=completion.recipe_files),
    ],
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest complete checkpoint.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Start over in the folder of an earlier run.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Load everything, show budget and schedule, train nothing.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print errors, and one line at the end.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Print what the libraries log, too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line, for scripts.")] = False,
) -> None:
    """Train, allocate, export, evaluate. Every key of the recipe is also a flag: --training.learning_rate 5e-4."""
    if recipe.name.startswith("--"):
        raise UserError(f"name the recipe before the flags: loralloc train RECIPE {recipe} ...")
    if resume and replace:
        raise UserError("--resume continues a run and --replace starts it over: give one of them")
    if quiet + verbose + as_json > 1:
        raise typer.BadParameter("--quiet, --verbose and --json exclude each other: give one of them")
    from loralloc.cli.checks import check_inputs, check_output, is_alone
    from loralloc.recipe.schema import load_recipe, peek_recipe

    outline = peek_recipe(recipe, context.args) if is_alone() else None  # several check in `pipeline`: one ends all
    if outline is not None:
        check_inputs(outline)
        check_output(outline, resume, replace)
    from loralloc.cli.screens import screen_for
    from loralloc.recipe import run
    from loralloc.recipe.trial import refused_values
    from loralloc.training import processes

    with screen_for(quiet, verbose, as_json) as screen:
        with processes.one_voice():
            settings = load_recipe(recipe, context.args, refused_values)
        act = run.rehearse if dry_run else run.run
        act(settings, resume=resume, start_over=replace, screen=screen)
