"""A model's answers before and after training: their metrics, and the first few of them."""

from __future__ import annotations

from typing import Any

from loralloc.report.run_record import RunRecord, mapping, number
from loralloc.report.tables import Table
from loralloc.report.wording import rounded

PARTS = ("prompt", "reference", "before", "after")
"""The parts of a sample, in reading order."""


def score_table(run: RunRecord) -> Table | None:
    """Return every metric of the answers, before and after training; None without metrics."""
    before, after = (mapping(_generation(run).get(name)) for name in ("untrained", "trained"))
    rows = [
        (name.replace("_", " "), rounded(number(before.get(name))), rounded(number(value)))
        for name, value in after.items()
    ]
    return Table(("metric", "before", "after"), rows) if rows else None


def samples(run: RunRecord) -> list[dict[str, str]]:
    """Return the answers that the run has kept, each with its prompt and its reference, in the order of `PARTS`."""
    found = _generation(run).get("samples")
    kept = [sample for sample in found if isinstance(sample, dict)] if isinstance(found, list) else []
    return [{part: str(sample.get(part) or "") for part in PARTS} for sample in kept]


def _generation(run: RunRecord) -> dict[str, Any]:
    return mapping(run.metrics.get("generation"))
