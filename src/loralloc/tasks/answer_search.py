"""Find the best answer in a window of a text, and score answers by SQuAD's rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]


class Found(NamedTuple):
    """The best answer in a window.

    Attributes:
        score: The sum of the logits of its first and its last token.
        start: Its first token.
        end: Its last token.
    """

    score: float
    start: int
    end: int


def best_span(starts: Floats, ends: Floats, allowed: NDArray[np.bool_], longest: int) -> Found | None:
    """Find the answer with the highest score in a window.

    Args:
        starts: Logit of each token as the first of the answer, [length].
        ends: Logit of each token as the last of the answer, [length].
        allowed: Which tokens belong to the text, [length].
        longest: Tokens of an answer, at most.

    Returns:
        The answer, the first of those with equal scores; None if no token is allowed, or no score is finite.
    """
    first = np.where(allowed, starts.astype(np.float64), -np.inf)
    last = np.where(allowed, ends.astype(np.float64), -np.inf)
    scores = first[:, None] + last[None, :]
    place = np.arange(len(starts))
    length = place[None, :] - place[:, None] + 1
    scores = np.where((length >= 1) & (length <= longest) & np.isfinite(scores), scores, -np.inf)
    start, end = divmod(int(scores.argmax()), len(starts))
    return Found(float(scores[start, end]), start, end) if np.isfinite(scores[start, end]) else None


@dataclass(frozen=True)
class Scored:
    """What is predicted for a question.

    Attributes:
        answer: The best answer in its text.
        score: The score of this answer.
        no_answer: The score of giving no answer: the lowest over the windows.
        references: The right answers; empty if the question has none.
    """

    answer: str
    score: float
    no_answer: float
    references: Sequence[str]

    @property
    def margin(self) -> float:
        """The score of no answer minus the score of the best answer."""
        return self.no_answer - self.score

    def predicted(self, threshold: float | None) -> str:
        """The answer, or an empty text for none.

        Args:
            threshold: The margin above which the prediction is that there is no answer; None: always an answer.
        """
        return "" if threshold is not None and self.margin > threshold else self.answer


def answer_metrics(rows: Sequence[Scored], threshold: float | None) -> dict[str, float]:
    """Compare answers with references, as SQuAD's script does: the best reference of a question counts.

    Args:
        rows: What is predicted for every question.
        threshold: As `Scored.predicted` takes it.

    Returns:
        `f1` and `exact_match`, from 0 to 1. If some questions have no answer, also both for the answerable and for the
        unanswerable questions; and, unless the threshold is None, the best value of each over all thresholds, with the
        threshold that gives it (SQuAD 2.0).
    """
    figures = np.array([worth(row.predicted(threshold), row.references) for row in rows])
    answerable = np.array([bool(row.references) for row in rows])
    found = _named(figures)
    if answerable.all():
        return found
    for suffix, some in (("_answerable", answerable), ("_unanswerable", ~answerable)):
        found |= _named(figures[some], suffix) if some.any() else {}
    if threshold is not None:
        found |= _best(rows, answerable)
    return found


def worth(predicted: str, references: Sequence[str]) -> tuple[float, float]:
    """Return (F1 of words, exact match) of an answer, each with the reference that fits best, from 0 to 1.

    Case, punctuation, articles and white space do not count.
    """
    from torchmetrics.functional.text.squad import squad  # takes two seconds, which only this task should cost

    target = {"id": "", "answers": {"text": list(references) or [""], "answer_start": []}}
    percent = squad({"id": "", "prediction_text": predicted}, target)  # type: ignore[arg-type]
    return float(percent["f1"]) / 100, float(percent["exact_match"]) / 100


def _named(figures: Floats, suffix: str = "") -> dict[str, float]:
    means = figures.mean(axis=0)
    return {f"f1{suffix}": float(means[0]), f"exact_match{suffix}": float(means[1])}


def _best(rows: Sequence[Scored], answerable: NDArray[np.bool_]) -> dict[str, float]:
    """The best value of each metric over all thresholds, with the threshold: margins up to it are answered."""
    order = np.argsort([row.margin for row in rows], kind="stable")
    margins = np.array([row.margin for row in rows])[order]
    answered = np.array([worth(row.answer, row.references) for row in rows])[order]
    silent = np.where(answerable, 0.0, 1.0)[order]
    # One more threshold than questions: 0 of them are answered, or the first, or the first two ...
    last_of_equals = np.append(margins[1:] != margins[:-1], True)
    cuts = np.append(0, np.nonzero(last_of_equals)[0] + 1)
    thresholds = np.append(np.nextafter(margins[0], -np.inf), margins)[cuts]
    found: dict[str, float] = {}
    for column, name in enumerate(("f1", "exact_match")):
        sums = np.append(0, np.cumsum(answered[:, column]))[cuts] + np.append(np.cumsum(silent[::-1])[::-1], 0)[cuts]
        best = int(sums.argmax())
        found |= {f"best_{name}": float(sums[best] / len(rows)), f"best_{name}_threshold": float(thresholds[best])}
    return found
