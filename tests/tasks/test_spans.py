"""Promises: the figures of spans are those of exact matches, counted naively."""

from __future__ import annotations

import random

import pytest

from loralloc.tasks.spans import span_metrics
from loralloc.tasks.tags import Span, spans_of


def naive(target, predicted, label=None):
    """Spans as sets: type, beginning and end must agree."""
    pairs = zip(target, predicted, strict=True)
    sets = [({s for s in a if label in (None, s.label)}, {s for s in b if label in (None, s.label)}) for a, b in pairs]
    right, there, said = (
        sum(len(part) for part in parts) for parts in zip(*[(a & b, a, b) for a, b in sets], strict=True)
    )
    precision, recall = right / said if said else 0.0, right / there if there else 0.0
    f1 = 2 * precision * recall / (precision + recall) if right else 0.0
    return {"f1": f1, "precision": precision, "recall": recall}


def test_they_are_the_naive_ones_over_random_tags():
    """Many spans are adjacent, overlap those predicted, or differ in type or at one end alone."""
    generator = random.Random(0)
    for _ in range(30):
        sides = []
        for _ in range(2):
            tags = [generator.choices(["O", "B-X", "I-X", "B-Y", "I-Y"], k=15) for _ in range(6)]
            sides.append([spans_of(row) for row in tags])
        found = span_metrics(*sides)
        for label, suffix in ((None, ""), ("X", "_X"), ("Y", "_Y")):
            for name, value in naive(*sides, label).items():
                assert found[name + suffix] == pytest.approx(value)


def test_adjacent_spans_are_not_one():
    one, two = [[Span(0, 2, "X")]], [[Span(0, 1, "X"), Span(1, 2, "X")]]
    assert span_metrics(one, two)["f1"] == 0
    assert span_metrics(two, two) == {
        f"{name}{suffix}": 1.0 for suffix in ("", "_X") for name in ("f1", "precision", "recall")
    }
    half = span_metrics(two, [[Span(1, 2, "X")]])
    assert (half["precision"], half["recall"]) == (half["precision_X"], half["recall_X"]) == (1, 0.5)


def test_nothing_predicted_is_worth_nothing():
    assert span_metrics([[Span(0, 1, "X")]], [[]])["f1"] == 0
    assert span_metrics([[]], [[]]) == {"f1": 0.0, "precision": 0.0, "recall": 0.0}
