"""DDP where processes are not alike: gradients collected without averaging, unused parameters, a short last batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sharded_loop import Loop, Scenario, checksum, in_one_process, loop
from torch.multiprocessing.spawn import spawn
from trainers import build, sentences

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


def scenarios(folder: Path) -> dict[str, Scenario]:
    return {
        "collected": loop(order="ddp", parts=2),
        "at once": loop(order="ddp"),
        "unused": loop(order="ddp", unused=5),
        "bad step": loop(order="ddp", poison=(6, 1)),
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


def test_a_bad_step_of_one_process_is_skipped_on_both(two: Any) -> None:
    assert two[0]["bad step"]["bad_steps"] == 1
