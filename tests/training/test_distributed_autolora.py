"""AutoLoRA on two processes over gloo: the same logits on both, and those of one process with the doubled batch."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import tiny_peft
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from trainers import BATCH, adapter_tensors, language_batch, sentences, train

from loralloc import AutoLoRA, UserError, attach

pytestmark = pytest.mark.slow

WORLD, STEPS = 2, 6
HELD_OUT = sentences(16, seed=5)


def loop_run(mode: str, rank: int, world: int) -> dict[str, Any]:
    """A loop of one's own, each batch split over the processes."""
    model = tiny_peft("llama").train()
    batches = [language_batch(HELD_OUT[at : at + 4]) for at in range(0, 16, 4)]
    run = attach(model, AutoLoRA(batches, mode=mode, logit_learning_rate=0.05), STEPS)  # type: ignore[arg-type]
    wrapped = DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    rows, clip = sentences(BATCH * STEPS), 0.5
    run.max_grad_norm = clip
    for step in range(STEPS):
        whole = rows[BATCH * step : BATCH * (step + 1)]
        batch = language_batch(whole[rank::world])
        weight, total = (float((b["labels"][:, 1:] != -100).sum()) for b in (batch, language_batch(whole)))
        (wrapped(**batch).loss * (weight * world / total)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        run.before_step(optimizer)
        optimizer.step()
        run.after_step(optimizer)
        optimizer.zero_grad()
    return {
        "logits": run.state.logits.tolist(),
        "gradient": run.state.mean.tolist(),
        "weights": {name: tensor.tolist() for name, tensor in adapter_tensors(model).items()},
        "ranks": run.finish().ranks,
    }


def refused_run(mode: str, rank: int, world: int) -> str:
    """What a loop is told that adds a term to the model's loss, here on the last process alone."""
    model = tiny_peft("llama").train()
    batch = language_batch(HELD_OUT[:4])
    run = attach(model, AutoLoRA([batch], mode=mode), STEPS)  # type: ignore[arg-type]
    wrapped = DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    penalty = sum(p.square().sum() for n, p in model.named_parameters() if "lora_A" in n) if rank + 1 == world else 0.0
    (wrapped(**batch).loss + penalty).backward()
    with pytest.raises(UserError) as refusal:
        run.before_step(optimizer)
    return str(refusal.value)


def trainer_run(folder: Path, world: int) -> dict[str, Any]:
    """transformers' Trainer, which multiplies the loss by the number of processes."""
    method = AutoLoRA(HELD_OUT, logit_learning_rate=0.05)
    settings = {"max_steps": STEPS, "per_device_train_batch_size": BATCH // world}
    trainer, allocation = train(folder, method=method, **settings)
    assert allocation.plan is not None
    return {
        "logits": allocation.run.state.logits.tolist(),
        "gradient": allocation.run.state.mean.tolist(),
        "weights": {name: tensor.tolist() for name, tensor in adapter_tensors(trainer.model).items()},
        "ranks": allocation.plan.ranks,
    }


SCENARIOS: dict[str, Callable[[Path, int, int], dict[str, Any]]] = {
    "fast": lambda folder, rank, world: loop_run("fast", rank, world),
    "paper": lambda folder, rank, world: loop_run("paper", rank, world),
    "trainer": lambda folder, rank, world: trainer_run(folder, world),
}


def in_one_of_two_processes(rank: int, folder: Path) -> None:
    """Run every scenario; write what came out."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT="29501", ACCELERATE_USE_CPU="true")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=WORLD)
    results: dict[str, Any] = {name: scenario(folder / name, rank, WORLD) for name, scenario in SCENARIOS.items()}
    results["refused"] = [refused_run(mode, rank, WORLD) for mode in ("fast", "paper")]
    (folder / f"{rank}.json").write_text(json.dumps(results))
    gc.collect()  # wrappers hold on to the process group
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of every scenario on each of two processes."""
    folder = tmp_path_factory.mktemp("two")
    spawn(in_one_of_two_processes, args=(folder,), nprocs=WORLD)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


def test_both_processes_refuse_a_loss_that_is_not_the_models_own(two: Any) -> None:
    """They end together: what one of them adds shows in the mean on both."""
    for mine, theirs in zip(*(result["refused"] for result in two), strict=True):
        assert mine == theirs
        assert "off from the one that the training loop has" in mine


@pytest.mark.parametrize("name", SCENARIOS)
def test_both_processes_learn_the_same_and_what_one_alone_does(name: str, two: Any, tmp_path: Path) -> None:
    assert two[0][name] == two[1][name], "bit for bit"
    alone, both = SCENARIOS[name](tmp_path, 0, 1), two[0][name]
    if name != "trainer":  # whose sampler deals the examples out in another way
        found, expected = (torch.tensor(result["gradient"]) for result in (both, alone))
        torch.testing.assert_close(found, expected, rtol=0.02, atol=1e-5)
    assert torch.tensor(alone["gradient"]).abs().max() > 1e-3
