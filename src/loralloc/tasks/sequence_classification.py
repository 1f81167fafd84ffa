"""Sequence classification: one text or a pair to a class, or to a number (regression)."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Value
from numpy.typing import NDArray
from transformers import (
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from loralloc.errors import UserError, closest
from loralloc.tasks import metrics
from loralloc.tasks.base import CHUNK, ModelSection, TaskData, evaluation_of, first_output, to_dataset
from loralloc.tasks.data import Splits, load_splits, read_rows
from loralloc.tasks.pretrained import check_length, load_config, load_model, load_tokenizer, locate, replaces_head
from loralloc.tasks.rows import Rows, quote
from loralloc.tasks.spec import ClassificationData

REGRESSION = "regression"


def prepare(model: ModelSection, data: ClassificationData, seed: int) -> TaskData:
    """Make everything a Trainer needs to classify sequences.

    Args:
        model: The recipe's model section.
        data: The recipe's data section.
        seed: Seed of the validation cut and of the new head.

    Returns:
        Model, data and metrics. The metric is the accuracy, with the share of the training data's most frequent
        class as its reference, or Pearson's correlation for a regression.

    Raises:
        UserError: The recipe, the data or the model is at fault.
    """
    if data.text is None or data.label is None:
        raise UserError("Sequence classification needs data.text and data.label, the columns to read.")
    # All data are read and checked before the model is loaded: a mistake should show in a second.
    if data.labels == REGRESSION:
        splits, goal = _read_regression(data, data.label, seed)
    else:
        splits, goal = _read_classes(data, data.label, seed)
    texts = [_read_texts(rows, data) for rows in splits.all()]

    checkpoint = locate(model)
    config = load_config(checkpoint)
    check_length(data.max_length, config, model.name)
    tokenizer = load_tokenizer(checkpoint)
    replaced = replaces_head(checkpoint, config, "ForSequenceClassification", goal.options["num_labels"])
    options = {**goal.options, "ignore_mismatched_sizes": replaced}

    def load() -> PreTrainedModel:
        classifier = load_model("sequence-classification", checkpoint, tokenizer, seed, **options)
        # A classifier's loss is a mean over the batch, but its forward takes any keyword, so a Trainer believes that
        # it divides by the number of items in all accumulated batches and leaves the division out.
        classifier.accepts_loss_kwargs = False  # pyright: ignore[reportArgumentType]
        return classifier

    classifier = load()
    keys = inspect.signature(classifier.forward).parameters.keys()
    encoded = [
        to_dataset(_tokenize(tokenizer, columns, targets, data.max_length, keys), goal.label_type)
        for columns, targets in zip(texts, goal.targets, strict=True)
    ]
    return TaskData(
        model=classifier,
        again=load,
        tokenizer=tokenizer,
        train=encoded[0],
        validation=encoded[1],
        test=encoded[2] if splits.test is not None else None,
        options=_trained_with(tokenizer, goal.compute_metrics),
        example_losses=example_losses,
        predictions=lambda prediction: predictions(prediction, classifier.config.id2label or {}),
        metric=goal.metric,
        reference=goal.reference,
        classes=goal.classes,
    )


def prepare_evaluation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: ClassificationData, source: str
) -> TaskData:
    """Make everything a Trainer needs to evaluate a trained classifier; see `tasks.prepare_evaluation`."""
    rows, column = read_rows(source), str(data.label)
    texts = _read_texts(rows, data)
    targets: list[int] | list[float]
    if data.labels == REGRESSION:
        targets, label_type, compute_metrics, metric = numbers(rows, column), "float32", regression_metrics, "pearson"
    else:
        index = {str(name): int(i) for i, name in sorted((model.config.id2label or {}).items())}
        targets = _to_indices(rows, label_names(rows, column), index, listed=False)
        label_type, compute_metrics, metric = "int64", classification_metrics, "accuracy"
    keys = inspect.signature(model.forward).parameters.keys()
    encoded = to_dataset(_tokenize(tokenizer, texts, targets, data.max_length, keys), Value(label_type))
    return evaluation_of(
        encoded,
        model=model,
        tokenizer=tokenizer,
        options=_trained_with(tokenizer, compute_metrics),
        example_losses=example_losses,
        predictions=lambda prediction: predictions(prediction, model.config.id2label or {}),
        metric=metric,
    )


def _trained_with(tokenizer: PreTrainedTokenizerBase, compute_metrics: Callable[..., Any]) -> dict[str, Any]:
    """What the trainer is given."""
    collator = DataCollatorWithPadding(tokenizer)
    options = {"data_collator": collator, "preprocess_logits_for_metrics": first_output}
    return {**options, "compute_metrics": compute_metrics}


def classification_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Compute accuracy, macro F1 and Matthews' correlation of logits.

    Args:
        prediction: Logits `[n, classes]` and targets `[n]`.

    Returns:
        `accuracy`, `macro_f1` and `matthews`.
    """
    logits, target = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
    # Where a logit is not a number, argmax gives its place: a broken model would predict some class.
    predicted = np.where(np.isnan(logits).any(axis=-1), -1, logits.argmax(axis=-1))
    return {
        "accuracy": metrics.accuracy(predicted, target),
        "macro_f1": metrics.macro_f1(predicted, target),
        "matthews": metrics.matthews(predicted, target),
    }


