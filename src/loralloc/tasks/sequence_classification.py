"""Sequence classification: one text or a pair to a class, to any number of classes, or to a number (regression)."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from loralloc.errors import UserError
from loralloc.tasks.base import (
    CHUNK,
    ModelSection,
    TaskData,
    evaluation_of,
    first_output,
    to_dataset,
    tokenize_cut,
    warn_of_cuts,
)
from loralloc.tasks.classes import REGRESSION, class_weights, read_goal, read_targets
from loralloc.tasks.classification_metrics import JUDGES, example_losses, predictions
from loralloc.tasks.data import read_rows
from loralloc.tasks.pretrained import check_length, load_config, load_model, load_tokenizer, locate, replaces_head
from loralloc.tasks.rows import Rows
from loralloc.tasks.spec import ClassificationData


def prepare(model: ModelSection, data: ClassificationData, seed: int) -> TaskData:
    """Make everything a Trainer needs to classify sequences.

    Args:
        model: The recipe's model section.
        data: The recipe's data section.
        seed: Seed of the validation cut and of the new head.

    Returns:
        Model, data and metrics. The metric is the accuracy, with the share of the training data's most frequent
        class as its reference; micro F1 where rows have several labels; Pearson's correlation for a regression.

    Raises:
        UserError: The recipe, the data or the model is at fault.
    """
    if data.text is None or data.label is None:
        raise UserError("Sequence classification needs data.text and data.label, the columns to read.")
    # All data are read and checked before the model is loaded: a mistake should show in a second.
    splits, goal = read_goal(data, seed)
    weights = None if data.class_weights is None else class_weights(goal, data.class_weights)
    texts = [_read_texts(rows, data) for rows in splits.all()]

    checkpoint = locate(model)
    config = load_config(checkpoint)
    check_length(data.max_length, config, model.name)
    tokenizer = load_tokenizer(checkpoint)
    replaced = replaces_head(checkpoint, config, "ForSequenceClassification", goal.options["num_labels"])
    options = {**goal.options, "ignore_mismatched_sizes": replaced}

    def load() -> PreTrainedModel:
        classifier = load_model("sequence-classification", checkpoint, tokenizer, seed, **options)
        if weights is not None:
            weigh_classes(classifier, weights)
        if goal.problem == REGRESSION:
            regress_exactly(classifier)
        return classifier

    classifier, label_type = load(), JUDGES[goal.problem].label_type
    keys = inspect.signature(classifier.forward).parameters.keys()
    encoded = [
        to_dataset(_tokenize(tokenizer, rows, columns, targets, data.max_length, keys), label_type)
        for rows, columns, targets in zip(splits.all(), texts, goal.targets, strict=True)
    ]
    return TaskData(
        model=classifier,
        again=load,
        tokenizer=tokenizer,
        train=encoded[0],
        validation=encoded[1],
        test=encoded[2] if splits.test is not None else None,
        reference=goal.reference,
        classes=goal.classes,
        **_trained_with(tokenizer, classifier, goal.problem),
    )


def prepare_evaluation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: ClassificationData, source: str
) -> TaskData:
    """Make everything a Trainer needs to evaluate a trained classifier; see `tasks.prepare_evaluation`."""
    rows = read_rows(source)
    problem = str(model.config.problem_type)
    keys = inspect.signature(model.forward).parameters.keys()
    targets = read_targets(rows, data, model.config)
    examples = _tokenize(tokenizer, rows, _read_texts(rows, data), targets, data.max_length, keys)
    encoded = to_dataset(examples, JUDGES[problem].label_type)
    return evaluation_of(encoded, model=model, tokenizer=tokenizer, **_trained_with(tokenizer, model, problem))


def _trained_with(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, problem: str) -> dict[str, Any]:
    """The fields of `TaskData` on the trainer: its options, metrics and predictions."""
    options = {
        "data_collator": DataCollatorWithPadding(tokenizer),
        "preprocess_logits_for_metrics": first_output,
        "compute_metrics": JUDGES[problem].compute,
    }
    names = model.config.id2label or {}
    return {
        "options": options,
        "metric": JUDGES[problem].metric,
        "example_losses": example_losses,
        "predictions": lambda prediction: predictions(prediction, names),
    }


def weigh_classes(model: PreTrainedModel, weights: Sequence[float]) -> None:
    """Let some classes count more in a classifier's training loss: the weighted mean over the batch.

    The loss in evaluation mode stays the plain mean, in evaluations as in ABLoRA. AutoLoRA's loss on held-out data is
    weighted, as it is computed in training mode.

    Args:
        model: The classifier.
        weights: One weight per class.
    """
    of_classes = torch.tensor(weights, dtype=torch.float32)

    def reweigh(module: Any, args: Any, kwargs: Mapping[str, Any], output: Any) -> Any:
        labels = kwargs.get("labels")
        if module.training and labels is not None:
            logits = output.logits.float()
            output.loss = torch.nn.functional.cross_entropy(logits, labels, of_classes.to(logits.device))
        return output

    model.register_forward_hook(reweigh, with_kwargs=True)


def regress_exactly(model: PreTrainedModel) -> None:
    """Compute a regression's loss in float32, as its labels are, also where the model computes in half precision.

    PyTorch 2.10 and 2.11 cannot compute the gradient of a squared error between two dtypes.

    Args:
        model: The model, with one output.
    """

    def compute(module: Any, args: Any, kwargs: Mapping[str, Any], output: Any) -> Any:
        labels = kwargs.get("labels")
        if labels is not None and output.logits.dtype != labels.dtype:
            wide = torch.promote_types(output.logits.dtype, labels.dtype)
            output.loss = torch.nn.functional.mse_loss(output.logits.to(wide).view(-1), labels.to(wide).view(-1))
        return output

    model.register_forward_hook(compute, with_kwargs=True)


def _read_texts(rows: Rows, data: ClassificationData) -> list[list[str]]:
    """Read the one or two columns of text."""
    columns = {"data.text": data.text, "data.text_pair": data.text_pair}
    return [rows.strings(column, key) for key, column in columns.items() if column is not None]


def _tokenize(
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    columns: Sequence[Sequence[str]],
    targets: Sequence[Any],
    max_length: int,
    keys: Collection[str],
) -> Iterator[dict[str, Any]]:
    """Tokenize texts or pairs, keeping what the model's forward takes; a warning counts those that are cut."""
    cut = 0
    for start in range(0, len(targets), CHUNK):
        text, *pair = [list(column[start : start + CHUNK]) for column in columns]
        encoded, longer = tokenize_cut(tokenizer, text, pair[0] if pair else None, max_length, True)
        cut += sum(longer)
        kept = [key for key in encoded if key in keys]
        for i in range(len(text)):
            yield {**{key: encoded[key][i] for key in kept}, "labels": targets[start + i]}
    warn_of_cuts(rows.source, len(rows), max_length, cut)
