"""A null control for AutoLoRA: the ranks that its threshold keeps of random logits, beside the learned ones."""

from __future__ import annotations

from collections import Counter
from statistics import mean, pstdev

import numpy as np

from loralloc.report.run_record import RunRecord
from loralloc.report.tables import Table

MOST_RANKS, MOST_SIZES = 1024, 16
"""Noise is drawn up to so many ranks of a module, and for so many different start ranks: it takes memory."""

SPREADS = (0.1, 0.5)
"""Standard deviations of the logits: as after a few hundred optimizer steps of a search, and as after long searches."""


DRAWS = 20_000
"""Modules of noise for each size."""


def thresholded_noise(k: int, spread: float) -> tuple[float, float]:
    """Return (mean, standard deviation) of the ranks that αⱼ ≥ 1/k keeps where α = softmax(β), β ~ N(0, spread²).

    >>> [round(number, 1) for number in thresholded_noise(8, 0.1)]
    [3.9, 0.9]
    """
    logits = np.random.default_rng(0).normal(scale=spread, size=(DRAWS, k))
    shares = np.exp(logits)
    shares /= shares.sum(1, keepdims=True)
    kept = np.maximum((shares * k >= 1 - 1e-5).sum(1), 1)
    return float(kept.mean()), float(kept.std())


def null_control(run: RunRecord) -> Table | None:
    """Return the learned ranks beside thresholded noise.

    None for other methods, under a budget, before the run has finished, if a module starts at rank 0 or above
    `MOST_RANKS`, and for more than `MOST_SIZES` different start ranks.
    """
    if run.plan.method != "autolora" or run.plan.budget or not run.finished:
        return None
    counts = Counter(module.start for module in run.plan.modules.values())
    if len(counts) > MOST_SIZES or not 1 <= min(counts) <= max(counts) <= MOST_RANKS:
        return None
    rows = []
    for k, modules in sorted(counts.items()):
        ranks = [module.rank for module in run.plan.modules.values() if module.start == k]
        rows.append(_row(f"learned, {modules} modules", k, mean(ranks), pstdev(ranks)))
        rows += [_row(f"random, standard deviation {spread}", k, *thresholded_noise(k, spread)) for spread in SPREADS]
    return Table(("logits", "rank k at the start", "mean rank kept", "standard deviation of the rank"), rows)


def _row(logits: str, k: int, average: float, deviation: float) -> tuple[str, ...]:
    return logits, f"{k}", f"{average:.2f}", f"{deviation:.2f}"
