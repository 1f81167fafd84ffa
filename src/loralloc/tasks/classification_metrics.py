"""Metrics, the loss of every row, and readable predictions of a classifier, by problem."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import List, Value
from numpy.typing import NDArray
from transformers import EvalPrediction

from loralloc.tasks import metrics
from loralloc.tasks.classes import ONE_LABEL, REGRESSION, SEVERAL_LABELS


def classification_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Compute accuracy, F1 and Matthews' correlation of logits.

    Args:
        prediction: Logits `[n, classes]` and targets `[n]`.

    Returns:
        `accuracy`, `macro_f1`, `matthews` and, with two classes, `f1` of the second one, as in GLUE.
    """
    logits, target = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
    # argmax returns the place of a NaN: without this, a broken model would predict some class.
    predicted = np.where(np.isnan(logits).any(axis=-1), -1, logits.argmax(axis=-1))
    found = {
        "accuracy": metrics.accuracy(predicted, target),
        "macro_f1": metrics.macro_f1(predicted, target),
        "matthews": metrics.matthews(predicted, target),
    }
    return found if logits.shape[-1] != 2 else {**found, "f1": metrics.f1(predicted == 1, target == 1)}


def label_set_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Compute F1 of several labels a row; a label is predicted where its probability is at least one half.

    Args:
        prediction: Logits `[n, classes]` and targets `[n, classes]`, 0 or 1.

    Returns:
        `micro_f1` (over all labels of all rows), `macro_f1` (mean over the labels that occur), and `accuracy`, the
        share of rows all of whose labels are right.
    """
    predicted = np.asarray(prediction.predictions) >= 0  # what is not a number is no label
    target = np.asarray(prediction.label_ids) == 1
    occurs = (predicted | target).any(axis=0)
    each = [metrics.f1(predicted[:, n], target[:, n]) for n in np.flatnonzero(occurs)]
    return {
        "micro_f1": metrics.f1(predicted.ravel(), target.ravel()),
        "macro_f1": float(np.mean(each)) if each else 0.0,
        "accuracy": float((predicted == target).all(axis=1).mean()),
    }


def example_losses(prediction: EvalPrediction) -> NDArray[np.floating]:
    """The loss of every example, [n]: cross-entropy, its mean over several labels, or a regression's squared error."""
    outputs, target = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
    if target.ndim == 2:
        logits = outputs.astype(np.float64)
        return (np.logaddexp(0, logits) - target * logits).mean(axis=1)
    if np.issubdtype(target.dtype, np.floating):
        return (outputs.reshape(target.shape).astype(np.float64) - target) ** 2
    return metrics.cross_entropy(outputs, target)


def predictions(prediction: EvalPrediction, names: Mapping[Any, str]) -> list[dict[str, Any]]:
    """Describe the prediction for every example: class or classes with all probabilities, or a regression's number.

    Args:
        prediction: Outputs and targets.
        names: The names of the classes by their indices.
    """
    outputs, target = np.asarray(prediction.predictions, dtype=np.float64), np.asarray(prediction.label_ids)
    if target.ndim == 2:
        shares = 1 / (1 + np.exp(-outputs))
        return [
            {
                "labels": [names[n] for n in np.flatnonzero(wanted)],
                "prediction": [names[n] for n in np.flatnonzero(row >= 0.5)],
                "scores": _named(row, names),
            }
            for wanted, row in zip(target, shares, strict=True)
        ]
    if np.issubdtype(target.dtype, np.floating):
        values = outputs.reshape(target.shape)
        return [
            {"label": float(label), "prediction": float(value)} for label, value in zip(target, values, strict=True)
        ]
    scores = np.exp(outputs - outputs.max(axis=-1, keepdims=True))
    scores /= scores.sum(axis=-1, keepdims=True)
    return [
        {
            "label": names[label],
            "prediction": names[int(row.argmax())],
            "scores": _named(row, names),
        }
        for label, row in zip(map(int, target), scores, strict=True)
    ]


def _named(row: NDArray[np.floating], names: Mapping[Any, str]) -> dict[str, float]:
    return {names[index]: round(float(value), 6) for index, value in enumerate(row)}


def regression_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Compute Pearson's and Spearman's correlations and the mean squared error.

    Args:
        prediction: Outputs `[n, 1]` and targets `[n]`.

    Returns:
        `pearson`, `spearman` and `mse`.
    """
    predicted = np.asarray(prediction.predictions).reshape(-1)
    target = np.asarray(prediction.label_ids).reshape(-1)
    return {
        "pearson": metrics.pearson(predicted, target),
        "spearman": metrics.spearman(predicted, target),
        "mse": metrics.mean_squared_error(predicted, target),
    }


@dataclass(frozen=True)
class Judge:
    """How predictions for a problem are judged.

    Attributes:
        metric: The first metric.
        compute: Computes all of them.
        label_type: The type of a target.
    """

    metric: str
    compute: Callable[[EvalPrediction], dict[str, float]]
    label_type: List | Value


JUDGES: Mapping[str, Judge] = {
    ONE_LABEL: Judge("accuracy", classification_metrics, Value("int64")),
    SEVERAL_LABELS: Judge("micro_f1", label_set_metrics, List(Value("float32"))),
    REGRESSION: Judge("pearson", regression_metrics, Value("float32")),
}