def example_losses(prediction: EvalPrediction) -> NDArray[np.floating]:
    """The loss of every example, [n]: cross-entropy, or the squared error of a regression."""
    outputs, target = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
    if np.issubdtype(target.dtype, np.floating):
        return (outputs.reshape(target.shape).astype(np.float64) - target) ** 2
    return metrics.cross_entropy(outputs, target)


def predictions(prediction: EvalPrediction, names: Mapping[Any, str]) -> list[dict[str, Any]]:
    """What is predicted for every example: the class with all probabilities, or the number of a regression."""
    outputs, target = np.asarray(prediction.predictions, dtype=np.float64), np.asarray(prediction.label_ids)
    if np.issubdtype(target.dtype, np.floating):
        values = outputs.reshape(target.shape)
        return [
            {"label": float(label), "prediction": float(value)} for label, value in zip(target, values, strict=True)
        ]
    scores = np.exp(outputs - outputs.max(axis=-1, keepdims=True))
    scores /= scores.sum(axis=-1, keepdims=True)
    return [
        {
            "label": names[label],
            "prediction": names[int(row.argmax())],
            "scores": {names[index]: round(float(value), 6) for index, value in enumerate(row)},
        }
        for label, row in zip(map(int, target), scores, strict=True)
    ]


def regression_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Compute Pearson's and Spearman's correlations and the mean squared error.

    Args:
        prediction: Outputs `[n, 1]` and targets `[n]`.

    Returns:
        `pearson`, `spearman` and `mse`.
    """
    predicted = np.asarray(prediction.predictions).reshape(-1)
    target = np.asarray(prediction.label_ids).reshape(-1)
    return {
        "pearson": metrics.pearson(predicted, target),
        "spearman": metrics.spearman(predicted, target),
        "mse": metrics.mean_squared_error(predicted, target),
    }


@dataclass(frozen=True)
class _Goal:
    """What the head is to learn."""

    targets: list[list[int]] | list[list[float]]
    """One target per row, for each split."""
    options: Mapping[str, Any]
    """Arguments of the model's `from_pretrained`."""
    label_type: Value
    compute_metrics: Callable[[EvalPrediction], dict[str, float]]
    metric: str
    reference: Mapping[str, float] = field(default_factory=dict)
    classes: Mapping[str, int] = field(default_factory=dict)
    """Training rows of every class."""


def _read_regression(data: ClassificationData, column: str, seed: int) -> tuple[Splits, _Goal]:
    splits = load_splits(data, seed)
    return splits, _Goal(
        targets=[numbers(rows, column) for rows in splits.all()],
        options={"num_labels": 1, "problem_type": REGRESSION},
        label_type=Value("float32"),
        compute_metrics=regression_metrics,
        metric="pearson",
    )


def _read_classes(data: ClassificationData, column: str, seed: int) -> tuple[Splits, _Goal]:
    splits = load_splits(data, seed, groups=lambda rows: label_names(rows, column))
    found = [label_names(rows, column) for rows in splits.all()]
    names = _label_set(data, found[0])
    index = {name: i for i, name in enumerate(names)}
    targets = [
        _to_indices(rows, labels, index, listed=data.labels is not None)
        for rows, labels in zip(splits.all(), found, strict=True)
    ]
    counts = Counter(targets[0])
    majority = counts.most_common(1)[0][0]
    return splits, _Goal(
        targets=targets,
        options={
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": index,
            "problem_type": "single_label_classification",
        },
        label_type=Value("int64"),
        compute_metrics=classification_metrics,
        metric="accuracy",
        reference={"majority": targets[-1].count(majority) / len(targets[-1])},
        classes={name: counts[i] for name, i in index.items()},
    )


