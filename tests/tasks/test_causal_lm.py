"""Promises: what is learned is what should be, nothing vanishes unsaid, and the metrics count tokens."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import build_tokenizer, save_decoder
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Metaspace
from transformers import EvalPrediction, PreTrainedTokenizerFast

from loralloc.errors import UserError
from loralloc.tasks import causal_lm, data
from loralloc.tasks.base import TaskData
from loralloc.tasks.causal_lm import (
    IGNORED,
    Encoder,
    fit,
    prepare,
    tokenize_pairs,
    tokenize_texts,
)
from loralloc.tasks.forms import read_form
from loralloc.tasks.rows import Rows
from loralloc.tasks.spec import LanguageModelData
from loralloc.tasks.token_sums import example_losses, language_model_metrics

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
    ("tokenizer", "expected"),
    [(BEGINS_AND_ENDS, "<s> a b </s>"), (PLAIN, "a b </s>"), (ONE_MARK, "<s> a b <s>")],
    ids=["both", "none", "one"],
)
def test_a_text_ends_once(tokenizer: PreTrainedTokenizerFast, expected: str) -> None:
    for texts in (["a b", " "], [f"a b {tokenizer.eos_token}"]):
        [(ids, learn)] = tokenize_texts(tokenizer, texts)
        if texts == ["a b", " "] or tokenizer is not BEGINS_AND_ENDS:
            assert words(tokenizer, ids) == expected
        assert all(learn)


def encoded(rows: list[dict[str, Any]], data: Any, tokenizer: PreTrainedTokenizerFast = PLAIN) -> list[list[int]]:
    """The ids of what an encoder makes of rows."""
    read = Rows("train.jsonl", tuple(rows[0]), rows, range(1, len(rows) + 1))
    return Encoder(tokenizer, data, "tiny").dataset(read, read_form(read, data))["input_ids"]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(2, 12))
def test_no_token_of_joined_texts_is_lost_but_a_last_one(lengths: list[int], max_length: int) -> None:
    documents = [" ".join("abcde"[i % 5] for i in range(length)) for length in lengths]
    data = LanguageModelData(train="train.jsonl", text="text", max_length=max_length)
    made = encoded([{"text": document} for document in documents], data)
    whole = PLAIN(" </s> ".join(documents) + " </s>")["input_ids"]
    joined = [token for block in made for token in block]
    assert joined == whole[: len(joined)]
    assert len(whole) - len(joined) == (1 if len(whole) % max_length == 1 else 0)
    assert all(len(block) == max_length for block in made[:-1])


def test_texts_need_not_be_joined() -> None:
    data = LanguageModelData(train="train.jsonl", packing="none", max_length=3)
    assert [words(PLAIN, ids) for ids in encoded([{"text": "a b"}, {"text": "c d e"}], data)] == ["a b </s>", "c d e"]


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
    [(ids, learn)] = tokenize_pairs(tokenizer, ["a b "], ["c d"])
    assert words(tokenizer, ids) == expected
    assert words(tokenizer, [i for i, keep in zip(ids, learn, strict=True) if keep]) == kept


def test_a_prompt_that_grows_together_with_its_completion_is_worth_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    for tokenizer in (BEGINS_AND_ENDS, PLAIN, ONE_MARK):
        with caplog.at_level(logging.WARNING, logger="loralloc"):
            list(tokenize_pairs(tokenizer, ["a b "], ["c"]))
            assert not caplog.records
            list(tokenize_pairs(tokenizer, ["a b", "a "], ["c", "d"]))
        assert "in 1 rows the end of the prompt and the start of the completion are one token" in caplog.text
        caplog.clear()


@pytest.mark.parametrize(
    ("splitter", "space", "line"),
    [(ByteLevel(add_prefix_space=False), "Ġ", "Ċ"), (Metaspace(prepend_scheme="first"), "▁", "\n")],
    ids=["byte-level", "SentencePiece"],
)
def test_what_the_warning_advises_helps(splitter: Any, space: str, line: str, caplog: pytest.LogCaptureFixture) -> None:
    """A space at the end of a prompt does not: these tokenizers join it to the next word."""
    vocabulary = {token: n for n, token in enumerate(["</s>", "a", "b", space, line, f"{space}b"])}
    backend = Tokenizer(BPE(vocabulary, [(space, "b")]))
    backend.pre_tokenizer = splitter
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    with caplog.at_level(logging.WARNING, logger="loralloc"):
        [(ids, learn)] = tokenize_pairs(tokenizer, ["a"], [" b"])
        assert tokenizer.convert_ids_to_tokens(ids[-2:]) == [f"{space}b", "</s>"]
        assert learn[-2:] == [True, True]
        assert sum(learn) == 2
        list(tokenize_pairs(tokenizer, ["a\n"], ["b"]))
        assert not caplog.records
        list(tokenize_pairs(tokenizer, ["a "], ["b"]))
    advice = "end prompts with a new line, or without a space and begin completions with one"
    assert f'{advice} (data.completion: " {{column}}")' in caplog.text


@pytest.mark.parametrize(("chat", "expected"), [(None, "user : a </s>"), (True, "user : a </s>"), (False, "a b </s>")])
def test_pairs_become_turns_where_the_model_has_a_template(chat: bool | None, expected: str) -> None:
    tokenizer = build_tokenizer("$A", None, unk_token="<unk>", eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} </s> {% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}assistant : {% endif %}"
    data = LanguageModelData(train="train.jsonl", chat=chat)
    [ids] = encoded([{"prompt": "a ", "completion": "b"}], data, tokenizer)
    assert words(tokenizer, ids).startswith(expected)


def test_turns_need_a_template() -> None:
    data = LanguageModelData(train="train.jsonl", chat=True)
    with pytest.raises(UserError, match=r'The tokenizer of model "tiny" has no chat template'):
        encoded([{"prompt": "a", "completion": "b"}], data)
    assert encoded([{"prompt": "a ", "completion": "b"}], LanguageModelData(train="train.jsonl"))


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


@pytest.fixture
def streamed(write: Write, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Iterator[list[int]]]:
    """The ids of examples of a stream, read two rows at a time, over and over."""
    monkeypatch.setattr(data, "PIECE", 2)
    monkeypatch.setattr(causal_lm, "SHUFFLED", 2)

    def make(*sources: list[dict[str, Any]], **given: Any) -> Iterator[list[int]]:
        train = [write(rows, f"{n}.jsonl") for n, rows in enumerate(sources)]
        section = LanguageModelData(train=train, validation=train[0], streaming=True, packing="none", **given)
        return (example["input_ids"] for example in Encoder(PLAIN, section, "tiny").stream(0))

    return make


def test_a_piece_of_a_stream_may_have_no_text(streamed: Callable[..., Iterator[list[int]]]) -> None:
    texts = [{"text": text} for text in ("a", "b", " ", "", "c")]
    made = islice(streamed(texts), 20)
    assert {words(PLAIN, ids) for ids in made} == {"a </s>", "b </s>", "c </s>"}
    with pytest.raises(UserError, match=r"0.jsonl: in none of the streamed rows is anything to learn"):
        next(streamed(texts[2:4]))


def test_a_piece_of_a_stream_may_lack_an_optional_column(streamed: Callable[..., Iterator[list[int]]]) -> None:
    full, bare = {"instruction": "a", "input": "b", "output": " c"}, {"instruction": "d", "output": " e"}
    named = {"prompt": "{instruction} {input}", "completion": "output"}
    for sources in ([[full, bare, bare, bare]], [[bare], [full]], [[full], [bare]]):
        for columns in (named, {}):
            made = {words(PLAIN, ids) for ids in islice(streamed(*sources, **columns), 20)}
            assert made == {"a b c </s>", "d e </s>"}


def test_a_mistake_in_a_later_source_shows_at_once(streamed: Callable[..., Iterator[list[int]]]) -> None:
    with pytest.raises(UserError, match=r'1.jsonl, row 2: no value in column "text" \(data.text\)'):
        streamed([{"text": "a"}], [{"text": "b"}, {"body": "c"}])
    with pytest.raises(UserError, match=r"1.jsonl is empty: it has no rows"):
        streamed([{"text": "a"}], [])


def test_streamed_rows_are_told_of_once(
    streamed: Callable[..., Iterator[list[int]]], caplog: pytest.LogCaptureFixture
) -> None:
    rows = [("a ", "b"), ("a ", "b c d e"), ("a b c d ", "e"), ("a ", "c"), ("a", "b"), ("a", "c")]
    stream = streamed([{"prompt": prompt, "completion": completion} for prompt, completion in rows], max_length=4)
    with caplog.at_level(logging.WARNING, logger="loralloc"):
        assert len(list(islice(stream, 20))) == 20
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2
    assert (
        "0.jsonl: of 6 rows, 2 are longer than data.max_length = 4 tokens and lose their end; 1 are dropped" in told[0]
    )
    assert "in 2 rows the end of the prompt and the start of the completion are one token" in told[1]


def test_metrics_count_every_learned_token_once() -> None:
    """Loss, tokens and hits of two examples: the mean is over tokens, not over examples."""
    sums = np.array([[6.0, 3, 1], [2.0, 1, 1]])
    prediction: Any = EvalPrediction(sums, sums[:, 1])
    assert language_model_metrics(prediction) == pytest.approx({"perplexity": math.exp(2), "token_accuracy": 0.5})
    assert example_losses(prediction).tolist() == [2, 2]


def test_the_split_is_seeded(task: Callable[..., TaskData]) -> None:
    rows = [{"text": " ".join("abcde"[i % 5] * (1 + i % 7))} for i in range(20)]
    first, second = task(rows, text="text"), task(rows, text="text")
    assert first.train[:] == second.train[:]
    assert first.validation[:] == second.validation[:]


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
    prediction: Any = EvalPrediction(np.array([[1e6, 2, 0]]), np.array([2]))
    assert language_model_metrics(prediction)["perplexity"] == math.inf
