"""`loralloc evaluate`: the metrics of a run's adapter, as stock PEFT loads it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    run: Annotated[Path, typer.Argument(help="The run folder.")],
    data: Annotated[
        str | None, typer.Option(help="Data to evaluate on, as data.test of a recipe; by default the recipe's own.")
    ] = None,
) -> None:
    """Load the exported adapter with stock PEFT and evaluate it on the validation and test data."""
    from loralloc.cli import stage, terminal
    from loralloc.cli.build import load_adapted
    from loralloc.cli.folder import RunFolder

    terminal.quiet_libraries()
    folder = RunFolder.finished(run)
    recipe = folder.load_recipe()
    if data is not None:
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"test": data})})
    model, loaded = load_adapted(folder, recipe)
    trainer, _ = stage.make_trainer(recipe, loaded, model, folder, method=None)
    results = {}
    if data is None:
        results["validation"] = stage.evaluate(trainer, loaded, "eval", loaded.validation)
    if loaded.test is not None:
        results["test" if data is None else data] = stage.evaluate(trainer, loaded, "eval", loaded.test)
    terminal.show_metrics(results)
