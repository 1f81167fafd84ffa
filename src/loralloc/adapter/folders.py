"""Folders that users name, looked at with the standard library alone, so that a wrong one is refused at once."""

from __future__ import annotations

import json
from pathlib import Path

from loralloc.errors import UserError

ADAPTER_CONFIG, ADAPTER_WEIGHTS, PICKLED_WEIGHTS = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
)

RECORD = "loralloc_export.json"
"""Our record of an export, in a file of its own: readers of LoRA warn about keys they do not know."""


def check_adapter_folder(folder: Path) -> None:
    """Refuse a folder without the two files of an adapter.

    Args:
        folder: What should be an adapter of PEFT.

    Raises:
        UserError: It is missing, or a file is.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    if not (folder / ADAPTER_CONFIG).is_file():
        inner = folder / "adapter"
        hint = f"; the adapter of this run is {inner}" if (inner / ADAPTER_CONFIG).is_file() else ""
        raise UserError(f"{folder} is no adapter: it has no {ADAPTER_CONFIG}{hint}")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        pickled = (folder / PICKLED_WEIGHTS).exists()
        cure = f"; convert {PICKLED_WEIGHTS}, a pickle, with PEFT's save_pretrained" if pickled else ""
        raise UserError(f"{folder} has no {ADAPTER_WEIGHTS}{cure}")


def check_target(path: Path) -> None:
    """Refuse to replace a folder that is not an export, or that holds anything besides.

    Args:
        path: Where an export is to be written.

    Raises:
        UserError: It is something else.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; give a folder for the export")
    found = {entry.name for entry in path.iterdir()} if path.exists() else set()
    if found and RECORD not in found:
        raise UserError(f"{path} exists and is no export of loralloc; nothing was overwritten: choose another folder")
    if found:
        written = json.loads((path / RECORD).read_text(encoding="utf-8")).get("files", [])
        strangers = sorted(found - {RECORD, *written})
        if strangers:
            raise UserError(
                f"{path} holds more than the export written there ({strangers[0]}); nothing was overwritten: "
                "choose another folder"
            )
