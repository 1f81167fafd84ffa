"""Promises: the best answer is the naively best one, and figures are those of SQuAD's script."""

from __future__ import annotations

import itertools
import re
import string
from collections import Counter

import numpy as np
import pytest

from loralloc.tasks.answer_search import Scored, answer_metrics, best_span, worth


def naive_best(starts, ends, allowed, longest):
    """Every pair of tokens, one after the other."""
    best = None
    for first, last in itertools.product(range(len(starts)), repeat=2):
        if allowed[first] and allowed[last] and 0 <= last - first < longest:
            score = float(starts[first]) + float(ends[last])
            if best is None or score > best[0]:
                best = (score, first, last)
    return best


@pytest.mark.parametrize("longest", [1, 3, 30])
def test_the_best_answer_is_the_naive_one(longest):
    rng = np.random.default_rng(0)
    for _ in range(50):
        starts, ends = rng.normal(size=(2, 40)).astype(np.float32)
        allowed = np.arange(40) >= rng.integers(1, 40)
        assert best_span(starts, ends, allowed, longest) == pytest.approx(naive_best(starts, ends, allowed, longest))


def test_it_is_that_of_the_twenty_best_beginnings_and_ends_where_these_hold_it():
    """As transformers' script searches; where the twenty hold no answer that is allowed, this one finds one."""
    rng = np.random.default_rng(1)
    allowed = np.ones(60, dtype=bool)
    for _ in range(50):
        starts, ends = rng.normal(size=(2, 60))
        tops = [np.argsort(side)[::-1][:20] for side in (starts, ends)]
        scores = [starts[a] + ends[b] for a in tops[0] for b in tops[1] if 0 <= b - a < 30]
        assert best_span(starts, ends, allowed, 30).score >= max(scores) - 1e-12
    falling = np.arange(60.0)
    assert best_span(falling, falling[::-1], allowed, 30).start <= best_span(falling, falling[::-1], allowed, 30).end


def test_no_token_is_no_answer():
    row = np.zeros(4)
    assert best_span(row, row, np.zeros(4, dtype=bool), 5) is None
    assert best_span(np.full(4, np.nan), row, np.ones(4, dtype=bool), 5) is None


def normalised(text: str) -> str:
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def naive_worth(predicted: str, references: list[str]) -> tuple[float, float]:
    """SQuAD's published script, in few lines."""
    best = [0.0, 0.0]
    for reference in references or [""]:
        said, right = normalised(predicted).split(), normalised(reference).split()
        common = sum((Counter(said) & Counter(right)).values())
        f1 = 2 * common / (len(said) + len(right)) if common else float(said == right) if not (said and right) else 0.0
        best = [max(best[0], f1), max(best[1], float(normalised(predicted) == normalised(reference)))]
    return best[0], best[1]


ANSWERS = ["the Tower, of London", "tower of London", "London", "a", "", "in the tower", "Paris"]


@pytest.mark.parametrize(("predicted", "reference"), list(itertools.product(ANSWERS, repeat=2)))
def test_an_answer_is_worth_what_squads_script_says(predicted, reference):
    for references in ([reference], [reference, "tower"]):
        assert worth(predicted, references) == pytest.approx(naive_worth(predicted, references), abs=1e-6)


def test_no_reference_wants_an_empty_answer():
    assert worth("", []) == (1, 1)
    assert worth("London", []) == (0, 0)


ROWS = [
    Scored("London", 5.0, 1.0, ["London"]),
    Scored("Paris", 2.0, 3.0, ["Paris", "in Paris"]),
    Scored("tower", 4.0, 1.0, ["the old tower"]),
    Scored("Rome", 1.0, 4.0, []),
    Scored("Oslo", 3.0, 2.5, []),
]


def test_figures_with_questions_that_have_no_answer():
    found = answer_metrics(ROWS, threshold=0.0)
    assert found["exact_match"] == (1 + 0 + 0 + 1 + 0) / 5  # Paris scores lower than no answer, and Oslo higher
    assert found["f1"] == pytest.approx((1 + 0 + 2 / 3 + 1 + 0) / 5)
    assert found["exact_match_answerable"] == 1 / 3
    assert found["f1_answerable"] == pytest.approx((1 + 0 + 2 / 3) / 3)
    assert found["exact_match_unanswerable"] == found["f1_unanswerable"] == 1 / 2
    assert answer_metrics(ROWS, threshold=2.0)["exact_match"] == (1 + 1 + 0 + 1 + 0) / 5


def test_the_best_threshold_is_the_naively_best_one():
    for rows in (ROWS, ROWS[1:], ROWS[3:], [*ROWS, *ROWS]):
        found = answer_metrics(rows, threshold=0.0)
        for name in ("f1", "exact_match"):
            tried = {t: answer_metrics(rows, threshold=t)[name] for t in (-99.0, *(row.margin for row in rows))}
            assert found[f"best_{name}"] == pytest.approx(max(tried.values()))
            assert answer_metrics(rows, found[f"best_{name}_threshold"])[name] == pytest.approx(found[f"best_{name}"])


def test_where_there_always_is_an_answer_none_is_not_predicted():
    assert ROWS[3].predicted(None) == "Rome"
    assert ROWS[3].predicted(0.0) == ""
    assert set(answer_metrics(ROWS[:3], None)) == set(answer_metrics(ROWS[:3], 0.0)) == {"f1", "exact_match"}
    assert "best_f1" not in answer_metrics(ROWS, None)
