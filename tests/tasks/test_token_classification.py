"""Promises: every word has its tag on its first token and is judged once; what is cut off counts as missed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from tiny_models import WORDS, save_encoder
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from loralloc.errors import UserError
from loralloc.methods.validation import IGNORED
from loralloc.tasks import metrics as metrics_of_arrays
from loralloc.tasks import prepare, prepare_evaluation
from loralloc.tasks.base import Evaluated, TaskData
from loralloc.tasks.rows import Rows, mix
from loralloc.tasks.sentences import read_sentences
from loralloc.tasks.spans import span_metrics
from loralloc.tasks.tags import spans_of

Section = Callable[..., Any]
Write = Callable[..., str]
Prepare = Callable[..., TaskData]

ONE = {"tokens": ["the", "film:good", "is", "bad"], "tags": ["O", "B-X", "I-X", "B-X"]}
TWO = {"tokens": "a b c", "tags": "O O B-Y"}
ROWS = [ONE, TWO] * 4


@pytest.fixture
def task(encoder: str, model_section: Section, data_section: Section, write: Write) -> Prepare:
    """Prepares rows with the tiny encoder, whose tokenizer parts words at signs."""

    def make(rows: list[dict[str, Any]], held_out: list[dict[str, Any]] | None = None, **given: Any) -> TaskData:
        columns = {"tokens": "tokens", "tags": "tags"} if "spans" not in given else {}
        validation = {} if held_out is None else {"validation": write(held_out, "validation.jsonl")}
        return prepare(
            "token-classification",
            model_section(encoder),
            data_section(write(rows), **{**columns, **validation, **given}),
            0,
        )

    return make


def names(prepared: TaskData) -> list[str]:
    return list((prepared.model.config.id2label or {}).values())


def answered(prepared: TaskData, wrong: tuple[int, ...] = ()) -> Evaluated:
    """An evaluation of the validation data in which all is right, but the labels counted in `wrong`, which become O."""
    examples = prepared.validation
    length = max(map(len, examples["labels"]))
    labels = np.full((len(examples), length), IGNORED)
    for row, given in zip(labels, examples["labels"], strict=True):
        row[: len(given)] = given
    chosen = np.where(labels == IGNORED, 0, labels)
    for number, place in enumerate(zip(*np.nonzero(labels != IGNORED), strict=True)):
        if number in wrong:
            chosen[place] = 0
    return Evaluated(4.0 * np.eye(len(names(prepared)))[chosen], labels, examples)


def metrics(prepared: TaskData, *wrong: int) -> dict[str, float]:
    return prepared.options["compute_metrics"](answered(prepared, wrong))


def test_the_first_token_of_a_word_carries_its_tag(task: Prepare) -> None:
    prepared = task(ROWS, ROWS[:2])
    assert names(prepared) == ["O", "B-X", "I-X", "B-Y", "I-Y"]
    first, second = prepared.train[0], prepared.train[1]
    assert first["labels"] == [IGNORED, 0, 1, IGNORED, IGNORED, 2, 1, IGNORED]  # film : good is one word
    assert second["labels"] == [IGNORED, 0, 0, 3, IGNORED]
    assert set(first) == {"input_ids", "token_type_ids", "attention_mask", "labels"}


def test_a_word_without_a_token_keeps_its_place(task: Prepare) -> None:
    row = {"tokens": ["a", "", "b"], "tags": ["O", "B-X", "B-Y"]}
    prepared = task(ROWS, [row, {"tokens": [""], "tags": ["B-X"]}])
    first, second = prepared.predictions(answered(prepared))  # type: ignore[misc]
    assert first == {"words": ["a", "", "b"], "tags": ["O", "B-X", "B-Y"], "predicted": ["O", None, "B-Y"]}
    assert second["predicted"] == [None]
    found = metrics(prepared)
    assert (found["f1"], found["precision"], found["recall"], found["accuracy"]) == (0.5, 1, 1 / 3, 0.5)
    assert (found["f1_X"], found["recall_X"], found["f1_Y"], found["precision_Y"]) == (0, 0, 1, 1)
    assert prepared.example_losses(answered(prepared))[1] == 0  # type: ignore[misc]


def test_words_that_are_cut_off_are_told_and_missed(task: Prepare, caplog: pytest.LogCaptureFixture) -> None:
    row = {"tokens": ["a"] * 6 + ["b"] * 4, "tags": ["B-X"] * 10}
    with caplog.at_level(logging.WARNING):
        prepared = task(ROWS, [row, TWO], max_length=8)
    (told,) = caplog.messages
    assert "1 of 2 sentences are longer than data.max_length, which is 8; 4 of their words are cut off" in told
    assert "set data.stride" in told
    found = metrics(prepared)
    assert found["recall_X"] == 6 / 10
    assert found["precision"] == 1
    assert found["accuracy"] == 9 / 13
    assert prepared.predictions(answered(prepared))[0]["predicted"] == ["B-X"] * 6 + [None] * 4  # type: ignore[misc]
    outside = task(ROWS, [{"tokens": ["a"] * 10, "tags": ["O"] * 10}], max_length=8)
    assert metrics(outside)["accuracy"] == 6 / 10  # what was not read is not right, whatever its tag


@pytest.mark.parametrize("stride", [0, 1, 3, 5])
def test_in_windows_every_word_is_judged_once_where_it_has_most_context(task: Prepare, stride: int) -> None:
    words = [word for word in WORDS if word != ":"]
    glued = [":".join(words[i : i + 1 + i % 3]) for i in range(len(words))]  # of one token, three or five
    rows = [{"tokens": glued, "tags": ["B-X", *["O"] * (len(glued) - 1)]}, TWO]
    prepared = task(rows * 4, rows, max_length=9, stride=stride)
    examples = prepared.validation
    windows = [example for example in examples if example["row"] == 0]
    judged = [place for example in windows for place in example["places"]]
    assert sorted(judged) == list(range(len(glued)))
    assert len(windows) > 3
    assert metrics(prepared)["f1"] == 1
    lengths = [2 * word.count(":") + 1 for word in glued]
    starts = range(0, sum(lengths), 7 - stride)  # nine tokens, two of them special
    spans = [(start, min(start + 7, sum(lengths))) for start in starts]
    for window in windows:
        tokens = [token for token, label in enumerate(window["labels"]) if label != IGNORED]
        for word, token in zip(window["places"], tokens, strict=True):
            first = sum(lengths[:word])
            reaches = [min(first - a, b - 1 - first) for a, b in spans if a <= first < b]
            assert min(token - 1, len(window["labels"]) - 2 - token) == max(reaches)
    training = [label for example in prepared.train for label in example["labels"] if label != IGNORED]
    assert len(training) == 4 * (len(glued) + 3)


@pytest.mark.parametrize("stride", [7, 8])
def test_windows_that_would_share_all_their_tokens(task: Prepare, stride: int) -> None:
    with pytest.raises(UserError, match=rf"data.stride is {stride}, and windows share fewer .* special tokens leave 7"):
        task(ROWS, ROWS, max_length=9, stride=stride)
    task(ROWS, ROWS, max_length=9, stride=6)


def test_json_lists_in_text(task: Prepare) -> None:
    listed = {"tokens": '["a", "b"]', "tags": '["B-X", "O"]'}
    prepared = task([listed, {"tokens": "a b", "tags": "O B-X"}] * 2, [listed, {"tokens": "[ a ]", "tags": "O O O"}])
    shown = prepared.predictions(answered(prepared))  # type: ignore[misc]
    assert [row["words"] for row in shown] == [["a", "b"], ["[", "a", "]"]]


def test_a_schemes_tags_are_learned_in_one_form(task: Prepare) -> None:
    iob1 = [{"tokens": "a b c d", "tags": "I-X I-X O I-X"}, {"tokens": "a b", "tags": "O I-Y"}] * 4
    prepared = task(iob1, iob1[:2])
    assert names(prepared) == ["O", "B-X", "I-X", "B-Y", "I-Y"]
    assert prepared.train[0]["labels"] == [IGNORED, 1, 2, 0, 1, IGNORED]
    with_b = [{"tokens": "a b c", "tags": "I-X B-X O"}] * 4
    assert task(with_b, with_b[:2], scheme="iob1").train[0]["labels"] == [IGNORED, 1, 1, 0, IGNORED]
    bilou = [{"tokens": "a b c", "tags": "B-X L-X U-X"}, {"tokens": "a", "tags": "O"}] * 4
    assert names(task(bilou, bilou[:2])) == ["O", "B-X", "I-X", "L-X", "U-X"]


def test_tags_that_stand_alone_are_judged_word_by_word(task: Prepare) -> None:
    rows = [{"tokens": "a b c", "tags": [3, 10, 3]}, {"tokens": "d", "tags": [2]}] * 4
    prepared = task(rows, [*rows[:2], {"tokens": ["a"] * 20, "tags": [3] * 20}])
    assert names(prepared) == ["2", "3", "10"]
    assert (prepared.metric, prepared.reference) == ("accuracy", {"majority": 22 / 24})
    found = metrics(prepared, 0)  # label 0 becomes the tag 2; 14 words of 20 are left of the long sentence
    assert found["accuracy"] == pytest.approx((24 - 6 - 1) / 24)
    assert set(found) == {"accuracy", "macro_f1", "loss"}
    assert metrics(prepared)["macro_f1"] == pytest.approx((2 * 16 / (2 * 16 + 6) + 1 + 1) / 3)  # cut off is no tag
    shown = prepared.predictions(answered(prepared))  # type: ignore[misc]
    assert shown[2]["predicted"] == ["3"] * 14 + [None] * 6


def test_the_f1_of_tags_is_summed_in_one_order(task: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of a set of texts differs from process to process, and with it the last digit of a mean."""
    counts = range(1, 9)
    rows = [{"tokens": "a " * n, "tags": f"t{n} " * n} for n in counts]
    prepared, asked = task(rows, rows), []
    monkeypatch.setattr(metrics_of_arrays, "f1", lambda predicted, target: asked.append(target.sum()) or 0.0)
    metrics(prepared)
    assert asked == list(counts)


