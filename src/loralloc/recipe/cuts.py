"""Evaluate a finished adapter at smaller sizes, for the report: cut by singular values, without further training."""

from __future__ import annotations

from typing import Any

from loralloc.adapter.terms import Terms
from loralloc.allocate import keep_top
from loralloc.recipe.stages import Stage


def evaluate_cuts(stage: Stage) -> list[dict[str, Any]]:
    """Evaluate the adapter on the validation data with half of its ranks, a quarter, ..., `evaluate.cuts` times.

    The adapter is restored afterwards. No answers are generated, even if other evaluations generate them.

    Returns:
        One record per size, from large to small: `ranks`, `average_rank` and `metrics`. Sizes below one rank are left
        out; the list is empty if there are no validation data.
    """
    count = stage.recipe.evaluate.cuts
    if not count or not len(stage.data.validation):
        return []
    terms, found = Terms.of(stage.model), []
    for ranks in dict.fromkeys(terms.count // 2**k for k in range(1, count + 1)):
        if ranks:
            with terms.cut(keep_top(terms.sigma, ranks)), stage.trainer.without_answers():
                metrics = stage.evaluate("cut", stage.data.validation)
            found.append({"ranks": ranks, "average_rank": round(ranks / len(terms.sites), 4), "metrics": metrics})
    return found
