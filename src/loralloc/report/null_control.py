"""What AutoLoRA's threshold keeps of noise, to read its ranks against."""

from __future__ import annotations

from collections import Counter
from statistics import mean, pstdev

import numpy as np

from loralloc.report.run_record import RunRecord

SPREADS = (0.1, 0.5)
"""Standard deviations of the logits: what a few hundred steps of their optimizer reach, and what long searches do."""


def thresholded_noise(k: int, spread: float, draws: int = 20_000, seed: int = 0) -> tuple[float, float]:
    """Return (mean, standard deviation) of the ranks that αⱼ ≥ 1/k keeps where α = softmax(β), β ~ N(0, spread²).

    >>> [round(number, 1) for number in thresholded_noise(8, 0.1)]
    [3.9, 0.9]
    """
    logits = np.random.default_rng(seed).normal(scale=spread, size=(draws, k))
    shares = np.exp(logits)
    shares /= shares.sum(1, keepdims=True)
    kept = np.maximum((shares * k >= 1 - 1e-5).sum(1), 1)
    return float(kept.mean()), float(kept.std())


def null_control(run: RunRecord) -> str:
    """Return the section that compares the learned ranks with thresholded noise; nothing for other methods."""
    if run.plan.method != "autolora" or run.plan.budget or not run.finished:
        return ""
    rows = []
    for k, modules in sorted(Counter(module.start for module in run.plan.modules.values()).items()):
        ranks = [module.rank for module in run.plan.modules.values() if module.start == k]
        rows.append(_row(f"learned, {modules} modules", k, mean(ranks), pstdev(ranks)))
        rows += [_row(f"noise of standard deviation {spread}", k, *thresholded_noise(k, spread)) for spread in SPREADS]
    table = (
        '<div class="scroll" tabindex="0"><table class="plain facts"><thead><tr><th scope="col">logits</th>'
        '<th scope="col">ranks at the start</th><th scope="col">mean kept</th>'
        '<th scope="col">standard deviation</th></tr></thead>\n'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
    return (
        '<section id="null-control">\n<h2>Learned, or noise?</h2>\n'
        '<p class="muted">The threshold keeps what is above an equal share, about half of anything. Ranks that look '
        "like the noise below may be noise: compare the plans of several seeds before reading much into single modules."
        f"</p>\n{table}\n</section>"
    )


def _row(name: str, k: int, average: float, deviation: float) -> str:
    return f"<tr><td>{name}</td><td>{k}</td><td>{average:.2f}</td><td>{deviation:.2f}</td></tr>"
