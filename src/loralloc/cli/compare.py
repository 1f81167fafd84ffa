"""`loralloc compare`: methods, learning rates, budgets and seeds side by side, and a verdict."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from loralloc.cli import completion
from loralloc.errors import UserError
from loralloc.files import check_writable


def compare(
    context: typer.Context,
    recipe: Annotated[
        Path,
        typer.Argument(help="The recipe, a YAML file; see `loralloc init`.", autocompletion=completion.recipe_files),
    ],
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time on this machine.")] = 1,
    ray: Annotated[
        str | None, typer.Option(help="Address of a Ray cluster whose machines share the runs, or auto.")
    ] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Repeat runs that were refused or have diverged.")] = False,
) -> None:
    """Compare methods fairly, plain LoRA and controls among them; the section `compare` of the recipe says which.

    Every key of the recipe is also a flag: --methods ablora --budgets "[1, 8]" --seeds 3. Called again, it continues
    where it was interrupted.
    """
    if recipe.name.startswith("--"):
        raise UserError(f"name the recipe before the flags: loralloc compare RECIPE {recipe} ...")
    if ray is not None and jobs > 1:
        raise UserError("--jobs is for this machine, and a Ray cluster schedules its runs itself: give one of them")
    from loralloc.cli.checks import check_inputs
    from loralloc.recipe.schema import load_recipe, peek_recipe

    if (outline := peek_recipe(recipe, context.args)) is not None:
        check_inputs(outline)
        check_writable(Path(outline.output).expanduser(), "output", "name another with --output")
    from loralloc.cli import terminal
    from loralloc.cli.watch import watching
    from loralloc.compare.execute import LocalExecutor, RayExecutor
    from loralloc.compare.study import compare as run
    from loralloc.recipe.trial import refused_values
    from loralloc.training import processes
    from loralloc.training.signals import Stopped, listening

    processes.refuse_several("loralloc compare")
    terminal.quiet_libraries()
    settings = load_recipe(recipe, context.args, refused_values)
    executor = LocalExecutor(jobs) if ray is None else RayExecutor(ray)
    try:
        with listening(), watching() as watcher:
            outcome = run(settings, executor, retry, watcher)
    except Stopped as stopped:  # the executor has ended the runs that were at work
        name = stopped.signal.name
        print(f"stopped by {name}; the same command goes on with the runs that are left", file=sys.stderr)
        raise
    terminal.console.print(outcome.verdict, soft_wrap=True, markup=False)
    for name, path in {"page": outcome.page, "table": outcome.table}.items():
        terminal.console.print(f"  {name:10}{path}", soft_wrap=True, markup=False)
