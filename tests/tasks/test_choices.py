"""Questions with choices: every way in which data say which choice is right, and every row that cannot be read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from loralloc.errors import UserError
from loralloc.tasks.choices import Question, chance, read_questions
from loralloc.tasks.data import read_rows
from loralloc.tasks.rows import Rows, split

Read = Callable[..., list[Question]]

ROW: dict[str, Any] = {"prompt": "the film is", "choices": ["good", "bad", "a film"], "answer": 1}


@pytest.fixture
def read(write: Callable[..., str], data_section: Callable[..., Any]) -> Read:
    def make(*rows: dict[str, Any], **given: Any) -> list[Question]:
        names = {"prompt": "prompt", "choices": "choices", "answer": "answer", **given}
        (questions,) = read_questions([read_rows(write(rows))], data_section("train.jsonl", **names))
        return questions

    return make


LABELLED = {"text": ["good", "bad", "a film"], "label": ["1", "2", "3"]}


@pytest.mark.parametrize(
    ("choices", "answer"),
    [
        (ROW["choices"], 1),
        (ROW["choices"], "1"),
        (ROW["choices"], "B"),
        (ROW["choices"], "(b)"),
        (ROW["choices"], "bad"),
        (LABELLED, "2"),
        (LABELLED, 2),
        (LABELLED, "bad"),
        (["1", "0"], "0"),  # a text before a number
        (ROW["choices"], 1.0),
        (ROW["choices"], " bad"),
        ({"text": ["good", "bad"], "label": ["A", "B"]}, 1),
        ({"text": ["good", "bad"], "label": ["A", "B"]}, "1"),
        ([{"text": "good", "label": "A"}, {"text": "bad", "label": "B"}], "B"),
        (LABELLED, "B"),
        ([{"text": "good", "label": None}, {"text": "bad", "label": None}], "B"),
        (["A", "B"], "B"),
        (["no", "yes"], True),
    ],
)
def test_the_right_choice(read: Read, choices: Any, answer: object) -> None:
    (question,) = read({**ROW, "choices": choices, "answer": answer})
    assert question.right == 1
    assert question.prompt == "the film is"


@pytest.mark.parametrize(
    ("choices", "answer"),
    [
        (ROW["choices"], 3),
        (ROW["choices"], -1),
        (ROW["choices"], "D"),
        (ROW["choices"], "7"),
        (ROW["choices"], "no"),
        (ROW["choices"], 1.5),
        (LABELLED, "D"),
        (LABELLED, 4),
        (LABELLED, [1]),
        (LABELLED, "1" * 5000),
    ],
)
def test_an_answer_that_is_no_choice(read: Read, choices: Any, answer: object) -> None:
    with pytest.raises(
        UserError, match=r"train\.jsonl:2: column \"answer\" \(data\.answer\) must hold the number of the"
    ):
        read(ROW, {**ROW, "choices": choices, "answer": answer})


def test_all_answers_are_read_in_one_way(read: Read) -> None:
    sums = [{"prompt": "a", "choices": choices, "answer": "1"} for choices in (["0", "4", "2"], ["1", "2", "3"])]
    assert [question.right for question in read(*sums)] == [1, 1]  # the text "1" is no choice of the first
    assert [question.right for question in read(sums[1], sums[1])] == [0, 0]
    letters = [{"prompt": "a", "choices": choices, "answer": "B"} for choices in (["B", "A"], ["good", "bad"])]
    assert [question.right for question in read(*letters)] == [1, 1]


def test_answers_that_name_the_choice_in_several_ways(read: Read) -> None:
    several = [{**ROW, "answer": answer} for answer in ("0", "B", "1", "a film")]
    assert [question.right for question in read(*several)] == [0, 1, 1, 2]  # each can mean one choice only
    message = (
        r'train\.jsonl:2: column "answer" .* found "B"; the choices: .*\. Some answers could name two choices, so all '
        r"must be written alike: 3 of 4 rows name its number from 0$"
    )
    with pytest.raises(UserError, match=message):
        read(*several[:3], {**ROW, "choices": ["1", "0"], "answer": "0"})


def test_splits_are_read_in_one_way_if_one_fits(data_section: Callable[..., Any]) -> None:
    def rows_of(source: str, *choices: list[str], answer: str = "1") -> Rows:
        records = [{"prompt": "a", "choices": one, "answer": answer} for one in choices]
        return Rows(source, tuple(records[0]), records, range(1, len(records) + 1))

    def right(*sources: Rows) -> list[list[int]]:
        data = data_section("a.jsonl", prompt="prompt", choices="choices", answer="answer")
        return [[question.right for question in questions] for questions in read_questions(sources, data)]

    train, held_out = rows_of("a.jsonl", ["0", "4"]), rows_of("b.jsonl", ["1", "2"])
    assert right(train, held_out) == [[1], [1]]
    letters = rows_of("c.jsonl", ["B", "A"], ["good", "bad"], answer="B")
    assert right(train, letters, held_out) == [[1], [1, 1], [0]]  # each file in its own way
    stays, cut = split(rows_of("a.jsonl", ["0", "4"], ["1", "2"]), 0.5, 0)
    assert right(stays, cut, letters) == [[1], [1], [1, 1]]


def test_choices_in_columns_of_their_own(read: Read) -> None:
    row = {"prompt": "a", "one": "good", "two": "bad", "answer": 1}
    (question,) = read(row, choices=["one", "{two} film"])
    assert question == Question("a", ("good", "bad film"), 1)


def test_columns_that_say_the_same(read: Read) -> None:
    with pytest.raises(UserError, match=r'train\.jsonl:1: a choice \(data\.choices\) occurs twice: \["good", "good"\]'):
        read({"prompt": "a", "one": "good", "two": "good", "answer": 1}, choices=["one", "two"])


def test_the_same_choices_for_every_question(read: Read) -> None:
    questions = read(*({"prompt": "a", "answer": answer} for answer in (True, False)), choices=["no", "yes"])
    assert [question.choices for question in questions] == [("no", "yes")] * 2
    assert [question.right for question in questions] == [1, 0]


def test_a_column_beside_what_is_none(read: Read) -> None:
    with pytest.raises(UserError, match=r'has no column "too" \(data\.choices\)'):
        read({"prompt": "a", "one": "good", "two": "bad", "answer": 1}, choices=["one", "too"])


@pytest.mark.parametrize(
    ("choices", "told"),
    [
        ("good", "must hold a list of texts, or"),
        (["good", 1], "must hold a list of texts, or"),
        (["good"], "a question needs two or more data.choices"),
        ([], "a question needs two or more data.choices"),
        (["good", " "], "choice 2 is empty"),
        (["good", "good"], "occurs twice"),
        ({"text": ["good", "bad"], "label": ["A"]}, "2 choices, but 1 labels"),
        ({"text": ["good", "bad"], "label": 5}, 'found {"text": ["good", "bad"], "label": 5}'),
        ({"text": ["good", "bad"], "label": "AB"}, "must hold a list of texts, or"),
        (
            {"text": ["good", "bad"], "label": ["A", "A"]},
            'column "choices" (data.choices): a label occurs twice, so an answer could name two choices: ["A", "A"]',
        ),
        ([{"text": "good", "label": 1}, {"text": "bad", "label": "1"}], "a label occurs twice"),
    ],
)
def test_choices_that_cannot_be_read(read: Read, choices: Any, told: str) -> None:
    with pytest.raises(UserError, match=r"train\.jsonl:2: ") as error:
        read(ROW, {**ROW, "choices": choices, "answer": "good"})
    assert told in str(error.value)


def test_guessing() -> None:
    assert chance([Question("a", ("b", "c"), 0), Question("a", ("b", "c", "d", "e"), 0)]) == (1 / 2 + 1 / 4) / 2
