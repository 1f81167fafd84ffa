"""Promises: targets end, what is cut is told, rows and models that cannot be learned from are refused in words."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encoder_decoders import PLACES
from tiny_models import build_tokenizer
from transformers import AutoConfig, AutoTokenizer

from loralloc.errors import UserError
from loralloc.tasks.base import Evaluated
from loralloc.tasks.data import read_rows
from loralloc.tasks.generation import Prompt
from loralloc.tasks.preview import parts_of
from loralloc.tasks.seq2seq import encode, prepare, prepare_evaluation, read_pairs, read_sources

Sections = Callable[..., Any]
ROWS = [{"text": f"{'a b c d e'[: 1 + 2 * (n % 5)]}", "short": "yes" if n % 2 else "no good"} for n in range(16)]
KEYS = {"source": "the film : {text}", "target": "short", "target_length": 8}


@pytest.fixture
def section(data_section: Sections, write: Callable[..., str]) -> Callable[..., Any]:
    """Makes the data section of some rows."""

    def make(rows: Any = ROWS, **given: Any) -> Any:
        return data_section(write(rows), **{**KEYS, **given})

    return make


def encoded(model: str, data: Any) -> list[dict[str, Any]]:
    rows = read_rows(data.train)
    return list(encode(rows, read_pairs(rows, data), AutoTokenizer.from_pretrained(model), data))


def test_sources_are_templates_and_targets_end(encoder_decoder: str, section: Callable[..., Any]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(encoder_decoder)
    for row, example in zip(ROWS, encoded(encoder_decoder, section()), strict=True):
        assert example["input_ids"] == tokenizer(f"the film : {row['text']}")["input_ids"]
        assert example["attention_mask"] == [1] * len(example["input_ids"])
        assert example["labels"] == tokenizer(row["short"])["input_ids"]
        assert example["labels"][-1] == tokenizer.eos_token_id


def test_a_source_that_special_tokens_fill_is_refused(t5: str, section: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match=r"^data\.max_length is 1, and special tokens take 1 of an example: a text wou"):
        encoded(t5, section(max_length=1))


def test_a_tokenizer_that_ends_nothing_gets_targets_that_end(section: Callable[..., Any], tmp_path: Path) -> None:
    tokenizer = build_tokenizer("$A", None, pad_token="<pad>", unk_token="<unk>", eos_token="</s>")
    tokenizer.save_pretrained(tmp_path / "open")
    (first, *_) = encoded(str(tmp_path / "open"), section())
    assert tokenizer.convert_ids_to_tokens(first["labels"]) == ["no", "good", "</s>"]
    assert tokenizer.convert_ids_to_tokens(first["input_ids"])[-1] != "</s>"


def test_what_is_cut_is_told(t5: str, section: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    """A source keeps its end-of-sequence token; a target that lost its end is not taught to stop."""
    data = section(max_length=6, target_length=2)
    with caplog.at_level(logging.WARNING):
        examples = encoded(t5, data)
    tokenizer = AutoTokenizer.from_pretrained(t5)
    assert {len(example["input_ids"]) for example in examples} == {5, 6}
    assert {example["input_ids"][-1] for example in examples} == {tokenizer.eos_token_id}
    assert [example["labels"] for example in examples[:2]] == [
        tokenizer("no good")["input_ids"][:2],
        tokenizer("yes")["input_ids"],
    ]
    assert [record.message.removeprefix(data.train) for record in caplog.records] == [
        ": of 16 rows, 9 have a source longer than data.max_length = 6 tokens, which loses its end.",
        ": of 16 rows, 8 have a target longer than data.target_length = 2 tokens, which loses its end.",
    ]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        encoded(t5, section())
    assert not caplog.records


@pytest.mark.parametrize("column", ["text", "short"])
def test_an_empty_text_is_refused_with_its_row(column: str, t5: str, section: Callable[..., Any]) -> None:
    rows = [*ROWS[:3], {**ROWS[3], column: " "}, *ROWS[4:]]
    data = section(rows, source="{text}")
    key = {"text": "data.source is empty here", "short": 'empty text in column "short" .data.target.'}[column]
    with pytest.raises(UserError, match=rf"train\.jsonl:4: {key}"):
        read_pairs(read_rows(data.train), data)
    read_pairs(read_rows(data.train).select([0, 1, 2]), data)


def test_positions_are_a_limit_where_there_are_any(
    encoder_decoder: str, section: Callable[..., Any], model_section: Sections
) -> None:
    has_places = AutoConfig.from_pretrained(encoder_decoder).model_type == "bart"
    for key in ("max_length", "target_length"):
        prepare(model_section(encoder_decoder), section(**{key: PLACES}), 0)
        long = section(**{key: PLACES + 1})
        if has_places:
            with pytest.raises(UserError, match=rf"data\.{key} is 33, but model \".*\" has 32 positions"):
                prepare(model_section(encoder_decoder), long, 0)
        else:
            prepare(model_section(encoder_decoder), long, 0)


def test_models_of_one_stack_are_refused(
    encoder: str, decoder: str, section: Callable[..., Any], model_section: Sections
) -> None:
    for model, kind in ((encoder, "bert"), (decoder, "llama")):
        words = (
            rf"Task seq2seq needs an encoder with a decoder, such as T5 or BART; model \"{model}\" \({kind}\) is one "
        )
        with pytest.raises(UserError, match=words + r".*task: causal-lm, an encoder with task: sequence-class"):
            prepare(model_section(model), section(), 0)


@pytest.mark.parametrize("task", ["causal_lm", "preference"])
def test_models_of_two_stacks_are_refused_where_one_is_needed(
    task: str, encoder_decoder: str, data_section: Sections, model_section: Sections, write: Callable[..., str]
) -> None:
    from loralloc.tasks import causal_lm, preference

    rows = [{"text": "a b", "prompt": "a ", "chosen": "yes", "rejected": "no"}] * 8
    columns = {"text": "text"} if task == "causal_lm" else {"chosen": "chosen", "rejected": "rejected"}
    module = {"causal_lm": causal_lm, "preference": preference}[task]
    words = (
        r"Task \S+ needs a decoder alone, and model .* is an encoder with a decoder; set task: seq2seq, with data.sou"
    )
    with pytest.raises(UserError, match=words):
        module.prepare(model_section(encoder_decoder), data_section(write(rows), **columns), 0)


def test_what_a_decoder_starts_and_ends_with_must_be_known(
    t5: str, section: Callable[..., Any], model_section: Sections, tmp_path: Path
) -> None:
    config = json.loads((Path(t5) / "config.json").read_text(encoding="utf-8"))
    config.pop("decoder_start_token_id")
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(
        UserError, match=r"does not say with which token its decoder starts; set decoder_start_token_id"
    ):
        prepare(model_section(str(tmp_path)), section(), 0)
    (tmp_path / "config.json").write_text(json.dumps({**config, "decoder_start_token_id": 0}), encoding="utf-8")
    build_tokenizer("$A", None, pad_token="<pad>", unk_token="<unk>").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"has no end-of-sequence token to end a text with. Set eos_token in its"):
        prepare(model_section(str(tmp_path)), section(), 0)


def test_evaluation_examples_have_their_texts(t5: str, section: Callable[..., Any], model_section: Sections) -> None:
    made = prepare(model_section(t5), section(test=section().train), 0)
    assert made.test is not None
    assert made.metric == "perplexity"
    assert made.train.column_names == ["input_ids", "attention_mask", "labels"]
    assert len(made.validation) == 4
    assert made.test["source"][1] == "the film : a b"
    alone = prepare_evaluation(made.model, made.tokenizer, section(), section().train)
    assert list(alone.test or ()) == list(made.test)


def test_rows_with_the_same_source_are_one_prompt(
    t5: str, section: Callable[..., Any], model_section: Sections
) -> None:
    rows = [{"text": text, "short": short} for text, short in (("a", "yes"), ("b", "no"), ("a", "no"), ("c", "yes"))]
    made = prepare_evaluation(
        prepare(model_section(t5), section(), 0).model,
        AutoTokenizer.from_pretrained(t5),
        section(rows),
        section(rows).train,
    )
    assert made.test is not None
    found = read_sources(made.test, None)
    assert [(index, prompt.text, prompt.references) for index, prompt in found] == [
        (0, "the film : a", ("yes", "no")),
        (1, "the film : b", ("no",)),
        (3, "the film : c", ("yes",)),
    ]
    assert read_sources(made.test, 1) == [(0, Prompt(tuple(made.test[0]["input_ids"]), "the film : a", ("yes", "no")))]
    sums = np.array([[2.0, 2, 1], [6.0, 2, 0], [1.0, 2, 2], [3.0, 3, 3]])
    assert made.predictions is not None
    (first, *_) = made.predictions(Evaluated(sums, sums[:, 1], made.test))
    assert first == {"source": "the film : a", "target": "yes", "loss": 1.0, "tokens": 2, "likeliest": 1}


def test_a_preview_shows_source_and_target(t5: str, section: Callable[..., Any]) -> None:
    example, tokenizer = encoded(t5, section())[1], AutoTokenizer.from_pretrained(t5)
    pieces = [("the film : a b </s> → ", "context"), ("yes </s>", "learned")]
    assert parts_of(tokenizer, example, targets_apart=True) == pieces
