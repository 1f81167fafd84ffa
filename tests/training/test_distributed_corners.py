"""DDP where processes are not alike: gradients collected, unused parameters, short batches. Trainers under FSDP2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from fsdp2 import launched_with_fsdp2
from sharded_loop import Loop, Scenario, checksum, in_one_process, loop
from torch.multiprocessing.spawn import spawn
from trainers import build, sentences, train, train_until_killed

from loralloc.sharding import is_sharded

pytestmark = pytest.mark.slow


def uneven(folder: Path, world: int) -> dict[str, Any]:
    """Two epochs of 37 examples, in batches of 4 for each process: the last ones of an epoch are 3 and 2."""
    data = sentences(37)
    trainer, allocation = build(
        folder, data=data, max_steps=-1, num_train_epochs=2, per_device_train_batch_size=8 // world
    )
    trainer.train()
    assert allocation.plan is not None
    assert trainer.model is not None
    return {"ranks": allocation.plan.ranks, "checksum": checksum(trainer.model), "steps": trainer.state.global_step}


def in_a_sharded_trainer(folder: Path) -> dict[str, Any]:
    """A Trainer with the callback under FSDP2, whole and killed before the seventh step; the run of DDP beside it."""
    settings: dict[str, Any] = {"max_steps": 8, "per_device_train_batch_size": 4}
    averaged, _ = train(folder / "ddp", **settings)
    settings |= {"save_strategy": "steps", "save_steps": 4}
    with launched_with_fsdp2():
        whole, allocation = train(folder / "whole", **settings)
        train_until_killed(folder / "killed", 6, **settings)
        dist.barrier()
        resumed, _ = build(folder / "killed", **settings)
        resumed.train(resume_from_checkpoint=str(folder / "killed" / "checkpoint-4"))
    assert allocation.plan is not None
    models: list[Any] = [averaged.model, whole.model, resumed.model]
    return {
        "ranks": allocation.plan.ranks,
        "checksums": [checksum(model) for model in models],
        "sharded": [is_sharded(model) for model in models],
        "files": sorted(path.name for path in (folder / "killed" / "checkpoint-4").iterdir()),
    }


def scenarios(folder: Path) -> dict[str, Scenario]:
    return {
        "collected": loop(order="ddp", parts=2),
        "at once": loop(order="ddp"),
        "unused": loop(order="ddp", unused=5),
        "bad step": loop(order="ddp", poison=(6, 1)),
        "sharded trainer": lambda rank, world: in_a_sharded_trainer(folder / "trainer"),
        "uneven": lambda rank, world: uneven(folder / "uneven", world),
    }


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of every scenario on each of two processes."""
    folder = tmp_path_factory.mktemp("two")
    spawn(in_one_process, args=(folder, 2, scenarios), nprocs=2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", scenarios(Path()))
def test_both_processes_end_with_the_same_adapter(name: str, two: Any) -> None:
    assert two[0][name] == two[1][name]
    assert sum(two[0][name]["ranks"].values()) == 12


def test_gradients_collected_without_averaging_make_the_same_plan(two: Any) -> None:
    alone = Loop(order="whole", parts=2).run(0, 1)
    assert two[0]["collected"]["ranks"] == two[0]["at once"]["ranks"] == alone["ranks"]


def test_what_one_process_does_not_use_still_moves_by_the_others_gradient(two: Any) -> None:
    assert two[0]["unused"]["bad_steps"] == 0
    assert two[0]["unused"]["checksum"] != two[0]["at once"]["checksum"]


def test_a_short_last_batch_is_a_step_like_any_other(two: Any) -> None:
    assert two[0]["uneven"]["steps"] == 10


def test_a_trainer_under_fsdp2_ends_with_the_adapter_of_ddp_also_when_killed_and_resumed(two: Any) -> None:
    found = two[0]["sharded trainer"]
    assert found["sharded"] == [False, True, True]
    assert len(set(found["checksums"])) == 1
    assert "optimizer.pt" in found["files"]
    assert not [name for name in found["files"] if "fsdp" in name or name.startswith("model")]


def test_a_bad_step_of_one_process_is_skipped_on_both(two: Any) -> None:
    assert two[0]["bad step"]["bad_steps"] == 1
