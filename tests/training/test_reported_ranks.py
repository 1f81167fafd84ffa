"""Rank statistics reach what a Trainer reports to, from the first row on."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from models import tiny_llama
from peft import LoraConfig, get_peft_model
from trainers import build
from transformers import DefaultFlowCallback, TrainerCallback

from loralloc import RankAllocation

RANKS = {"rank/total", "rank/min", "rank/max", "budget", "params/active"}
KINDS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
"""Of a Llama; documented names, which dashboards are built on."""


class Recorder(TrainerCallback):
    """A tracker: keeps what it is told when it is told."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.rows.append(dict(logs))


def tensorboard_tags(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every scalar in TensorBoard's event files: records of length, checksum, message, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[str, list[tuple[int, float]]] = {}
    for file in folder.rglob("events.out.tfevents.*"):
        content, place = file.read_bytes(), 0
        while place < len(content):
            length = int.from_bytes(content[place : place + 8], "little")
            event = Event.FromString(content[place + 12 : place + 12 + length])
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
            place += 16 + length
    return found


def test_tensorboard_has_the_ranks_beside_every_loss(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer, allocation = build(tmp_path, report_to=["tensorboard"], logging_steps=6)
    trainer.train()
    tags = tensorboard_tags(tmp_path / "events")
    steps = [step for step, _ in tags["train/loss"]]
    assert steps == [6, 12, 18, 24]
    for name in RANKS:
        assert [step for step, _ in tags[f"train/{name}"]] == steps, name
    assert allocation.plan is not None
    assert tags["train/rank/total"][-1] == (24, allocation.plan.total_rank)


def test_tensorboard_has_mean_rank_and_closed_share_of_every_kind(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    model = get_peft_model(tiny_llama(layers=2), LoraConfig(r=4, target_modules="all-linear"))
    trainer, allocation = build(tmp_path, model=model, report_to=["tensorboard"], logging_steps=6)
    trainer.train()
    tags = tensorboard_tags(tmp_path / "events")
    assert {name for name in tags if name.startswith(("train/rank/mean/", "train/rank/closed/"))} == {
        f"train/rank/{what}/{kind}" for what in ("mean", "closed") for kind in KINDS
    }
    assert allocation.plan is not None
    for kind in KINDS:
        ranks = [rank for name, rank in allocation.plan.ranks.items() if name.endswith(kind)]
        assert tags[f"train/rank/mean/{kind}"][-1] == (24, pytest.approx(mean(ranks)))
        assert tags[f"train/rank/closed/{kind}"][-1] == (24, pytest.approx(1 - mean(ranks) / 4))
    assert tags["train/rank/closed/q_proj"][0][1] < 1


def test_kinds_are_told_apart_by_the_shortest_name(tmp_path: Path) -> None:
    """The names of a BERT's two output layers end alike."""
    trainer, allocation = build(tmp_path, "bert")
    del trainer
    allocation.run.begin(24)
    names = {name.removeprefix("rank/mean/") for name in allocation.run.statistics() if name.startswith("rank/mean/")}
    assert names == {"query", "attention.output", "output.dense"}
    assert all(value == 0 for name, value in allocation.run.statistics().items() if name.startswith("rank/closed/"))


def test_it_stands_before_trackers_and_after_the_flow(tmp_path: Path) -> None:
    trainer, allocation = build(tmp_path, report_to=["tensorboard"])
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert kinds[:2] == [DefaultFlowCallback, RankAllocation]
    assert kinds.count(RankAllocation) == 1
    assert any("TensorBoard" in kind.__name__ for kind in kinds[2:])
    assert trainer.callback_handler.callbacks[1] is allocation


def test_a_tracker_that_is_added_before_or_after_sees_the_same(tmp_path: Path) -> None:
    before, after = Recorder(), Recorder()
    trainer, _ = build(tmp_path, callbacks=[after], logging_steps=12)
    trainer.callback_handler.callbacks.insert(2, before)
    trainer.train()
    losses = [row for row in before.rows if "loss" in row]
    assert len(losses) == 2
    assert all(row.keys() >= RANKS for row in losses)
    assert after.rows == before.rows
    history = [{k: v for k, v in row.items() if k != "step"} for row in trainer.state.log_history if "loss" in row]
    assert history == losses


def test_events_are_sent_to_every_callback_once(tmp_path: Path) -> None:
    class Count(TrainerCallback):
        begun = 0

        def on_init_end(self, *args: Any, **kwargs: Any) -> None:
            self.begun += 1

    count = Count()
    build(tmp_path, callbacks=[count], report_to=["tensorboard"])
    assert count.begun == 1
