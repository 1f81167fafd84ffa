"""Read files in every format of `locations.READABLE`; damaged files are refused with file, place and reason.

A fault in a column that the recipe does not use is no reason to refuse a file: it is stored, and reported when the
column is read. The form of every row is checked, whatever its columns.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import IO, Any

import pyarrow
from datasets import Dataset, Features
from pyarrow import parquet

from loralloc.errors import UserError
from loralloc.tasks.locations import data_file, extension
from loralloc.tasks.rows import Rows, quote, shorten

_SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}
_TABLES = {",": ".csv", "\t": ".tsv"}


def read_file(source: str) -> Rows:
    """Read all rows of a file.

    Args:
        source: Its path.

    Returns:
        The rows; none for an empty file.

    Raises:
        UserError: There is no such file, it cannot be read, or it is malformed.
    """
    path = data_file(source)
    return _READERS[extension(path)](source, path)


@contextmanager
def _unpacking(source: str) -> Iterator[None]:
    """Refuse a file that cannot be read or unpacked with its name and the reason."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{source} is not a complete gzip file ({error}).") from error
    except OSError as error:
        raise UserError(f"{source} cannot be read ({error.strerror}).") from error


def _unpack(source: str, path: Path) -> bytes:
    with _unpacking(source):
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content


def _read_text(source: str, path: Path) -> str:
    content = _unpack(source, path)
    try:
        return content.decode("utf-8-sig")  # a byte-order mark, as Excel writes it, is not data
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{source}:{line}: {_not_text(error)}") from error


def _not_text(error: UnicodeDecodeError) -> str:
    return f"not UTF-8 text (byte 0x{error.object[error.start]:02x}). Save the file as UTF-8."


def _columns(records: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(key for record in records for key in record))


def _read_json(source: str, path: Path) -> Rows:
    text = _read_text(source, path)
    if text.lstrip().startswith("["):
        return _json_list(source, text)
    _refuse_one_object(source, text)
    return _json_lines(source, text)


