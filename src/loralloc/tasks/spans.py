"""Score predicted spans: a span is right if its type, beginning and end are right."""

from __future__ import annotations

from collections.abc import Sequence

from nervaluate import Evaluator

from loralloc.tasks.tags import Span

SCENARIO = "strict"
"""Spans that overlap without being the same count for nothing."""


def span_metrics(target: Sequence[Sequence[Span]], predicted: Sequence[Sequence[Span]]) -> dict[str, float]:
    """Compare the spans of sentences; all spans count alike (micro averages).

    Args:
        target: The spans of every sentence.
        predicted: Those predicted.

    Returns:
        `f1`, `precision` and `recall`, and the same of every type that occurs, such as `f1_Gene`; 0 where nothing is
        predicted, or nothing is there.
    """
    types = sorted({span.label for side in (target, predicted) for spans in side for span in spans})
    found = Evaluator(_entities(target), _entities(predicted), tags=types, loader="dict").evaluate()
    values = {"": found["overall"][SCENARIO], **{f"_{name}": found["entities"][name][SCENARIO] for name in types}}
    return {
        f"{figure}{name}": float(getattr(result, figure))
        for name, result in values.items()
        for figure in ("f1", "precision", "recall")
    }


def _entities(sentences: Sequence[Sequence[Span]]) -> list[list[dict[str, str | int]]]:
    """The form that the library takes, in which ends are inclusive."""
    return [[{"label": span.label, "start": span.start, "end": span.end - 1} for span in spans] for spans in sentences]
