"""Measure the model and the data of a comparison: loaded once, before anything is trained."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from loralloc.compare.grid import Shapes
from loralloc.plain_lora import plain_sites
from loralloc.quantized import leave_memory, parameter_count
from loralloc.recipe.fingerprints import learned_from
from loralloc.recipe.from_recipe import add_adapter, task_data
from loralloc.recipe.schema import Recipe
from loralloc.recipe.stages import total_steps
from loralloc.tasks.base import TaskData, length_of
from loralloc.training.fingerprints import repeated_rows, rows_fingerprint, weights_fingerprint


def measure(recipe: Recipe) -> Shapes:
    """Load a recipe's model and data, and note what a comparison depends on.

    Raises:
        UserError: A run would be refused: there are no data, the model cannot be adapted, and so on.
    """
    data = task_data(recipe)
    lora = recipe.lora.model_copy(update={"r": 1, "peft": {}})
    model = add_adapter(data.model, recipe.model_copy(update={"lora": lora}))
    modules = {site.name: (site.A.shape[1], len(site.B)) for site in plain_sites(model)}
    shapes = Shapes(
        modules=modules,
        train=length_of(data.train),
        validation=len(data.validation),
        test=None if data.test is None else len(data.test),
        steps=total_steps(recipe, data.packed(data.train) if isinstance(data.train, Dataset) else None),
        base_parameters=parameter_count(data.model, list(model.peft_config)),
        metric=data.metric,
        greater_is_better=data.greater_is_better,
        depends_on={"data": _rows(recipe, data), "base": weights_fingerprint(model)},
        repeated=_repeated(data),
    )
    leave_memory(data.model)
    return shapes


def _rows(recipe: Recipe, data: TaskData) -> dict[str, Any]:
    """Fingerprint all rows of a comparison; the rows to test on count too, since losses are compared row by row."""
    tested = {} if data.test is None else {"test": rows_fingerprint(data.test)}
    return {**learned_from(recipe, data), **tested}


def _repeated(data: TaskData) -> dict[str, int]:
    """How many of the rows that methods are judged on are among those to train on, and to choose rates on."""
    sources = {"training": data.train} if data.test is None else {"training": data.train, "validation": data.validation}
    return {name: repeated_rows(data.held_out, rows) for name, rows in sources.items() if isinstance(rows, Dataset)}
