"""Tasks: from the model and data sections of a recipe to what a Trainer needs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from loralloc.errors import UserError, closest
from loralloc.tasks.spec import TASKS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from loralloc.tasks.base import ModelSection, TaskData
    from loralloc.tasks.spec import DataSection


def prepare(task: str, model: ModelSection, data: DataSection, seed: int) -> TaskData:
    """Load the model and the data of a run.

    Args:
        task: One of `TASKS`.
        model: The recipe's model section.
        data: The recipe's data section.
        seed: Seed of the validation cut and of new parameters.

    Returns:
        Model, data and metrics, as a Trainer takes them.

    Raises:
        UserError: There is no such task, or the recipe, the data or the model is at fault.
    """
    if task not in TASKS:
        raise UserError(f'No task "{task}". Tasks: {", ".join(TASKS)}.{closest(task, TASKS)}')
    return importlib.import_module(TASKS[task].module).prepare(model, data, seed)


def prepare_evaluation(
    task: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: DataSection, source: str
) -> TaskData:
    """Load the data for an evaluation of a trained model, and nothing else that the recipe names.

    Args:
        task: One of `TASKS`.
        model: The model, with its labels where the task has any.
        tokenizer: Its tokenizer.
        data: The recipe's data section: columns and length.
        source: The data to evaluate on, as `data.test` of a recipe.

    Returns:
        Model, data (as `test`) and metrics.

    Raises:
        UserError: The data are at fault.
    """
    return importlib.import_module(TASKS[task].module).prepare_evaluation(model, tokenizer, data, source)
