"""What makes a checkpoint whole: a list of its files with sizes and checksums, which is written last.

Whatever happens to a process, to its machine or to a file afterwards, a folder without this list, or with a file that
is not as listed, is no checkpoint. The list also says what the run depends on, for whoever wants to go on from it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from loralloc.files import sha256_of, sync_folder, write_atomically

MANIFEST, UNFINISHED = "manifest.json", "manifest.json.unfinished"
"""The list, and what stands in its place until everything else is written."""
_CHECKSUM = "checksum"


@dataclass(frozen=True)
class Manifest:
    """What is known of a checkpoint.

    Attributes:
        step: Optimizer steps done.
        processes: How many processes have written it.
        ended: Whether the training ends with it, before its planned end.
        best: The folder beside it that holds the best state so far; None where none is kept.
        depends_on: What a resumed run must have in common with it.
        files: Size in bytes and SHA-256 of every file, by its path in the checkpoint.
    """

    step: int
    processes: int
    ended: bool = False
    best: str | None = None
    depends_on: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def write_manifest(folder: Path, facts: Manifest) -> None:
    """List the files of a folder, once they are safe on the disk; the list is the last thing to appear.

    Args:
        folder: The checkpoint.
        facts: What else is to be known of it; its `files` are found here.
    """
    files = {str(path.relative_to(folder)): _secured(path) for path in _files(folder)}
    for inner in (*(path for path in folder.rglob("*") if path.is_dir()), folder, folder.parent):
        sync_folder(inner)
    write_atomically(folder / UNFINISHED, sealed({**asdict(facts), "files": files}))
    os.replace(folder / UNFINISHED, folder / MANIFEST)
    sync_folder(folder)


def begin_writing(folder: Path) -> None:
    """Mark a checkpoint as unfinished: one that has neither this mark nor a list has lost its list.

    Args:
        folder: The checkpoint, of which nothing has been written yet.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    (folder / UNFINISHED).touch()


def was_cut_off(folder: Path) -> bool:
    """Whether a checkpoint was never whole, since its writing was cut off."""
    return (folder / UNFINISHED).exists() and not (folder / MANIFEST).exists()


def read_manifest(folder: Path) -> Manifest:
    """Read the list of a folder.

    Raises:
        ValueError: There is none, or it is not as it was written; the message says which.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"it has no {MANIFEST}: its writing was cut off")
    try:
        return Manifest(**unsealed(path.read_bytes()))
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(f"its {MANIFEST} is damaged") from error


def damage(folder: Path) -> str | None:
    """Say what is wrong with a checkpoint; None where every file is as it was written.

    Args:
        folder: Its folder, called after its step.
    """
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        return str(error)
    if folder.name != f"checkpoint-{manifest.step}":
        return f"it was written as checkpoint-{manifest.step}"
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["size"]:
            return f"{name} has {path.stat().st_size:,} bytes instead of {expected['size']:,}"
        if sha256_of(path) != expected["sha256"]:
            return f"{name} has other content than was written"
    return None


def sealed(record: Mapping[str, Any]) -> str:
    """Write a record as JSON with its own checksum, so that later changes are detected.

    Args:
        record: Anything that JSON can hold.
    """
    checksum = hashlib.sha256(json.dumps(record).encode()).hexdigest()
    return json.dumps({**record, _CHECKSUM: checksum}, indent=1) + "\n"


def unsealed(content: bytes) -> dict[str, Any]:
    """Read what `sealed` has written.

    Raises:
        ValueError: It is not as it was written, to the byte.
    """
    try:
        record = json.loads(content)
    except ValueError:
        record = None
    if isinstance(record, dict):
        record.pop(_CHECKSUM, None)
        if sealed(record).encode() == content:
            return record
    raise ValueError("its content is not what was written")


def _secured(path: Path) -> dict[str, Any]:
    """Flush a file to disk, and return its size and checksum."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"size": path.stat().st_size, "sha256": sha256_of(path)}


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in (MANIFEST, UNFINISHED))
