"""`loralloc train`: train, allocate, export, evaluate, report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from loralloc.cli import completion
from loralloc.cli.streams import lasting_streams
from loralloc.errors import UserError, check_choice
from loralloc.recipe.changes import ALLOWED


def train(
    context: typer.Context,
    recipe: Annotated[
        Path,
        typer.Argument(help="The recipe, a YAML file; see `loralloc init`.", autocompletion=completion.recipe_files),
    ],
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest whole checkpoint.")] = False,
    allow_changed: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-changed",
            help=f"With --resume: what may differ from the run so far, {' or '.join(ALLOWED)}.",
        ),
    ] = None,
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
    if allow_changed and not resume:
        raise UserError("--allow-changed says what may differ in a run that goes on: give it with --resume")
    for kind in allow_changed or ():
        check_choice("--allow-changed", kind, ALLOWED)
    if quiet + verbose + as_json > 1:
        raise typer.BadParameter("--quiet, --verbose and --json exclude each other: give one of them")
    from loralloc.cli.checks import check_inputs, check_output, is_alone
    from loralloc.recipe.schema import load_recipe, peek_recipe

    outline = peek_recipe(recipe, context.args) if is_alone() else None  # several processes check together, in `run`
    if outline is not None:
        check_inputs(outline)
        check_output(outline, resume, replace)
    from loralloc.cli.screens import screen_for
    from loralloc.recipe import run
    from loralloc.recipe.going_on import farewell
    from loralloc.recipe.trial import refused_values
    from loralloc.training import processes
    from loralloc.training.signals import Stopped, listening

    with lasting_streams(), screen_for(quiet, verbose, as_json) as screen:
        with processes.one_voice():
            settings = load_recipe(recipe, context.args, refused_values)
        if dry_run:
            run.rehearse(settings, resume=resume, start_over=replace, screen=screen)
            return
        try:
            with listening():
                run.run(settings, resume, replace, screen=screen, allow_changed=allow_changed or ())
        except Stopped as stopped:
            if processes.is_main():
                print(farewell(stopped, settings), file=sys.stderr)
            raise