def _refuse_one_object(source: str, text: str) -> None:
    """Refuse a single object that is no line of JSON lines: one of columns, as pandas writes it, or one on many lines.

    Raises:
        UserError: With the two forms that are read.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return  # more than one object, or a damaged one, which its line tells
    if not isinstance(found, dict):
        return
    columns = _is_of_columns(found)
    if columns or "\n" in text.strip():
        kind = f"of columns ({shorten(', '.join(found))})" if columns else "on several lines"
        cure = "write a list of objects, one for each row, or an object a line"
        raise UserError(f"{source} is one object {kind}; {cure}")


def _is_of_columns(found: Mapping[str, Any]) -> bool:
    """Whether all values are columns of two rows at least: lists of one length, or mappings from the rows' numbers.

    >>> _is_of_columns({"text": ["a", "b"], "label": [0, 1]}), _is_of_columns({"text": {"0": "a", "1": "b"}})
    (True, True)
    >>> _is_of_columns({"text": "a", "label": [0, 1]}), _is_of_columns({"messages": [{"role": "user"}, {}]})
    (False, False)
    """
    columns = [list(v.values()) if isinstance(v, dict) and all(map(str.isdigit, v)) else v for v in found.values()]
    if not all(isinstance(column, list) for column in columns) or len(set(map(len, columns))) != 1:
        return False
    return len(columns[0]) > 1 and not any(isinstance(entry, dict) for column in columns for entry in column)


def _parse_json(text: str) -> Any:
    """Parse JSON, and refuse what it allows but no column can hold.

    Raises:
        ValueError: It is not JSON, or an object names a key twice.
        RecursionError: It is nested too deeply.
    """
    value = json.loads(text, object_pairs_hook=_unique)
    json.dumps(value, ensure_ascii=False).encode()  # JSON may escape a lone surrogate, which no tokenizer takes
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{quote(twice)} occurs twice in one object")
    return found


def _reason(error: Exception) -> str:
    return getattr(error, "msg", None) or getattr(error, "reason", None) or str(error)


def _json_list(source: str, text: str) -> Rows:
    try:
        records = _parse_json(text)
    except json.JSONDecodeError as error:
        line = text.split("\n")[error.lineno - 1]
        raise UserError(f"{source}:{error.lineno}: not valid JSON ({error.msg}): {shorten(line)}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: not valid JSON ({_reason(error)})") from error
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise UserError(f"{source}, row {number}: a row must be a JSON object, found {quote(record)}")
    return Rows(source, _columns(records), records, range(1, len(records) + 1), unit="row")


def _read_jsonl(source: str, path: Path) -> Rows:
    return _json_lines(source, _read_text(source, path))


def _json_lines(source: str, text: str) -> Rows:
    records, numbers = [], []
    # Not splitlines(): JSON strings may hold characters that it takes for the end of a line, such as U+2028.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            records.append(_json_line(source, number, line))
            numbers.append(number)
    return Rows(source, _columns(records), records, numbers)


def _json_line(source: str, number: int, line: str) -> dict[str, Any]:
    try:
        record = _parse_json(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}:{number}: not valid JSON ({_reason(error)}): {shorten(line)}") from error
    if not isinstance(record, dict):
        raise UserError(f"{source}:{number}: a row must be a JSON object, found {quote(record)}")
    return record


@dataclass(frozen=True)
class Stream:
    """A file that is read a row at a time."""

    records: Iterable[Mapping[str, Any]]
    """One mapping from column to value per row."""
    columns: Sequence[str] = ()
    """The columns that a header names; none where there is no header."""
    unreadable: Mapping[str, str] = field(default_factory=dict)
    """See `Rows.unreadable`."""


@contextmanager
def _opened(source: str, path: Path) -> Iterator[IO[str]]:
    """Open a text file, packed with gzip or not.

    Raises:
        UserError: It cannot be read or unpacked, or is not UTF-8; also while it is read.
    """
    with _unpacking(source), _open(path) as file:
        try:
            yield file
        except UnicodeDecodeError as error:
            raise UserError(f"{source}: {_not_text(error)}") from error


def _open(path: Path) -> IO[str]:
    options: dict[str, Any] = {"encoding": "utf-8-sig", "newline": ""}
    return gzip.open(path, "rt", **options) if path.suffix == ".gz" else path.open(**options)


def stream_json_lines(source: str, path: Path) -> Stream:
    """Read the objects of a file of JSON lines one at a time, packed or not.

    Raises:
        UserError: While it is read: a line is no JSON object; with the line.
    """

    def records() -> Iterator[dict[str, Any]]:
        with _opened(source, path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _json_line(source, number, line.rstrip("\r\n"))

    return Stream(records())


def stream_table(source: str, path: Path) -> Stream:
    """Read the records of a table one at a time, packed or not; values are texts, None where there is none.

    Raises:
        UserError: As when the table is read at once; a fault of a record is found when it is read.
    """

    def lines() -> Iterator[str]:
        with _opened(source, path) as file:
            yield from file

    columns, unreadable, records = _table(source, path, lines())
    return Stream((record for _, record in records), columns, unreadable)


def _read_table(source: str, path: Path) -> Rows:
    lines = io.StringIO(_read_text(source, path), newline="")
    columns, unreadable, found = _table(source, path, lines)
    numbers, records = [], []
    for number, record in found:
        numbers.append(number)
        records.append(record)
    return Rows(source, columns, records, numbers, unreadable=unreadable)


def _table(
    source: str, path: Path, lines: Iterable[str]
) -> tuple[tuple[str, ...], dict[str, str], Iterator[tuple[int, dict[str, Any]]]]:
    """Read a table.

    Args:
        source: Its name, for messages.
        path: Its path, whose extension says what separates the columns.
        lines: Its lines.

    Returns:
        The columns, the unreadable ones (see `Rows.unreadable`), and an iterator over the records, each with the line
        where it begins.

    Raises:
        UserError: The columns are separated by another character; or, while records are read, one is malformed or has
            another number of values than the header has names.
    """
    delimiter = "\t" if extension(path) == ".tsv" else ","
    rows = _fields(source, lines, delimiter)
    _, header = next(rows, (0, []))
    _check_delimiter(source, header, delimiter)
    kept, unreadable = _by_name(header)

    def records() -> Iterator[tuple[int, dict[str, Any]]]:
        for number, fields in rows:
            if len(fields) != len(header):
                raise UserError(
                    f"{source}:{number}: {len(fields)} values, "
                    f"but the header names {len(header)} columns: {quote(fields)}"
                )
            # An empty field is how these formats write a missing value.
            yield number, {header[i]: fields[i] or None for i in kept}

    return tuple(header[i] for i in kept), unreadable, records()


def _fields(source: str, lines: Iterable[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the fields of every row that is not blank, each with the line where it begins."""
    begun: list[str] = []  # the first line of the row that is being read

    def noted() -> Iterator[str]:
        for line in lines:
            if not begun:
                begun.append(line.rstrip("\r\n"))
            yield line

    reader = csv.reader(noted(), delimiter=delimiter, strict=True)
    while True:
        begun.clear()
        start = reader.line_num + 1
        try:
            with _any_field_size():  # not for longer: whoever reads a stream may do other things between two rows
                fields = next(reader, None)
        except csv.Error as error:
            raise UserError(
                f'{source}:{start}: malformed row ({error}). Quotes within a quoted value are doubled (""): '
                f"{shorten(begun[0])}"
            ) from error
        if fields is None:
            return
        if fields:  # the reader gives an empty list for a blank line
            yield start, fields


