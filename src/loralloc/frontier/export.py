"""Write the adapter of one size."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loralloc.adapter.export import Export, export_adapter
from loralloc.errors import UserError
from loralloc.frontier.orders import Order
from loralloc.frontier.run import Settings
from loralloc.frontier.source import Source
from loralloc.reading import read_object
from loralloc.recipe.from_recipe import load_adapter, task_data

SHOWN_TO = 0.006
"""Average ranks are shown in three digits: one that is this close to a point's, in shares of it, means the point."""


def as_measured(
    folder: Path, order: Order | None, recover: float | None, rate: float | None, average: float
) -> Settings:
    """Return the settings with which a frontier that is there was made, and its sizes down to the one that is meant.

    Each size began at the next larger one; those that are there are not made anew.

    Args:
        folder: Folder of the frontier.
        order: The order that is asked for; None for that of the frontier, or the default where there is none.
        recover: The share of steps likewise.
        rate: The share of the learning rate likewise.
        average: The average rank that is asked for.
    """
    record = _record(folder)
    points = record.get("points", ())
    near = [point for point in points if _is_meant(point["average_rank"], average)]
    if near:
        meant = min(near, key=lambda point: abs(point["average_rank"] - average))["ranks"]
    else:
        meant = round(average * record.get("modules", 0))
    ranks = [point["ranks"] for point in points if point["ranks"] > meant > 0]
    default, recovery = Settings(), record.get("recovery", {})
    return Settings(
        order or record.get("order", default.order),
        recovery.get("share", default.recover) if recover is None else recover,
        [average],
        [*ranks, meant] if ranks or near else None,
        recovery.get("rate", default.rate) if rate is None else rate,
    )


def _is_meant(shown: float, average: float) -> bool:
    return abs(shown - average) <= SHOWN_TO * shown


def _record(folder: Path) -> Mapping[str, Any]:
    try:
        return read_object(folder / "frontier.json")
    except UserError:
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
