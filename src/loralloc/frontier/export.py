"""Write the adapter of one size."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from loralloc.adapter.export import Export, export_adapter
from loralloc.frontier.run import Settings
from loralloc.frontier.source import Source
from loralloc.recipe.from_recipe import load_adapter, task_data

SHOWN_TO = 0.006
"""Average ranks are shown in three digits: one that is this close to a point's, in shares of it, means the point."""


def as_measured(folder: Path, settings: Settings, average: float) -> Settings:
    """Return the settings with which a frontier that is there was made, and of its sizes the one that is meant.

    Args:
        folder: Folder of the frontier.
        settings: What to take where there is none.
        average: The average rank that is asked for.
    """
    record = _record(folder)
    near = [point["average_rank"] for point in record.get("points", ())]
    near = [value for value in near if abs(value - average) <= SHOWN_TO * value]
    average = min(near, key=lambda value: abs(value - average), default=average)
    if record:
        settings = replace(settings, order=record["order"], recover=record["recovery"]["share"])
    return replace(settings, averages=(average,))


def _record(folder: Path) -> Mapping[str, Any]:
    try:
        return json.loads((folder / "frontier.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def export_point(source: Source, adapter: Path, target: Path) -> Export:
    """Load the adapter of a point with stock PEFT, write it like any finished adapter, and check it.

    Args:
        source: What the frontier is of.
        adapter: The point's adapter.
        target: Folder to write.
    """
    data = task_data(source.recipe)
    return export_adapter(load_adapter(data.model, adapter), target, tokenizer=data.tokenizer)
