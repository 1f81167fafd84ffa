"""Rows of data that remember where they came from, so that an error can point at one of them."""

from __future__ import annotations

import json
import random
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from datasets import ClassLabel, Dataset, concatenate_datasets, interleave_datasets

from loralloc.errors import UserError, closest

QUOTE_LENGTH = 120


def shorten(text: str, length: int = QUOTE_LENGTH) -> str:
    """Cut a text to be quoted in a message.

    >>> shorten("abcdefgh", 5)
    'ab...'
    """
    return text if len(text) <= length else text[: length - 3] + "..."


def quote(value: object) -> str:
    """Quote a row or a value in a message, on one line and short."""
    return shorten(json.dumps(value, ensure_ascii=False, default=str))


def records_of(value: object) -> list[Any] | None:
    """Read a list of records, which some data sets write as a record of lists; None for anything else.

    >>> records_of({"text": ["a", "b"], "start": [0, 4]})
    [{'text': 'a', 'start': 0}, {'text': 'b', 'start': 4}]
    """
    if isinstance(value, list):
        return value
    if not isinstance(value, Mapping) or not value or not all(isinstance(column, list) for column in value.values()):
        return None
    if len({len(column) for column in value.values()}) > 1:
        return None
    return [dict(zip(value, values, strict=True)) for values in zip(*value.values(), strict=True)]


@dataclass(frozen=True)
class Rows:
    """Rows of one source."""

    source: str
    """The file or Hub name, as the user wrote it."""
    columns: tuple[str, ...]
    """Names of the columns, in the order of the source."""
    records: list[dict[str, Any]] | Dataset
    """One mapping from column to value per row."""
    numbers: Sequence[int]
    """Where each row stands in the source, counted from 1."""
    unit: Literal["line", "row"] = "line"
    """What `numbers` counts: lines of a text file, or rows."""
    unreadable: Mapping[str, str] = field(default_factory=dict)
    """Columns that are there but cannot be read, each with the reason and the cure."""
    places: Sequence[str] | None = None
    """Where each row stands, if rows come from several sources; None if `source` and `numbers` say it."""
    classes: Sequence[Mapping[str, Sequence[str]]] | None = None
    """The classes that each row's source numbers, by column, if rows come from several; None if `records` say it."""

    def __len__(self) -> int:
        return len(self.records)

    def place(self, index: int) -> str:
        """Say where a row stands: `train.jsonl:17`, or `train.parquet, row 17`."""
        if self.places is not None:
            return self.places[index]
        number = self.numbers[index]
        return f"{self.source}:{number}" if self.unit == "line" else f"{self.source}, row {number}"

    def quoted(self, index: int) -> str:
        """Quote a row for a message."""
        return quote(dict(self.records[index]))

    def select(self, indices: Sequence[int]) -> Rows:
        """Take some of the rows, in the order given."""
        if isinstance(self.records, Dataset):
            records = self.records.select(indices)
        else:
            records = [self.records[i] for i in indices]
        places = None if self.places is None else [self.places[i] for i in indices]
        classes = None if self.classes is None else [self.classes[i] for i in indices]
        numbers = [self.numbers[i] for i in indices]
        return replace(self, records=records, numbers=numbers, places=places, classes=classes)

    def class_names(self, column: str) -> list[Sequence[str]]:
        """For each row, the names of the classes that its source numbers in a column, also in lists; or none."""
        if self.classes is not None:
            return [classes.get(column, ()) for classes in self.classes]
        return [_numbered_classes(self.records).get(column, ())] * len(self)

    def values(self, column: str, key: str) -> list[Any]:
        """Read a column in which every row must have a value.

        Args:
            column: Name of the column.
            key: The recipe key that named the column, for the message.

        Returns:
            One value per row.

        Raises:
            UserError: There is no such column, it cannot be read, or a row has no value in it.
        """
        values = self.column(column, key)
        for index, value in enumerate(values):
            if value is None:
                raise UserError(f'{self.place(index)}: no value in column "{column}" ({key}): {self.quoted(index)}')
        return values

    def column(self, column: str, key: str) -> list[Any]:
        """Read a column as it is: None where a row has no value.

        Args:
            column: Name of the column.
            key: The recipe key that named the column, for the message.

        Raises:
            UserError: There is no such column, or it cannot be read.
        """
        if column in self.unreadable:
            raise UserError(f'{self.source}: column "{column}" ({key}) {self.unreadable[column]}.')
        if column not in self.columns:
            columns = ", ".join(self.columns) or "none with a unique name"
            raise UserError(
                f'{self.source} has no column "{column}" ({key}). Its columns: {columns}.'
                f"{closest(column, self.columns)}"
            )
        if isinstance(self.records, Dataset):
            return list(self.records[column])
        return [row.get(column) for row in self.records]

    def strings(self, column: str, key: str, *, blank: bool = False) -> list[str]:
        """Read a column of texts.

        Args:
            column: Name of the column.
            key: The recipe key that named the column, for the message.
            blank: Whether a text may be empty.

        Returns:
            One text per row.

        Raises:
            UserError: No such column, a missing value, a value that is not a text, or a blank one.
        """
        values = self.values(column, key)
        for index, value in enumerate(values):
            if not isinstance(value, str):
                raise UserError(
                    f'{self.place(index)}: column "{column}" ({key}) must hold text, '
                    f"found {type(value).__name__} {quote(value)}"
                )
            if not blank and not value.strip():
                raise UserError(f'{self.place(index)}: empty text in column "{column}" ({key}): {self.quoted(index)}')
        return values


