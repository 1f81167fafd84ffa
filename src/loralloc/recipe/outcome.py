"""What a run has produced."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loralloc.adapter.export import Export
from loralloc.plan import RankPlan
from loralloc.recipe.run_folder import RunFolder


@dataclass(frozen=True)
class Outcome:
    """What a run produced.

    Attributes:
        folder: The run folder.
        plan: The rank plan.
        metrics: The content of metrics.json.
        export: The exported adapter; None in processes other than the first, which write nothing.
    """

    folder: RunFolder
    plan: RankPlan
    metrics: Mapping[str, Any]
    export: Export | None
