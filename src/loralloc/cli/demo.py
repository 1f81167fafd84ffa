"""`loralloc demo`: the main job, offline, in minutes on any machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loralloc.files import check_writable

METHODS = ("adalora", "lora")
SECONDS = 180
"""Seconds that the training of both runs may take together, unless `LEAST` steps take longer."""

LEAST = 40
"""Fewest steps of a run: with fewer, ranks are closed before their scores mean much."""


def demo(
    output: Annotated[Path, typer.Option(help="Folder of the two runs.")] = Path("runs/demo"),
) -> None:
    """Fine-tune a real pretrained encoder on real text, offline: AdaLoRA, beside plain LoRA at the same budget.

    The task: from which area of Python's standard library does a docstring come? The data are made from the sources of
    the Python that runs this; the encoder comes with the extra `demo`. A few steps are measured first, and as many are
    trained as fit into three minutes, at most those of the recipes.
    """
    check_writable(output, "--output", "name another folder")
    from loralloc.recipe.run_folder import RunFolder
    from loralloc.recipe.schema import load_recipe, peek_recipe
    from loralloc.recipes import list_recipes

    paths = {method: list_recipes()[f"demo/{method}"] for method in METHODS}
    words = {method: ["--output", str(output / method)] for method in METHODS}
    for outline in filter(None, (peek_recipe(paths[method], words[method]) for method in METHODS)):
        RunFolder.for_new_run(outline, replace=True)
    recipes = {method: load_recipe(paths[method], words[method]) for method in METHODS}
    from loralloc.cli import fit, terminal
    from loralloc.recipe import run

    terminal.quiet_libraries()
    fit.show_measuring()
    measured = fit.measure(recipes["adalora"])
    most = min(recipe.training.steps or LEAST for recipe in recipes.values())
    steps = fit.steps_within(SECONDS, measured, len(METHODS), LEAST, most)
    fit.show_steps(steps, SECONDS, measured, len(METHODS), most)
    outcomes = {}
    for method in METHODS:
        recipe = load_recipe(paths[method], [*words[method], "--training.steps", str(steps)])
        outcomes[method] = run.run(recipe, start_over=True, untrained=measured.untrained, screen=terminal.Terminal())
    terminal.show_comparison(outcomes)
