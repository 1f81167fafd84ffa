"""Fingerprints of what a run depends on: base weights, rows of data, versions. Equal things have equal ones."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from torch import nn

from loralloc import native

PACKAGES = ("loralloc", "torch", "transformers", "peft", "accelerate", "trl", "datasets", "tokenizers", "bitsandbytes")
"""What computes a step, or makes its batches."""

SAMPLES = 1024
"""Entries of each base weight that its fingerprint looks at."""
CHUNK = 1000
"""Rows that are read at a time."""


def weights_fingerprint(model: nn.Module) -> dict[str, Any]:
    """Fingerprint the frozen weights of a model: names, shapes, dtypes, and some entries of each.

    Reading all of a large model would take longer than loading it, so up to `SAMPLES` evenly spaced entries of each
    tensor are used, including the scales of quantised ones. Another model, another checkpoint of it, another dtype or
    weights that were scaled have another fingerprint. A change of single entries can go unnoticed.

    Args:
        model: The model with its adapter, before it trains.

    Returns:
        The number of tensors, and a SHA-256.
    """
    moving = {name for name, weight in model.named_parameters() if weight.requires_grad}
    moving |= {name for name, _ in model.named_buffers()}
    digest, count = hashlib.sha256(), 0
    for name, weight in sorted(model.state_dict().items(), key=lambda entry: _bare(entry[0])):
        if name in moving or ".lora_" in name or not isinstance(weight, torch.Tensor) or weight.is_meta:
            continue
        flat = weight.detach().reshape(-1)
        sample = flat[:: -(-flat.numel() // SAMPLES) or 1].cpu().contiguous()
        digest.update(f"{_bare(name)} {list(weight.shape)} {weight.dtype}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
        count += 1
    return {"tensors": count, "sha256": digest.hexdigest()}


def _bare(name: str) -> str:
    """A weight's name, the same with or without an adapter on its layer: a plan may leave a layer without one."""
    return name.replace(".base_layer.", ".")


def rows_fingerprint(rows: Dataset) -> dict[str, Any]:
    """Fingerprint the content of rows, in their order, however they lie in memory.

    Args:
        rows: Examples as they are trained on.

    Returns:
        The number of rows, and a SHA-256.
    """
    digest = hashlib.sha256()
    tables: Any = rows.with_format("arrow").iter(batch_size=CHUNK)
    for table in tables:
        for name in sorted(table.column_names):
            digest.update(name.encode())
            _add(digest, table.column(name).combine_chunks())
    return {"rows": len(rows), "sha256": digest.hexdigest()}


def repeated_rows(rows: Dataset, others: Dataset) -> int:
    """Count the rows that are among others too, by the columns that both have.

    Args:
        rows: Examples as they are evaluated on.
        others: Examples that they should not be among.
    """
    columns = [name for name in rows.column_names if name in others.column_names]
    own = list(_contents(rows, columns)) if columns else []
    return sum(map((set(own) & set(_contents(others, columns))).__contains__, own))


def _contents(rows: Dataset, columns: list[str]) -> Iterator[bytes]:
    """A hash of every row."""
    tables: Any = rows.select_columns(columns).with_format("arrow").iter(batch_size=CHUNK)
    for table in tables:
        for row in table.to_pylist():
            yield hashlib.blake2b(repr(row).encode(), digest_size=16).digest()


def _add(digest: Any, array: Any) -> None:
    """Add a column's content; lists, mostly of token ids, are not converted to Python objects."""
    kind = array.type
    digest.update(f"{kind} {len(array)}".encode())
    if array.null_count or not (pa.types.is_list(kind) or pa.types.is_primitive(kind)):
        digest.update(repr(array.to_pylist()).encode())
    elif pa.types.is_list(kind):
        digest.update(np.diff(array.offsets.to_numpy()).tobytes())
        _add(digest, array.flatten())
    else:
        digest.update(array.to_numpy(zero_copy_only=False).tobytes())


def versions() -> dict[str, str]:
    """The versions of Python and of what a run computes with: installed packages, the kernel in C++ if it is built."""
    found = {"python": platform.python_version()}
    if native.loaded() is not None:
        found["kernel in C++"] = native.version()
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
