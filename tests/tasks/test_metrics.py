"""Promises: the metrics equal naive twins that follow their definitions, and known values."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loralloc.tasks import metrics

CLASSES = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40)
NUMBERS = st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=2, max_size=30)


def naive_macro_f1(predicted: list[int], target: list[int]) -> float:
    scores = []
    for c in sorted(set(predicted) | set(target)):
        true_positive = sum(p == c and t == c for p, t in zip(predicted, target, strict=True))
        precision = true_positive / predicted.count(c) if c in predicted else 0.0
        recall = true_positive / target.count(c) if c in target else 0.0
        scores.append(2 * precision * recall / (precision + recall) if precision + recall else 0.0)
    return sum(scores) / len(scores)


def naive_matthews(predicted: list[int], target: list[int]) -> float:
    """Gorodkin's triple sum over the confusion matrix."""
    size = range(max(predicted + target) + 1)
    C = [[sum(p == j and t == i for p, t in zip(predicted, target, strict=True)) for j in size] for i in size]
    covariance = sum(C[k][k] * C[m][n] - C[n][k] * C[k][m] for k in size for m in size for n in size)
    count = len(target)
    x = sum(sum(C[k][i] for i in size) * (count - sum(C[k][i] for i in size)) for k in size)
    y = sum(sum(C[i][k] for i in size) * (count - sum(C[i][k] for i in size)) for k in size)
    return covariance / math.sqrt(x * y) if x * y else 0.0


def naive_pearson(x: list[float], y: list[float]) -> float:
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    spread = math.sqrt(sum((a - mean_x) ** 2 for a in x) * sum((b - mean_y) ** 2 for b in y))
    return covariance / spread if spread else 0.0


def naive_ranks(values: list[float]) -> list[float]:
    return [sum(w < v for w in values) + (sum(w == v for w in values) + 1) / 2 for v in values]


def arrays(pairs: list[tuple[int, int]], dtype: type = int) -> tuple[np.ndarray, np.ndarray]:
    predicted, target = zip(*pairs, strict=True)
    return np.array(predicted, dtype=dtype), np.array(target, dtype=dtype)


@given(CLASSES)
def test_classification_metrics_equal_their_twins(pairs: list[tuple[int, int]]) -> None:
    predicted, target = arrays(pairs)
    assert metrics.accuracy(predicted, target) == pytest.approx(np.mean([p == t for p, t in pairs]))
    assert metrics.macro_f1(predicted, target) == pytest.approx(naive_macro_f1(predicted.tolist(), target.tolist()))
    assert metrics.matthews(predicted, target) == pytest.approx(naive_matthews(predicted.tolist(), target.tolist()))


@given(NUMBERS)
def test_regression_metrics_equal_their_twins(pairs: list[tuple[int, int]]) -> None:
    predicted, target = arrays(pairs, np.float32)
    x, y = predicted.tolist(), target.tolist()
    assert metrics.pearson(predicted, target) == pytest.approx(naive_pearson(x, y), abs=1e-9)
    assert metrics.ranks(predicted).tolist() == naive_ranks(x)
    expected = naive_pearson(naive_ranks(x), naive_ranks(y))
    assert metrics.spearman(predicted, target) == pytest.approx(expected, abs=1e-9)
    assert metrics.mean_squared_error(predicted, target) == pytest.approx(np.mean([(a - b) ** 2 for a, b in pairs]))


def test_known_values() -> None:
    target, predicted = np.array([0, 1, 2, 0, 1, 2]), np.array([0, 2, 1, 0, 0, 1])
    assert metrics.macro_f1(predicted, target) == pytest.approx(0.26666667)  # scikit-learn's own example
    binary = np.array([1, 1, 1, 0]), np.array([1, 0, 1, 1])
    assert metrics.matthews(*binary) == pytest.approx(-1 / 3)
    assert metrics.spearman(np.array([1.0, 2, 3, 4, 5]), np.array([5.0, 6, 7, 8, 7])) == pytest.approx(0.8207827)


def test_a_constant_tells_nothing() -> None:
    constant, varied = np.zeros(4), np.arange(4.0)
    assert metrics.pearson(constant, varied) == metrics.spearman(varied, constant) == 0.0
    assert metrics.matthews(np.zeros(4, dtype=int), np.array([0, 1, 0, 1])) == 0.0


def test_what_is_not_finite_is_not_hidden() -> None:
    broken, fine = np.array([1.0, np.nan, 2.0]), np.array([1.0, 2.0, 3.0])
    assert math.isnan(metrics.pearson(broken, fine))
    assert math.isnan(metrics.spearman(broken, fine))
    assert math.isnan(metrics.mean_squared_error(broken, fine))


def test_perplexity() -> None:
    assert metrics.perplexity(np.log([2.0, 8.0])) == pytest.approx(4.0)
    assert metrics.perplexity(np.array([1e6])) == math.inf
