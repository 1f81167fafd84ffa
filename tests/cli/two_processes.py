"""What one of two processes does that `torchrun` starts: every command of a list, through the command line itself.

    torchrun --nproc-per-node=2 tests/cli/two_processes.py FOLDER

FOLDER holds commands.json: names to the words of a command. Each process writes RANK.json: what came of each.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.distributed.tensor import DTensor

from loralloc.cli import progress
from loralloc.errors import UserError
from loralloc.recipe import run as pipeline
from loralloc.recipe.run_folder import RunFolder
from loralloc.training.trainer import PlainTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `cli` is the folder of tests, as it is in pytest
from fsdp2 import launched_with_fsdp2

from cli.command import loralloc
from cli.deaths import killed_at

RANK = int(os.environ.get("RANK", "0"))  # collected as a module with doctests too


def checksum(model: torch.nn.Module) -> str:
    """One number for all that training changes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if "lora_" in name or "modules_to_save" in name:
            digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def watched(found: dict[str, Any]) -> Iterator[None]:
    """Note what this process holds at the end of a run: its own plan and weights, and how its model is wrapped."""
    final_metrics = pipeline.final_metrics

    def note(stage: Any, plan: Any, *rest: Any) -> Any:
        wrapper = type(stage.trainer.model_wrapped).__name__
        apart = sorted(name for name, p in stage.trainer.model.named_parameters() if isinstance(p.data, DTensor))
        found.update(ranks=plan.ranks, checksum=checksum(stage.trainer.model), wrapper=wrapper, sharded=apart)
        return final_metrics(stage, plan, *rest)

    with patch.object(pipeline, "final_metrics", note):
        yield


@contextmanager
def fails(owner: Any, name: str, rank: int, error: Exception) -> Iterator[None]:
    """A function fails in one of the processes."""
    alive = getattr(owner, name)

    def die(*args: Any, **kwargs: Any) -> Any:
        if rank == RANK:
            raise error
        return alive(*args, **kwargs)

    with patch.object(owner, name, die):
        yield


@contextmanager
def sharded_and_killed() -> Iterator[None]:
    with launched_with_fsdp2(), killed_at(5):
        yield


@contextmanager
def gone_at(step: int, rank: int) -> Iterator[None]:
    """The operating system ends one of the processes after an optimizer step, and the others are not told."""
    alive = progress.Progress.on_step_end

    def die(self: Any, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        if state.global_step == step and rank == RANK:
            os.kill(os.getpid(), signal.SIGKILL)
        alive(self, args, state, *rest, **kwargs)

    with patch.object(progress.Progress, "on_step_end", die):
        yield


MISHAPS: dict[str, Any] = {
    "killed": lambda: killed_at(5),
    "gone": lambda: gone_at(5, rank=1),
    "sharded": launched_with_fsdp2,
    "sharded-and-killed": sharded_and_killed,
    "folder": lambda: fails(RunFolder, "create", 0, OSError("no space left on device")),
    "data": lambda: fails(pipeline, "task_data", 1, UserError("there is no file train.jsonl here")),
    "apart": lambda: patch.object(PlainTrainer, "_left_as_it_is", nullcontext),
}
"""What goes wrong in a command, by the first word of its name."""


def main() -> None:
    """Run the commands of the folder, in its directory."""
    os.chdir(sys.argv[1])
    torch.set_num_threads(1)
    results = {}
    with patch.object(pipeline, "write_report", lambda folder: folder / "report.html"):
        for name, words in json.loads(Path("commands.json").read_text(encoding="utf-8")).items():
            found: dict[str, Any] = {}
            mishap = MISHAPS.get(name.partition(" ")[0], nullcontext)
            with watched(found), mishap():
                result = loralloc(*words)
                found.update(code=result.code, out=result.out, err=result.err)
            results[name] = found
    Path(f"{RANK}.json").write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main()
