"""Reading data: local files, data sets of the Hub and the demo's, all as `Rows`.

| source | rows |
|---|---|
| `.jsonl`, `.json` | one JSON object a line; a `.json` file may also be one list of objects |
| `.csv`, `.tsv` | a header, then one record each; values are texts |
| `.parquet` | the rows of the table |
| `.txt` | documents separated by blank lines, in the column `text` |
| `hub:NAME[/CONFIG][@SPLIT]` | a data set of the Hugging Face Hub |
| `demo:docstrings[@SPLIT]` | docstrings of Python's standard library: `train`, `validation` or `test` |

Training data may come from several sources, one after the other or mixed by weights; and they may be streamed: read
while the model trains, for data larger than the memory.

Every file may be packed with gzip (`.jsonl.gz`). Text is UTF-8. SPLIT is `train` unless given. The NAME of a
Hub data set may be OWNER/NAME, so a CONFIG is read only from three parts: `hub:nyu-mll/glue/qnli@train`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from datasets import load_dataset
from datasets.exceptions import DatasetsError
from huggingface_hub import is_offline_mode

from loralloc.errors import UserError
from loralloc.tasks.formats import Stream, read_file, rows_of_dataset, stream_json_lines, stream_table
from loralloc.tasks.hub import is_reachable, out_of_reach
from loralloc.tasks.locations import data_file, demo_split, extension, hub_data, train_sources
from loralloc.tasks.rows import Rows, mix, shorten, split
from loralloc.tasks.spec import DataSection

PIECE = 1000
"""Streamed rows that are read at a time."""
TEST_SEED = 0
"""Seed of the share to test on, in all runs."""
STREAMED: Mapping[str, Callable[[str, Path], Stream]] = {
    ".jsonl": stream_json_lines,
    ".csv": stream_table,
    ".tsv": stream_table,
}
"""Readers of text that can be streamed. Not those of `datasets`: they take 2020-01-01 for a date, NA for missing."""


@dataclass(frozen=True)
class Splits:
    """The rows of a run."""

    train: Rows | None
    """None if they are streamed."""
    validation: Rows
    test: Rows | None

    def all(self) -> Iterator[Rows]:
        """Yield the splits that exist: training, validation, test."""
        if self.train is not None:
            yield self.train
        yield self.validation
        if self.test is not None:
            yield self.test


def load_splits(data: DataSection, seed: int, groups: Callable[[Rows], Sequence[Hashable]] | None = None) -> Splits:
    """Read the rows of a run; shares to test and to validate on are cut off the training rows.

    Args:
        data: The recipe's data section.
        seed: Seed of the validation share. The rows to test on do not depend on it: runs are compared on them.
        groups: Gives the group of every row, for stratified cuts.

    Returns:
        Training, validation and test rows.

    Raises:
        UserError: A source cannot be read, is empty, or is too small to cut.
    """
    test = read_rows(data.test) if isinstance(data.test, str) else None
    if getattr(data, "streaming", False):
        return Splits(None, read_rows(str(data.validation)), test)
    train = _read_train(data, seed)
    if isinstance(data.test, float):
        train, test = split(train, data.test, TEST_SEED, groups(train) if groups else None, part="test")
    if isinstance(data.validation, str):
        return Splits(train, read_rows(data.validation), test)
    kept, validation = split(train, data.validation, seed, groups(train) if groups else None)
    return Splits(kept, validation, test)


def _read_train(data: DataSection, seed: int) -> Rows:
    weights = None if isinstance(data.train, str) else [getattr(one, "weight", None) for one in data.train]
    weighted = [weight for weight in weights or () if weight is not None]
    return mix([read_rows(source) for source in train_sources(data)], weighted or None, seed)


def first_pieces(data: DataSection) -> list[Rows]:
    """Read the beginning of every source of training rows, `PIECE` rows at most.

    Args:
        data: The recipe's data section.

    Returns:
        One piece a source, with the columns of all.

    Raises:
        UserError: A source cannot be found or read, or has no rows.
    """
    pieces = []
    for source in train_sources(data):
        piece = next(_pieces(source), None)
        if piece is None:
            raise UserError(f"{source} is empty: it has no rows.")
        pieces.append(piece)
    columns = tuple(dict.fromkeys(column for piece in pieces for column in piece.columns))
    return [replace(piece, columns=columns) for piece in pieces]


def stream_rows(data: DataSection, columns: Iterable[str] = ()) -> Iterator[Rows]:
    """Read training rows a piece at a time.

    Args:
        data: The recipe's data section.
        columns: Columns that are known before; see `first_pieces`.

    Yields:
        Rows of one source, `PIECE` at most; one source after the other. Their columns are all that have occurred: rows
        of a piece may all lack an optional one.

    Raises:
        UserError: A source cannot be found or read.
    """
    known = dict.fromkeys(columns)
    for source in train_sources(data):
        for piece in _pieces(source):
            known |= dict.fromkeys(piece.columns)
            yield replace(piece, columns=tuple(known))


def _pieces(source: str) -> Iterator[Rows]:
    stream = _open_stream(source)
    rows = iter(stream.records)
    first = 1
    while records := list(_explained(source, islice(rows, PIECE))):
        columns = tuple(dict.fromkeys(chain(stream.columns, *records)))
        numbers = range(first, first + len(records))
        yield Rows(source, columns, records, numbers, unit="row", unreadable=stream.unreadable)
        first += len(records)


def _open_stream(source: str) -> Stream:
    if source.startswith("demo:"):
        raise UserError(f"{source} cannot be streamed; take data.streaming out, its rows are few")
    if source.startswith("hub:"):
        repository, config, part = hub_data(source)
        with _loading(source, config):
            return Stream(load_dataset(repository, config, split=part, streaming=True))
    path = data_file(source)
    with _loading(source, None):
        if path.suffix.lower() == ".parquet":
            return Stream(load_dataset("parquet", data_files=str(path), split="train", streaming=True))
        if (kind := extension(path)) in STREAMED:
            return STREAMED[kind](source, path)
    raise UserError(
        f"{source}: files of this format cannot be streamed; {', '.join(STREAMED)} can, each also with .gz, and "
        ".parquet, unpacked"
    )


def _explained(source: str, rows: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """Yield rows; an error of `datasets` about a damaged row becomes one sentence."""
    with _loading(source, None):
        yield from rows


def read_rows(source: str) -> Rows:
    """Read all rows of a source.

    Args:
        source: A file, `hub:NAME[/CONFIG][@SPLIT]` or `demo:docstrings[@SPLIT]`.

    Returns:
        The rows; at least one.

    Raises:
        UserError: The source cannot be found or read, is malformed, or has no rows.
    """
    if source.startswith("hub:"):
        rows = _read_hub(source)
    elif source.startswith("demo:"):
        rows = _read_demo(source)
    else:
        rows = read_file(source)
    if not len(rows):
        raise UserError(f"{source} is empty: it has no rows.")
    return rows


def _read_demo(source: str) -> Rows:
    from loralloc.tasks import docstrings

    part = demo_split(source)  # a wrong name is refused before seconds of parsing
    records = docstrings.build()[part]
    return Rows(source, ("text", "label", "module"), records, range(1, len(records) + 1), unit="row")


def _read_hub(source: str) -> Rows:
    repository, config, part = hub_data(source)
    if not is_offline_mode() and not is_reachable(repository, "dataset"):
        # Without HF_HUB_OFFLINE, `datasets` would retry for long before it looks into its cache.
        raise UserError(f"{source}: {out_of_reach()} HF_HUB_OFFLINE=1 uses what was downloaded before.")
    with _loading(source, config):
        return rows_of_dataset(source, load_dataset(repository, config, split=part))


@contextmanager
def _loading(source: str, config: str | None) -> Iterator[None]:
    try:
        yield
    except StopIteration as error:  # how `datasets` says that a table is empty
        raise UserError(f"{source} is empty: it has no rows.") from error
    except UserError:
        raise
    except (OSError, EOFError, ValueError, RuntimeError, zlib.error, DatasetsError) as error:
        raise UserError(f"{source} cannot be loaded: {_why(error)}.{_cure(source, config, error)}") from error


def _why(error: Exception) -> str:
    """The error message of `datasets` on one line; if preparing the rows failed, the cause has the reason."""
    told = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ is not None else error
    return shorten(" ".join(str(told).split()), 300).rstrip(".")


def _cure(source: str, config: str | None, error: Exception) -> str:
    if config is None and "config name is missing" in str(error).lower():
        name, at, part = source.partition("@")
        return f" Add one of them to the name: {name}/CONFIG{at}{part}"
    return f" {out_of_reach()}" if is_offline_mode() else ""
