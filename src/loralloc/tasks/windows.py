"""Split texts that are too long for a model into windows that share some tokens."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from loralloc.errors import UserError
from loralloc.tasks.base import CHUNK, check_room


class Window(NamedTuple):
    """The part of a row that a model sees at once.

    Attributes:
        row: The index of the row.
        inputs: What goes into the model.
        encoding: Where its tokens stand: `word_ids`, `sequence_ids` and `offsets`.
    """

    row: int
    inputs: dict[str, list[int]]
    encoding: Encoding


def check_fast(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse a tokenizer that cannot tell where its tokens stand.

    Args:
        tokenizer: The tokenizer.
        name: Name of its model.

    Raises:
        UserError: It is a slow one, written in Python.
    """
    if not tokenizer.is_fast:
        raise UserError(
            f'The tokenizer of model "{name}" ({type(tokenizer).__name__}) does not tell where in the text its tokens '
            "stand, which this task needs. Take a model with a fast tokenizer: one that has a tokenizer.json."
        )


def windows(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Any],
    pairs: Sequence[str] | None = None,
    *,
    keys: Collection[str],
    max_length: int,
    stride: int | None,
    **options: Any,
) -> Iterator[Window]:
    """Tokenize rows into windows; of a pair, only the second text is split.

    Args:
        tokenizer: A fast tokenizer.
        texts: For each row, a text or a list of words.
        pairs: A second text a row; None for none.
        keys: What the model's forward takes.
        max_length: Tokens of a window, at most.
        stride: Tokens that two successive windows share; None cuts a longer text to one window.
        options: More options of the tokenizer.

    Yields:
        The windows, row after row and in the order of the text; at least one a row.

    Raises:
        UserError: Windows would share all their tokens, or special tokens fill them.
    """
    room = max_length - tokenizer.num_special_tokens_to_add(pair=pairs is not None)
    if stride is not None and stride >= room:
        raise UserError(
            f"data.stride is {stride}, and windows share fewer tokens than they have: of data.max_length, which is "
            f"{max_length}, special tokens leave {max(0, room)}"
        )
    check_room(tokenizer, max_length, 1 if pairs is None else 2)
    for start in range(0, len(texts), CHUNK):
        encoded = tokenizer(
            texts[start : start + CHUNK],  # type: ignore[arg-type]
            None if pairs is None else pairs[start : start + CHUNK],  # type: ignore[arg-type]
            truncation=True if pairs is None else "only_second",
            max_length=max_length,
            stride=stride or 0,
            return_overflowing_tokens=stride is not None,
            **options,
        )
        kept = [key for key in encoded if key in keys]
        encodings = encoded.encodings or []
        rows = range(len(encodings)) if stride is None else encoded["overflow_to_sample_mapping"]
        for i, (row, encoding) in enumerate(zip(rows, encodings, strict=True)):
            yield Window(start + row, {key: encoded[key][i] for key in kept}, encoding)


def by_row(rows: Iterable[int]) -> list[list[int]]:
    """Return the indices of every row's windows, given the row of each window.

    >>> by_row([0, 1, 1])
    [[0], [1, 2]]
    """
    found: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        found.setdefault(row, []).append(place)
    return list(found.values())
