"""Checkpoints of `loralloc train`: safetensors and JSON only, whole or not there.

`manifest.json` is written last into each checkpoint folder, and a run resumes from the newest folder whose files match
it. A process that is killed during a save therefore loses only that save, and a damaged file only the steps since the
checkpoint before it.

| file | holds | written in |
|---|---|---|
| `adapter_model.safetensors` | what is trained, as plain LoRA | `gated_files` |
| `gated_factors.safetensors` | the factors and gates behind it | `gated_files` |
| `loralloc.safetensors`, `loralloc.json` | the method's state, counts, settings | `callback`, from `run.state_dict` |
| `optimizer.safetensors`, `optimizer.json` | optimizer and learning-rate schedule | here |
| `scaler.json` | the loss scale of fp16 | here |
| `random-PROCESS.json` | the generators of a process | here |
| `window.json`, `bad_steps.json` | what the log averages, steps that plain LoRA has skipped | `trainer` |
| `manifest.json` | its files, and what the run depends on | `manifest` |
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerState, TrainingArguments

from loralloc.errors import UserError
from loralloc.files import leaves, write_atomically
from loralloc.training import processes
from loralloc.training.manifest import MANIFEST, damage, read_manifest, was_cut_off

SCALER = "scaler.json"

WRITTEN_LAST = (MANIFEST, "trainer_state.json", "complete.json")
"""Files written at the end of a checkpoint: with one of them it was complete, or nearly so, even without a manifest."""


@dataclass(frozen=True)
class Found:
    """What a run can go on from.

    Attributes:
        checkpoint: The newest whole checkpoint; None where there is none.
        skipped: Why newer ones do not count, by their names.
        damaged: Whether one of these has been whole.
    """

    checkpoint: Path | None
    skipped: Mapping[str, str]
    damaged: bool


def checkpoint_of(args: TrainingArguments, state: TrainerState) -> Path:
    """The folder in which a Trainer keeps the checkpoint of the current step."""
    return Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"


def newest_whole(folder: Path) -> Found:
    """Find the whole checkpoint with the highest step.

    Args:
        folder: Where checkpoints are.
    """
    skipped, damaged = {}, False
    for step in sorted(_steps(folder), reverse=True):
        checkpoint = folder / f"checkpoint-{step}"
        reason = damage(checkpoint) or _damage_of_best(checkpoint)
        if reason is None:
            return Found(checkpoint, skipped, damaged)
        skipped[checkpoint.name] = reason
        damaged |= not was_cut_off(checkpoint) and any((checkpoint / name).exists() for name in WRITTEN_LAST)
    return Found(None, skipped, damaged)


def _damage_of_best(checkpoint: Path) -> str | None:
    """What is wrong with the checkpoint of the best state, without which a run that keeps one cannot go on."""
    best = read_manifest(checkpoint).best
    if best is None or best == checkpoint.name:
        return None
    reason = damage(checkpoint.parent / best)
    return None if reason is None else f"the best state is in {best}, and {reason}"


def _steps(folder: Path) -> Iterator[int]:
    """The steps of the checkpoints in a folder, whole or not."""
    steps = (path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*") if path.is_dir())
    return (int(step) for step in steps if step.isdecimal())


def drop_after(folder: Path, kept: Path | None) -> None:
    """Remove the checkpoints of steps that a resumed run makes again; the Trainer would take them for its newest.

    Args:
        folder: Where checkpoints are.
        kept: The checkpoint from which the run goes on; None for the start.
    """
    first = -1 if kept is None else int(kept.name.removeprefix("checkpoint-"))
    for step in [step for step in _steps(folder) if step > first]:
        shutil.rmtree(folder / f"checkpoint-{step}")


def drop_cut_off(folder: Path) -> None:
    """Remove checkpoints whose writing has failed: what they hold is of no use, and takes space."""
    for step in list(_steps(folder)):
        if not (folder / f"checkpoint-{step}" / MANIFEST).exists():
            shutil.rmtree(folder / f"checkpoint-{step}", ignore_errors=True)


def check_processes(checkpoint: Path, count: int) -> None:
    """Refuse to go on with more or fewer processes: batches and random states are theirs.

    Raises:
        UserError: Another number of processes wrote the checkpoint.
    """
    written_by = read_manifest(checkpoint).processes
    if written_by != count:
        launcher = processes.launcher(written_by)
        raise UserError(
            f"{checkpoint} was written by a run on {written_by} processes, and this one is on {count}; resume on "
            f"as many: {launcher}loralloc train RECIPE --resume"
        )


def save_optimizer(checkpoint: Path, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    """Write the states of optimizer and learning-rate schedule."""
    state = optimizer.state_dict()
    tensors, numbers = {}, {}
    for name, value in leaves(state["state"]):
        target = tensors if isinstance(value, Tensor) else numbers
        target[name] = value.detach().cpu().contiguous().clone() if isinstance(value, Tensor) else value
    save_file(tensors, checkpoint / "optimizer.safetensors")
    numbers = dict(sorted(numbers.items()))  # a resumed run has them in the order of the files that it read
    record = {"state": numbers, "param_groups": state["param_groups"], "scheduler": scheduler.state_dict()}
    write_atomically(checkpoint / "optimizer.json", json.dumps(record) + "\n")


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