def test_metrics_are_those_of_the_predictions(task: Prepare) -> None:
    rng = np.random.default_rng(0)
    prepared = task(ROWS, ROWS)
    evaluated = answered(prepared)
    evaluated.predictions = rng.normal(size=evaluated.predictions.shape)  # type: ignore[union-attr]
    shown = prepared.predictions(evaluated)  # type: ignore[misc]
    found = prepared.options["compute_metrics"](evaluated)
    expected = span_metrics([spans_of(row["tags"]) for row in shown], [spans_of(row["predicted"]) for row in shown])
    assert {name: found[name] for name in expected} == expected
    pairs = [pair for row in shown for pair in zip(row["tags"], row["predicted"], strict=True)]
    assert found["accuracy"] == np.mean([tag == predicted for tag, predicted in pairs])
    evaluated.predictions = np.full_like(evaluated.predictions, np.nan)  # type: ignore[type-var]
    assert {tag for row in prepared.predictions(evaluated) for tag in row["predicted"]} == {None}  # type: ignore[misc]


def test_losses_are_the_models_own(task: Prepare) -> None:
    prepared = task(ROWS, [ONE, TWO])
    rows = [{key: row[key] for key in prepared.train.column_names} for row in prepared.validation]  # type: ignore[union-attr]
    collate = prepared.options["data_collator"]
    single = [prepared.model(**collate([row])).loss.item() for row in rows]
    batch = collate(rows)
    with torch.no_grad():
        logits = prepared.model(**batch).logits.numpy()
    evaluated = Evaluated(logits, batch["labels"].numpy(), prepared.validation)
    assert prepared.example_losses(evaluated) == pytest.approx(single, abs=1e-5)  # type: ignore[misc]
    whole = prepared.model(**batch).loss.item()
    assert prepared.options["compute_metrics"](evaluated)["loss"] == pytest.approx(whole, abs=1e-5)
    empty = task(ROWS, [ONE, {"tokens": [""], "tags": ["O"]}])  # its batch alone would have a loss that is no number
    assert np.isfinite(metrics(empty)["loss"])


