"""Promises: labels become classes or numbers, mistakes in them are found before training, and a Trainer can use it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from tiny_models import build_tokenizer, save_decoder
from transformers import EvalPrediction, Trainer, TrainingArguments

from loralloc.errors import UserError
from loralloc.tasks.base import TaskData, first_output, tokenize_cut
from loralloc.tasks.classes import label_names, numbers
from loralloc.tasks.classification_metrics import classification_metrics, regression_metrics
from loralloc.tasks.pretrained import load_model, load_tokenizer, locate
from loralloc.tasks.rows import Rows, mix
from loralloc.tasks.sequence_classification import prepare

GOOD, BAD = {"text": "the film is good", "label": "yes"}, {"text": "the film is bad a b", "label": "no"}
ROWS = [GOOD, BAD] * 6 + [GOOD] * 4

Section = Callable[..., Any]
Write = Callable[..., str]


@pytest.fixture
def task(encoder: str, model_section: Section, data_section: Section, write: Write) -> Callable[..., TaskData]:
    """Prepares rows with the tiny encoder."""

    def make(rows: list[dict[str, Any]], dtype: str = "float32", **given: Any) -> TaskData:
        data = data_section(write(rows), **{"text": "text", "label": "label", **given})
        return prepare(model_section(encoder, dtype), data, 0)

    return make


def test_labels_are_found_in_the_training_data(task: Callable[..., TaskData]) -> None:
    prepared = task(ROWS)
    config = prepared.model.config
    assert (config.id2label, config.label2id) == ({0: "no", 1: "yes"}, {"no": 0, "yes": 1})
    assert config.problem_type == "single_label_classification"
    assert (len(prepared.train), len(prepared.validation), prepared.test) == (12, 4, None)


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ([10, 9, 9, 10], ["9", "10"]),
        ([True, False, True, False], ["false", "true"]),
        ([1.0, 0.0, 1.0, 0.0], ["0", "1"]),
        (["b", "a", "b", "a"], ["a", "b"]),
        (["9" * 5000, "10"] * 4, ["10", "9" * 5000]),  # more digits than Python reads
        (["1", "001", "00001", "01", "000001", "0001"] * 2, ["000001", "00001", "0001", "001", "01", "1"]),
    ],
)
def test_labels_of_every_type_are_sorted(task: Callable[..., TaskData], values: list[Any], names: list[str]) -> None:
    prepared = task([{"text": "a", "label": value} for value in values])
    assert list(prepared.model.config.id2label.values()) == names


def test_labels_may_be_given(task: Callable[..., TaskData]) -> None:
    prepared = task(ROWS, labels=["yes", "no", "perhaps"])
    assert prepared.model.config.label2id == {"yes": 0, "no": 1, "perhaps": 2}
    truth = task([{"text": "a", "label": i % 2 == 0} for i in range(8)], labels=[True, False])
    assert truth.model.config.label2id == {"true": 0, "false": 1}


def test_names_of_numbered_classes_are_used() -> None:
    features = Features({"label": ClassLabel(names=["no", "yes"])})
    table = Dataset.from_dict({"label": [1, 0, -1]}, features=features)
    rows = Rows("hub:x", ("label",), table, range(1, 4), unit="row")
    assert label_names(rows, "label") == ["yes", "no", "-1"]


def test_sources_that_number_their_classes_in_another_order_are_mixed_by_name() -> None:
    def rows_of(names: list[str], labels: list[int]) -> Rows:
        table = Dataset.from_dict({"label": labels}, features=Features({"label": ClassLabel(names=names)}))
        return Rows("hub:x", ("label",), table, range(1, len(labels) + 1), unit="row")

    plain = Rows("train.jsonl", ("label",), [{"label": "yes"}, {"label": 0}], [1, 2])
    mixed = mix([rows_of(["no", "yes"], [1, 0]), rows_of(["yes", "no"], [1, 0]), plain], None, 0)
    assert label_names(mixed, "label") == ["yes", "no", "no", "yes", "yes", "0"]
    assert label_names(mixed.select([5, 2, 1]), "label") == ["0", "no", "no"]


def test_one_text_and_a_pair(task: Callable[..., TaskData]) -> None:
    single = task(ROWS).train[0]
    assert set(single) == {"input_ids", "token_type_ids", "attention_mask", "labels"}
    pair = task([{**row, "other": "a b"} for row in ROWS], text_pair="other").train[0]
    assert len(pair["input_ids"]) == len(single["input_ids"]) + 3
    assert sum(pair["token_type_ids"]) == 3


def test_long_texts_are_cut_and_counted(task: Callable[..., TaskData], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="loralloc"):
        prepared = task(ROWS, max_length=5)
        assert {len(ids) for ids in prepared.train["input_ids"]} == {5}
        assert (
            "train.jsonl: of 12 rows, 12 are longer than data.max_length = 5 tokens and lose their end." in caplog.text
        )
        caplog.clear()
        pairs = task([{**row, "other": "a"} for row in ROWS], text_pair="other", max_length=9)  # BAD has 8, and 2 more
        told = [record.getMessage().partition(": ")[2] for record in caplog.records]
        lengths = [len(ids) for split in (pairs.train, pairs.validation) for ids in split["input_ids"]]
        assert max(lengths) == 9
        assert sum(int(one.split(" ")[3]) for one in told) == lengths.count(9) == 6
        caplog.clear()
        task(ROWS)
        assert not caplog.records


@pytest.mark.parametrize("pairs", [None, ["a b", "good", "a"]])
def test_only_what_is_too_long_is_tokenized_again(pairs: list[str] | None) -> None:
    """The naive twin tokenizes and cuts all texts at once."""
    special = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    tokenizer, seen = build_tokenizer("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", **special), []

    def counted(texts: list[str], *others: Any, **options: Any) -> Any:
        seen.append(len(texts))
        return tokenizer(texts, *others, **options)

    counted.num_special_tokens_to_add = tokenizer.num_special_tokens_to_add  # type: ignore[attr-defined]
    texts = ["the film", "the film is bad a b", "good"]
    found, longer = tokenize_cut(counted, texts, pairs, 7, True)  # type: ignore[arg-type]
    whole = tokenizer(texts, pairs, truncation=True, max_length=7)
    assert {key: list(found[key]) for key in whole} == dict(whole)
    assert (longer, seen) == ([False, True, False], [3, 1])


@pytest.mark.parametrize(("pair", "special"), [(None, 2), ("other", 3)])
def test_a_length_that_special_tokens_fill_is_refused(
    task: Callable[..., TaskData], pair: str | None, special: int
) -> None:
    rows, least = [{**row, "other": "a b"} for row in ROWS], special + (1 if pair is None else 2)
    with pytest.raises(UserError) as error:
        task(rows, text_pair=pair, max_length=least - 1)
    assert str(error.value) == (
        f"data.max_length is {least - 1}, and special tokens take {special} of an example: a text would have no token "
        f"left; raise it to {least} at least"
    )
    assert {len(ids) for ids in task(rows, text_pair=pair, max_length=least).train["input_ids"]} == {least}


def test_a_batch_is_padded_to_its_longest(task: Callable[..., TaskData]) -> None:
    prepared = task(ROWS)
    batch = prepared.options["data_collator"]([prepared.train[i] for i in range(4)])
    lengths = [len(prepared.train[i]["input_ids"]) for i in range(4)]
    assert batch["input_ids"].shape == (4, max(lengths))
    assert batch["attention_mask"].sum(dim=1).tolist() == lengths
    assert batch["labels"].shape == (4,)


def test_only_what_the_model_takes_is_kept(
    tmp_path: Path, model_section: Section, data_section: Section, write: Write
) -> None:
    """A decoder's tokenizer gives segment numbers that its model does not know; it has no padding token either."""
    folder = save_decoder(tmp_path / "decoder", build_tokenizer("$A", None, unk_token="<unk>", eos_token="</s>"))
    prepared = prepare(model_section(folder), data_section(write(ROWS), text="text", label="label"), 0)
    assert set(prepared.train.column_names) == {"input_ids", "attention_mask", "labels"}
    batch = prepared.options["data_collator"]([prepared.train[i] for i in range(4)])
    assert prepared.model(**batch).logits.shape == (4, 2)


