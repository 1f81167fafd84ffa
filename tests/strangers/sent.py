"""What strangers send, made from files that are right, and how long a refusal may take."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from drills import adapters, plans, runs
from drills.grammar import as_json

SECONDS = 1.0
"""Processor time of a refusal, with that of the processes that it starts; the clock depends on who else works here."""


@contextmanager
def quickly() -> Iterator[None]:
    """What happens inside takes less than a second."""
    before = _seconds()
    yield
    assert _seconds() - before < SECONDS


def _seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + used.ru_utime + used.ru_stime


def adapter(folder: Path, config: Mapping[str, Any] | None = None, **stored: Any) -> Path:
    """Write an adapter folder.

    Args:
        folder: The folder.
        config: Changes of adapter_config.json.
        stored: Changes of every tensor: `kind`, `shape` or `fill`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor._replace(**stored) for key, tensor in adapters.factors().items()}
    (folder / "adapter_config.json").write_text(as_json({**adapters.CONFIG, **(config or {})}))
    (folder / "adapter_model.safetensors").write_bytes(adapters.weights_file(tensors))
    return folder


def run(folder: Path) -> Path:
    """Write a run folder without an adapter, as `loralloc report` reads it."""
    (folder / "model").mkdir(parents=True, exist_ok=True)
    (folder / "ranks.json").write_text(as_json(plans.PLAN))
    (folder / "trace.jsonl").write_text(runs.lines(runs.TRACE))
    (folder / "log.jsonl").write_text(runs.lines(runs.LOG))
    (folder / "metrics.json").write_text(as_json(runs.METRICS))
    (folder / "recipe.yaml").write_text(runs.RECIPE[0])
    (folder / "model" / "config.json").write_text(as_json(runs.CONFIG))
    return folder


def _fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def _link(target: str | Path) -> Callable[[Path], None]:
    def put(path: Path) -> None:
        path.unlink(missing_ok=True)
        path.symlink_to(target)

    return put


def _folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def _sparse(path: Path) -> None:
    path.write_bytes(b"{}")
    os.truncate(path, 2**42)


def _deep(path: Path) -> None:
    path.write_text('{"a": ' * 100_000)


NO_FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a FIFO": (_fifo, r"is a FIFO, and what is read must be a regular file"),
    "a device": (_link("/dev/zero"), r"(is a link out of its folder, to /dev/zero; put a copy|is a device, and what)"),
    "a folder": (_folder, r"([Ii]s a (folder|directory)|is a folder, and what is read must be a regular file)"),
    "terabytes": (
        _sparse,
        r"has 4,398,046,511,104 bytes, and (a file of its kind may have at most|this machine has) [\d,]+",
    ),
}
"""What may stand in the place of a file, and what is said of it."""
