"""What a finished adapter is worth at smaller sizes, for the report: cut by singular values, without more training."""

from __future__ import annotations

from typing import Any

from loralloc.adapter.terms import Terms
from loralloc.allocate import keep_top
from loralloc.recipe.stages import Stage


def evaluate_cuts(stage: Stage) -> list[dict[str, Any]]:
    """Evaluate on the validation data a half of the ranks, a quarter, and so on, as often as `evaluate.cuts` says.

    The adapter is what it was afterwards. Where evaluations let the model write answers, these do not.

    Returns:
        Of each size, from large to small: `ranks`, `average_rank`, and the `metrics` that were found. Sizes below one
        rank are left out, and all of them where there are no validation data.
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
