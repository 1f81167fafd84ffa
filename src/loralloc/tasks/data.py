"""Reading data: local files, data sets of the Hub and the demo's, all as `Rows`.

| source | rows |
|---|---|
| `.jsonl`, `.json` | one JSON object a line; a `.json` file may also be one list of objects |
| `.csv`, `.tsv` | a header, then one record each; values are texts |
| `.parquet` | the rows of the table |
| `.txt` | documents parted by blank lines, in the column `text` |
| `hub:NAME[/CONFIG][@SPLIT]` | a data set of the Hugging Face Hub |
| `demo:docstrings[@SPLIT]` | docstrings of Python's standard library: `train`, `validation` or `test` |

Every file may be packed with gzip (`.jsonl.gz`). Text is UTF-8. SPLIT is `train` unless given. The NAME of a
Hub data set may be OWNER/NAME, so a CONFIG is read only from three parts: `hub:nyu-mll/glue/qnli@train`.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import tempfile
import zlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

from datasets import Dataset, load_dataset
from huggingface_hub import is_offline_mode

from loralloc.errors import UserError, closest
from loralloc.tasks.hub import is_reachable, out_of_reach
from loralloc.tasks.rows import Rows, quote, shorten, split


class Sources(Protocol):
    """The part of a recipe's data section that names the data."""

    @property
    def train(self) -> str:
        """Source of the training rows."""
        ...

    @property
    def validation(self) -> float | str:
        """Share to cut off from the training rows, or a source."""
        ...

    @property
    def test(self) -> str | None:
        """Source of the test rows."""
        ...


@dataclass(frozen=True)
class Splits:
    """The rows of a run."""

    train: Rows
    validation: Rows
    test: Rows | None

    def all(self) -> Iterator[Rows]:
        """Go through the splits there are."""
        yield self.train
        yield self.validation
        if self.test is not None:
            yield self.test


def load_splits(sources: Sources, seed: int, groups: Callable[[Rows], Sequence[Hashable]] | None = None) -> Splits:
    """Read the rows of a run, cutting the validation rows off where the recipe gives a share.

    Args:
        sources: The recipe's data section.
        seed: Seed of the cut.
        groups: Gives the group of every row, for a stratified cut.

    Returns:
        Training, validation and test rows.

    Raises:
        UserError: A source cannot be read, is empty, or is too small to cut.
    """
    train = read_rows(sources.train)
    if isinstance(sources.validation, str):
        validation = read_rows(sources.validation)
    else:
        train, validation = split(train, sources.validation, seed, groups(train) if groups else None)
    return Splits(train, validation, read_rows(sources.test) if sources.test else None)


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
        rows = _read_file(source)
    if not len(rows):
        raise UserError(f"{source} is empty: it has no rows.")
    return rows


def _read_file(source: str) -> Rows:
    path = Path(source).expanduser()
    if path.is_dir():
        raise UserError(f"{source} is a folder; name a file in it.")
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    if suffix not in READERS:
        raise UserError(
            f'{source}: cannot tell the format from the extension "{suffix}". '
            f"Known: {', '.join(READERS)}, each also with .gz."
        )
    if not path.is_file():
        siblings = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"{source}: no such file.{closest(path.name, siblings)}")
    return READERS[suffix](source, path)


def _unpack(source: str, path: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{source} is not a complete gzip file ({error}).") from error
    except OSError as error:
        raise UserError(f"{source} cannot be read ({error.strerror}).") from error


def _read_text(source: str, path: Path) -> str:
    content = _unpack(source, path)
    try:
        return content.decode("utf-8-sig")  # a byte-order mark, as Excel writes it, is not data
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{source}:{line}: not UTF-8 text (byte 0x{content[error.start]:02x}). Save the file as UTF-8."
        ) from error


def _columns(records: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(key for record in records for key in record))


def _read_json(source: str, path: Path) -> Rows:
    text = _read_text(source, path)
    return _read_json_list(source, text) if text.lstrip().startswith("[") else _json_lines(source, text)


def _read_json_list(source: str, text: str) -> Rows:
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        line = text.splitlines()[error.lineno - 1] if error.lineno <= len(text.splitlines()) else ""
        raise UserError(f"{source}:{error.lineno}: not valid JSON ({error.msg}): {shorten(line)}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: not valid JSON ({error})") from error
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
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            json.dumps(record, ensure_ascii=False).encode()  # JSON may escape half a character: no tokenizer takes it
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", None) or getattr(error, "reason", None) or str(error)
            raise UserError(f"{source}:{number}: not valid JSON ({reason}): {shorten(line)}") from error
        if not isinstance(record, dict):
            raise UserError(f"{source}:{number}: a row must be a JSON object, found {quote(record)}")
        records.append(record)
        numbers.append(number)
    return Rows(source, _columns(records), records, numbers)


