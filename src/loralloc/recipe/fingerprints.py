"""What a run depends on, from its recipe to its weights, as its checkpoints record it."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel

from loralloc.plan import RankPlan
from loralloc.recipe.changes import settings
from loralloc.recipe.schema import Recipe
from loralloc.tasks.base import TaskData
from loralloc.tasks.locations import data_file, train_sources
from loralloc.training.fingerprints import rows_fingerprint, versions, weights_fingerprint

BLOCKS, BLOCK = 256, 1 << 16
"""How many blocks of a streamed file are hashed, and the bytes of each."""


def depends_on(recipe: Recipe, data: TaskData, model: PeftModel) -> Callable[[], dict[str, Any]]:
    """Return a function that says what the run of a recipe depends on; the rows are read when it is first called.

    Args:
        recipe: The recipe.
        data: All data, before a method holds some of them out.
        model: The adapted model before training, not sharded yet.
    """
    base = weights_fingerprint(model)

    @functools.cache
    def found() -> dict[str, Any]:
        fixed = settings(recipe)
        fixed.pop("plan", None)  # the plan's content counts, not its path
        plan = {} if recipe.plan is None else {"plan": _plan(recipe.plan)}
        return {"recipe": fixed, **plan, "data": learned_from(recipe, data), "base": base, "versions": versions()}

    return found


def learned_from(recipe: Recipe, data: TaskData) -> dict[str, Any]:
    """Fingerprint the rows that a run trains and is validated on.

    Args:
        recipe: The recipe.
        data: All data, before a method holds some of them out.
    """
    return {"train": _training_rows(recipe, data), "validation": rows_fingerprint(data.validation)}


def _training_rows(recipe: Recipe, data: TaskData) -> dict[str, Any]:
    """Fingerprint the training rows; streamed data by source: files by samples of their content, the Hub by name."""
    if isinstance(data.train, Dataset):
        return rows_fingerprint(data.train)
    sources = train_sources(recipe.data)
    return {"sources": [one if one.startswith("hub:") else _sampled(data_file(one)) for one in sources]}


def _sampled(path: Path) -> str:
    """A hash of a file's size and of blocks at even distances: what is streamed may be too large to read as a whole."""
    size = path.stat().st_size
    digest = hashlib.sha256(f"{size}".encode())
    with path.open("rb") as file:
        for at in range(BLOCKS):
            file.seek(at * max(0, size - BLOCK) // (BLOCKS - 1))
            digest.update(file.read(BLOCK))
    return digest.hexdigest()


def _plan(path: str) -> str:
    modules = RankPlan.load(path).modules
    told = {name: [module.rank, module.scale] for name, module in modules.items()}
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()
