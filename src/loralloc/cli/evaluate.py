"""`loralloc evaluate`: the metrics of a run's adapter, as stock PEFT loads it."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from loralloc.cli import completion
from loralloc.errors import UserError
from loralloc.files import check_writable


def evaluate(
    run: Annotated[Path, typer.Argument(help="The run folder.", autocompletion=completion.runs)],
    data: Annotated[
        str | None,
        typer.Option(
            help="Data to evaluate on, as data.test of a recipe; by default the recipe's own.",
            autocompletion=completion.data_files,
        ),
    ] = None,
    predictions: Annotated[
        Path | None,
        typer.Option(help="Write what is predicted for each example to this new file, one JSON object a line."),
    ] = None,
) -> None:
    """Load the exported adapter with stock PEFT and evaluate it on the validation and test data, or on other data."""
    from loralloc.cli.checks import check_inputs
    from loralloc.recipe.run_folder import RunFolder
    from loralloc.tasks.locations import check_load_in, check_source, model_folder

    folder = RunFolder.finished(run)
    recipe = folder.peek_recipe()
    if predictions is not None:
        _check_target(predictions, recipe.task)
    if data is None:
        check_inputs(recipe, trained=True)
    else:
        check_source(data)
        model_folder(recipe.model.name)
        check_load_in(recipe.model.load_in)
    from loralloc.cli import terminal
    from loralloc.recipe import evaluations
    from loralloc.recipe.from_recipe import load_adapted, load_with_data
    from loralloc.recipe.predictions import write_predictions

    terminal.quiet_libraries()
    model, loaded = load_adapted(folder, recipe) if data is None else load_with_data(folder, recipe, data)
    with TemporaryDirectory(prefix="loralloc-") as scratch:
        screen = terminal.Terminal()
        trainer = evaluations.make_evaluator(recipe, loaded, model, Path(scratch), screen)
        results = {}
        if data is None:
            # The last evaluation is the one that is written: of the test data or, without them, the validation data.
            also = {
                name: evaluations.evaluate(trainer, loaded, "also", screen, more) for name, more in loaded.also.items()
            }
            results["validation"] = evaluations.evaluate(trainer, loaded, "eval", screen, loaded.validation)
            results |= also
        if loaded.test is not None:
            results["test" if data is None else data] = evaluations.evaluate(
                trainer, loaded, "test", screen, loaded.test
            )
        answered = evaluations.generation(recipe, loaded, trainer, screen)
    terminal.show_metrics(results)
    if answered is not None:
        terminal.show_metrics({"generated": answered.metrics})
    if predictions is not None:  # last: whatever happens to the file, the metrics have been shown
        write_predictions(predictions, loaded, trainer, answered)


def _check_target(path: Path, task: str) -> None:
    """Refuse a file that predictions cannot be written to, before anything is loaded.

    Args:
        path: The file.
        task: The task of the run.

    Raises:
        UserError: The task predicts nothing, or the file cannot be made without losing something.
    """
    from loralloc.tasks.spec import TASKS

    if not TASKS[task].predicts:
        raise UserError("--predictions: this task compares answers and predicts none; evaluate without it")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--predictions: there is no folder {path.parent}; make it first")
    check_writable(path.absolute().parent, "--predictions", "name a file elsewhere")
    if path.is_dir():
        raise UserError(f"--predictions: {path} is a folder; name a file in it")
    if path.exists():
        raise UserError(f"--predictions: {path} exists; nothing was overwritten: choose another file, or remove it")
