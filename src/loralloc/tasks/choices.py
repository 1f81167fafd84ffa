"""Read multiple-choice questions, with the right choice of each, from the columns of a data set."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loralloc.errors import UserError
from loralloc.tasks.forms import read_texts
from loralloc.tasks.rows import Rows, quote
from loralloc.tasks.spec import ChoiceData
from loralloc.tasks.templates import is_template


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


def read_questions(rows: Rows, data: ChoiceData) -> list[Question]:
    """Read questions, one a row.

    Args:
        rows: The rows.
        data: The recipe's data section.

    Raises:
        UserError: A column is missing, a choice is empty or stands twice, or no choice is the right one.
    """
    assert data.prompt is not None
    assert data.choices is not None
    assert data.answer is not None
    prompts = read_texts(rows, data.prompt, "data.prompt")
    answers = rows.values(data.answer, "data.answer")
    questions = []
    for i, (choices, labels) in enumerate(_read_choices(rows, data.choices)):
        if len(choices) < 2:
            raise UserError(f"{rows.place(i)}: a question needs two or more data.choices, found {quote(choices)}")
        if len(set(choices)) < len(choices):
            raise UserError(f"{rows.place(i)}: a choice (data.choices) occurs twice: {quote(choices)}")
        right = right_choice(answers[i], choices, labels)
        if right is None:
            raise UserError(
                f'{rows.place(i)}: column "{data.answer}" (data.answer) must hold the number of the right choice from '
                f"0, its letter, its label or its text, found {quote(answers[i])}; the choices: {quote(choices)}"
            )
        questions.append(Question(prompts[i], tuple(choices), right))
    return questions


def right_choice(answer: object, choices: Sequence[str], labels: Sequence[str]) -> int | None:
    """Find the choice that an answer names: by its label, or else its text, its number from 0, or its letter.

    Args:
        answer: The answer in the data.
        choices: The choices.
        labels: Their labels; empty if the data have none.

    Returns:
        The index of the choice, from 0; None if the answer names none.

    >>> right_choice("B", ["no", "yes"], []), right_choice("2", ["no", "yes"], ["1", "2"])
    (1, 1)
    """
    if isinstance(answer, float) and answer.is_integer():  # pandas writes 1.0 for 1 if values are missing
        answer = int(answer)
    if not isinstance(answer, str | int):
        return None
    said = answer.strip() if isinstance(answer, str) else str(int(answer))
    for names in (labels, choices if isinstance(answer, str) else ()):
        if said in names:
            return list(names).index(said)
    if said.isdecimal():
        return int(said) if int(said) < len(choices) else None
    letter = said.strip(" .()").upper()
    place = string.ascii_uppercase.find(letter) if len(letter) == 1 else -1
    return place if 0 <= place < len(choices) else None


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
    labels: list[Any] = []
    if isinstance(value, list) and value and all(isinstance(choice, Mapping) for choice in value):
        value = {key: [choice.get(key) for choice in value] for key in ("text", "label") if key in value[0]}
    if isinstance(value, Mapping) and isinstance(value.get("text"), list):
        value, labels = value["text"], list(value.get("label") or [])
    if not isinstance(value, list) or not all(isinstance(choice, str) for choice in value):
        raise UserError(
            f'{where} must hold a list of texts, or {{"text": [...], "label": [...]}}, found {quote(value)}'
        )
    if labels and len(labels) != len(value):
        raise UserError(f"{where}: {len(value)} choices, but {len(labels)} labels")
    for n, choice in enumerate(value, 1):
        if not choice.strip():
            raise UserError(f"{where}: choice {n} is empty: {quote(value)}")
    return value, [str(label) for label in labels]


def chance(questions: Sequence[Question]) -> float:
    """The accuracy of guessing."""
    return sum(1 / len(question.choices) for question in questions) / len(questions)
