"""What the model card of a run tells beyond the adapter: its data, results and settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loralloc.budget import in_words
from loralloc.plan import RankPlan
from loralloc.recipe.schema import Recipe
from loralloc.tasks.base import TaskData, length_of
from loralloc.tasks.locations import train_sources


def card_facts(recipe: Recipe, data: TaskData, plan: RankPlan, metrics: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the sections of the card, each a mapping from a name to a value.

    Args:
        recipe: The recipe of the run.
        data: Its data.
        plan: Its rank plan.
        metrics: The content of metrics.json.
    """
    splits = {"train": data.train, "validation": data.validation, "test": data.test}
    counts = {name: length_of(split) for name, split in splits.items() if split is not None}
    sizes = {name: "streamed" if count is None else f"{count:,} examples" for name, count in counts.items()}
    held_out = "test" if metrics["test"] else "validation"
    training = recipe.training
    return {
        "Data": {"task": recipe.task, "source": ", ".join(map(_name, train_sources(recipe.data))), **sizes},
        f"Results ({held_out})": {
            **metrics[held_out],
            **{f"{k} (reference)": v for k, v in metrics["reference"].items()},
        },
        "Settings": {
            "method": recipe.method.name,
            **({"budget": in_words(plan.budget)} if plan.budget else {}),
            "base weights": recipe.model.load_in or recipe.model.dtype,
            "parameters": plan.parameters,
            "steps": metrics["total_steps"],
            "batch size": training.batch_size * training.accumulation * metrics["processes"],
            "learning rate": training.learning_rate,
            "schedule": training.schedule or training.trainer.get("lr_scheduler_type", "linear"),
            "seed": training.seed,
        },
    }


def _name(source: str) -> str:
    """A data source without the folders of this machine."""
    return source if source.startswith(("hub:", "demo:")) else Path(source).name