def test_the_majority_is_that_of_the_training_data(task: Callable[..., TaskData], write: Write) -> None:
    test = write([GOOD, BAD, BAD, BAD], "test.jsonl")
    assert task(ROWS).reference == {"majority": pytest.approx(3 / 4)}
    assert task(ROWS, test=test).reference == {"majority": 1 / 4}


def test_the_same_seed_gives_the_same_data_and_head(task: Callable[..., TaskData]) -> None:
    first, second = task(ROWS), task(ROWS)
    assert first.train[:] == second.train[:]
    assert torch.equal(first.model.classifier.weight, second.model.classifier.weight)


def test_regression(task: Callable[..., TaskData]) -> None:
    rows = [{"text": "a b", "label": "1.5"}, {"text": "a", "label": 2}] * 4
    prepared = task(rows, labels="regression")
    assert (prepared.model.config.num_labels, prepared.model.config.problem_type) == (1, "regression")
    assert (prepared.metric, prepared.greater_is_better, prepared.reference) == ("pearson", True, {})
    assert set(prepared.train["labels"]) == {1.5, 2.0}
    batch = prepared.options["data_collator"]([prepared.train[0], prepared.train[1]])
    assert batch["labels"].dtype == torch.float32


def train(prepared: TaskData, folder: Path, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        str(folder),
        max_steps=4,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        use_cpu=True,
        dataloader_pin_memory=False,
        logging_strategy="no",
        **options,
    )
    trainer = Trainer(
        model=prepared.model,
        args=arguments,
        train_dataset=prepared.train,
        eval_dataset=prepared.validation,
        **prepared.options,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("labels", [None, "regression"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_trainer_takes_it(task: Callable[..., TaskData], tmp_path: Path, labels: Any, dtype: str) -> None:
    rows = [{"text": "a b", "label": 1}, {"text": "c", "label": 0}] * 8
    prepared = task(rows, dtype, labels=labels)
    metrics = train(prepared, tmp_path / "out").evaluate()
    assert f"eval_{prepared.metric}" in metrics
    assert np.isfinite(metrics["eval_loss"])


def test_a_regression_in_half_precision_has_a_loss_in_full(
    task: Callable[..., TaskData],
) -> None:
    prepared = task([{"text": "a b", "label": 1.3}, {"text": "c", "label": 0.1}] * 8, "bfloat16", labels="regression")
    batch = prepared.options["data_collator"]([prepared.train[0], prepared.train[1]])
    output = prepared.model(**batch)
    assert (output.logits.dtype, output.loss.dtype) == (torch.bfloat16, torch.float32)
    assert output.loss.equal((output.logits.float().view(-1) - batch["labels"]).square().mean())
    seen = output.loss.grad_fn
    while seen is not None and "ToCopy" not in seen.name():
        seen = seen.next_functions[0][0] if seen.next_functions else None
    assert seen is not None  # the outputs were cast: PyTorch 2.10 has no gradient of the mixed error


def test_accumulation_changes_nothing(task: Callable[..., TaskData], tmp_path: Path) -> None:
    """Without the mark on the model, the loss would be as many times too great as batches are accumulated."""

    def weights(name: str, **options: int) -> torch.Tensor:
        prepared = task(ROWS)
        prepared.model.eval()
        for module in prepared.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        trainer = train(prepared, tmp_path / name, optim="sgd", learning_rate=0.5, max_grad_norm=0.0, **options)
        return trainer.model.classifier.weight.detach()

    whole = weights("whole", per_device_train_batch_size=4)
    parts = weights("parts", per_device_train_batch_size=2, gradient_accumulation_steps=2)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


def test_a_trained_head_for_other_labels_is_replaced(
    encoder: str,
    tmp_path: Path,
    model_section: Section,
    data_section: Section,
    write: Write,
    caplog: pytest.LogCaptureFixture,
) -> None:
    checkpoint = locate(model_section(encoder))
    tokenizer = load_tokenizer(checkpoint)
    trained = load_model("sequence-classification", checkpoint, tokenizer, 0, num_labels=3)
    trained.save_pretrained(tmp_path / "trained")
    tokenizer.save_pretrained(tmp_path / "trained")
    data = data_section(write(ROWS), text="text", label="label")
    with caplog.at_level(logging.WARNING, logger="loralloc"):
        prepared = prepare(model_section(str(tmp_path / "trained")), data, 0)
    assert prepared.model.classifier.out_features == 2
    assert "has 3 outputs, the data need 2: it is replaced by a new one" in caplog.text


def test_columns_must_be_named(task: Callable[..., TaskData]) -> None:
    for missing in ("text", "label"):
        with pytest.raises(UserError, match=r"needs data.text and data.label, the columns to read"):
            task(ROWS, **{missing: None})


def test_a_label_that_training_never_saw(task: Callable[..., TaskData], write: Write) -> None:
    other = write([GOOD, {"text": "a", "label": "yess"}], "other.jsonl")
    message = r'other.jsonl:2: label "yess" is not among the labels of the training data \("no", "yes"\).*mean "yes"'
    for split in ("validation", "test"):
        with pytest.raises(UserError, match=message):
            task(ROWS, **{split: other})


def test_a_label_that_the_recipe_does_not_give(task: Callable[..., TaskData], write: Write) -> None:
    validation = write([GOOD], "other.jsonl")
    with pytest.raises(UserError, match=r'train.jsonl:2: label "no" is not among data.labels \("yes", "perhaps"\)'):
        task(ROWS, labels=["yes", "perhaps"], validation=validation)


def test_one_label_is_too_few(task: Callable[..., TaskData]) -> None:
    with pytest.raises(UserError, match=r"needs two labels or more; .*train.jsonl has yes. For numbers"):
        task([GOOD] * 8)


def test_labels_given_twice_or_misspelt(task: Callable[..., TaskData]) -> None:
    with pytest.raises(UserError, match=r"data.labels names a label twice: no, yes, no\."):
        task(ROWS, labels=["no", "yes", "no"])
    with pytest.raises(UserError, match=r'a list of labels or "regression", found "regresion". Did you mean "regr'):
        task(ROWS, labels="regresion")


@pytest.mark.parametrize("value", [0.5, [1], " "])
def test_values_that_are_no_label(task: Callable[..., TaskData], value: Any) -> None:
    message = r'train.jsonl:9: column "label" \(data.label\) must hold a text or a whole number, found .*For numbers'
    with pytest.raises(UserError, match=message):
        task([GOOD, BAD] * 4 + [{"text": "a", "label": value}])


@pytest.mark.parametrize("value", ["x", True, [1], float("nan"), float("inf"), 10**400, "9" * 5000])
def test_values_that_are_no_number(value: Any) -> None:
    rows = Rows("train.jsonl", ("label",), [{"label": 1}, {"label": value}], [1, 2])
    message = (
        r'train.jsonl:2: column "label" \(data.label\) must hold a finite number \(data.labels: regression\), found'
    )
    with pytest.raises(UserError, match=message):
        numbers(rows, "label")


def test_numbers_may_be_written_as_text() -> None:
    rows = Rows("train.csv", ("label",), [{"label": "1.5"}, {"label": " -2e1 "}], [2, 3])
    assert numbers(rows, "label") == [1.5, -20.0]


def test_a_mistake_shows_before_the_model_is_loaded(
    model_section: Section, data_section: Section, write: Write
) -> None:
    data = data_section(write(ROWS), text="txt", label="label")
    with pytest.raises(UserError, match=r'no column "txt"'):
        prepare(model_section("./no/such/model"), data, 0)


def test_more_tokens_than_positions(task: Callable[..., TaskData]) -> None:
    with pytest.raises(UserError, match=r"data.max_length is 33, but model .* has 32 positions"):
        task(ROWS, max_length=33)


def test_metrics_of_logits() -> None:
    logits = np.array([[2.0, 1.0], [0.0, 1.0], [np.nan, 0.0], [0.0, 3.0]])
    metrics = classification_metrics(EvalPrediction(logits, np.array([0, 0, 0, 1])))
    assert metrics["accuracy"] == 0.5  # where a logit is not a number, the prediction is wrong
    assert set(metrics) == {"accuracy", "macro_f1", "matthews", "f1"}
    assert metrics["f1"] == 2 / 3  # of the second class: one hit, one that is the first class, none missed
    three = classification_metrics(EvalPrediction(np.eye(3), np.array([0, 1, 1])))
    assert set(three) == {"accuracy", "macro_f1", "matthews"}


def test_metrics_of_a_regression() -> None:
    metrics = regression_metrics(EvalPrediction(np.array([[1.0], [2.0], [4.0]]), np.array([1.0, 2.0, 3.0])))
    assert metrics == pytest.approx({"pearson": 0.981980506, "spearman": 1.0, "mse": 1 / 3})


def test_outputs_beside_the_logits_are_dropped() -> None:
    logits, labels = torch.ones(2, 3), torch.zeros(2)
    assert first_output((logits, torch.zeros(9)), labels) is logits
    assert first_output(logits, labels) is logits


def test_parquet_rows(encoder: str, tmp_path: Path, model_section: Section, data_section: Section) -> None:
    features = Features({"text": Value("string"), "label": Value("string")})
    Dataset.from_list(ROWS, features=features).to_parquet(str(tmp_path / "train.parquet"))
    data = data_section(tmp_path / "train.parquet", text="text", label="label")
    assert len(prepare(model_section(encoder), data, 0).train) == 12
