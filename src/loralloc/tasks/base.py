"""What a task reads from a recipe, and what it hands to a Trainer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from datasets import Dataset, Features, IterableDataset, List, Value, concatenate_datasets
from numpy.typing import NDArray
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase

from loralloc.errors import UserError
from loralloc.tasks.spec import GREATER_IS_BETTER

logger = logging.getLogger(__name__)

CHUNK = 1000
"""Examples turned into Arrow at a time, so that only so many exist as Python lists."""


class ModelSection(Protocol):
    """The part of a recipe that names the model."""

    @property
    def name(self) -> str:
        """A folder, a name on the Hub, or `demo:minilm`."""
        ...

    @property
    def dtype(self) -> str:
        """`float32`, `bfloat16`, `float16`, or `auto` for the dtype of the checkpoint."""
        ...

    @property
    def load_in(self) -> str | None:
        """`4bit` or `8bit` to quantise the model; None to leave it as it is."""
        ...

    @property
    def trust_remote_code(self) -> bool:
        """Whether code that comes with the model may run."""
        ...

    @property
    def load(self) -> Mapping[str, Any]:
        """More arguments of `from_pretrained`."""
        ...


Logits = torch.Tensor | tuple[torch.Tensor, ...]


class Evaluated(EvalPrediction):
    """What an evaluation has found: predictions and targets of every example, in order, and the examples.

    Args:
        predictions: What the trainer's prediction step gives, one row an example.
        label_ids: Targets, one row an example.
        examples: The examples, also with the columns that do not go into the model.
    """

    def __init__(self, predictions: Any, label_ids: Any, examples: Any) -> None:
        super().__init__(predictions, label_ids)
        self.examples = examples


@dataclass(frozen=True)
class TaskData:
    """Model, data and metrics of a run, as a Trainer takes them."""

    model: PreTrainedModel
    """The pretrained model, with a head for the task and without an adapter."""
    tokenizer: PreTrainedTokenizerBase
    """Its tokenizer, with a padding token."""
    train: Dataset | IterableDataset
    """Training examples as the trainer takes them; without a length where they are streamed."""
    validation: Dataset
    """Validation examples. Like those to test on, they may have more columns than training examples, for metrics."""
    test: Dataset | None
    """Test examples, if the recipe names any."""
    metric: str
    """The metric to report first; one of those that an evaluation gives."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the trainer's constructor, such as the collator, and metrics as a function of `Evaluated`."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Training arguments that this task sets, beyond those of every task."""
    example_losses: Callable[[Evaluated], NDArray[np.floating]] | None = None
    """Returns the loss of every example of an evaluation, to compare two runs by; None if the task has none."""
    predictions: Callable[[Evaluated], list[dict[str, Any]]] | None = None
    """Returns a readable prediction for every example of an evaluation; None if the task has none."""
    learned_validation: Dataset | None = None
    """Validation examples in the form of training examples, for methods that learn from them; None: `validation`."""
    also: Mapping[str, Dataset] = field(default_factory=dict)
    """More examples to evaluate on at the end, by name."""
    targets_apart: bool = False
    """Whether labels are a separate sequence that a decoder writes, instead of one label for each input id."""
    packed: Callable[[Dataset], int] = len
    """How many rows the trainer makes of some examples."""
    reference: Mapping[str, float] = field(default_factory=dict)
    """Values of `metric` that need no training, by name: on the test data or, without them, the validation data."""
    classes: Mapping[str, int] = field(default_factory=dict)
    """Training examples of every class, in the order of the model's outputs; empty where there are no classes."""
    again: Callable[[], PreTrainedModel] | None = None
    """Loads the pretrained model once more; None if it was not loaded here."""

    @property
    def held_out(self) -> Dataset:
        """The examples that a run is judged by: the test data or, without them, the validation data."""
        return self.validation if self.test is None else self.test

    @property
    def greater_is_better(self) -> bool:
        """Whether a greater value of `metric` is a better one."""
        return GREATER_IS_BETTER[self.metric]


def evaluation_of(examples: Dataset, **settings: Any) -> TaskData:
    """Make the data of an evaluation alone: examples to test on, none to train on."""
    none = examples.select(())
    return TaskData(train=none, validation=none, test=examples, **settings)


