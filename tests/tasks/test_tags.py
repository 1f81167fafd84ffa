"""Promises: spans in any scheme come back from their tags, and what a scheme forbids is found where it stands."""

from __future__ import annotations

import random

import pytest

from loralloc.tasks.tags import Span, fault_of, from_spans, recognise, spans_of, tag_set, to_bio


def naive_spans(tags: list[str]) -> list[Span]:
    """Of well-formed BIO tags, word by word."""
    found, place = [], 0
    while place < len(tags):
        if tags[place].startswith("B-"):
            label, end = tags[place][2:], place + 1
            while end < len(tags) and tags[end] == f"I-{label}":
                end += 1
            found.append(Span(place, end, label))
        place += 1
    return found


def draw(generator: random.Random) -> tuple[list[Span], int]:
    """Spans of a sentence, some of them adjacent, and its number of words."""
    spans, place = [], generator.randrange(3)
    while place < 12:
        end = place + generator.randint(1, 3)
        spans.append(Span(place, end, generator.choice("XY")))
        place = end + generator.choice([0, 0, 1, 2])
    return spans, 16


def written(spans: list[Span], count: int, letters: str) -> list[str]:
    """Spans as tags with letters for a span's beginning, inside, end, and one of a single word."""
    begin, inside, end, single = letters
    tags = ["O"] * count
    for first, behind, label in spans:
        long = [begin, *[inside] * (behind - first - 2), end] if behind - first > 1 else [single]
        tags[first:behind] = [f"{letter}-{label}" for letter in long]
    return tags


@pytest.mark.parametrize(("letters", "scheme"), [("BIIB", "bio"), ("BILU", "bilou"), ("BIES", "bilou")])
def test_spans_come_back_from_their_tags(letters, scheme):
    generator = random.Random(0)
    for _ in range(200):
        spans, count = draw(generator)
        tags = written(spans, count, letters)
        assert spans_of(tags) == spans
        assert fault_of(tags, scheme) is None
        if scheme == "bio":
            assert from_spans(spans, count) == tags
            assert naive_spans(tags) == spans


def test_iob1_becomes_bio():
    """B- only behind a span of the same type."""
    assert to_bio(["I-X", "I-X", "B-X", "I-X", "O", "I-Y", "I-X"]) == ["B-X", "I-X", "B-X", "I-X", "O", "B-Y", "B-X"]


def test_what_a_model_predicts_against_the_rules_is_still_read():
    assert spans_of(["O", "I-X", "I-Y"]) == [Span(1, 2, "X"), Span(2, 3, "Y")]
    assert spans_of(["B-X", "L-X", "I-X"]) == [Span(0, 2, "X"), Span(2, 3, "X")]
    assert spans_of(["U-X", "I-X"]) == [Span(0, 1, "X"), Span(1, 2, "X")]
    assert spans_of(["B-X", "B-X"]) == [Span(0, 1, "X"), Span(1, 2, "X")]


@pytest.mark.parametrize(
    ("tags", "scheme"),
    [
        ({"O", "B-X", "I-X"}, "bio"),
        ({"O", "B-X"}, "bio"),
        ({"O", "I-X"}, "iob1"),
        ({"O", "B-X", "L-X"}, "bilou"),
        ({"O", "S-X"}, "bilou"),
        ({"NOUN", "VERB"}, "plain"),
        ({"O"}, "plain"),
        ({"O", "B-X", "NOUN"}, None),
        ({"L-X", "S-X"}, None),
        ({"E-X", "U-X"}, None),
    ],
)
def test_schemes_are_recognised(tags, scheme):
    assert recognise(tags) == scheme


def test_every_letter_of_a_type_is_a_tag():
    assert tag_set({"B-X", "O"}, "bio") == ["O", "B-X", "I-X"]
    assert tag_set({"U-X", "O"}, "bilou") == ["O", "B-X", "I-X", "L-X", "U-X"]
    assert tag_set({"E-X", "B-X"}, "bilou") == ["O", "B-X", "I-X", "E-X", "S-X"]


@pytest.mark.parametrize(
    ("tags", "scheme", "place", "reason"),
    [
        (["O", "I-X"], "bio", 1, "begin spans with B-X, or set data.scheme: iob1"),
        (["B-Y", "I-X"], "bio", 1, "the word before it is not in a X"),
        (["B-X", "U-X"], "bio", 1, "no tag of scheme bio"),
        (["B-X", "NN"], "bio", 1, "no tag of scheme bio"),
        (["I-X", "L-X"], "bilou", 0, "no span of X has begun: begin it with B-X"),
        (["B-X", "O"], "bilou", 1, "the span of X before it has no end: end it with L-X or E-X"),
        (["B-X", "U-X"], "bilou", 1, "the span of X before it has no end"),
        (["B-X", "L-Y"], "bilou", 1, "no span of Y has begun"),
        (["O", "B-X"], "bilou", 1, "the sentence ends there"),
        (["S-X", "E-X"], "bilou", 1, "no span of X has begun"),
    ],
)
def test_what_a_scheme_forbids_is_found_where_it_stands(tags, scheme, place, reason):
    found = fault_of(tags, scheme)
    assert found is not None
    assert found[0] == place
    assert reason in found[1]


def test_what_a_scheme_allows_is_not():
    assert fault_of(["I-X", "O", "I-Y"], "iob1") is None
    assert fault_of(["B-X", "NN", "O"], "plain") is None
    assert fault_of(["U-X", "B-X", "I-X", "L-X", "S-Y"], "bilou") is None
