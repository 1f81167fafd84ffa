"""Write the adapter of one size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from loralloc.adapter.export import Export, export_adapter
from loralloc.errors import UserError
from loralloc.frontier.orders import ORDERS, Order
from loralloc.frontier.run import Settings
from loralloc.frontier.source import Source
from loralloc.reading import read_object
from loralloc.recipe.from_recipe import load_adapter, task_data
from loralloc.setting_types import is_number

SHOWN_TO = 0.006
"""Relative distance within which a requested average rank means a point's: they are shown with three digits."""


def as_measured(
    source: Source, order: Order | None, recover: float | None, rate: float | None, average: float
) -> Settings:
    """Return the settings of an existing frontier, with its sizes down to the requested one.

    The larger sizes are included because each size starts from a larger one; points that exist are reused.

    Args:
        source: The frontier's source; a frontier of another adapter in its folder does not count.
        order: The requested order; None for the order of the frontier, or the default if there is no frontier.
        recover: The requested share of steps; None likewise.
        rate: The requested share of the learning rate; None likewise.
        average: The requested average rank.
    """
    record, default = _record(source), Settings()
    sizes = list(_sizes(record.get("points")))
    near = [size for size in sizes if abs(size[0] - average) <= SHOWN_TO * size[0]]
    modules: Any = record.get("modules")
    if near:
        meant = min(near, key=lambda size: abs(size[0] - average))[1]
    else:
        meant = round(average * modules) if is_number(modules) else 0
    larger = [ranks for _, ranks in sizes if ranks > meant > 0]
    measured_by: Order | None = next((known for known in ORDERS if known == record.get("order")), None)
    recovery = record.get("recovery")
    kept: dict[str, Any] = recovery if isinstance(recovery, dict) else {}
    share: Any = kept.get("share")
    factor: Any = kept.get("rate")
    measured = float(share) if is_number(share) and 0 <= share < 1 else default.recover
    at = float(factor) if is_number(factor) and 0 < factor <= 10 else default.rate
    return Settings(
        order or measured_by,
        measured if recover is None else recover,
        [average],
        [*larger, meant] if larger or near else None,
        at if rate is None else rate,
    )


def _sizes(points: Any) -> Iterator[tuple[float, int]]:
    """The average rank and the total ranks of every point in a frontier's file; incomplete points are skipped."""
    for point in points if isinstance(points, list) else ():
        if isinstance(point, dict) and is_number(point.get("average_rank")) and type(point.get("ranks")) is int:
            yield point["average_rank"], point["ranks"]


def _record(source: Source) -> Mapping[str, Any]:
    try:
        record = read_object(source.folder / "frontier.json")
    except UserError:
        return {}
    return record if record.get("fingerprint") == source.fingerprint() else {}


def export_point(source: Source, adapter: Path, target: Path) -> Export:
    """Load the adapter of a point with stock PEFT, write it like any finished adapter, and check it.

    Args:
        source: The frontier's source.
        adapter: The point's adapter.
        target: Folder to write.
    """
    data = task_data(source.recipe)
    return export_adapter(load_adapter(data.model, adapter), target, tokenizer=data.tokenizer)
