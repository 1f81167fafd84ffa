"""Checkpoints of `loralloc train`: safetensors and JSON only, complete or not there.

Each checkpoint folder ends with `complete.json`, written last; a run resumes from the newest folder that has it, so a
process killed in the middle of a save loses that save and nothing else.

| file | holds | written in |
|---|---|---|
| `adapter_model.safetensors` | what is trained, as plain LoRA | `gated_files` |
| `gated_factors.safetensors` | the factors and gates behind it | `gated_files` |
| `loralloc.safetensors`, `loralloc.json` | the method's state, counts, settings | `callback`, from `run.state_dict` |
| `optimizer.safetensors`, `optimizer.json` | optimizer and learning-rate schedule | here |
| `scaler.json` | the loss scale of fp16 | here |
| `random-PROCESS.json` | the generators of a process | here |
| `window.json`, `bad_steps.json` | what the log averages, steps that plain LoRA has skipped | `trainer` |
| `complete.json` | the step | here |
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loralloc.errors import UserError
from loralloc.files import write_atomically

COMPLETE = "complete.json"
SCALER = "scaler.json"


def newest_complete(folder: Path, before: int) -> Path | None:
    """Return the complete checkpoint with the highest step below `before`, or None.

    The Trainer would take a step too many from a checkpoint of the last step, or of that at which a run ended early.
    """
    on_the_way = (path for path in folder.glob(f"checkpoint-*/{COMPLETE}") if not _read(path).get("ended"))
    steps = (path.parent.name.removeprefix("checkpoint-") for path in on_the_way)
    found = [int(step) for step in steps if step.isdecimal() and int(step) < before]
    return folder / f"checkpoint-{max(found)}" if found else None


def drop_after(folder: Path, kept: Path | None) -> None:
    """Remove the checkpoints of steps that a resumed run makes again; the Trainer would take them for its newest.

    Args:
        folder: Where checkpoints are.
        kept: The checkpoint from which the run goes on; None for the start.
    """
    first = -1 if kept is None else int(kept.name.removeprefix("checkpoint-"))
    for path in folder.glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        if step.isdecimal() and int(step) > first:
            shutil.rmtree(path)


def mark_complete(checkpoint: Path, step: int, processes: int, *, ended: bool = False) -> None:
    """Declare a checkpoint complete: everything else in it has been written, by every process.

    Args:
        checkpoint: Its folder.
        step: Optimizer steps done.
        processes: How many have written.
        ended: Whether the training ends with it, before its planned end.
    """
    record = {"step": step, "processes": processes, **({"ended": True} if ended else {})}
    write_atomically(checkpoint / COMPLETE, json.dumps(record) + "\n")


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def check_processes(checkpoint: Path, processes: int) -> None:
    """Refuse to go on with more or fewer processes: batches and random states are theirs.

    Raises:
        UserError: Another number of processes wrote the checkpoint.
    """
    written_by = _read(checkpoint / COMPLETE)["processes"]
    if written_by != processes:
        launcher = "" if written_by == 1 else f"torchrun --nproc-per-node={written_by} --no-python "
        raise UserError(
            f"{checkpoint} was written by a run on {written_by} processes, and this one is on {processes}; resume on "
            f"as many: {launcher}loralloc train RECIPE --resume"
        )


def save_optimizer(checkpoint: Path, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    """Write the states of optimizer and learning-rate schedule."""
    state = optimizer.state_dict()
    tensors, numbers = {}, {}
    for name, value in _flat(state["state"]):
        target = tensors if isinstance(value, Tensor) else numbers
        target[name] = value.detach().cpu().contiguous().clone() if isinstance(value, Tensor) else value
    save_file(tensors, checkpoint / "optimizer.safetensors")
    numbers = dict(sorted(numbers.items()))  # a resumed run has them in the order of the files that it read
    record = {"state": numbers, "param_groups": state["param_groups"], "scheduler": scheduler.state_dict()}
    write_atomically(checkpoint / "optimizer.json", json.dumps(record) + "\n")


def _flat(entries: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings, by their keys with dots."""
    for key, value in entries.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def load_optimizer(checkpoint: Path, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    """Restore what `save_optimizer` wrote."""
    record = json.loads((checkpoint / "optimizer.json").read_text(encoding="utf-8"))
    state: dict[int, dict[str, Any]] = {}
    for name, value in {**load_file(checkpoint / "optimizer.safetensors"), **record["state"]}.items():
        index, *keys, last = name.split(".")
        entries: dict[str, Any] = state.setdefault(int(index), {})
        for key in keys:  # 8-bit optimizers keep theirs one level deeper
            entries = entries.setdefault(key, {})
        entries[last] = value
    optimizer.load_state_dict({"state": state, "param_groups": record["param_groups"]})
    scheduler.load_state_dict(record["scheduler"])


def save_scaler(checkpoint: Path, scaler: torch.amp.GradScaler) -> None:
    """Write the loss scale of fp16."""
    write_atomically(checkpoint / SCALER, json.dumps(scaler.state_dict()) + "\n")


def load_scaler(checkpoint: Path, scaler: torch.amp.GradScaler) -> None:
    """Restore what `save_scaler` wrote."""
    scaler.load_state_dict(json.loads((checkpoint / SCALER).read_text(encoding="utf-8")))


def save_random_state(path: Path) -> None:
    """Write the states of Python's, NumPy's and torch's generators as JSON."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # type: ignore[misc]
    record = {
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, gauss],
        "torch": torch.get_rng_state().tolist(),
        "cuda": [state.tolist() for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
    }
    path.parent.mkdir(parents=True, exist_ok=True)  # other processes than the first may come first
    write_atomically(path, json.dumps(record) + "\n")


def load_random_state(path: Path) -> None:
    """Restore what `save_random_state` wrote."""
    record = json.loads(path.read_text(encoding="utf-8"))
    version, internal, gauss = record["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = record["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(torch.tensor(record["torch"], dtype=torch.uint8))
    if record["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([torch.tensor(state, dtype=torch.uint8) for state in record["cuda"]])
