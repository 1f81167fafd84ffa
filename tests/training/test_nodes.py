"""With `save_on_each_node`, the first process of every node writes all that the first of all does."""

from __future__ import annotations

from pathlib import Path

import pytest
from models import tiny_peft
from trainers import arguments, build, language_batch, read_trace, sentences, train_until_killed
from transformers import TrainingArguments

from loralloc.training.callback import MARKER, TENSORS
from loralloc.training.manifest import MANIFEST, damage
from loralloc.training.trainer import PlainTrainer, SkipBadSteps

SAVING = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8, "save_on_each_node": True}


@pytest.fixture
def second_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process takes itself for the first one of the second node."""
    monkeypatch.setattr(TrainingArguments, "process_index", property(lambda self: 1))


@pytest.mark.usefixtures("second_node")
def test_an_allocation_goes_on_from_what_a_node_has_written(tmp_path: Path) -> None:
    settings = {**SAVING, "trace": tmp_path / "trace.jsonl"}
    trainer, _ = train_until_killed(tmp_path, 6, **settings)
    assert trainer.args.should_save
    assert not trainer.state.is_world_process_zero
    trainer, allocation = build(tmp_path, **settings)
    trainer.train(resume_from_checkpoint=True)
    assert allocation.plan is not None
    assert (tmp_path / "checkpoint-8" / "ranks.json").is_file()
    assert [event["event"] for event in read_trace(tmp_path / "trace.jsonl")][-1] == "finish"


@pytest.mark.usefixtures("second_node")
def test_a_process_that_does_not_save_writes_nothing(tmp_path: Path) -> None:
    settings = {**SAVING, "save_on_each_node": False, "trace": tmp_path / "trace.jsonl"}
    train_until_killed(tmp_path, 6, **settings)
    assert {path.name for path in tmp_path.rglob("*")}.isdisjoint({MARKER, TENSORS, "trace.jsonl"})


@pytest.mark.usefixtures("second_node")
def test_a_checkpoint_of_a_run_is_whole_on_each_node(tmp_path: Path) -> None:
    trainer = PlainTrainer(
        model=tiny_peft("llama"),
        args=arguments(tmp_path, **SAVING, save_total_limit=1),
        train_dataset=sentences(),
        data_collator=language_batch,
        log=tmp_path / "log.jsonl",
        guard=SkipBadSteps(),
    )
    trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-8"]
    assert damage(tmp_path / "checkpoint-8") is None
    assert {MANIFEST, SkipBadSteps.FILE} <= {path.name for path in (tmp_path / "checkpoint-8").iterdir()}