def split(
    rows: Rows, fraction: float, seed: int, stratify_by: Sequence[Hashable] | None = None, *, part: str = "validation"
) -> tuple[Rows, Rows]:
    """Cut a share of the rows off, at random but always the same for a seed.

    Args:
        rows: All rows.
        fraction: Share to cut off, between 0 and 1.
        seed: Seed of the choice.
        stratify_by: One group per row: every group gives its share (largest remainders), but never its last row.
        part: What the rows cut off are for, by its key in the recipe's section `data`.

    Returns:
        The rows that stay and the rows cut off, each in their original order.

    Raises:
        UserError: There are too few rows to leave at least one on either side.
    """
    chosen = cut(len(rows), fraction, seed, stratify_by)
    if not chosen:
        kinds = f" with {len(set(stratify_by))} different labels" if stratify_by is not None else ""
        raise UserError(
            f"{rows.source}: {len(rows)} rows{kinds} are too few to cut {fraction:g} of them off for {part}. "
            f"Give more rows, or name a file in data.{part}."
        )
    kept = sorted(set(range(len(rows))) - set(chosen))
    return rows.select(kept), rows.select(chosen)


def mix(parts: Sequence[Rows], weights: Sequence[float] | None, seed: int) -> Rows:
    """Join the rows of several sources.

    Args:
        parts: The sources; at least one.
        weights: The relative share of each: the source of every row is drawn at random, until one of them is used up;
            the rows of a source keep their order. None: all rows, one source after the other.
        seed: Seed of the draws.

    Returns:
        The rows, with the columns that any of them has. What a source calls the classes that it numbers is kept.
    """
    if len(parts) == 1:
        return parts[0]
    numbered = [Dataset.from_dict({"part": [n] * len(part), "row": range(len(part))}) for n, part in enumerate(parts)]
    if weights is None:
        order = concatenate_datasets(numbered)
    else:
        shares = [weight / sum(weights) for weight in weights]
        order = interleave_datasets(numbered, shares, seed=seed, stopping_strategy="first_exhausted")
    chosen = list(zip(order["part"], order["row"], strict=True))
    classes = [_numbered_classes(part.records) for part in parts]
    return Rows(
        source=" and ".join(part.source for part in parts),
        columns=tuple(dict.fromkeys(column for part in parts for column in part.columns)),
        records=[dict(parts[part].records[row]) for part, row in chosen],
        numbers=range(1, len(chosen) + 1),
        unreadable={name: reason for part in parts for name, reason in part.unreadable.items()},
        places=[parts[part].place(row) for part, row in chosen],
        classes=[classes[part] for part, _ in chosen],  # two sources may number the same classes in another order
    )


def _numbered_classes(records: list[dict[str, Any]] | Dataset) -> dict[str, Sequence[str]]:
    """The columns whose classes a data set numbers, also in lists, each with the names of its classes."""
    features = records.features if isinstance(records, Dataset) else {}
    kinds = {column: getattr(kind, "feature", kind) for column, kind in features.items()}
    return {column: kind.names for column, kind in kinds.items() if isinstance(kind, ClassLabel)}


def cut(count: int, fraction: float, seed: int, stratify_by: Sequence[Hashable] | None = None) -> list[int]:
    """Choose a share of some rows, at random but always the same for a seed.

    Args:
        count: How many rows there are.
        fraction: Share to choose, between 0 and 1.
        seed: Seed of the choice.
        stratify_by: One group per row: every group gives its share (largest remainders), but never its last row.

    Returns:
        The indices of the chosen rows, in ascending order; empty if there are too few rows.

    >>> len(cut(10, 0.3, 0)), cut(2, 0.5, 0, ["a", "b"])
    (3, [])
    """
    groups: dict[Hashable, list[int]] = {}
    for index, group in enumerate(stratify_by or [None] * count):
        groups.setdefault(group, []).append(index)
    generator = random.Random(seed)
    chosen: list[int] = []
    for members, share in zip(groups.values(), _shares(groups, fraction, count), strict=True):
        chosen += generator.sample(members, share)
    return sorted(chosen)


def _shares(groups: Mapping[Hashable, Sequence[int]], fraction: float, count: int) -> list[int]:
    """Divide the rows to cut off among the groups by largest remainders; a group keeps at least one row."""
    wanted = max(1, round(fraction * count))
    sizes = [len(members) for members in groups.values()]
    shares = [min(int(fraction * size), size - 1) for size in sizes]
    # First come the groups whose exact share was rounded down most; ties go to the group seen first.
    order = sorted(range(len(sizes)), key=lambda g: shares[g] - fraction * sizes[g])
    for group in order:
        if sum(shares) < wanted and shares[group] < sizes[group] - 1:
            shares[group] += 1
    return shares
