"""A loop of one's own over a sharded base model, or under DDP, and what each of its processes ends with."""

from __future__ import annotations

import gc
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from models import tiny_peft
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from trainers import BATCH, adapter_tensors, language_batch, sentences

from loralloc import ABLoRA, AdaLoRA, ALLoRA, AutoLoRA, Budget, Truncate, attach, export_adapter, kept_whole
from loralloc.methods.base import Method
from loralloc.training.run import AllocationRun

STEPS = 12
SEEDS_DIFFER = 17
"""Added to the seed of the second process, so that nothing agrees by chance."""

SCORED_ON = [language_batch(sentences(12, seed=3))]


def methods() -> dict[str, Method]:
    """Every method, and every way of theirs to compute a step again."""
    half = Budget(average_rank=2)
    rounds: dict[str, Any] = {"warmup": 4, "interval": 3, "rounds": 2, "samples": 12}
    return {
        "adalora": AdaLoRA(half),
        "ablora": ABLoRA(half, SCORED_ON, **rounds),
        "ablora, exact": ABLoRA(half, SCORED_ON, mode="exact", **rounds),
        "autolora": AutoLoRA(SCORED_ON),
        "autolora, paper": AutoLoRA(SCORED_ON, mode="paper"),
        "autolora, first order": AutoLoRA(SCORED_ON, mode="first_order"),
        "allora": ALLoRA(mode="hybrid", allocate=AdaLoRA(half)),
        "truncate": Truncate(half),
    }


def shard(model: PeftModel, ignored: set[nn.Parameter] | None = None, heads: bool = False) -> None:
    """Shard the blocks, the head by itself where it is asked for, and what is around them, over all processes."""
    whole = kept_whole(model) if ignored is None else ignored
    base: Any = model.get_base_model()
    for block in [*base.model.layers, *([base.lm_head] if heads else [])]:
        fully_shard(block, ignored_params=whole)
    fully_shard(model, ignored_params=whole)


@dataclass
class Loop:
    """A training loop over `STEPS` batches, each split over the processes.

    Attributes:
        method: Name of the method.
        order: Whether the model is sharded `before` or `after` attaching, stays `whole`, or is wrapped by `ddp`.
        parts: Backward passes in a step; the gradients of all but the last are only collected.
        unused: The step, if any, in which the second process's loss does not depend on the last block; for `ddp`.
        poison: (step, process) at which the loss is infinite; one process does the work of both.
        resume: The folder from which the second half starts, None for the whole run.
        save: The folder to which the first half is written; the run goes on.
        export: Where the adapter is exported to.
        meet: The file through which the processes join once the method is attached; None where they have before.
    """

    method: str = "adalora"
    order: str = "before"
    parts: int = 1
    unused: int | None = None
    poison: tuple[int, int] | None = None
    resume: Path | None = None
    save: Path | None = None
    export: Path | None = None
    meet: Path | None = None

    def run(self, rank: int, world: int) -> dict[str, Any]:
        torch.manual_seed(rank * SEEDS_DIFFER)
        alpha: dict[str, Any] = {"lora_alpha": 4} if self.method == "allora" else {}
        model = tiny_peft("llama", **alpha).train()
        if self.order == "before":
            shard(model)
        run = attach(model, methods()[self.method], total_steps=STEPS)
        if self.meet is not None:
            dist.init_process_group("gloo", init_method=f"file://{self.meet}", rank=rank, world_size=world)
        if self.order == "after":
            shard(model)
        called: nn.Module = model
        if self.order == "ddp":
            called = DistributedDataParallel(model, find_unused_parameters=self.unused is not None)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        events: list[dict[str, Any]] = []
        run.on_event = events.append
        if self.resume is not None:
            load(self.resume, model, run, optimizer)
        for step in range(run.step, STEPS):
            if step == STEPS // 2 and self.save is not None:
                save(self.save, model, run, optimizer)
            self.backward(called, step, rank, world)
            run.before_step(optimizer)
            optimizer.step()
            run.after_step(optimizer)
            optimizer.zero_grad()
        kinds = {name: type(parameter.data).__name__ for name, parameter in model.named_parameters()}
        plan = run.finish()
        found = {
            "ranks": plan.ranks,
            "bad_steps": run.bad_steps,
            "events": events,
            "checksum": checksum(model),
            "sharded": sorted(name for name, kind in kinds.items() if kind == DTensor.__name__),
            "whole": sorted(name for name, kind in kinds.items() if kind != DTensor.__name__),
        }
        if self.export is not None:
            exported = export_adapter(model, self.export)
            found |= {"difference": exported.difference, "allowed": exported.allowed, "path": str(exported.path)}
        return found

    def backward(self, model: nn.Module, step: int, rank: int, world: int) -> None:
        """The backward passes of a step, each on its share of the batch; their sum is the step's."""
        rows = sentences(BATCH * STEPS)[BATCH * step : BATCH * (step + 1)]
        total = labels(language_batch(rows))
        shares = [rows[index :: world * self.parts] for index in range(rank, world * self.parts, world)]
        for index, share in enumerate(shares):
            batch = language_batch(share)
            infinite = self.poison in ((step, rank), (step, rank + world))
            weight = labels(batch) * world / total * (torch.inf if infinite else 1.0)
            with collecting(model) if index < len(shares) - 1 else nullcontext():
                output = model(**batch, output_hidden_states=True)
                skipped = step == self.unused and rank == 1
                (output.hidden_states[1].square().mean() if skipped else output.loss * weight).backward()


