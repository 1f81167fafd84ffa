"""Checks of folders that users name, with the standard library alone, so that a wrong folder is refused at once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loralloc.errors import UserError
from loralloc.files import check_writable, sha256_of, write_atomically
from loralloc.reading import RECORD_LIMIT, check_inside, check_regular, read_object

ADAPTER_CONFIG, ADAPTER_WEIGHTS, PICKLED_WEIGHTS = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
)

CARD = "README.md"

RECORD = "loralloc_export.json"
"""Our record of an export, in a file of its own: readers of LoRA warn about keys they do not know."""
NEXT_CARD = "next_card"
"""A key of the record while the card is being replaced: the SHA-256 of the new card."""


def check_adapter_folder(folder: Path) -> None:
    """Refuse a folder without the two files of an adapter.

    Args:
        folder: What should be an adapter of PEFT.

    Raises:
        UserError: The folder or a file is missing, or a file is not a regular file inside the folder.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    check_inside(folder, [folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS])
    if not (folder / ADAPTER_CONFIG).exists():
        inner = folder / "adapter"
        hint = f"; the adapter of this run is {inner}" if (inner / ADAPTER_CONFIG).is_file() else ""
        raise UserError(f"{folder} is no adapter: it has no {ADAPTER_CONFIG}{hint}")
    if not (folder / ADAPTER_WEIGHTS).exists():
        pickled = (folder / PICKLED_WEIGHTS).exists()
        cure = f"; convert {PICKLED_WEIGHTS}, a pickle, with PEFT's save_pretrained" if pickled else ""
        raise UserError(f"{folder} has no {ADAPTER_WEIGHTS}{cure}")
    check_regular(folder / ADAPTER_CONFIG, RECORD_LIMIT)
    check_regular(folder / ADAPTER_WEIGHTS)


def record_export(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the record of an export: some facts, and the SHA-256 of every file that is in the folder.

    Args:
        folder: The finished export.
        facts: What else the record tells.
    """
    record = {**facts, "files": {name: _digest(folder / name) for name in sorted(_files(folder))}}
    _write_record(folder, record)


def write_card(folder: Path, text: str) -> None:
    """Write the card of an export, or replace the card of an export that has its record.

    The record gets the digest of the new card before the card is written. So an export whose process was killed in
    between is still recognised as one of ours, and may be replaced.

    Args:
        folder: The export.
        text: The card.
    """
    if not (folder / RECORD).exists():
        write_atomically(folder / CARD, text)
        return
    record = read_object(folder / RECORD)
    digest = hashlib.sha256(text.encode()).hexdigest()
    _write_record(folder, {**record, NEXT_CARD: digest})
    write_atomically(folder / CARD, text)
    _write_record(folder, {**record, "files": {**record["files"], CARD: digest}})


def _write_record(folder: Path, record: Mapping[str, Any]) -> None:
    write_atomically(folder / RECORD, json.dumps(record, indent=1) + "\n")


def recorded_modules(folder: Path) -> list[str] | None:
    """Return the names of all modules that an exported adapter adapts, those without a rank included.

    Args:
        folder: Folder of an adapter of any origin.

    Returns:
        The names; None if the folder has no record of them.

    Raises:
        UserError: The record cannot be read.
    """
    ranks = read_object(folder / RECORD).get("ranks") if (folder / RECORD).exists() else None
    return list(ranks) if isinstance(ranks, dict) else None


def exported_files(folder: Path) -> list[str]:
    """Return the names of an export's files, the record last; only the card may have changed since the check.

    Args:
        folder: The export.

    Raises:
        UserError: The folder is no export of loralloc, or one of its files is missing or has changed.
    """
    if not (folder / RECORD).exists():
        raise UserError(f"{folder} is no export of loralloc, so nobody has checked it; loralloc export writes one")
    recorded = _recorded(folder, "remove the folder and export it again")
    if missing := [name for name in recorded if not (folder / name).exists()]:
        raise UserError(f"{folder} lacks {', '.join(missing)}, which was exported there; export it again")
    check_inside(folder, [folder / name for name in (*recorded, RECORD)])
    if changed := [name for name, digest in recorded.items() if name != CARD and _digest(folder / name) != digest]:
        raise UserError(f"{folder}: {changed[0]} has changed since it was exported and checked; export it again")
    return [*recorded, RECORD]


def check_target(path: Path) -> None:
    """Refuse to replace a folder that is not an export, or that holds anything else, or to write where nobody may.

    That the record names a file is not enough: its content must be what was exported.

    Args:
        path: Where an export is to be written.

    Raises:
        UserError: There is something else, or the folder around it cannot be made or written into.
    """
    check_writable(path.absolute().parent, str(path), "choose another folder")
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; give a folder for the export")
    found = _files(path) if path.exists() else set()
    if not found:
        return
    cure = "nothing was overwritten: choose another folder"
    if RECORD not in {entry.name for entry in path.iterdir()}:
        raise UserError(f"{path} exists and is no export of loralloc; {cure}")
    recorded = _recorded(path, cure)
    if strangers := sorted(found - recorded.keys()):
        raise UserError(f"{path} holds more than the export written there ({strangers[0]}); {cure}")
    digests = {name: _digest(path / name) for name in sorted(found)}
    if (card := digests.get(CARD)) and card == read_object(path / RECORD, cure).get(NEXT_CARD):
        del digests[CARD]
    if changed := [name for name, digest in digests.items() if digest != recorded[name]]:
        cure = "nothing was overwritten: move it away, or choose another folder"
        raise UserError(f"{path}: {changed[0]} has changed since it was exported; {cure}")


def _files(folder: Path) -> set[str]:
    """Paths of all that is in a folder, at any depth, but the record: files, links and empty folders."""
    found = set()
    for root, folders, files in os.walk(folder):
        links = [name for name in folders if (Path(root) / name).is_symlink()]
        empty = [] if folders or files or root == str(folder) else ["."]
        found |= {(Path(root) / name).relative_to(folder).as_posix() for name in (*files, *links, *empty)}
    return found - {RECORD}


def _recorded(folder: Path, cure: str) -> dict[str, str]:
    """What the record says of the files: SHA-256 by name."""
    files = read_object(folder / RECORD, cure).get("files")
    if not isinstance(files, dict) or not all(isinstance(digest, str) for digest in files.values()):
        raise UserError(f"{folder / RECORD} does not say what its files hold, as those of earlier versions; {cure}")
    return files


def _digest(path: Path) -> str:
    """SHA-256 of a file; an empty string for a link or anything that is not a file."""
    if path.is_symlink() or not path.is_file():
        return ""
    return sha256_of(path)
