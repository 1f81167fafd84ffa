"""Read multiple-choice questions, with the right choice of each, from the columns of a data set.

An answer may be read in several ways: "1" is the text of one choice and the number of another. All rows of a source are
read in one way, the first of `READINGS` that fits every row. Rows may differ only where no answer can mean two choices.
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from loralloc.errors import UserError
from loralloc.tasks.forms import read_texts
from loralloc.tasks.rows import Rows, quote
from loralloc.tasks.spec import ChoiceData
from loralloc.tasks.templates import is_template

READINGS = {"label": "its label", "text": "its text", "number": "its number from 0", "letter": "its letter"}
"""The ways to name a choice, each in words; the first is preferred."""


@dataclass(frozen=True)
class Question:
    """A question.

    Attributes:
        prompt: Its text.
        choices: The choices; at least two.
        right: The index of the right choice, from 0.
    """

    prompt: str
    choices: tuple[str, ...]
    right: int


@dataclass(frozen=True)
class _Draft:
    """A question before it is known how answers are to be read.

    Attributes:
        prompt: Its text.
        choices: The choices.
        right: The index of the right choice by every way to read the answer that fits.
        fault: What to say if none does.
    """

    prompt: str
    choices: tuple[str, ...]
    right: Mapping[str, int]
    fault: str


def read_questions(sources: Sequence[Rows], data: ChoiceData) -> list[list[Question]]:
    """Read questions, one a row.

    Args:
        sources: The rows of every split. Their answers are read in the way that fits all; if there is none, those of
            each source in its own way.
        data: The recipe's data section.

    Returns:
        The questions of every split.

    Raises:
        UserError: A column is missing, a choice is empty or stands twice, or an answer names no choice or may name two.
    """
    drafts = [list(_read_drafts(rows, data)) for rows in sources]
    by_source: dict[str, list[_Draft]] = {}  # what is cut off for validation is of one source with what stays
    for rows, found in zip(sources, drafts, strict=True):
        by_source.setdefault(rows.source, []).extend(found)
    shared = _fitting(list(chain(*drafts)))
    readings = {source: shared or _reading_of(found) for source, found in by_source.items()}
    return [
        [Question(one.prompt, one.choices, _right(one, readings[rows.source])) for one in found]
        for rows, found in zip(sources, drafts, strict=True)
    ]


def _read_drafts(rows: Rows, data: ChoiceData) -> Iterator[_Draft]:
    assert data.prompt is not None
    assert data.choices is not None
    assert data.answer is not None
    prompts = read_texts(rows, data.prompt, "data.prompt")
    answers = rows.values(data.answer, "data.answer")
    for i, (choices, labels) in enumerate(_read_choices(rows, data.choices)):
        if len(choices) < 2:
            raise UserError(f"{rows.place(i)}: a question needs two or more data.choices, found {quote(choices)}")
        if len(set(choices)) < len(choices):
            raise UserError(f"{rows.place(i)}: a choice (data.choices) occurs twice: {quote(choices)}")
        fault = (
            f'{rows.place(i)}: column "{data.answer}" (data.answer) must hold the number of the right choice from '
            f"0, its letter, its label or its text, found {quote(answers[i])}; the choices: {quote(choices)}"
        )
        yield _Draft(prompts[i], tuple(choices), right_choices(answers[i], choices, labels), fault)


def _fitting(drafts: Sequence[_Draft]) -> str | None:
    """The first way to read answers that fits all of them."""
    return next((reading for reading in READINGS if all(reading in draft.right for draft in drafts)), None)


def _reading_of(drafts: Sequence[_Draft]) -> str | None:
    """The way to read the answers of one source; None if rows differ in it, and no answer can mean two choices.

    Raises:
        UserError: There is none; with the first row that names no choice, or that is not read as most are.
    """
    if (reading := _fitting(drafts)) is not None:
        return reading
    if all(len(set(draft.right.values())) == 1 for draft in drafts):
        return None
    if (fault := next((draft.fault for draft in drafts if not draft.right), None)) is not None:
        raise UserError(fault)
    counts = Counter(reading for draft in drafts for reading in draft.right)
    best = max(READINGS, key=lambda reading: counts[reading])
    fault = next(draft.fault for draft in drafts if best not in draft.right)
    raise UserError(
        f"{fault}. Some answers could name two choices, so all must be written alike: {counts[best]} of {len(drafts)} "
        f"rows name {READINGS[best]}"
    )


def _right(draft: _Draft, reading: str | None) -> int:
    return next(iter(draft.right.values())) if reading is None else draft.right[reading]


def right_choices(answer: object, choices: Sequence[str], labels: Sequence[str]) -> dict[str, int]:
    """Find the choices that an answer may name.

    Args:
        answer: The answer in the data.
        choices: The choices.
        labels: Their labels; empty if the data have none.

    Returns:
        For each of `READINGS` that fits: the index of the choice, from 0.

    >>> right_choices("B", ["no", "yes"], []), right_choices("2", ["0", "1", "2"], ["1", "2", "3"])
    ({'letter': 1}, {'label': 1, 'text': 2, 'number': 2})
    """
    if isinstance(answer, float) and answer.is_integer():  # pandas writes 1.0 for 1 if values are missing
        answer = int(answer)
    if not isinstance(answer, str | int):
        return {}
    said = answer.strip() if isinstance(answer, str) else str(int(answer))
    letter = said.strip(" .()").upper()
    places = {
        "label": list(labels).index(said) if said in labels else -1,
        "text": list(choices).index(said) if isinstance(answer, str) and said in choices else -1,
        "number": int(said) if said.isdecimal() and len(said) < 10 else -1,  # Python reads no text of 4,301 digits
        "letter": string.ascii_uppercase.find(letter) if len(letter) == 1 else -1,
    }
    return {reading: place for reading, place in places.items() if 0 <= place < len(choices)}


def _read_choices(rows: Rows, named: str | list[str]) -> list[tuple[list[str], list[str]]]:
    """Return (choices, their labels if the data have any), one pair a row."""
    if isinstance(named, str):
        where = [f'{rows.place(i)}: column "{named}" (data.choices)' for i in range(len(rows))]
        return list(map(_listed, rows.values(named, "data.choices"), where))
    columns = [words for words in named if is_template(words) or words in rows.columns]
    if not columns:  # the same choices for every question
        return [(list(named), [])] * len(rows)
    texts = [read_texts(rows, words, "data.choices") for words in named]  # refuses names that are no columns
    return [([column[i] for column in texts], []) for i in range(len(rows))]


def _listed(value: object, where: str) -> tuple[list[str], list[str]]:
    """The choices of one row: a list of texts, or texts with labels as ARC has them."""
    given, labels = value, None
    if isinstance(value, list) and value and all(isinstance(choice, Mapping) for choice in value):
        value = {key: [choice.get(key) for choice in value] for key in ("text", "label") if key in value[0]}
    if isinstance(value, Mapping) and isinstance(value.get("text"), list):
        value, labels = value["text"], value.get("label")
    if labels is None or (isinstance(labels, list) and all(label is None for label in labels)):
        labels = []  # Arrow adds nulls to a row if another row has labels
    texts = isinstance(value, list) and all(isinstance(choice, str) for choice in value)
    if not isinstance(value, list) or not texts or not isinstance(labels, list):
        raise UserError(
            f'{where} must hold a list of texts, or {{"text": [...], "label": [...]}}, found {quote(given)}'
        )
    if labels and len(labels) != len(value):
        raise UserError(f"{where}: {len(value)} choices, but {len(labels)} labels")
    labels = [str(label) for label in labels]
    if len(set(labels)) < len(labels):
        raise UserError(f"{where}: a label occurs twice, so an answer could name two choices: {quote(labels)}")
    for n, choice in enumerate(value, 1):
        if not choice.strip():
            raise UserError(f"{where}: choice {n} is empty: {quote(value)}")
    return value, labels


def chance(questions: Sequence[Question]) -> float:
    """The accuracy of guessing."""
    return sum(1 / len(question.choices) for question in questions) / len(questions)