@contextmanager
def collecting(model: Any) -> Iterator[None]:
    """Gradients stay the process's own inside."""
    if isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    elif isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)
    else:
        yield


def labels(batch: dict[str, Any]) -> float:
    """Labels that count in the loss of a batch."""
    return float((batch["labels"][:, 1:] != -100).sum())


def checksum(model: nn.Module) -> str:
    """One number for all that training changes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(adapter_tensors(model).items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def save(folder: Path, model: PeftModel, run: AllocationRun, optimizer: torch.optim.Optimizer) -> None:
    """What a resumed run needs; the first process writes, and nothing of the base model."""
    tensors, numbers = run.state_dict()
    state = optimizer.state_dict()
    if dist.get_rank() == 0:
        folder.mkdir()
        save_file(tensors, folder / "tensors.safetensors")
        save_file(adapter_tensors(model), folder / "adapter.safetensors")
        flat = {f"{i}.{key}": value for i, entry in state["state"].items() for key, value in entry.items()}
        save_file(flat, folder / "optimizer.safetensors")
        (folder / "numbers.json").write_text(json.dumps([numbers, state["param_groups"]]))
    dist.barrier()


def load(folder: Path, model: PeftModel, run: AllocationRun, optimizer: torch.optim.Optimizer) -> None:
    """Take up what `save` wrote."""
    numbers, groups = json.loads((folder / "numbers.json").read_text())
    model.load_state_dict(load_file(folder / "adapter.safetensors"), strict=False)
    state: dict[int, dict[str, Any]] = {}
    for name, value in load_file(folder / "optimizer.safetensors").items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    run.load_state_dict(load_file(folder / "tensors.safetensors"), numbers, optimizer)


Scenario = Callable[[int, int], Any]


def in_one_process(rank: int, folder: Path, world: int, scenarios: Callable[[Path], dict[str, Scenario]]) -> None:
    """Run every scenario as one of several processes; write what came out."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT="29500", ACCELERATE_USE_CPU="true")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world)
    results = {name: scenario(rank, world) for name, scenario in scenarios(folder).items()}
    (folder / f"{rank}.json").write_text(json.dumps(results))
    gc.collect()  # wrappers hold on to the process group
    dist.barrier()
    dist.destroy_process_group()


def loop(**settings: Any) -> Scenario:
    """A scenario that is a loop."""
    return partial(Loop.run, Loop(**settings))
