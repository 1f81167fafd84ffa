"""Multiple choice with a head: questions beside their choices, and the best one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from loralloc.errors import UserError
from loralloc.tasks.base import Evaluated, TaskData
from loralloc.tasks.multiple_choice_head import choice_metrics, predictions, prepare, prepare_evaluation

ROWS: list[dict[str, Any]] = [
    {"prompt": "the film is", "choices": ["good", "bad film"], "answer": 0},
    {"prompt": "hello", "choices": ["a b c", "yes"], "answer": "B"},
] * 4


@pytest.fixture
def task(
    encoder: str, write: Callable[..., str], model_section: Callable[..., Any], data_section: Callable[..., Any]
) -> Callable[..., TaskData]:
    def make(rows: list[dict[str, Any]] = ROWS, **given: Any) -> TaskData:
        names = {"prompt": "prompt", "choices": "choices", "answer": "answer", **given}
        return prepare(model_section(encoder), data_section(write(rows), **names), 0)

    return make


def test_a_batch_is_what_the_model_takes_and_each_choice_is_scored_alone(task: Callable[..., TaskData]) -> None:
    data = task()
    assert set(data.train.column_names or ()) == {"input_ids", "token_type_ids", "attention_mask", "labels"}
    rows = [data.train[i] for i in range(3)]
    batch = data.options["data_collator"](rows)
    assert batch["input_ids"].shape[:2] == (3, 2)
    logits = data.model.eval()(**batch).logits
    assert logits.shape == (3, 2)
    for i, row in enumerate(rows):
        for n in range(2):
            alone = {key: torch.tensor([[row[key][n]]]) for key in row if key != "labels"}
            torch.testing.assert_close(data.model(**alone).logits[0, 0], logits[i, n], rtol=1e-4, atol=1e-6)


def test_questions_and_choices_are_pairs_and_long_questions_are_cut_and_counted(
    task: Callable[..., TaskData], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="loralloc"):
        data = task([{"prompt": "a " * 20, "choices": ["b c", "d"], "answer": 0}] * 8, max_length=10)
        told = [record.getMessage() for record in caplog.records]
        task(max_length=10)
        assert len(caplog.records) == len(told) == 2
    assert "train.jsonl: of 6 rows, 6 are longer than data.max_length = 10 tokens and lose their end." in told[0]
    ids = data.train[0]["input_ids"]
    assert [len(one) for one in ids] == [10, 10]
    words = [data.tokenizer.decode(one) for one in ids]
    assert words[0] == "[CLS] a a a a a [SEP] b c [SEP]"


def test_choices_that_would_be_cut(task: Callable[..., TaskData]) -> None:
    rows = [{"prompt": "a", "choices": ["b c d", "d"], "answer": 0}] * 8
    assert len(task(rows, max_length=7).train) == 6  # [CLS] a [SEP] b c d [SEP]
    with pytest.raises(
        UserError, match=r"train\.jsonl:\d: a choice has 3 tokens, and of data\.max_length, which is 6, sp"
    ):
        task(rows, max_length=6)


def test_metrics_and_predictions(task: Callable[..., TaskData]) -> None:
    data = task()
    examples = data.validation
    scores = np.array([[2.0, 1.0], [np.nan, 0.0]])
    found = Evaluated(scores, np.array(examples["labels"]), examples)
    hit = float(examples["labels"][0] == 0)
    assert choice_metrics(found) == {"accuracy": hit / 2}
    told = predictions(Evaluated(np.array([[2.0, 1.0], [0.0, 3.0]]), found.label_ids, examples))
    assert [one["prediction"] for one in told] == [examples["choices"][0][0], examples["choices"][1][1]]
    assert sum(told[0]["scores"].values()) == pytest.approx(1, abs=1e-5)
    assert data.reference == {"chance": 0.5}


def test_unlike_numbers_of_choices(task: Callable[..., TaskData], data_section: Any, write: Callable[..., str]) -> None:
    odd = {"prompt": "hello", "choices": ["a", "b", "c"], "answer": 0}
    told = r"train\.jsonl:9: 3 choices, and the first question has 2: a head scores the same number for every question"
    with pytest.raises(UserError, match=told):
        task([*ROWS, odd])
    data = task()
    section = data_section("x", prompt="prompt", choices="choices", answer="answer")
    other = write([odd, odd], "other.jsonl")  # another number in an evaluation of its own is a number all the same
    assert len(prepare_evaluation(data.model, data.tokenizer, section, other).test or ()) == 2
