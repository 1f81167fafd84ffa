"""Files that somebody else may have written: opened here, with limits.

A file must be a regular one, because a FIFO waits for ever and a device has no end; it must not be larger than files of
its kind are; and its brackets must not be nested deeper than its readers go. In a folder that was handed over as a
whole it must also lie in that folder: a link to the outside would show, in a report or a message, what is elsewhere on
this machine. Standard library only.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from loralloc.errors import UserError

MIB = 2**20
RECORD_LIMIT = 16 * MIB
"""Most bytes of a file with one JSON object: a plan of 100,000 modules has fewer."""
LINES_LIMIT = 512 * MIB
"""Most bytes of a log or a trace."""
RECIPE_LIMIT = MIB // 4
"""Most bytes of a recipe: the longest one of this package has 4,000."""
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
"""An escape that may be a lone surrogate, which Python can neither print nor write."""
DEEPEST = 64
"""Most levels of nested brackets in a JSON file."""


def check_regular(path: Path, limit: int | None = None) -> None:
    """Refuse what is no regular file, or too large a one, without waiting for it.

    Args:
        path: A file that is there.
        limit: The most bytes that it may have; None for any number.

    Raises:
        OSError: There is no such file.
        UserError: It is a folder, a FIFO, a device or a socket, or too large.
    """
    _check(path, path.stat(), limit)


def check_inside(folder: Path, paths: Iterable[Path]) -> None:
    """Refuse links in a folder that lead out of it.

    A snapshot in the Hub's cache consists of links into the cache folder of its repository. For a snapshot, links may
    lead anywhere in that repository folder.

    Args:
        folder: The folder, itself perhaps reached through a link.
        paths: What is read or written in it; what is not there is no problem.

    Raises:
        UserError: With the link and where it leads.
    """
    root = Path(os.path.realpath(folder))
    snapshot = next((place for place in (root, *root.parents) if place.parent.name == "snapshots"), None)
    if snapshot is not None:
        root = snapshot.parent.parent
    for path in paths:
        target = Path(os.path.realpath(path))
        if target != root and root not in target.parents:
            raise UserError(f"{path} is a link out of its folder, to {target}; put a copy of the file in its place")


def read_bytes(path: Path, limit: int = RECORD_LIMIT) -> bytes:
    """Read a regular file of at most so many bytes.

    Raises:
        OSError: It cannot be read.
        UserError: It is no regular file, or a larger one.
    """
    with open(path, "rb", opener=_open_at_once) as file:
        _check(path, os.fstat(file.fileno()), limit)
        content = file.read(limit + 1)
    if len(content) > limit:  # files such as those in /proc report a size of 0
        raise _too_large(path, len(content), limit)
    return content


def read_text(path: Path, limit: int = RECORD_LIMIT, encoding: str = "utf-8") -> str:
    """Read a regular file of at most so many bytes as text.

    Raises:
        OSError: It cannot be read.
        UnicodeDecodeError: It is not text of this encoding.
        UserError: It is no regular file, or a larger one.
    """
    return read_bytes(path, limit).decode(encoding).replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: Path, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Read a regular file of at most `RECORD_LIMIT` bytes as JSON.

    Args:
        path: The file.
        pairs: Makes each object from its (key, value) pairs; `dict` by default.

    Raises:
        OSError: It cannot be read.
        UserError: It is no regular file, or larger than `RECORD_LIMIT`.
        ValueError: It is not JSON, nested too deeply, or not UTF-8.
    """
    return parse_json(read_text(path), pairs)


def parse_json(text: str, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Read JSON whose brackets are nested at most `DEEPEST` deep.

    Args:
        text: The JSON.
        pairs: As of `read_json`.

    Raises:
        ValueError: It is not JSON, or nested too deeply.

    >>> parse_json('{"a": [1, 2]}')
    {'a': [1, 2]}
    """
    try:
        value = json.loads(text, object_pairs_hook=pairs)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
        if text.count("[") + text.count("{") > DEEPEST and _is_deeper(value, DEEPEST):
            raise RecursionError
    except RecursionError:
        raise ValueError(f"brackets are nested more than {DEEPEST} deep") from None
    except UnicodeEncodeError:
        raise ValueError("a string has half a character (a lone surrogate)") from None
    return value


def read_object(path: Path, cure: str = "restore the file") -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: The file, which is there.
        cure: What the messages advise.

    Raises:
        UserError: It cannot be read, is not JSON, or is no object.
    """
    try:
        data = read_json(path)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {cure}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text (byte {error.start}); {cure}") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); {cure}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(data).__name__}; {cure}")
    return data


def _open_at_once(path: str, flags: int) -> int:
    """Open a file without blocking: opening a FIFO would otherwise wait until somebody writes into it."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _check(path: Path, found: os.stat_result, limit: int | None) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{path} is {_kind(found.st_mode)}, and what is read must be a regular file")
    if limit is not None and found.st_size > limit:
        raise _too_large(path, found.st_size, limit)


def _too_large(path: Path, size: int, limit: int) -> UserError:
    return UserError(f"{path} has {size:,} bytes, and a file of its kind may have at most {limit:,}")


def _kind(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "a folder"
    if stat.S_ISFIFO(mode):
        return "a FIFO"
    return "a socket" if stat.S_ISSOCK(mode) else "a device"


def _is_deeper(value: Any, most: int) -> bool:
    """Whether more than so many containers are inside each other; counted level by level, without recursion."""
    level = [value]
    for _ in range(most):
        containers = [entry for entry in level if isinstance(entry, dict | list)]
        if not containers:
            return False
        level = [
            entry
            for container in containers
            for entry in (container.values() if isinstance(container, dict) else container)
        ]
    return any(isinstance(entry, dict | list) for entry in level)
