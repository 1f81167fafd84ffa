"""Files of a run: written whole or not at all, and JSON that every reader takes."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import re
import shlex
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from loralloc import reading
from loralloc.errors import UserError

LAST_STEP = 2**53
"""Largest step number: floats, as in a figure, do not represent every whole number above it."""


def finite(value: Any) -> Any:
    """JSON has no NaN: numbers that are not finite become None, also inside mappings and lists."""
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def leaves(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested mappings, by their keys with dots.

    >>> list(leaves({"a": 1, "b": {"c": 2}}))
    [('a', 1), ('b.c', 2)]
    """
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def in_shell(name: object) -> str:
    """Write a path or another name as one word of a command that is to be copied into a shell.

    >>> in_shell("runs/x"), in_shell("my runs/x"), in_shell("-x")
    ('runs/x', "'my runs/x'", './-x')
    """
    word = str(name)
    return shlex.quote(f"./{word}" if word.startswith("-") else word)


def write_atomically(path: Path, text: str) -> None:
    """Write text so that a reader, or a crash, sees the old file or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.unlink(missing_ok=True)
        with temporary.open("x", encoding="utf-8") as file:  # never through a link that somebody has put there
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            error.filename = str(path)  # the name that the user knows
        raise


def check_writable(folder: Path, key: str, cure: str) -> None:
    """Refuse a folder that cannot be made, or written into.

    Args:
        folder: The folder; it need not be there.
        key: What has named it, for the message.
        cure: What to do instead.

    Raises:
        UserError: It would lie in a file or behind a link that leads nowhere, or its owner, or the file system, lets
            nobody write there.
    """
    above = next(path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
    if not above.exists():
        raise UserError(f"{key}: {above} is a link that leads nowhere; {cure}")
    if not above.is_dir():
        found = f"{above} is a file" if above == folder else f"{folder} would lie in {above}, which is a file"
        raise UserError(f"{key}: {found}; {cure}")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{key}: you may not write into {above}; {cure}")
    if above != folder and above != folder.absolute():
        try:  # some file systems, such as /proc, let root write and have no place for a folder
            os.rmdir(tempfile.mkdtemp(dir=above))
        except OSError as error:
            raise UserError(f"{key}: {folder} cannot be made in {above} ({error.strerror}); {cure}") from error


def sync_folder(folder: Path) -> None:
    """Flush a folder to disk, so that created, renamed and removed names survive a crash of the machine."""
    if os.name == "nt":  # where a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot, and need not
            raise
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """The checksum of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def disk_is_full(error: BaseException) -> bool:
    """Whether an error says that there is no space left: by its number or, from Rust's libraries, in its words."""
    return _has_number(error, errno.ENOSPC, errno.EDQUOT)


def file_is_too_large(error: BaseException) -> bool:
    """Whether an error says that a file would be larger than the process (`ulimit -f`) or the file system allows."""
    return _has_number(error, errno.EFBIG)


def _has_number(error: BaseException, *numbers: int) -> bool:
    return getattr(error, "errno", None) in numbers or any(f"(os error {number})" in str(error) for number in numbers)


def drop_half_written(folder: Path) -> None:
    """Remove temporary files, here and below, of processes that were killed in `write_atomically`.

    Args:
        folder: A folder in which nobody else keeps files.
    """
    for path in folder.rglob(".*"):
        if re.fullmatch(r"\..+\.\d+", path.name) and path.is_file():
            path.unlink()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read a file of one JSON object a line, each with a `step`, in the order of steps.

    A run that was killed may leave half a last line, which is skipped. A run resumed from an earlier checkpoint repeats
    steps; the later rows of these steps replace the earlier ones.

    Args:
        path: The file.

    Returns:
        Its rows; none when there is no file.

    Raises:
        UserError: It cannot be read, or a line in it is no JSON object with a step.
    """
    if not path.exists():
        return []
    lines = read_text(path, reading.LINES_LIMIT).split("\n")
    rows: list[dict[str, Any]] = []
    for place, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = reading.parse_json(line)
            step = row["step"] = int(row["step"])
            if not 0 <= step <= LAST_STEP:
                raise ValueError
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            if place == len(lines):
                break
            raise UserError(
                f"{path}, line {place}: not a JSON object with a step: {line[:80]!r}; restore the file"
            ) from error
        if rows and rows[-1]["step"] > step:
            rows = [earlier for earlier in rows if earlier["step"] < step]
        rows.append(row)
    return rows


def read_text(path: Path, limit: int = reading.RECORD_LIMIT) -> str:
    """Read a file that this package has written.

    Args:
        path: The file.
        limit: The most bytes that it may have.

    Raises:
        UserError: It cannot be read, is not UTF-8, no regular file, or a larger one.
    """
    try:
        return reading.read_text(path, limit)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error}); restore the file") from error