def _read_csv(source: str, path: Path) -> Rows:
    return _read_table(source, path, ",")


def _read_tsv(source: str, path: Path) -> Rows:
    return _read_table(source, path, "\t")


def _read_table(source: str, path: Path, delimiter: str) -> Rows:
    text = _read_text(source, path)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    records, numbers = [], []
    start = 1
    with _any_field_size():
        try:
            for fields in reader:
                if not header:
                    header = _check_header(source, fields)
                elif fields:  # the reader gives an empty list for a blank line
                    if len(fields) != len(header):
                        raise UserError(
                            f"{source}:{start}: {len(fields)} values, "
                            f"but the header names {len(header)} columns: {quote(fields)}"
                        )
                    # An empty field is how these formats write a missing value.
                    records.append({k: v or None for k, v in zip(header, fields, strict=True)})
                    numbers.append(start)
                start = reader.line_num + 1
        except csv.Error as error:
            line = text.split("\n")[start - 1]
            raise UserError(
                f'{source}:{start}: malformed row ({error}). Quotes within a quoted value are doubled (""): '
                f"{shorten(line.rstrip())}"
            ) from error
    return Rows(source, tuple(header), records, numbers)


def _check_header(source: str, header: list[str]) -> list[str]:
    for name in header:
        if not name.strip() or header.count(name) > 1:
            raise UserError(f'{source}:1: the header has a blank or repeated column "{name}": {quote(header)}')
    return header


@contextmanager
def _any_field_size() -> Iterator[None]:
    """Lift the limit of 128 KiB a field, which is shorter than many a document."""
    previous = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # a C long, 32 bits wide on Windows
    try:
        yield
    finally:
        csv.field_size_limit(previous)


def _read_parquet(source: str, path: Path) -> Rows:
    with tempfile.TemporaryDirectory(prefix="loralloc-") as folder:
        if path.suffix == ".gz":
            unpacked = Path(folder) / "data.parquet"
            unpacked.write_bytes(_unpack(source, path))
            path = unpacked
        try:
            table = Dataset.from_parquet(str(path), cache_dir=folder, keep_in_memory=True)
        except ValueError as error:
            raise UserError(f"{source} is not a readable Parquet file ({shorten(str(error))}).") from error
    return _from_dataset(source, table)


def _from_dataset(source: str, table: Any) -> Rows:
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


def _read_demo(source: str) -> Rows:
    from loralloc.tasks import docstrings

    name, _, part = source.removeprefix("demo:").partition("@")
    if name != "docstrings":
        raise UserError(f'No demo data "{name}"; there is demo:docstrings.')
    splits = docstrings.build()
    part = part or "train"
    if part not in splits:
        raise UserError(f'{source}: no split "{part}". Splits: {", ".join(splits)}.{closest(part, splits)}')
    records = splits[part]
    return Rows(source, ("text", "label", "module"), records, range(1, len(records) + 1), unit="row")


def _read_hub(source: str) -> Rows:
    name, _, part = source.removeprefix("hub:").partition("@")
    words = name.split("/")
    if not 1 <= len(words) <= 3 or not all(words):
        raise UserError(f"{source}: write hub:NAME[/CONFIG][@SPLIT], as in hub:nyu-mll/glue/qnli@train.")
    repository, config = "/".join(words[:2]), (words[2] if len(words) == 3 else None)
    if not is_offline_mode() and not is_reachable(repository, "dataset"):
        # Without the variable, `datasets` would try for long before it looks into its cache.
        raise UserError(f"{source}: {out_of_reach()} HF_HUB_OFFLINE=1 uses what was downloaded before.")
    try:
        return _from_dataset(source, load_dataset(repository, config, split=part or "train"))
    except (OSError, ValueError, RuntimeError) as error:
        reason = shorten(str(error).strip().split("\n")[0], 300)
        cure = f" {out_of_reach()}" if is_offline_mode() else ""
        raise UserError(f"{source} cannot be loaded: {reason}.{cure}") from error


READERS: dict[str, Callable[[str, Path], Rows]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}
