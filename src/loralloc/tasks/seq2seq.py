"""Sequence to sequence: an encoder reads a text, and a decoder writes another one (T5, BART and the like).

Everything of a target is learned, and the end-of-sequence token after it. A source longer than `max_length` loses its
end, but not its end-of-sequence token; a target longer than `target_length` loses both, so that the model is not taught
to stop there. What is cut is counted in a warning.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import islice
from typing import Any

from datasets import Dataset, List, Value
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from loralloc.errors import UserError
from loralloc.tasks.base import Evaluated, ModelSection, TaskData, check_room, evaluation_of, to_dataset
from loralloc.tasks.data import load_splits, read_rows
from loralloc.tasks.forms import read_texts
from loralloc.tasks.generation import Prompt
from loralloc.tasks.pretrained import (
    check_end,
    check_length,
    check_stacks,
    load_config,
    load_model,
    load_tokenizer,
    locate,
)
from loralloc.tasks.rows import Rows
from loralloc.tasks.spec import Seq2SeqData
from loralloc.tasks.token_sums import example_losses, language_model_metrics, token_predictions

logger = logging.getLogger(__name__)

Pairs = tuple[list[str], list[str]]
"""The sources and the targets of all rows."""


def prepare(model: ModelSection, data: Seq2SeqData, seed: int) -> TaskData:
    """Make everything a Trainer needs to teach an encoder with a decoder.

    Args:
        model: The recipe's model section.
        data: The recipe's data section.
        seed: Seed of the validation cut.

    Returns:
        Model, data and metrics. The metric is the perplexity.

    Raises:
        UserError: The recipe, the data or the model is at fault.
    """
    # All data are read and checked before the model is loaded: a mistake should show in a second.
    splits = load_splits(data, seed)
    read = [(rows, read_pairs(rows, data)) for rows in splits.all()]

    checkpoint = locate(model)
    config = load_config(checkpoint)
    check_model(config, data, model.name)
    tokenizer = load_tokenizer(checkpoint)
    check_end(tokenizer, model.name)
    encoded = [encode(rows, pairs, tokenizer, data) for rows, pairs in read]
    pairs = [pairs for _, pairs in read]

    def load() -> PreTrainedModel:
        return load_model("seq2seq", checkpoint, tokenizer, seed)

    return TaskData(
        model=load(),
        again=load,
        tokenizer=tokenizer,
        train=encoded[0],
        validation=with_texts(encoded[1], pairs[1]),
        test=with_texts(encoded[2], pairs[2]) if splits.test is not None else None,
        **_trained_with(tokenizer),
    )


def prepare_evaluation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: Seq2SeqData, source: str
) -> TaskData:
    """Make everything a Trainer needs to evaluate an encoder with a decoder; see `tasks.prepare_evaluation`."""
    rows = read_rows(source)
    pairs = read_pairs(rows, data)
    examples = with_texts(encode(rows, pairs, tokenizer, data), pairs)
    return evaluation_of(examples, model=model, tokenizer=tokenizer, **_trained_with(tokenizer))


def _trained_with(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The fields of `TaskData` on the trainer: its options and metrics; it has a collator of its own."""
    return {
        "options": {"processing_class": tokenizer, "compute_metrics": language_model_metrics},
        "metric": "perplexity",
        "targets_apart": True,
        "example_losses": example_losses,
        "predictions": predictions,
    }


def check_model(config: PreTrainedConfig, data: Seq2SeqData, name: str) -> None:
    """Refuse a model that cannot learn the task, or not at these lengths.

    Raises:
        UserError: It has no encoder or no decoder, too few positions, or no token that its decoder starts with.
    """
    check_stacks("seq2seq", config, name)
    check_length(data.max_length, config, name)
    check_length(data.target_length, config, name, "target_length")
    if getattr(config, "decoder_start_token_id", None) is None:
        raise UserError(
            f'The configuration of model "{name}" does not say with which token its decoder starts; set '
            "decoder_start_token_id in its config.json (T5: the padding token)."
        )


def read_pairs(rows: Rows, data: Seq2SeqData) -> Pairs:
    """Read sources and targets.

    Raises:
        UserError: No such column, or a text that is missing or blank.
    """
    return (
        read_texts(rows, str(data.source), "data.source"),
        read_texts(rows, str(data.target), "data.target"),
    )


def encode(rows: Rows, pairs: Pairs, tokenizer: PreTrainedTokenizerBase, data: Seq2SeqData) -> Dataset:
    """Tokenize sources and targets.

    Args:
        rows: Where they came from, for messages.
        pairs: The texts.
        tokenizer: The model's tokenizer.
        data: The recipe's data section: the lengths.

    Returns:
        Examples of `input_ids`, `attention_mask` and `labels`.

    Raises:
        UserError: A source would be cut to its special tokens.
    """
    cut = {"max_length": 0, "target_length": 0}

    def examples() -> Iterator[dict[str, list[int]]]:
        for source, target in zip(*pairs, strict=True):
            # Not verbose: texts longer than the model are expected here, and cut.
            read = tokenizer(source, verbose=False)
            if len(read["input_ids"]) > data.max_length:
                check_room(tokenizer, data.max_length, 1)
                cut["max_length"] += 1
                read = tokenizer(source, truncation=True, max_length=data.max_length)
            labels = list(tokenizer(text_target=target, verbose=False)["input_ids"])
            if tokenizer.eos_token_id not in labels:  # mBART puts a language code after it
                labels.append(tokenizer.eos_token_id)
            cut["target_length"] += len(labels) > data.target_length
            kept = {key: read[key] for key in ("input_ids", "attention_mask")}
            yield {**kept, "labels": labels[: data.target_length]}

    found = to_dataset(examples(), List(Value("int32")))
    for key, count in cut.items():
        if count:
            logger.warning(
                "%s: of %d rows, %d have a %s longer than data.%s = %d tokens, which loses its end.",
                rows.source,
                len(rows),
                count,
                "source" if key == "max_length" else "target",
                key,
                getattr(data, key),
            )
    return found


def with_texts(examples: Dataset, pairs: Pairs) -> Dataset:
    """Add the uncut texts, which an evaluation needs beside the tokens."""
    sources, targets = pairs
    return examples.add_column("source", sources).add_column("target", targets)  # type: ignore[call-arg]


def read_sources(examples: Dataset, count: int | None) -> list[tuple[int, Prompt]]:
    """Take the sources to answer out of evaluation examples.

    Args:
        examples: Examples with their texts.
        count: Sources to take, the first ones; None for all.

    Returns:
        For each distinct source: the index of its first example, and the source as a prompt with all its targets as
        references.
    """
    first: dict[str, int] = {}
    references: dict[str, list[str]] = {}
    for index, (source, target) in enumerate(zip(examples["source"], examples["target"], strict=True)):
        first.setdefault(source, index)
        references.setdefault(source, []).append(target)
    return [
        (index, Prompt(tuple(examples[index]["input_ids"]), source, tuple(references[source])))
        for source, index in islice(first.items(), count)
    ]


def predictions(prediction: Evaluated) -> list[dict[str, Any]]:
    """For every example: its texts, and the loss and hits of the target's tokens; see `token_predictions`."""
    examples = prediction.examples
    rows = zip(examples["source"], examples["target"], token_predictions(prediction), strict=True)
    return [{"source": source, "target": target, **figures} for source, target, figures in rows]
