"""Folders that users name, looked at with the standard library alone, so that a wrong one is refused at once."""

from __future__ import annotations

from pathlib import Path

from loralloc.errors import UserError

ADAPTER_CONFIG, ADAPTER_WEIGHTS, PICKLED_WEIGHTS = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
)


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