def label_names(rows: Rows, column: str) -> list[str]:
    """Read a column of class labels as names.

    Args:
        rows: The rows.
        column: Name of the column: texts, whole numbers or truth values.

    Returns:
        One name per row. A Hub data set that numbers its classes gives their names.

    Raises:
        UserError: No such column, a missing value, or a value of another type.
    """
    values = rows.values(column, "data.label")
    kind = rows.records.features[column] if isinstance(rows.records, Dataset) else None
    classes = kind.names if isinstance(kind, ClassLabel) else []
    names = []
    for i, value in enumerate(values):
        name = classes[value] if type(value) is int and 0 <= value < len(classes) else _name(value)
        if name is None:
            raise UserError(
                f'{rows.place(i)}: column "{column}" (data.label) must hold a text or a whole number, '
                f"found {quote(value)}. For numbers to predict set data.labels: regression."
            )
        names.append(name)
    return names


def _name(label: object) -> str | None:
    """Name a label; None for what cannot be one."""
    if isinstance(label, bool):
        return str(label).lower()
    if isinstance(label, float) and label.is_integer():  # how pandas writes whole numbers beside a gap
        return str(int(label))
    return str(label) if isinstance(label, int) or (isinstance(label, str) and label.strip()) else None


def sort_labels(names: Sequence[str]) -> list[str]:
    """Sort distinct labels: as numbers when all are whole numbers, else as texts.

    >>> sort_labels(["10", "9", "9"])
    ['9', '10']
    >>> sort_labels(["b", "10", "9"])
    ['10', '9', 'b']
    """
    distinct = set(names)
    whole = all(name.removeprefix("-").isdecimal() for name in distinct)
    return sorted(distinct, key=int) if whole else sorted(distinct)


def numbers(rows: Rows, column: str) -> list[float]:
    """Read a column of numbers to predict.

    Args:
        rows: The rows.
        column: Name of the column: numbers, or texts that write one.

    Returns:
        One finite number per row.

    Raises:
        UserError: No such column, a missing value, or a value that is not a finite number.
    """
    result = []
    for i, value in enumerate(rows.values(column, "data.label")):
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise UserError(
                f'{rows.place(i)}: column "{column}" (data.label) must hold a finite number '
                f"(data.labels: regression), found {quote(value)}"
            )
        result.append(number)
    return result


def _label_set(data: ClassificationData, found: Sequence[str]) -> list[str]:
    if isinstance(data.labels, str):
        raise UserError(
            f'data.labels must be a list of labels or "{REGRESSION}", found "{data.labels}".'
            f"{closest(data.labels, [REGRESSION])}"
        )
    names = sort_labels(found) if data.labels is None else [_name(label) or "" for label in data.labels]
    if len(names) < 2:
        raise UserError(
            f"Classification needs two labels or more; {data.train} has {', '.join(names) or 'none'}. "
            "For numbers to predict set data.labels: regression."
        )
    if len(set(names)) < len(names):
        raise UserError(f"data.labels names a label twice: {', '.join(names)}.")
    return names


def _to_indices(rows: Rows, names: Sequence[str], index: Mapping[str, int], *, listed: bool) -> list[int]:
    for i, name in enumerate(names):
        if name not in index:
            owner = "data.labels" if listed else "the labels of the training data"
            raise UserError(
                f'{rows.place(i)}: label "{name}" is not among {owner} ({quote(list(index))[1:-1]}).'
                f"{closest(name, index)}"
            )
    return [index[name] for name in names]


def _read_texts(rows: Rows, data: ClassificationData) -> list[list[str]]:
    """Read the one or two columns of text."""
    columns = {"data.text": data.text, "data.text_pair": data.text_pair}
    return [rows.strings(column, key) for key, column in columns.items() if column is not None]


def _tokenize(
    tokenizer: PreTrainedTokenizerBase,
    columns: Sequence[Sequence[str]],
    targets: Sequence[int] | Sequence[float],
    max_length: int,
    keys: Collection[str],
) -> Iterator[dict[str, Any]]:
    """Tokenize texts or pairs, keeping what the model's forward takes."""
    for start in range(0, len(targets), CHUNK):
        text, *pair = [list(column[start : start + CHUNK]) for column in columns]
        encoded = tokenizer(text, pair[0] if pair else None, truncation=True, max_length=max_length)
        kept = [key for key in encoded if key in keys]
        for i in range(len(text)):
            yield {**{key: encoded[key][i] for key in kept}, "labels": targets[start + i]}
