"""Early stopping and the best checkpoint: by the task's metric, among the states whose ranks are final."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import TrainerCallback

from loralloc.errors import UserError
from loralloc.recipe.schema import Recipe
from loralloc.recipe.screen import Screen
from loralloc.tasks.base import TaskData
from loralloc.tasks.spec import GREATER_IS_BETTER
from loralloc.training.callback import RankAllocation
from loralloc.training.early_stopping import EarlyStopping
from loralloc.training.trainer import RunTrainer


def judges(recipe: Recipe) -> bool:
    """Whether the recipe stops early or keeps the best checkpoint, so that evaluations during training matter."""
    return recipe.training.keep_best or recipe.training.early_stopping is not None


def best_arguments(recipe: Recipe, data: TaskData) -> Mapping[str, Any]:
    """Return the trainer's arguments: the metric that judges evaluations, and whether the best checkpoint is loaded."""
    if not judges(recipe):
        return {}
    metric = str(recipe.training.trainer.get("metric_for_best_model", data.metric)).removeprefix("eval_")
    return {
        "load_best_model_at_end": recipe.training.keep_best,
        "metric_for_best_model": metric,
        "greater_is_better": GREATER_IS_BETTER.get(metric, not metric.endswith("loss")),
    }


def best_callbacks(recipe: Recipe) -> Iterator[TrainerCallback]:
    """Yield what ends a training early, where the recipe asks for that."""
    if recipe.training.early_stopping is not None:
        yield EarlyStopping(recipe.training.early_stopping)


def wait_for_final_ranks(
    recipe: Recipe, trainer: RunTrainer, allocation: RankAllocation | None, screen: Screen
) -> None:
    """Delay evaluations until the ranks are final, if early stopping or the best checkpoint depends on them.

    Before that, the model has more ranks than it may keep, so its scores say little about the exported adapter.

    Raises:
        UserError: The method chooses the ranks when the run ends.
    """
    if not judges(recipe) or allocation is None:
        return
    schedule, args = allocation.run.schedule, trainer.args
    final = schedule.steps_until_final
    if final > schedule.total_steps:
        keys = {"keep_best": recipe.training.keep_best, "early_stopping": recipe.training.early_stopping}
        asked = " and ".join(f"training.{name}" for name, value in keys.items() if value)
        raise UserError(
            f"{asked}: {recipe.method.name} chooses the ranks when the run ends, and no earlier state has them; leave "
            "it out"
        )
    if final > args.eval_delay:
        args.eval_delay = final
        screen.note(f"evaluations begin at step {final:,}, when the ranks are final: earlier states cannot be the best")
