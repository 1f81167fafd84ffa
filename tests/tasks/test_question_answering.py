"""Promises: every window of a context knows its part of the answer, and the best answer of all windows counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from loralloc.errors import UserError
from loralloc.tasks import prepare, prepare_evaluation
from loralloc.tasks.base import Evaluated, TaskData
from loralloc.tasks.preview import parts_of
from loralloc.tasks.question_answering import answer_tokens
from loralloc.tasks.questions import Answer

Section = Callable[..., Any]
Write = Callable[..., str]
Prepare = Callable[..., TaskData]


def row(context: str, *answers: str, question: str = "is the film") -> dict[str, Any]:
    starts = [context.index(answer) for answer in answers]
    return {"question": question, "context": context, "answers": {"text": list(answers), "answer_start": starts}}


SHORT = row("the film is good", "good")
LONG = row("a b c d e a b c d e a b c d e a b good film c d e", "good film")
NONE = row("a b c d")
ROWS = [SHORT, LONG] * 3
COLUMNS = {"question": "question", "context": "context", "answers": "answers"}


@pytest.fixture
def task(encoder: str, model_section: Section, data_section: Section, write: Write) -> Prepare:
    """Prepares rows with the tiny encoder; of 16 tokens, six are the question and what stands around it."""

    def make(rows: list[dict[str, Any]], held_out: list[dict[str, Any]] | None = None, **given: Any) -> TaskData:
        validation = {} if held_out is None else {"validation": write(held_out, "validation.jsonl")}
        data = data_section(write(rows), **{**COLUMNS, **validation, **given})
        return prepare("question-answering", model_section(encoder), data, 0)

    return make


def answered(prepared: TaskData, none: tuple[int, ...] = ()) -> Evaluated:
    """An evaluation of the validation data in which the ends of all answers are found, but in some windows none is."""
    examples = prepared.validation
    labels = [np.array(examples[name]) for name in ("start_positions", "end_positions")]
    length = max(map(len, examples["input_ids"]))
    logits = [np.eye(length)[np.where(np.isin(np.arange(len(ends)), none), 0, ends)] * 4.0 for ends in labels]
    return Evaluated(tuple(logits), tuple(labels), examples)


def metrics(prepared: TaskData, *none: int) -> dict[str, float]:
    return prepared.options["compute_metrics"](answered(prepared, none))


def shown(prepared: TaskData, evaluated: Evaluated) -> list[dict[str, Any]]:
    assert prepared.predictions is not None
    return prepared.predictions(evaluated)


def test_an_answer_is_the_tokens_that_say_it(task: Prepare) -> None:
    prepared = task(ROWS, ROWS[:2])
    first = prepared.train[0]
    assert set(first) == {"input_ids", "token_type_ids", "attention_mask", "start_positions", "end_positions"}
    found = first["input_ids"][first["start_positions"] : first["end_positions"] + 1]
    assert prepared.tokenizer.decode(found) == "good"
    assert parts_of(prepared.tokenizer, first)[1] == (" good", "learned")
    assert prepared.model.config.may_not_answer is False


def test_a_window_without_the_whole_answer_points_at_its_first_token(task: Prepare) -> None:
    prepared = task([LONG] * 4, [LONG], stride=4)
    windows = list(prepared.validation)
    texts = [prepared.tokenizer.decode(window["input_ids"][5:-1]) for window in windows]
    assert texts == ["a b c d e a b c d e", "b c d e a b c d e a", "c d e a b good film c d e"]
    ends = [(window["start_positions"], window["end_positions"]) for window in windows]
    assert ends == [(0, 0), (0, 0), (10, 11)]
    assert [window["row"] for window in windows] == [0, 0, 0]
    assert [window["context"] for window in windows] == [LONG["context"], "", ""]
    halves = task([LONG] * 4, [LONG], stride=0, max_length=15)  # nine tokens a window: the answer is in two
    assert {window["start_positions"] for window in halves.train} == {0}  # type: ignore[index]


def test_without_a_stride_windows_share_a_third_of_max_length(task: Prepare) -> None:
    assert task([LONG] * 4, [LONG]).validation[:] == task([LONG] * 4, [LONG], stride=16 // 3).validation[:]
    assert len(task([LONG] * 4, [LONG]).validation) != len(task([LONG] * 4, [LONG], stride=0).validation)


@pytest.mark.parametrize(
    ("answer", "tokens"),
    [
        (Answer("ab", 0), (2, 2)),
        (Answer(" cd ", 2), (3, 3)),  # white space around it is not part of it
        (Answer("b c", 1), (2, 3)),  # tokens are whole
        (Answer("cd ef", 3), (3, 4)),
        (Answer("ef gh", 6), (0, 0)),  # its end is behind the window
        (Answer("gh", 9), (0, 0)),
    ],
)
def test_tokens_of_an_answer(answer: Answer, tokens: tuple[int, int]) -> None:
    assert answer_tokens([(-1, -1), (-1, -1), (0, 2), (3, 5), (6, 8), (-1, -1)], answer) == tokens


def test_the_best_answer_of_all_windows_counts(task: Prepare) -> None:
    prepared = task(ROWS, [SHORT, LONG], stride=4)
    evaluated = answered(prepared)
    assert [one["answer"] for one in shown(prepared, evaluated)] == ["good", "good film"]
    assert metrics(prepared) == {"f1": 1.0, "exact_match": 1.0}
    first = shown(prepared, evaluated)[0]
    assert first == {
        "question": "is the film",
        "answer": "good",
        "score": 8.0,
        "no_answer_score": 0.0,
        "references": ["good"],
    }
    # A higher score in another window of the same context.
    evaluated.predictions[0][2, 6], evaluated.predictions[1][2, 6] = 9.0, 9.0
    assert shown(prepared, evaluated)[1]["answer"] == "c"
    evaluated.predictions[0][2, 2], evaluated.predictions[1][2, 2] = 99.0, 99.0  # a token of the question is none
    assert shown(prepared, evaluated)[1]["answer"] == "c"


def test_an_answer_is_no_longer_than_allowed(task: Prepare) -> None:
    prepared = task(ROWS, [LONG], stride=4, answer_length=1)
    assert shown(prepared, answered(prepared))[0]["answer"] in ("good", "film")


def test_no_answer_is_predicted_where_training_data_have_such(task: Prepare) -> None:
    prepared = task([SHORT, NONE] * 4, [SHORT, NONE, LONG], stride=4)
    assert prepared.model.config.may_not_answer is True
    assert [one["answer"] for one in shown(prepared, answered(prepared))] == ["good", "", "good film"]
    found = metrics(prepared)
    assert found["exact_match"] == found["f1_answerable"] == found["exact_match_unanswerable"] == 1
    assert metrics(prepared, 0)["exact_match_answerable"] == 1 / 2
    assert metrics(prepared, 0)["best_exact_match"] == 2 / 3
    eager = task([SHORT, NONE] * 4, [SHORT, NONE], no_answer_threshold=99.0)
    assert all(one["answer"] for one in shown(eager, answered(eager)))
    never = task([SHORT] * 4, [SHORT, NONE])
    assert all(one["answer"] for one in shown(never, answered(never)))


def test_the_first_of_several_answers_is_learned_and_all_are_right(task: Prepare) -> None:
    several = row("the film is good", "good", "is good")
    prepared = task([several] * 4, [several])
    first = prepared.validation[0]
    assert first["start_positions"] == first["end_positions"] == 8
    evaluated = answered(prepared)
    evaluated.predictions[0][0, 7] = 9.0
    assert shown(prepared, evaluated)[0]["answer"] == "is good"
    assert prepared.options["compute_metrics"](evaluated) == {"f1": 1.0, "exact_match": 1.0}


def test_losses_are_the_models_own_and_a_questions_is_the_mean_of_its_windows(task: Prepare) -> None:
    prepared = task(ROWS, [SHORT, LONG], stride=4)
    names, collate = prepared.train.column_names, prepared.options["data_collator"]
    assert names is not None
    rows = [{key: window[key] for key in names} for window in prepared.validation]
    single = [prepared.model(**collate([one])).loss.item() for one in rows]
    batch = collate(rows)
    with torch.no_grad():
        output = prepared.model(**batch)
    logits = (output.start_logits.numpy(), output.end_logits.numpy())
    labels = (batch["start_positions"].numpy(), batch["end_positions"].numpy())
    assert prepared.example_losses is not None
    found = prepared.example_losses(Evaluated(logits, labels, prepared.validation))
    assert found == pytest.approx([single[0], np.mean(single[1:])], abs=1e-5)


def test_an_evaluation_alone_is_the_same(task: Prepare, data_section: Section, write: Write) -> None:
    for rows in ([SHORT, LONG], [SHORT, NONE]):
        prepared = task(rows * 3, rows)
        data = data_section("gone.jsonl", **COLUMNS)
        again = prepare_evaluation(
            "question-answering", prepared.model, prepared.tokenizer, data, write(rows, "more.jsonl")
        )
        assert again.test is not None
        assert again.test[:] == prepared.validation[:]
        assert again.options["compute_metrics"](answered(prepared)) == metrics(prepared)


def records(value: Any) -> dict[str, Any]:
    return {"question": "is the film", "context": "the film is good", "answers": value}


def test_answers_may_be_a_list_of_records(task: Prepare) -> None:
    for key in ("answer_start", "start"):
        listed = records([{"text": "good", key: 12}])
        assert task([listed] * 4, [listed]).train[:] == task([SHORT] * 4, [SHORT]).train[:]
    assert task([SHORT, records([])] * 4, [SHORT]).model.config.may_not_answer


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (records({"text": ["good"], "answer_start": [11]}),
         r'answer "good" is not at 11, where " goo" stands; it does at 12'),
        (records({"text": ["bad"], "answer_start": [-1]}), r'"bad" is not at -1, .* does not have it anywhere'),
        (records({"text": ["a", "b"], "answer_start": [1]}), r"must hold .* of equal length"),
        (records("good"), r'must hold .* Found "good"'),
        (records(["good"]), r'must hold answers with "text" and "answer_start", found "good"'),
        (records([{"text": "good"}]), r'"answer_start", the character at which it begins: {"text": "good"}'),
        (records([{"text": "good", "start": 12.0}]), r'"answer_start", the character at which it begins'),
        (records([{"text": " ", "start": 3}]), r"has an empty answer; where there is none, give empty lists"),
        ({**SHORT, "question": " "}, r'empty text in column "question" \(data.question\)'),
        ({**SHORT, "context": ""}, r'empty text in column "context" \(data.context\)'),
        ({**SHORT, "answers": None}, r'no value in column "answers" \(data.answers\)'),
        ({**SHORT, "question": "a " * 9},
         r"the question has 9 tokens; of data.max_length, which is 16, it leaves 4 for the context, and windows share "
         r"5 of them \(data.stride\). Raise data.max_length"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_read_is_refused(task: Prepare, bad: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"train.jsonl:2: .*{message}"):
        task([SHORT, bad, SHORT], [SHORT])


def test_other_refusals(task: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"train.jsonl: no question has an answer .* so there is nothing to learn"):
        task([NONE] * 3, [SHORT])
    task([NONE, SHORT] * 3, [SHORT])
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    with pytest.raises(UserError, match=r"does not tell where in the text its tokens stand"):
        task(ROWS)
