"""Metrics from sums over every example's learned tokens, for tasks that learn texts.

Sums are [n, 3]: the loss of an example's learned tokens, their number, and how many of them the model found the
likeliest. Logits, as wide as the vocabulary, are not collected.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import EvalPrediction

from loralloc.tasks import metrics


def language_model_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Compute perplexity and accuracy over the learned tokens.

    Every token counts the same, unlike in a Trainer's `eval_loss`, which averages over batches.

    Args:
        prediction: Sums of every example: loss, learned tokens, and those that were the likeliest, `[n, 3]`.

    Returns:
        `perplexity` and `token_accuracy`.
    """
    losses, tokens, hits = np.asarray(prediction.predictions, dtype=np.float64).sum(axis=0)
    return {"perplexity": metrics.perplexity(losses / tokens), "token_accuracy": float(hits / tokens)}


def example_losses(prediction: EvalPrediction) -> NDArray[np.floating]:
    """The mean loss of every example's learned tokens, [n]; see `language_model_metrics`."""
    sums = np.asarray(prediction.predictions, dtype=np.float64)
    return sums[:, 0] / sums[:, 1]


def token_predictions(prediction: EvalPrediction) -> list[dict[str, Any]]:
    """For every example: the mean loss of its learned tokens, their number, and how many were the likeliest."""
    rows = np.asarray(prediction.predictions, dtype=np.float64).tolist()
    return [{"loss": loss / tokens, "tokens": int(tokens), "likeliest": int(hits)} for loss, tokens, hits in rows]