def _by_name(header: Sequence[str]) -> tuple[list[int], dict[str, str]]:
    """Return the indices of the columns with a unique name, and for each name that is not unique the reason.

    A column without a name, such as the index that pandas writes, is left out: a recipe cannot name it.
    """
    counts = Counter(header)
    kept = [i for i, name in enumerate(header) if name.strip() and counts[name] == 1]
    return kept, {
        name: f"stands {count} times in the header: give each a unique name"
        for name, count in counts.items()
        if count > 1 and name.strip()
    }


def _check_delimiter(source: str, header: Sequence[str], delimiter: str) -> None:
    """Refuse a table that seems to have one column because its columns are separated by another character."""
    if len(header) != 1:
        return
    found = [other for other in _SEPARATORS if other != delimiter and other in header[0]]
    if not found:
        return
    other = max(found, key=header[0].count)
    cure = f"Save the file with {_SEPARATORS[delimiter]}"
    if other in _TABLES:
        renamed = re.sub(r"\.[ct]sv(?=(\.gz)?$)", _TABLES[other], source, flags=re.I)
        cure = f"Rename it to {renamed}"
    raise UserError(
        f"{source}:1: the columns are separated by {_SEPARATORS[other]}, but those of a {_TABLES[delimiter]} file by "
        f"{_SEPARATORS[delimiter]}. {cure}. The header is {quote(header[0])}"
    )


@contextmanager
def _any_field_size() -> Iterator[None]:
    """Lift the limit of 128 KiB a field, which is shorter than many a document."""
    previous = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # a C long, 32 bits wide on Windows
    try:
        yield
    finally:
        csv.field_size_limit(previous)


def _read_parquet(source: str, path: Path) -> Rows:
    try:
        with parquet.ParquetFile(pyarrow.BufferReader(_unpack(source, path)), page_checksum_verification=True) as file:
            table = file.read()
        table.validate(full=True)
    except (OSError, ValueError, NotImplementedError) as error:  # pyarrow's own errors are kinds of these
        reason = shorten(str(error).strip().split("\n")[0])
        raise UserError(
            f"{source} is not a readable Parquet file ({reason}). Is it complete? Copy or write it again."
        ) from error
    return _rows_of_arrow(source, table)


def _rows_of_arrow(source: str, table: pyarrow.Table) -> Rows:
    """Keep the columns that can be read; the others are an error only if a recipe names them."""
    kept, unreadable = _by_name(table.column_names)
    for index in list(kept):
        field = table.schema.field(index)
        try:
            Features.from_arrow_schema(pyarrow.schema([field]))
        except (ValueError, NotImplementedError):
            kept.remove(index)
            unreadable[field.name] = f"has the type {field.type}: write it as text, numbers or lists of them"
    return replace(rows_of_dataset(source, Dataset(table.select(kept))), unreadable=unreadable)


def rows_of_dataset(source: str, table: Dataset) -> Rows:
    """Wrap a data set whose rows count from 1."""
    return Rows(source, tuple(table.column_names), table, range(1, len(table) + 1), unit="row")


def _read_txt(source: str, path: Path) -> Rows:
    records, numbers = [], []
    lines = enumerate(_read_text(source, path).split("\n"), 1)
    for blank, group in groupby(lines, key=lambda line: not line[1].strip()):
        if not blank:
            document = list(group)
            records.append({"text": "\n".join(line.removesuffix("\r") for _, line in document)})
            numbers.append(document[0][0])
    return Rows(source, ("text",), records, numbers)


_READERS: dict[str, Callable[[str, Path], Rows]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_table,
    ".tsv": _read_table,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}
