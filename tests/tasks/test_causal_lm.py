"""Promises: what is learned is what should be, nothing vanishes unsaid, and the metrics count tokens."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import build_tokenizer, save_decoder
from transformers import EvalPrediction, PreTrainedTokenizerFast, Trainer, TrainingArguments

from loralloc.errors import UserError
from loralloc.tasks.base import TaskData
from loralloc.tasks.causal_lm import (
    IGNORED,
    PaddingCollator,
    blocks,
    fit,
    language_model_metrics,
    leading_tokens,
    prepare,
    token_scores,
    tokenize_completions,
)
from loralloc.tasks.rows import Rows

Section = Callable[..., Any]
Write = Callable[..., str]

BEGINS_AND_ENDS = build_tokenizer("<s> $A </s>", None, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
PLAIN = build_tokenizer("$A", None, unk_token="<unk>", eos_token="</s>")
ONE_MARK = build_tokenizer("<s> $A", None, unk_token="<unk>", bos_token="<s>", eos_token="<s>")


@pytest.fixture
def task(decoder: str, model_section: Section, data_section: Section, write: Write) -> Callable[..., TaskData]:
    """Prepares rows with the tiny decoder."""

    def make(rows: list[dict[str, Any]], **given: Any) -> TaskData:
        return prepare(model_section(decoder), data_section(write(rows), **given), 0)

    return make


def rows_of(count: int) -> Rows:
    return Rows("train.jsonl", ("n",), [{"n": i} for i in range(count)], range(1, count + 1))


def words(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(ids))


@pytest.mark.parametrize(
    ("tokenizer", "lead"), [(BEGINS_AND_ENDS, ["<s>"]), (PLAIN, []), (ONE_MARK, ["<s>"])], ids=["both", "none", "one"]
)
def test_leading_tokens(tokenizer: PreTrainedTokenizerFast, lead: list[str]) -> None:
    assert tokenizer.convert_ids_to_tokens(leading_tokens(tokenizer)) == lead


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        (BEGINS_AND_ENDS, ["<s> a b </s>", "<s> c d e", "</s>"]),
        (PLAIN, ["a b </s> c", "d e </s>"]),
        (ONE_MARK, ["<s> a b <s>", "c d e"]),
    ],
    ids=["both", "none", "one"],
)
def test_documents_are_joined_and_cut(tokenizer: PreTrainedTokenizerFast, expected: list[str]) -> None:
    made = list(blocks(tokenizer, ["a b", " ", "c d e"], max_length=4))
    expected = [block for block in expected if " " in block]  # a block of one token predicts nothing
    assert [words(tokenizer, block["input_ids"]) for block in made] == expected
    assert all(block["labels"] == block["input_ids"] for block in made)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(2, 12))
def test_no_token_is_lost_but_a_last_one(lengths: list[int], max_length: int) -> None:
    documents = [" ".join("abcde"[i % 5] for i in range(length)) for length in lengths]
    made = [block["input_ids"] for block in blocks(PLAIN, documents, max_length)]
    whole = PLAIN(" </s> ".join(documents) + " </s>")["input_ids"]
    joined = [token for block in made for token in block]
    assert joined == whole[: len(joined)]
    assert len(whole) - len(joined) == (1 if len(whole) % max_length == 1 else 0)
    assert all(len(block) == max_length for block in made[:-1])


@pytest.mark.parametrize(
    ("tokenizer", "expected", "kept"),
    [
        (BEGINS_AND_ENDS, "<s> a b c d </s>", "c d </s>"),
        (PLAIN, "a b c d </s>", "c d </s>"),
        (ONE_MARK, "<s> a b c d <s>", "c d <s>"),
    ],
    ids=["both", "none", "one"],
)
def test_only_the_completion_and_its_end_are_learned(
    tokenizer: PreTrainedTokenizerFast, expected: str, kept: str
) -> None:
    [(ids, learn)] = tokenize_completions(tokenizer, ["a b"], ["c d"])
    assert words(tokenizer, ids) == expected
    assert words(tokenizer, [i for i, keep in zip(ids, learn, strict=True) if keep]) == kept


def test_a_long_row_loses_its_end_and_one_without_anything_to_learn_is_dropped(
    caplog: pytest.LogCaptureFixture,
) -> None:
    short = ([1, 2, 3], [False, True, True])
    long = ([1, 2, 3, 4, 5], [False, False, True, True, True])
    vanished = ([1, 2, 3, 4, 5], [False, False, False, False, True])
    with caplog.at_level(logging.WARNING, logger="loralloc"):
        made = list(fit([short, long, vanished], rows_of(3), max_length=4))
    assert [example["labels"] for example in made] == [[IGNORED, 2, 3], [IGNORED, IGNORED, 3, 4]]
    assert "of 3 rows, 2 are longer than data.max_length = 4 tokens and lose their end; 1 are dropped" in caplog.text


def test_rows_that_fit_are_not_worth_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="loralloc"):
        list(fit([([1, 2], [False, True])], rows_of(1), max_length=2))
    assert not caplog.records


def test_nothing_left_to_learn() -> None:
    message = (
        r"train.jsonl: in none of the 1 rows is anything to learn within the first 2 tokens. Raise data.max_length"
    )
    with pytest.raises(UserError, match=message):
        list(fit([([1, 2, 3], [False, False, True])], rows_of(1), max_length=2))
    with pytest.raises(UserError, match=r"in none of the 1 rows"):  # the first token is never predicted
        list(fit([([1], [True])], rows_of(1), max_length=2))


def test_padding_is_told_by_the_mask_and_not_by_the_token() -> None:
    pad = 7
    long = {"input_ids": [7, 1, 7], "attention_mask": [1, 1, 1], "labels": [7, 1, 7]}
    short = {"input_ids": [7], "attention_mask": [1], "labels": [7]}
    batch = PaddingCollator(pad)([long, short])
    assert batch["input_ids"].tolist() == [[7, 1, 7], [7, 7, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[7, 1, 7], [7, IGNORED, IGNORED]]


def naive_scores(logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """Perplexity and accuracy, one token after the other."""
    losses, hits = [], []
    for row, targets in zip(logits, labels, strict=True):
        for t in range(1, len(targets)):
            if targets[t] != IGNORED:
                losses.append(-torch.log_softmax(row[t - 1], dim=-1)[targets[t]].item())
                hits.append(row[t - 1].argmax().item() == targets[t].item())
    return math.exp(sum(losses) / len(losses)), sum(hits) / len(hits)


def test_metrics_count_every_learned_token_once() -> None:
    logits = torch.randn(3, 6, 5)
    labels = torch.randint(0, 5, (3, 6))
    labels[0, :4], labels[1, 5:] = IGNORED, IGNORED
    losses, hits = token_scores((logits, torch.zeros(1)), labels)
    assert losses.shape == hits.shape == (3, 5)
    metrics = language_model_metrics(EvalPrediction((losses.numpy(), hits.numpy()), labels.numpy()))
    perplexity, accuracy = naive_scores(logits, labels)
    assert metrics == pytest.approx({"perplexity": perplexity, "token_accuracy": accuracy}, rel=1e-5)


@pytest.mark.parametrize("shape", ["text", "completion", "chat"])
def test_a_trainer_takes_every_shape(
    shape: str, tmp_path: Path, model_section: Section, data_section: Section, write: Write
) -> None:
    tokenizer = build_tokenizer("<s> $A", None, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} </s> {% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}assistant : {% endif %}"
    folder = save_decoder(tmp_path / "decoder", tokenizer)
    messages = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "yes"}]
    rows = [{"text": "a b c d e", "prompt": "a b" + " c" * (i % 3), "reply": "yes", "chat": messages} for i in range(8)]
    columns = {"text": {"text": "text"}, "completion": {"prompt": "prompt", "completion": "reply"}}
    data = data_section(write(rows), **columns.get(shape, {"messages": "chat"}), test=write(rows, "test.jsonl"))
    prepared = prepare(model_section(folder), data, 0)
    assert set(prepared.train.column_names) == {"input_ids", "attention_mask", "labels"}
    assert (prepared.metric, prepared.greater_is_better) == ("perplexity", False)

    arguments = TrainingArguments(
        str(tmp_path / "out"),
        max_steps=2,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
        use_cpu=True,
        dataloader_pin_memory=False,
        per_device_eval_batch_size=3,
    )
    trainer = Trainer(
        model=prepared.model,
        args=arguments,
        train_dataset=prepared.train,
        eval_dataset=prepared.test,
        data_collator=prepared.collator,
        compute_metrics=prepared.compute_metrics,
        preprocess_logits_for_metrics=prepared.preprocess_logits,
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert prepared.test is not None
    batch = prepared.collator([prepared.test[i] for i in range(len(prepared.test))])
    with torch.no_grad():
        perplexity, accuracy = naive_scores(prepared.model.eval()(**batch).logits, batch["labels"])
    assert metrics["eval_perplexity"] == pytest.approx(perplexity, rel=1e-4)
    assert metrics["eval_token_accuracy"] == pytest.approx(accuracy)


def test_the_split_is_seeded(task: Callable[..., TaskData]) -> None:
    rows = [{"text": " ".join("abcde"[i % 5] * (1 + i % 7))} for i in range(20)]
    first, second = task(rows, text="text"), task(rows, text="text")
    assert first.train[:] == second.train[:]
    assert first.validation[:] == second.validation[:]


def test_padding_does_not_change_the_loss(task: Callable[..., TaskData]) -> None:
    rows = [{"p": "a" + " b" * i, "c": "film is good"} for i in range(8)]
    prepared = task(rows, prompt="p", completion="c")
    examples = [prepared.train[i] for i in range(4)]
    with torch.no_grad():
        alone = [prepared.model(**prepared.collator([example])).loss for example in examples]
        together = prepared.model(**prepared.collator(examples)).loss  # as many learned tokens in every row
    torch.testing.assert_close(together, torch.stack(alone).mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "columns",
    [{}, {"text": "t", "messages": "m"}, {"prompt": "p"}, {"completion": "c"}, {"text": "t", "completion": "c"}],
)
def test_columns_must_say_one_shape(task: Callable[..., TaskData], columns: dict[str, str]) -> None:
    message = r"exactly one of data.text, data.prompt with data.completion, or data.messages"
    with pytest.raises(UserError, match=message):
        task([{"t": "a"}] * 4, **columns)


def test_texts_that_are_all_empty(task: Callable[..., TaskData]) -> None:
    with pytest.raises(UserError, match=r'train.jsonl has no text: column "text" \(data.text\) is empty in every row'):
        task([{"text": " "}] * 4, text="text")


def test_a_completion_must_not_be_empty(task: Callable[..., TaskData]) -> None:
    with pytest.raises(UserError, match=r'train.jsonl:\d: empty text in column "c" \(data.completion\)'):
        task([{"p": "a", "c": ""}] * 4, prompt="p", completion="c")


def test_completions_that_never_fit(task: Callable[..., TaskData]) -> None:
    with pytest.raises(UserError, match=r"in none of the 3 rows is anything to learn within the first 4 tokens"):
        task([{"p": "a b c d e", "c": "a"}] * 4, prompt="p", completion="c", max_length=4)


def test_a_tokenizer_without_an_end(
    tmp_path: Path, model_section: Section, data_section: Section, write: Write
) -> None:
    folder = save_decoder(tmp_path / "decoder", build_tokenizer("$A", None, unk_token="<unk>", pad_token="<pad>"))
    data = data_section(write([{"text": "a b"}] * 4), text="text")
    with pytest.raises(UserError, match=r"has no end-of-sequence token to end a text with. Set eos_token in its"):
        prepare(model_section(folder), data, 0)


def test_chats_need_a_template(task: Callable[..., TaskData]) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(UserError, match=r"has no chat template"):
        task([{"chat": chat}] * 4, messages="chat")


def test_metrics_of_a_diverged_model_are_infinite_and_not_an_error() -> None:
    labels = np.zeros((1, 3), dtype=int)
    prediction: Any = EvalPrediction((np.full((1, 2), 1e5), np.zeros((1, 2))), labels)
    assert language_model_metrics(prediction)["perplexity"] == math.inf
