"""Ends of a process, acted out in this one, and what a run that goes on afterwards is compared by."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from loralloc.cli import progress

from .command import TIMING, files, log_rows, read_json

HALF = "budget: {average_rank: 2}"
METHODS = {
    "adalora": f"{{name: adalora, {HALF}}}",
    "ablora": f"{{name: ablora, {HALF}, rounds: 2, validation: 0.25, warmup: 4, interval: 3}}",
    "autolora": "{name: autolora, validation: 0.25, search: 12, check_every: 3}",
    "allora": f"{{name: allora, mode: post, eta: 1.41, allocate: adalora, {HALF}}}",
    "truncate": f"{{name: truncate, {HALF}}}",
    "lora": "{name: lora}",
}
"""Every method, in a recipe's words; a search of twelve steps comes first with AutoLoRA."""


def words(method: str, recipe: Path | str = "recipe.yaml", save_every: int = 4) -> list[Any]:
    """The command that trains twelve steps with a method."""
    own = ["--lora.alpha", 4] if method == "allora" else ["--lora.dropout", 0.1]
    return [
        *("train", recipe, "--method", METHODS[method], *own, "--steps", 12, "--save_every", save_every),
        *("--log_every", 3),
    ]


class KilledError(Exception):
    """Stands for the signal that ends a process."""


@contextmanager
def killed_at(step: int) -> Iterator[None]:
    """The process ends after an optimizer step, before anything is logged, evaluated or saved."""
    alive = progress.Progress.on_step_end

    def die(self: Any, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        if state.global_step == step:
            raise KilledError
        alive(self, args, state, *rest, **kwargs)

    with patch.object(progress.Progress, "on_step_end", die), pytest.raises(KilledError):
        yield


@contextmanager
def killed_in(module: Any, name: str, step: int | None = None) -> Iterator[None]:
    """The process ends where a function would be called; in the one for a checkpoint, when a step is given."""
    alive = getattr(module, name)

    def die(*args: Any, **kwargs: Any) -> Any:
        if step is None or f"checkpoint-{step}" in str(args[0]):
            raise KilledError
        return alive(*args, **kwargs)

    with patch.object(module, name, die), pytest.raises(KilledError):
        yield


def differences(run: Path, other: Path) -> list[str]:
    """Files in which two runs differ in more than times and their own place: bit for bit, but logs by their rows."""
    ours, theirs = _state(run), _state(other)
    return [name for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)]


def unlike(run: Path, whole: Path) -> list[str]:
    """Files in which a resumed run differs from the whole one; those of a search also hold times."""
    return [name for name in differences(run, whole) if name not in ("search/log.jsonl", "search/metrics.json")]


def _state(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = dict(files(run))
    found["adapter/README.md"] = found["adapter/README.md"].replace(bytes(run.resolve()), b"RUN")
    for name in found:
        if name.endswith(("trainer_state.json", "window.json")):
            found[name] = _without_times(json.loads(found[name]))
        if name.endswith("manifest.json"):
            found[name] = _without_checksums(json.loads(found[name]))
    found["log.jsonl"] = _without_times(log_rows(run))
    found["metrics.json"] = _without_times(read_json(run / "metrics.json"))
    return found


def _without_checksums(manifest: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint is, with the names of its files, of which some hold times."""
    return {**manifest, "files": list(manifest["files"]), "checksum": None}


def _without_times(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_times(item) for item in value]
    if not isinstance(value, dict):
        return value
    # train_loss has a test of its own.
    times = (*TIMING, "seconds", "train_loss")
    return {key: _without_times(item) for key, item in value.items() if not key.endswith(times)}