SPANS = [
    {
        "text": "the film, is good",
        "spans": [{"start": 4, "end": 8, "label": "X"}, {"start": 13, "end": 17, "label": "Y"}],
    },
    {"text": "a b", "spans": []},
    {"text": "good film", "spans": {"start": [0], "end": [9], "label": ["X"]}},
]
TEXT = {"text": "text", "spans": "spans"}


def test_spans_of_characters_become_tags_and_come_back(task: Prepare) -> None:
    prepared = task(SPANS * 3, SPANS, **TEXT)
    shown = prepared.predictions(answered(prepared))  # type: ignore[misc]
    assert shown[0]["words"] == ["the", "film", ",", "is", "good"]
    assert shown[0]["tags"] == ["O", "B-X", "O", "O", "B-Y"]
    assert shown[2]["tags"] == ["B-X", "I-X"]
    assert shown[0]["text"] == SPANS[0]["text"]
    assert shown[0]["spans"] == [
        {"start": 4, "end": 8, "label": "X", "text": "film"},
        {"start": 13, "end": 17, "label": "Y", "text": "good"},
    ]
    assert shown[2]["spans"] == [{"start": 0, "end": 9, "label": "X", "text": "good film"}]
    assert metrics(prepared)["f1"] == 1


def test_a_span_inside_a_word_is_widened_and_told(task: Prepare, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"text": "good film", "spans": [{"start": 1, "end": 7, "label": "X"}]}, SPANS[0]]
    with caplog.at_level(logging.WARNING):
        prepared = task(rows * 2, rows, **TEXT)
    assert [message.partition(": ")[2] for message in caplog.messages] == [
        "2 spans begin or end inside a word; they are widened to whole words, for training and for metrics.",
        "1 spans begin or end inside a word; they are widened to whole words, for training and for metrics.",
    ]
    assert prepared.validation[0]["tags"] == ["B-X", "I-X"]