def length_of(examples: Dataset | IterableDataset) -> int | None:
    """How many examples there are; None for a stream."""
    return len(examples) if isinstance(examples, Dataset) else None


def first_output(logits: Logits, labels: torch.Tensor) -> torch.Tensor:
    """Keep the logits and drop what some models return beside them (`preprocess_logits_for_metrics`).

    Args:
        logits: Outputs of a batch.
        labels: Not needed.

    Returns:
        The logits.
    """
    del labels
    return logits[0] if isinstance(logits, tuple) else logits


def to_dataset(examples: Iterable[Mapping[str, Any]], label: List | Value | None, **columns: List | Value) -> Dataset:
    """Collect tokenized examples.

    Args:
        examples: Mappings with `labels`, `input_ids` and what else the tokenizer gave; at least one, all with
            the same keys.
        label: Type of `labels`; None where there are none.
        columns: Types of further columns that are neither ids nor masks.

    Returns:
        The examples in memory, in the smallest fitting integer types.
    """
    types: dict[str, Any] = {"input_ids": List(Value("int32")), "labels": label, **columns}
    iterator = iter(examples)
    chunks = []
    while chunk := list(islice(iterator, CHUNK)):
        table = {key: [example[key] for example in chunk] for key in chunk[0]}
        # What is neither ids nor labels is a mask or a segment number.
        features = Features({key: types.get(key, List(Value("int8"))) for key in table})
        chunks.append(Dataset.from_dict(table, features=features))
    return concatenate_datasets(chunks)


def check_room(tokenizer: PreTrainedTokenizerBase, max_length: int, texts: int) -> None:
    """Refuse a length that special tokens fill: every example would be the same, whatever its text.

    Args:
        tokenizer: The model's tokenizer.
        max_length: Longest example, in tokens.
        texts: Texts of an example, 1 or 2.

    Raises:
        UserError: Not every text would keep a token.
    """
    least = tokenizer.num_special_tokens_to_add(pair=texts == 2) + texts
    if max_length < least:
        raise UserError(
            f"data.max_length is {max_length}, and special tokens take {least - texts} of an example: a text would "
            f"have no token left; raise it to {least} at least"
        )


def tokenize_cut(
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    pairs: list[str] | None,
    max_length: int,
    truncation: bool | str,
) -> tuple[Mapping[str, list[Any]], list[bool]]:
    """Tokenize texts, or pairs of texts, and cut those that are too long.

    Args:
        tokenizer: The model's tokenizer.
        texts: The texts.
        pairs: A second text for each; None if there are none.
        max_length: Longest example, in tokens.
        truncation: What to cut, as the tokenizer takes it.

    Returns:
        What the tokenizer gives, and for each text whether it was too long.

    Raises:
        UserError: A cut would leave a text without tokens.
    """
    # Not verbose: texts longer than the model are expected here, and cut.
    found = tokenizer(texts, pairs, verbose=False)
    longer = [len(ids) > max_length for ids in found["input_ids"]]
    if at := [i for i, too_long in enumerate(longer) if too_long]:
        check_room(tokenizer, max_length, 1 if pairs is None else 2)
        others = None if pairs is None else [pairs[i] for i in at]
        again = tokenizer([texts[i] for i in at], others, truncation=truncation, max_length=max_length)
        for key, rows in again.items():
            for i, row in zip(at, rows, strict=True):
                found[key][i] = row
    return found, longer


def warn_of_cuts(source: str, count: int, max_length: int, cut: int, dropped: int = 0) -> None:
    """Warn of rows that lose something, if there are any.

    Args:
        source: Where they come from.
        count: How many rows there are.
        max_length: Longest example, in tokens.
        cut: Rows that are longer.
        dropped: Rows that are left out because nothing to learn is left.
    """
    if cut or dropped:
        logger.warning(
            "%s: of %d rows, %d are longer than data.max_length = %d tokens and lose their end%s.",
            source,
            count,
            cut,
            max_length,
            f"; {dropped} are dropped because nothing to learn is left" if dropped else "",
        )
