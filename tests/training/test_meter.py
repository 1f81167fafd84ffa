"""Rows of the log say how fast a training is, and how much memory it takes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.command import read_rows
from models import tiny_peft
from trainers import arguments, class_batch, sentences
from transformers import TrainerCallback

from loralloc.training import meter as module
from loralloc.training.meter import Meter
from loralloc.training.trainer import PlainTrainer, SkipBadSteps


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time; the test moves it."""
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    return now


def test_padding_is_no_token(clock: list[float]) -> None:
    meter = Meter("tokens")
    meter.see({"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]])})
    meter.see({"input_ids": torch.ones(1, 6, dtype=torch.long)})  # packed: no padding, no mask
    clock[0] = 2.0
    assert meter.read()["tokens_per_second"] == 5.0


def test_examples_are_rows(clock: list[float]) -> None:
    meter = Meter("examples")
    meter.see({"input_ids": torch.ones(4, 3, dtype=torch.long), "labels": torch.zeros(4)})
    clock[0] = 0.5
    assert meter.read()["examples_per_second"] == 8.0


def test_each_reading_counts_from_the_last(clock: list[float]) -> None:
    meter = Meter("examples")
    rates = []
    for count in (2, 6):
        meter.see({"labels": torch.zeros(count)})
        clock[0] += 1
        rates.append(meter.read()["examples_per_second"])
    assert rates == [2.0, 6.0]


def test_a_pause_takes_none_of_the_time(clock: list[float]) -> None:
    meter = Meter("examples")
    meter.see({"labels": torch.zeros(6)})
    clock[0] += 1
    with meter.paused():
        clock[0] += 5
    clock[0] += 1
    assert meter.read()["examples_per_second"] == 3.0


def test_processor_time_goes_on_from_what_a_resumed_run_had_and_leaves_pauses_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [100.0]
    monkeypatch.setattr(module, "processor_time", lambda: now[0])
    meter = Meter("examples")
    now[0] += 2
    with meter.paused():
        now[0] += 50
    now[0] += 1
    assert meter.processor_seconds == 3.0
    meter.start()
    assert meter.processor_seconds == 3.0, "rows of the log start anew, it does not"
    meter.processor_seconds = 10.0
    now[0] += 4
    assert meter.processor_seconds == 14.0


def test_processor_time_counts_work_and_not_sleep() -> None:
    begun = module.processor_time()
    time.sleep(0.2)
    slept = module.processor_time() - begun
    while module.processor_time() - begun < 0.2:
        pass
    assert slept < 0.1


def test_memory_is_at_least_what_is_there() -> None:
    before = Meter("examples").read()["memory_mib"]
    held = torch.ones(64 * 2**20, dtype=torch.uint8)
    after = Meter("examples").read()["memory_mib"]
    assert after >= before > 0
    assert after >= held.numel() / 2**20


class Tick(TrainerCallback):
    """A step takes a second."""

    def __init__(self, clock: list[float]) -> None:
        self.clock = clock

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.clock[0] += 1


def test_an_evaluation_takes_none_of_the_time(tmp_path: Path, clock: list[float], monkeypatch: Any) -> None:
    trainer = PlainTrainer(
        model=tiny_peft("bert"),
        args=arguments(tmp_path, max_steps=4, logging_steps=2, eval_strategy="steps", eval_steps=2),
        train_dataset=sentences(),
        eval_dataset=sentences(4),
        data_collator=class_batch,
        log=tmp_path / "log.jsonl",
        guard=SkipBadSteps(),
        callbacks=[Tick(clock)],
    )
    alive = trainer.evaluation_loop

    def slow(*args: Any, **kwargs: Any) -> Any:
        clock[0] += 100
        return alive(*args, **kwargs)

    monkeypatch.setattr(trainer, "evaluation_loop", slow)
    trainer.train()
    rows = [row for row in read_rows(tmp_path / "log.jsonl") if "loss" in row]
    assert [(row["step"], row["examples_per_second"]) for row in rows] == [(2, 8.0), (4, 8.0)]