@pytest.mark.parametrize("prefix", [False, True])
def test_byte_level_tokens_have_the_space_before_their_word(
    prefix: bool, tmp_path: Path, model_section: Section, data_section: Section, write: Write
) -> None:
    """As in running text, which RoBERTa and GPT-2 were trained on; whatever their add_prefix_space says."""
    inner = Tokenizer(BPE(unk_token="<unk>"))
    inner.pre_tokenizer = ByteLevel(add_prefix_space=prefix)
    trainer = BpeTrainer(vocab_size=60, special_tokens=["<unk>"], initial_alphabet=[], show_progress=False)
    inner.train_from_iterator([" the film is good a b c"] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", pad_token="<unk>")
    folder = save_encoder(tmp_path / "model", tokenizer)
    data = data_section(write(ROWS), tokens="tokens", tags="tags", validation=write(ROWS[:2], "validation.jsonl"))
    prepared = prepare("token-classification", model_section(folder), data, 0)
    assert prepared.tokenizer.convert_ids_to_tokens(prepared.train[1]["input_ids"]) == ["Ġa", "Ġb", "Ġc"]
    assert prepared.train[1]["labels"] == [0, 0, 3]


def test_an_evaluation_alone_is_the_same(task: Prepare, data_section: Section, write: Write) -> None:
    prepared = task(ROWS, ROWS[:3])
    data = data_section("gone.jsonl", tokens="tokens", tags="tags")
    again = prepare_evaluation(
        "token-classification", prepared.model, prepared.tokenizer, data, write(ROWS[:3], "more.jsonl")
    )
    assert again.test is not None
    assert again.test[:] == prepared.validation[:]
    assert again.metric == prepared.metric == "f1"
    with pytest.raises(
        UserError, match=r'more.jsonl:1: tag "B-Z" of the word "a" is not among the tags of the training'
    ):
        prepare_evaluation(
            "token-classification",
            prepared.model,
            prepared.tokenizer,
            data,
            write([{"tokens": "a", "tags": "B-Z"}], "more.jsonl"),
        )


GOOD = {"tokens": "a b", "tags": "B-X O"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": "a b", "tags": "O"}, r"train.jsonl:2: 2 words \(data.tokens\) and 1 tags \(data.tags\)"),
        ({"tokens": [], "tags": []}, r'train.jsonl:2: an empty sentence, column "tokens"'),
        ({"tokens": " ", "tags": " "}, r"train.jsonl:2: an empty sentence"),
        ({"tokens": "a b", "tags": "O I-X"}, r'train.jsonl:2: word 2, "b", has the tag "I-X", but .* iob1'),
        (
            {"tokens": "a b", "tags": ["O", None]},
            r'train.jsonl:2: item 2 of column "tags" \(data.tags\) is no text: null',
        ),
        ({"tokens": "a b", "tags": ["O", 1.5]}, r"train.jsonl:2: item 2 .* is no text: 1.5"),
        (
            {"tokens": ["a", 2], "tags": "O O"},
            r'train.jsonl:2: item 2 of column "tokens" \(data.tokens\) is no text: 2',
        ),
        ({"tokens": 5, "tags": "O O"}, r"train.jsonl:2: .* must hold a list of texts .* or a text .* found int 5"),
        ({"tokens": "a b", "tags": "['O', 'B-X']"}, r"train.jsonl:2: .* must hold a list of texts \(in JSON, where"),
        ({"tokens": "a b", "tags": ["O", -100]}, r"train.jsonl:2: item 2 .* is no text: -100"),
        ({"tokens": "a", "tags": "NOUN"}, r"train.jsonl: the tags are of several schemes \(B-X, NOUN, O\)"),
    ],
)
def test_a_row_that_cannot_be_read_is_refused(task: Prepare, row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        task([GOOD, row, GOOD, GOOD], [GOOD])
    task([GOOD] * 4, [GOOD])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([{"start": 0, "end": 3, "label": "X"}, {"start": 2, "end": 5, "label": "Y"}],
         r'spans that overlap, "goo" \(0 to 3, X\) and "od " \(2 to 5, Y\)'),
        ([{"start": 0, "end": 2, "label": "X"}, {"start": 2, "end": 4, "label": "Y"}],
         r'both have a part of the word "good", and a word has one tag'),
        ([{"start": 5, "end": 12, "label": "X"}], r"span 5 to 12 \(X\), outside of its text of 9 characters"),
        ([{"start": -1, "end": 2, "label": "X"}], r"span -1 to 2 \(X\), outside of its text"),
        ([{"start": 3, "end": 2, "label": "X"}], r"span 3 to 2 \(X\), outside of its text"),
        ([{"start": 4, "end": 5, "label": "X"}], r'span " " \(4 to 5, X\), which is empty'),
        ([{"start": 4, "end": 4, "label": "X"}], r'span "" \(4 to 4, X\), which is empty'),
        ([{"start": 0, "end": 4}], r"must hold spans with start and end, whole numbers, and label, a text"),
        ([{"start": 0.0, "end": 4, "label": "X"}], r"must hold spans with start and end, whole numbers"),
        ("X", r'must hold a list of {start, end, label}, found "X"'),
    ],
)  # fmt: skip
def test_spans_that_cannot_be_read_are_refused(task: Prepare, row: Any, message: str) -> None:
    with pytest.raises(UserError, match=rf'train.jsonl:2: column "spans" \(data.spans\):? .*{message}'):
        task([SPANS[0], {"text": "good film", "spans": row}], SPANS, **TEXT)


