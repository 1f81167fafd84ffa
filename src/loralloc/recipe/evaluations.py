"""Evaluations: the trainer that makes them, before, in and after a training, and the answers of a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from peft import PeftModel

from loralloc.errors import UserError
from loralloc.peft_layers import evaluating
from loralloc.recipe.best import best_arguments
from loralloc.recipe.from_recipe import trainer_class, training_arguments
from loralloc.recipe.passthrough import OF_EVALUATIONS, only
from loralloc.recipe.run_folder import RunFolder
from loralloc.recipe.schema import Recipe
from loralloc.recipe.screen import Screen
from loralloc.recipe.targets import check_output_layer
from loralloc.tasks.base import TaskData
from loralloc.tasks.generation import Generation, Prompt, check_metrics, generate, read_prompts, score
from loralloc.tasks.spec import TASKS
from loralloc.training import processes
from loralloc.training.step_data import random_state_kept
from loralloc.training.trainer import RunTrainer

EVALUATED = {
    "untrained": "the untrained model",
    "batch": "a batch of held-out data",
    "cut": "a smaller adapter",
    "eval": "validation data",
    "test": "test data",
    "also": "more data",
}
"""What an evaluation is about, by the prefix of its metrics in the log."""


def make_evaluator(recipe: Recipe, data: TaskData, model: PeftModel, scratch: Path, screen: Screen) -> RunTrainer:
    """Build a trainer that only evaluates: what the recipe says about training does not matter.

    Args:
        recipe: The recipe.
        data: The data.
        model: The model.
        scratch: A folder for the files that a trainer writes when it is built.
        screen: Shows what happens.
    """
    check_output_layer(recipe.task, model, "the adapter", "loralloc truncate cuts it all the same")
    settings = {"eval_every": None, "save_every": None, "keep_best": False, "early_stopping": None}
    settings["trainer"] = only(recipe.training.trainer, OF_EVALUATIONS)
    recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update=settings)})
    shown = {"train_dataset": data.held_out, "callbacks": [screen.progress(None)]}  # TRL looks at the first example
    return build_trainer(recipe, data, model, RunFolder(scratch), **shown)


def build_trainer(recipe: Recipe, data: TaskData, model: PeftModel, folder: RunFolder, **options: Any) -> RunTrainer:
    """Build the trainer of a recipe; `options` go to its class."""
    arguments = training_arguments(recipe, folder.checkpoints, {**data.arguments, **best_arguments(recipe, data)})
    held_out = data.validation if len(data.validation) else None
    if TASKS[recipe.task].trainer == "Seq2SeqTrainer":
        options["generate"] = recipe.evaluate.generate
    with refusing_options(recipe):
        return trainer_class(recipe)(
            model=model, args=arguments, eval_dataset=held_out, log=folder.log, **data.options, **options
        )


@contextmanager
def refusing_options(recipe: Recipe) -> Iterator[None]:
    """Turn a trainer's errors about its options, raised when it is built or first evaluates, into one message."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError, ImportError) as error:
        if not recipe.training.trainer:
            raise
        raise UserError(f"training.trainer: {str(error).splitlines()[0]}") from error


def evaluate(
    trainer: RunTrainer, data: TaskData, prefix: str, screen: Screen, split: Dataset | None = None
) -> dict[str, float]:
    """Evaluate on a split, by default the test data or, without them, the validation data.

    Returns:
        The metrics, by their names without the prefix.
    """
    if split is None:
        split = data.held_out
    with screen.evaluating(trainer, EVALUATED[prefix]):
        metrics = trainer.evaluate(split, metric_key_prefix=prefix)  # type: ignore[arg-type]
    found = without_times(metrics, prefix)
    screen.evaluated(EVALUATED[prefix], found)
    return found


def generation(recipe: Recipe, data: TaskData, trainer: RunTrainer, screen: Screen) -> Generation | None:
    """Let a model answer the prompts of the test data or, without them, of the validation data.

    If the trainer generates in evaluations, these are the answers of the last one. Otherwise the first process answers
    while the others wait. Random states and the model's mode are restored.

    Returns:
        The answers; None where the recipe asks for none, and in processes that wait.

    Raises:
        UserError: The data have no prompts, or a metric's library is not installed.
    """
    settings = recipe.evaluate.generate
    if settings is None:
        return None
    if trainer.written is not None:
        return trainer.written
    check_metrics(settings.metrics)
    prompts = read_prompts(cast(Any, data.held_out), data.tokenizer, settings.samples, recipe.data.max_length)
    answers = processes.on_main(_answer, recipe, data, trainer, screen, prompts)
    if answers is None:
        return None
    return Generation(prompts, answers, score(answers, prompts, settings.metrics, settings.after))


def _answer(
    recipe: Recipe, data: TaskData, trainer: RunTrainer, screen: Screen, prompts: Sequence[Prompt]
) -> list[str]:
    settings, model = recipe.evaluate.generate, cast(Any, trainer.model)  # the trainer has moved it to its device
    assert settings is not None
    with random_state_kept(), evaluating(model), screen.generating(len(prompts)) as told:
        torch.manual_seed(recipe.training.seed)
        return generate(model, data.tokenizer, prompts, settings, 2 * recipe.training.batch_size, told)


def without_times(metrics: dict[str, float], prefix: str) -> dict[str, float]:
    """Return the metrics of a Trainer's evaluation by their names without the prefix; times and epoch are left out."""
    timing = ("_runtime", "_per_second", "_preparation_time")
    return {
        key.removeprefix(f"{prefix}_"): value
        for key, value in metrics.items()
        if not key.endswith(timing) and key != "epoch"
    }
