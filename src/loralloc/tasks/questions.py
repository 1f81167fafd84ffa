"""Questions, each with a text and the answers that the text holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from loralloc.errors import UserError
from loralloc.tasks.rows import Rows, quote, records_of
from loralloc.tasks.spec import QuestionData


class Answer(NamedTuple):
    """An answer.

    Attributes:
        text: Its text.
        start: The character of the context at which it begins.
    """

    text: str
    start: int

    @property
    def end(self) -> int:
        """The character of the context after its last one."""
        return self.start + len(self.text)


@dataclass(frozen=True)
class Questions:
    """The questions of one source.

    Attributes:
        rows: Where they come from.
        questions: The questions.
        contexts: The text that belongs to each.
        answers: The answers to each; empty if the text has none.
    """

    rows: Rows
    questions: list[str]
    contexts: list[str]
    answers: list[list[Answer]]

    @property
    def all_answered(self) -> bool:
        """Whether every question has an answer."""
        return all(self.answers)


def read_questions(rows: Rows, data: QuestionData) -> Questions:
    """Read the questions of a source.

    Args:
        rows: The rows.
        data: The recipe's data section.

    Raises:
        UserError: No such column, an empty question or context, malformed answers, or an answer that the context does
            not have at the given character; with the row and the reason.
    """
    questions = rows.strings(str(data.question), "data.question")
    contexts = rows.strings(str(data.context), "data.context")
    column = str(data.answers)
    answers = [
        [_read_answer(f'{rows.place(i)}: column "{column}" (data.answers)', context, record) for record in records]
        for i, (context, records) in enumerate(zip(contexts, _records(rows, column), strict=True))
    ]
    return Questions(rows, questions, contexts, answers)


def _records(rows: Rows, column: str) -> list[list[Any]]:
    found = []
    for i, value in enumerate(rows.values(column, "data.answers")):
        records = records_of(value)
        if records is None:
            raise UserError(
                f'{rows.place(i)}: column "{column}" (data.answers) must hold {{"text": [...], "answer_start": [...]}} '
                f'of equal length, or a list of {{"text", "answer_start"}}; empty lists for no answer. Found '
                f"{quote(value)}"
            )
        found.append(records)
    return found


def _read_answer(where: str, context: str, record: Any) -> Answer:
    if not isinstance(record, dict):
        raise UserError(f'{where} must hold answers with "text" and "answer_start", found {quote(record)}')
    text, start = record.get("text"), record.get("answer_start", record.get("start"))
    if not isinstance(text, str) or type(start) is not int:
        raise UserError(
            f'{where} must hold answers with "text", a text, and "answer_start", the character at which it begins: '
            f"{quote(record)}"
        )
    if not text.strip():
        raise UserError(f"{where} has an empty answer; where there is none, give empty lists: {quote(record)}")
    answer = Answer(text, start)
    if start < 0 or context[start : answer.end] != text:
        there = quote(context[max(0, start) : max(0, answer.end)])
        raise UserError(
            f"{where}: the answer {quote(text)} is not at {start}, where {there} stands; {_cure(context, text)}"
        )
    return answer


def _cure(context: str, text: str) -> str:
    """Say where in the context an answer does stand, if anywhere."""
    places, at = [], context.find(text)
    while at >= 0:
        places.append(str(at))
        at = context.find(text, at + 1)
    if not places:
        return "the context does not have it anywhere: an answer must be a part of it, letter by letter"
    return f"it does at {', '.join(places[:5])}{', ...' if len(places) > 5 else ''}"