def test_other_refusals(
    task: Prepare, model_section: Section, data_section: Section, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"needs two tags or more; .*train.jsonl has O alone"):
        task([{"tokens": "a", "tags": "O"}] * 3, [{"tokens": "a", "tags": "O"}])
    with pytest.raises(UserError, match=r'validation.jsonl:1: tag "B-Y" of the word "a" is not among .*"B-X", "I-X"'):
        task([GOOD] * 3, [{"tokens": "a", "tags": "B-Y"}])
    with pytest.raises(UserError, match=r"no word gives a token, so there is nothing to learn"):
        task([{"tokens": ["", ""], "tags": ["B-X", "O"]}] * 3, [GOOD])
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    with pytest.raises(UserError, match=r"does not tell where in the text its tokens stand.* fast tokenizer"):
        task(ROWS)


def test_a_rare_tag_may_be_cut_off_for_validation(task: Prepare) -> None:
    """It is found in the training data before they are cut."""
    for rare in range(8):
        rows = [{"tokens": "a", "tags": "B-Y"} if i == rare else GOOD for i in range(8)]
        assert names(task(rows)) == ["O", "B-X", "I-X", "B-Y", "I-Y"]


def _tags_of(*names: str) -> Features:
    return Features({"tokens": List(Value("string")), "tags": List(ClassLabel(names=list(names)))})


def test_tags_that_a_data_set_names(data_section: Section) -> None:
    table = Dataset.from_dict({"tokens": [["a", "b"]], "tags": [[1, 0]]}, features=_tags_of("O", "B-X"))
    rows = Rows("hub:x", ("tokens", "tags"), table, range(1, 2), unit="row")
    data = data_section("hub:x", tokens="tokens", tags="tags")
    assert read_sentences(rows, data).tags == [["B-X", "O"]]
    other = Dataset.from_dict({"tokens": [["a", "b"]], "tags": [[1, 0]]}, features=_tags_of("B-Y", "O"))
    mixed = mix([rows, Rows("hub:y", ("tokens", "tags"), other, range(1, 2), unit="row")], None, 0)
    assert read_sentences(mixed, data).tags == [["B-X", "O"], ["O", "B-Y"]]
