"""Multiple choice with a head: an encoder reads a question with each of its choices, and a head scores them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import DataCollatorForMultipleChoice, PreTrainedModel, PreTrainedTokenizerBase

from loralloc.errors import UserError
from loralloc.tasks import metrics
from loralloc.tasks.base import (
    Evaluated,
    ModelSection,
    TaskData,
    evaluation_of,
    first_output,
    tokenize_cut,
    warn_of_cuts,
)
from loralloc.tasks.choices import Question, chance, read_questions
from loralloc.tasks.classification_metrics import example_losses
from loralloc.tasks.data import load_splits, read_rows
from loralloc.tasks.pretrained import check_length, load_config, load_model, load_tokenizer, locate
from loralloc.tasks.rows import Rows
from loralloc.tasks.spec import ChoiceData


def prepare(model: ModelSection, data: ChoiceData, seed: int) -> TaskData:
    """Make everything a Trainer needs to choose with a head.

    Args:
        model: The recipe's model section.
        data: The recipe's data section.
        seed: Seed of the validation cut and of the new head.

    Returns:
        Model, data and metrics. The metric is the accuracy, with that of guessing as its reference.

    Raises:
        UserError: The recipe, the data or the model is at fault.
    """
    # All data are read and checked before the model is loaded: a mistake should show in a second.
    splits = load_splits(data, seed)
    sources = list(splits.all())
    read = list(zip(sources, read_questions(sources, data), strict=True))
    count = len(read[0][1][0].choices)
    for rows, questions in read:
        _check_counts(rows, questions, count)

    checkpoint = locate(model)
    check_length(data.max_length, load_config(checkpoint), model.name)
    tokenizer = load_tokenizer(checkpoint)

    def load() -> PreTrainedModel:
        return load_model("multiple-choice-head", checkpoint, tokenizer, seed)

    chooser = load()
    encoded = [_encode(tokenizer, rows, questions, data.max_length, chooser) for rows, questions in read]
    return TaskData(
        model=chooser,
        again=load,
        tokenizer=tokenizer,
        train=encoded[0].remove_columns(SHOWN),
        validation=encoded[1],
        test=encoded[2] if splits.test is not None else None,
        reference={"chance": chance(read[-1][1])},
        **_trained_with(tokenizer),
    )


def prepare_evaluation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: ChoiceData, source: str
) -> TaskData:
    """Make everything a Trainer needs to evaluate a trained model; see `tasks.prepare_evaluation`."""
    rows = read_rows(source)
    (questions,) = read_questions([rows], data)
    _check_counts(rows, questions, len(questions[0].choices))
    encoded = _encode(tokenizer, rows, questions, data.max_length, model)
    return evaluation_of(encoded, model=model, tokenizer=tokenizer, **_trained_with(tokenizer))


SHOWN = ["prompt", "choices"]
"""Columns of examples that are shown in predictions and do not go into the model."""


def _trained_with(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The fields of `TaskData` on the trainer: its options and metrics."""
    collator = DataCollatorForMultipleChoice(tokenizer)
    options = {"data_collator": collator, "preprocess_logits_for_metrics": first_output}
    return {
        "options": {**options, "compute_metrics": choice_metrics},
        "metric": "accuracy",
        "example_losses": example_losses,
        "predictions": predictions,
    }


def _check_counts(rows: Rows, questions: Sequence[Question], count: int) -> None:
    """Refuse questions with different numbers of choices: a batch of questions is one tensor.

    Raises:
        UserError: With the first question that differs.
    """
    for i, question in enumerate(questions):
        if len(question.choices) != count:
            raise UserError(
                f"{rows.place(i)}: {len(question.choices)} choices, and the first question has {count}: a head scores "
                "the same number for every question. Bring them to one number; or task multiple-choice, with a causal "
                "model, does not need that"
            )


def _encode(
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    questions: Sequence[Question],
    max_length: int,
    model: PreTrainedModel,
) -> Dataset:
    """Tokenize pairs of a question and a choice, keeping what the model's forward takes.

    Questions that are too long lose their end, and are counted in a warning.

    Raises:
        UserError: A choice leaves no room for a question: choices that are cut cannot be compared.
    """
    taken = inspect.signature(model.forward).parameters.keys()
    room = max_length - tokenizer.num_special_tokens_to_add(pair=True)
    examples, cut = [], 0
    for i, question in enumerate(questions):
        choices = list(question.choices)
        longest = max(len(tokenizer(choice, add_special_tokens=False)["input_ids"]) for choice in choices)
        if longest >= room:
            raise UserError(
                f"{rows.place(i)}: a choice has {longest} tokens, and of data.max_length, which is {max_length}, "
                f"special tokens leave {max(0, room)} for it and its question; raise it"
            )
        prompts = [question.prompt] * len(choices)
        encoded, longer = tokenize_cut(tokenizer, prompts, choices, max_length, "only_first")
        cut += any(longer)
        kept = {key: value for key, value in encoded.items() if key in taken}
        examples.append({**kept, "labels": question.right, "prompt": question.prompt, "choices": choices})
    warn_of_cuts(rows.source, len(rows), max_length, cut)
    return Dataset.from_list(examples)


def choice_metrics(evaluated: Evaluated) -> dict[str, float]:
    """Compute the share of questions whose best choice is the right one.

    Args:
        evaluated: Scores of the choices, [n, choices], and the right ones, [n].

    Returns:
        `accuracy`.
    """
    scores, right = np.asarray(evaluated.predictions), np.asarray(evaluated.label_ids)
    best = np.where(np.isnan(scores).any(axis=-1), -1, scores.argmax(axis=-1))  # a broken model chooses nothing
    return {"accuracy": metrics.accuracy(best, right)}


def predictions(evaluated: Evaluated) -> list[dict[str, Any]]:
    """For every question: the prompt, the right choice, the one chosen, and the probability of each choice."""
    scores = np.asarray(evaluated.predictions, dtype=np.float64)
    shares = np.exp(scores - np.logaddexp.reduce(scores, axis=-1, keepdims=True))
    rows = zip(evaluated.examples["prompt"], evaluated.examples["choices"], shares, evaluated.label_ids, strict=True)
    return [
        {
            "prompt": prompt,
            "label": choices[int(right)],
            "prediction": choices[int(row.argmax())],
            "scores": {choice: round(float(value), 6) for choice, value in zip(choices, row, strict=True)},
        }
        for prompt, choices, row, right in rows
    ]
