"""The results of a comparison as numbers: `compare.json`, for other programs to read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from loralloc._version import __version__
from loralloc.compare.grid import Point
from loralloc.compare.results import Entry
from loralloc.compare.statistics import Difference
from loralloc.compare.tables import agreement
from loralloc.compare.verdict import Compared
from loralloc.files import finite

FORMAT = 1
"""Format of the file; it changes when a key changes its meaning."""


def json_text(parts: Sequence[tuple[Point, str, Entry, Sequence[Compared]]], metric: str) -> str:
    """Return compare.json: for every budget the verdict and all contenders, plain LoRA first.

    Args:
        parts: For every budget: the budget, its verdict, plain LoRA, and the other contenders compared with it.
        metric: The metric to give beside the loss.
    """
    budgets = [
        {
            "budget": point.label,
            "parameters": point.parameters,
            "verdict": verdict,
            "contenders": [_contender(baseline, metric), *(_compared(one, metric) for one in compared)],
        }
        for point, verdict, baseline, compared in parts
    ]
    tree = {"format": FORMAT, "loralloc": __version__, "metric": metric, "budgets": budgets}
    return json.dumps(finite(tree), indent=1, allow_nan=False) + "\n"


def _contender(entry: Entry, metric: str) -> dict[str, Any]:
    chosen = entry.chosen
    return {
        "contender": entry.contender.label,
        "kind": entry.contender.kind,
        "learning_rate": chosen.learning_rate,
        "at_edge": entry.at_edge,
        "seeds": len(chosen.finished),
        "loss": chosen.held_out("loss"),
        "loss_per_example": chosen.row_loss,
        metric: chosen.held_out(metric),
        "parameters": chosen.average("parameters"),
        "processor_seconds": chosen.average("processor_seconds"),
        "memory_mib": chosen.average("memory_mib"),
        "agreement_of_plans": agreement(chosen),
        "tried": {f"{trial.learning_rate:g}": trial.tried("loss") for trial in entry.trials},
    }


def _compared(one: Compared, metric: str) -> dict[str, Any]:
    return {**_contender(one.entry, metric), "difference": _difference(one.difference)}


def _difference(found: Difference | None) -> dict[str, Any] | None:
    if found is None:
        return None
    known = ("low", "high", "low_all", "high_all", "p", "adjusted")
    certainty = {name: getattr(found, name) if found.known else None for name in known}
    return {"mean": found.mean, **certainty, "seeds": found.seeds, "rows": found.rows}
