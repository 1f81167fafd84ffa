"""What the options of a trainer put into a checkpoint comes back, and none of it is pickled."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loralloc.training import checkpoint as checkpoints
from loralloc.training.trainer import PlainTrainer


def scaler(scale: float) -> torch.amp.GradScaler:
    """A loss scaler that has begun to count, on the CPU."""
    made = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)
    made.scale(torch.ones(1))
    return made


def trainer(scale: torch.amp.GradScaler | None) -> Any:
    return SimpleNamespace(accelerator=SimpleNamespace(scaler=scale), args=SimpleNamespace(should_save=True))


def test_the_loss_scale_of_fp16(tmp_path: Path) -> None:
    ours, theirs = scaler(512.0), scaler(65536.0)
    assert theirs.get_scale() != ours.get_scale()
    PlainTrainer._save_scaler(trainer(ours), str(tmp_path))
    PlainTrainer._load_scaler(trainer(theirs), str(tmp_path))
    assert theirs.state_dict() == ours.state_dict()
    assert [path.name for path in tmp_path.iterdir()] == ["scaler.json"]


def test_without_fp16_there_is_none(tmp_path: Path) -> None:
    PlainTrainer._save_scaler(trainer(None), str(tmp_path))
    PlainTrainer._load_scaler(trainer(None), str(tmp_path))
    PlainTrainer._load_scaler(trainer(scaler(2.0)), None)
    assert list(tmp_path.iterdir()) == []


class Nested(torch.optim.SGD):
    """Packs its state as 8-bit optimizers do, one level deeper."""

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        packed = {
            index: {"steps": 3, "packed": {"codes": entries["momentum_buffer"], "bits": 8}}
            for index, entries in state["state"].items()
        }
        return {**state, "state": packed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        unpacked = {index: entries["packed"] for index, entries in state_dict["state"].items()}
        assert all(entries["steps"] == 3 and entries["packed"]["bits"] == 8 for entries in state_dict["state"].values())
        state = {index: {"momentum_buffer": entries["codes"]} for index, entries in unpacked.items()}
        super().load_state_dict({**state_dict, "state": state})


def test_optimizers_that_nest_their_state(tmp_path: Path) -> None:
    def build() -> tuple[torch.nn.Parameter, Any, Any]:
        weight = torch.nn.Parameter(torch.ones(3))
        optimizer = Nested([weight], lr=0.1, momentum=0.9)
        return weight, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer)

    (weight, ours, schedule), (_, theirs, other) = build(), build()
    weight.grad = torch.tensor([1.0, 2.0, 3.0])
    ours.step()
    checkpoints.save_optimizer(tmp_path, ours, schedule)
    checkpoints.load_optimizer(tmp_path, theirs, other)
    (loaded,) = theirs.state.values()
    assert torch.equal(loaded["momentum_buffer"], torch.tensor([1.0, 2.0, 3.0]))


@pytest.mark.parametrize("kind", ["Adafactor", "Adamax"])
def test_a_checkpoint_of_a_resumed_run_is_written_in_the_same_order(tmp_path: Path, kind: str) -> None:
    """Eleven weights: as text, 10 comes before 2."""
    import transformers

    weights = [torch.nn.Parameter(torch.ones(2, 2)) for _ in range(11)]
    made: Any = getattr(torch.optim, kind, None) or getattr(transformers, kind)
    optimizer = made(weights, lr=0.1, **({"relative_step": False} if made is transformers.Adafactor else {}))
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    for weight in weights:
        weight.grad = torch.ones(2, 2)
    optimizer.step()
    texts = []
    for _ in range(2):
        checkpoints.save_optimizer(tmp_path, optimizer, schedule)
        texts.append((tmp_path / "optimizer.json").read_text(encoding="utf-8"))
        checkpoints.load_optimizer(tmp_path, optimizer, schedule)
    assert texts[0] == texts[1]
