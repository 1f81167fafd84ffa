"""What it costs to keep an adapter whole over a sharded base instead of sharding it too: memory, time, bytes sent.

    torchrun --nproc-per-node=2 benchmarks/sharding.py

Plain LoRA on a small Llama over gloo on CPUs, no allocation, the same batches. Both ways take turns, so that what else
the machine does falls on both. Memory is what a process holds between steps: base, adapter, gradients, Adam's moments.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from loralloc import kept_whole
from loralloc.training.shared_gradients import SharedGradients

WARM_UP = 2


class BytesSent(TorchDispatchMode):
    """Counts the bytes that each of n processes in a ring would send: (n − 1) / n of a tensor; an all-reduce, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, world = str(func), dist.get_world_size()
        result = func(*args, **(kwargs or {}))
        if not name.startswith("c10d"):  # copies in and out
            return result
        if "allgather" in name or "reduce_scatter" in name:
            self.bytes += _largest(args, result) * (world - 1) / world
        elif "allreduce" in name:
            self.bytes += 2 * _largest(args, result) * (world - 1) / world
        return result


def _largest(*values: Any) -> int:
    """Bytes of the largest tensor in nested lists."""
    sizes = [0]
    for value in values:
        if isinstance(value, Tensor):
            sizes.append(value.nbytes)
        elif isinstance(value, list | tuple):
            sizes.append(_largest(*value))
    return max(sizes)


def build(layers: int, hidden: int, rank: int) -> PeftModel:
    """The model with its adapter, the same in every process."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=8,
    )  # fmt: skip
    return get_peft_model(LlamaForCausalLM(config), LoraConfig(r=rank, target_modules="all-linear"))


def sharded(model: PeftModel, whole: bool) -> PeftModel:
    """Shard the model; the adapter is sharded too unless `whole`."""
    ignored = kept_whole(model) if whole else None
    base: Any = model.get_base_model()
    for block in base.model.layers:
        fully_shard(block, ignored_params=ignored)
    fully_shard(model, ignored_params=ignored)
    if whole:
        SharedGradients(model)
    return model


def stepper(model: PeftModel, batch: dict[str, Tensor]) -> tuple[Callable[[], None], torch.optim.Optimizer]:
    """A function that makes one step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        model(**batch).loss.backward()
        optimizer.step()

    return step, optimizer


def held(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """Bytes in this process of the base, and of the trained weights with their gradients and moments."""
    trained = [p for p in model.parameters() if p.requires_grad]
    moments = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    gradients = [p.grad for p in trained if p.grad is not None]
    base = [p for p in model.parameters() if not p.requires_grad]
    return sum(map(_local, base)), sum(map(_local, [*trained, *gradients, *moments]))


def _local(tensor: Tensor) -> int:
    return tensor.to_local().nbytes if isinstance(tensor, DTensor) else tensor.nbytes


def main() -> None:
    """Print a table, from the first process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"layers": 8, "hidden": 512, "rank": 16, "samples": 2, "tokens": 128, "steps": 12}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(dist.get_rank())
    ids = torch.randint(4096, (options.samples, options.tokens), generator=generator)
    models = {
        name: sharded(build(options.layers, options.hidden, options.rank), whole)
        for name, whole in {"adapter whole": True, "adapter sharded": False}.items()
    }
    steps = {name: stepper(model, {"input_ids": ids, "labels": ids}) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(WARM_UP + options.steps):
        for name, (step, _) in steps.items():
            dist.barrier()
            begin = time.perf_counter()
            step()
            if turn >= WARM_UP:
                times[name].append(time.perf_counter() - begin)
    rows = []
    for name, (step, optimizer) in steps.items():
        with BytesSent() as sent:
            step()
        base, trained = held(models[name], optimizer)
        rows.append((name, base / 2**20, trained / 2**20, sent.bytes / 2**20, statistics.median(times[name])))
    if dist.get_rank() == 0:
        print("| | base, MiB | adapter, gradients, moments, MiB | sent in a step, MiB | step, s |")
        print("|---|---|---|---|---|")
        for name, *figures in rows:
            print(f"| {name} |", " | ".join(f"{figure:.2f}" for figure in figures), "|")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
