"""Metrics, as pure functions of numpy arrays.

A metric that is undefined because everything is constant is 0, as in scikit-learn: a constant tells nothing.
A correlation is NaN if any value is not finite.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.integer]
Floats = NDArray[np.floating]


def accuracy(predicted: Ints, target: Ints) -> float:
    """Share of the predictions that are right.

    >>> accuracy(np.array([0, 1, 1]), np.array([0, 1, 0]))
    0.6666666666666666
    """
    return float(np.mean(predicted == target))


def f1(predicted: NDArray[np.bool_], target: NDArray[np.bool_]) -> float:
    """F1 of boolean predictions, 2·TP / (2·TP + FP + FN); 0 if nothing is true in either.

    >>> f1(np.array([True, True, False]), np.array([True, False, False]))
    0.6666666666666666
    """
    both = int(predicted.sum() + target.sum())
    return float(2 * (predicted & target).sum() / both) if both else 0.0


def macro_f1(predicted: Ints, target: Ints) -> float:
    """Mean over the classes that occur, as a prediction or a target, of 2·TP / (2·TP + FP + FN)."""
    return float(np.mean([f1(predicted == c, target == c) for c in np.union1d(predicted, target)]))


def matthews(predicted: Ints, target: Ints) -> float:
    """Matthews' correlation coefficient for any number of classes (Gorodkin, 2004).

    The covariance of the two one-hot codings over the root of the product of their variances.
    """
    count = len(target)
    classes = np.union1d(predicted, target)
    p = np.array([np.sum(predicted == c) for c in classes], dtype=np.float64)
    t = np.array([np.sum(target == c) for c in classes], dtype=np.float64)
    covariance = np.sum(predicted == target) * count - p @ t
    spread = (count**2 - p @ p) * (count**2 - t @ t)
    return float(covariance / np.sqrt(spread)) if spread > 0 else 0.0


def pearson(predicted: Floats, target: Floats) -> float:
    """Pearson's correlation coefficient."""
    x = predicted.astype(np.float64) - np.mean(predicted, dtype=np.float64)
    y = target.astype(np.float64) - np.mean(target, dtype=np.float64)
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return float("nan")
    spread = np.linalg.norm(x) * np.linalg.norm(y)
    return float(x @ y / spread) if spread > 0 else 0.0


def ranks(values: Floats) -> Floats:
    """Rank values from 1; equal values share the mean of their ranks.

    >>> ranks(np.array([10.0, 30.0, 10.0]))
    array([1.5, 3. , 1.5])
    """
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[group]


def spearman(predicted: Floats, target: Floats) -> float:
    """Spearman's rank correlation coefficient."""
    if not (np.isfinite(predicted).all() and np.isfinite(target).all()):
        return float("nan")
    return pearson(ranks(predicted), ranks(target))


def mean_squared_error(predicted: Floats, target: Floats) -> float:
    """Mean of the squared differences."""
    return float(np.mean((predicted.astype(np.float64) - target.astype(np.float64)) ** 2))


def cross_entropy(logits: Floats, target: Ints) -> Floats:
    """Cross-entropy of every row of logits, [n, classes], with its class, [n]."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.log(np.exp(shifted).sum(axis=-1)) - np.take_along_axis(shifted, target[:, None], axis=-1)[:, 0]


def paired_difference(first: Floats, second: Floats) -> tuple[float, float, float]:
    """Mean difference of two runs' losses of the same examples, with its 95 % interval.

    What makes an example hard for both runs cancels out, so that far smaller differences are visible than between the
    means of two runs.

    Args:
        first: Losses of one run, [n], n at least 2.
        second: Losses of the other run, of the same examples in the same order.

    Returns:
        Mean of first - second, and the ends of its interval (normal approximation: ± 1.96 standard errors).

    >>> paired_difference(np.array([1.0, 2.0, 3.0]), np.array([0.5, 1.5, 2.5]))
    (0.5, 0.5, 0.5)
    """
    differences = first.astype(np.float64) - second
    mean, error = float(differences.mean()), float(differences.std(ddof=1)) / math.sqrt(len(differences))
    return mean, mean - 1.96 * error, mean + 1.96 * error


def perplexity(losses: Floats) -> float:
    """Exponential of the mean loss per token; infinite where that overflows."""
    with np.errstate(over="ignore"):
        return float(np.exp(np.mean(losses, dtype=np.float64)))
