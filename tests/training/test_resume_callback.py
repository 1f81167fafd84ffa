"""A Trainer's run that is killed and resumed is the run that was not (promise 4, for the callback)."""

from __future__ import annotations

import errno
import functools
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import tiny_peft
from safetensors.torch import save_file
from torch import Tensor
from trainers import (
    STEPS,
    KillAt,
    KilledError,
    adapter_tensors,
    build,
    read_trace,
    same_tensors,
    sentences,
    train,
    train_until_killed,
    training_rows,
)
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loralloc import ABLoRA, AdaLoRA, AutoLoRA, Budget, RankAllocation, Truncate, UserError
from loralloc.training import callback
from loralloc.training.callback import MARKER, TENSORS
from loralloc.training.manifest import sealed, unsealed

SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 8, "logging_steps": 1}

METHODS = {
    "default": AdaLoRA(Budget(average_rank=2)),
    "parameters": AdaLoRA(Budget(fraction=0.5), interval=2),
    "reference": AdaLoRA(Budget(average_rank=2), order="reference", parity="sgd"),
    "ablora": ABLoRA(
        Budget(average_rank=2), sentences(24, seed=5), warmup=3, interval=5, rounds=3, samples=12, resample=True
    ),
    "autolora": AutoLoRA(sentences(20, seed=5), logit_learning_rate=0.05, check_every=3),
    "autolora-paper": AutoLoRA.as_published(sentences(20, seed=5), logit_learning_rate=0.05),
    "truncate": Truncate(Budget(average_rank=2), recover=10),
    "published": AdaLoRA.as_published(Budget(total_rank=7), penalty="paper", importance="sensitivity"),
}


def moments(trainer: Trainer) -> dict[str, Tensor]:
    assert trainer.optimizer is not None
    state = trainer.optimizer.state_dict()["state"]
    return {f"{index}.{key}": value.clone() for index, entry in state.items() for key, value in entry.items()}


def scores(allocation: RankAllocation) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in allocation.run.state_dict()[0].items()}


@dataclass(frozen=True)
class Run:
    """Everything that a resumed run must reproduce."""

    parameters: dict[str, Tensor]
    moments: dict[str, Tensor]
    scores: dict[str, Tensor]
    plan: dict[str, Any]
    log: list[dict[str, Any]]
    trace: str


def everything(trainer: Trainer, allocation: RankAllocation, trace: Path) -> Run:
    assert allocation.plan is not None
    return Run(
        parameters=adapter_tensors(trainer.model),
        moments=moments(trainer),
        scores=scores(allocation),
        plan=allocation.plan.to_dict(),
        log=training_rows(trainer),
        trace=trace.read_text(),
    )


def settings_of(folder: Path, method: str = "default", **others: Any) -> dict[str, Any]:
    """A model with dropout, so that the state of the generators counts."""
    model = tiny_peft("llama", lora_dropout=0.1)
    return {**SAVING, "model": model, "method": METHODS[method], "trace": folder / "trace.jsonl", **others}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """A run of each method that nothing stops, made when it is first asked for."""

    @functools.cache
    def run(method: str) -> Run:
        folder = tmp_path_factory.mktemp(method)
        return everything(*train(folder, **settings_of(folder, method, save_strategy="no")), folder / "trace.jsonl")

    return run


def forget() -> None:
    """Leave the generators as a new process might find them."""
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("method", "stop"),
    [
        ("default", 2),  # in the warm-up
        slow("default", 4),  # when the budget begins to fall
        ("default", 8),  # while it falls
        slow("default", 14),
        ("default", 16),  # after the step that freezes the ranks
        slow("default", 22),
        ("parameters", 8),
        slow("parameters", 20),
        slow("reference", 8),
        slow("reference", 20),
        ("ablora", 8),  # with ranks that are one round old
        slow("ablora", 14),
        slow("published", 8),
        slow("published", 20),
        ("autolora", 8),
        slow("autolora-paper", 8),
    ],
)
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(
    method: str, stop: int, uninterrupted: Callable[[str], Run], tmp_path: Path
) -> None:
    expected = uninterrupted(method)
    killed, _ = train_until_killed(tmp_path, stop + 1, **settings_of(tmp_path, method, save_steps=stop))
    assert killed.state.global_step == stop + 1  # one step beyond the checkpoint is lost and done again
    assert not same_tensors(adapter_tensors(killed.model), expected.parameters)
    forget()
    trainer, allocation = build(tmp_path, **settings_of(tmp_path, method, save_steps=stop))
    trainer.train(resume_from_checkpoint=True)
    resumed = everything(trainer, allocation, tmp_path / "trace.jsonl")
    assert same_tensors(resumed.parameters, expected.parameters)
    assert same_tensors(resumed.moments, expected.moments)
    assert same_tensors(resumed.scores, expected.scores)
    assert resumed.plan == expected.plan
    assert resumed.log == expected.log
    assert resumed.trace == expected.trace


@pytest.mark.slow
def test_killed_twice_equals_uninterrupted_too(uninterrupted: Callable[[str], Run], tmp_path: Path) -> None:
    train_until_killed(tmp_path, 9, **settings_of(tmp_path))
    forget()
    trainer, _ = build(tmp_path, **settings_of(tmp_path, callbacks=[KillAt(17)]))
    with pytest.raises(KilledError):
        trainer.train(resume_from_checkpoint=True)
    forget()
    trainer, allocation = build(tmp_path, **settings_of(tmp_path))
    trainer.train(resume_from_checkpoint=True)
    resumed, expected = everything(trainer, allocation, tmp_path / "trace.jsonl"), uninterrupted("default")
    assert same_tensors(resumed.parameters, expected.parameters)
    assert (resumed.plan, resumed.trace) == (expected.plan, expected.trace)


class _KillAtEnd(TrainerCallback):
    """End the process after the last checkpoint, before the run is finished."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == state.max_steps:
            raise KilledError


@pytest.mark.parametrize("killed", [True, False])
def test_a_resume_after_the_last_step_finishes_the_run(
    killed: bool, uninterrupted: Callable[[str], Run], tmp_path: Path
) -> None:
    settings = settings_of(tmp_path)
    if killed:
        with pytest.raises(KilledError):
            train(tmp_path, callbacks=[_KillAtEnd()], **settings)
    else:  # a script that is run again
        train(tmp_path, **settings)
    trainer, allocation = build(tmp_path, **settings_of(tmp_path))
    trainer.train(resume_from_checkpoint=True)
    assert allocation.plan is not None
    assert allocation.plan.to_dict() == uninterrupted("default").plan
    assert same_tensors(adapter_tensors(trainer.model), uninterrupted("default").parameters)
    assert (tmp_path / "trace.jsonl").read_text() == uninterrupted("default").trace


class _FullDisk:
    """Writes the allocation's tensors until the disk is full."""

    def __init__(self, files: int) -> None:
        self.left = files

    def __call__(self, tensors: dict[str, Tensor], path: Path) -> None:
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save_file(tensors, path)


def test_a_save_that_fails_leaves_the_only_checkpoint_before_it(
    uninterrupted: Callable[[str], Run], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(callback, "save_file", _FullDisk(1))
    with pytest.raises(OSError, match="No space left on device"):
        train(tmp_path, **settings_of(tmp_path, save_total_limit=1))
    monkeypatch.undo()
    whole = str(tmp_path / "checkpoint-8")
    trainer, _ = build(tmp_path, **settings_of(tmp_path))
    cure = re.escape(f", in the same output_dir; the newest there is resume_from_checkpoint={whole!r}")
    with pytest.raises(UserError, match=rf"checkpoint-16 has no usable rank-allocation state \(.*{cure}$"):
        trainer.train(resume_from_checkpoint=True)
    trainer, _ = build(tmp_path, **settings_of(tmp_path))
    trainer.train(resume_from_checkpoint=whole)
    assert same_tensors(adapter_tensors(trainer.model), uninterrupted("default").parameters)


def test_one_checkpoint_is_enough(tmp_path: Path) -> None:
    train(tmp_path, save_total_limit=1, **SAVING)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{STEPS}"]
    assert (tmp_path / f"checkpoint-{STEPS}" / MARKER).is_file()


# One checkpoint in the middle of a run, of which each test has a copy to spoil.


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    train_until_killed(folder, 9, **SAVING)
    return folder / "checkpoint-8"


@pytest.fixture
def checkpoint(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "checkpoint-8"))


def resume(checkpoint: Path, **settings: Any) -> RankAllocation:
    """Resume from a checkpoint in the output folder it lies in."""
    trainer, allocation = build(checkpoint.parent, **{**SAVING, **settings})
    trainer.train(resume_from_checkpoint=True)
    return allocation


def rewrite(checkpoint: Path, **numbers: Any) -> None:
    """Let the allocation's state say something else, with a checksum that fits."""
    path = checkpoint / MARKER
    path.write_text(sealed({**unsealed(path.read_bytes()), **numbers}))


def test_bad_steps_before_the_checkpoint_are_remembered(checkpoint: Path) -> None:
    rewrite(checkpoint, bad_steps=3)
    plan = resume(checkpoint).plan
    assert plan is not None
    assert (plan.provenance["bad_steps"], plan.provenance["steps"]) == (3, STEPS)


# A checkpoint that cannot be resumed from is refused in words.


UNUSABLE = r"checkpoint-8 has no usable rank-allocation state \("


@pytest.mark.parametrize("missing", [MARKER, TENSORS])
def test_a_checkpoint_without_the_callbacks_files_is_refused(missing: str, checkpoint: Path) -> None:
    (checkpoint / missing).unlink()
    cure = r"\); resume from a checkpoint that was written with this callback, in the same output_dir"
    with pytest.raises(UserError, match=f"{UNUSABLE}.*{re.escape(missing)}.*{cure}"):
        resume(checkpoint)


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", "null", '{"method": "adalora"}'])
def test_a_damaged_marker_is_refused(content: str, checkpoint: Path) -> None:
    (checkpoint / MARKER).write_text(content)
    with pytest.raises(UserError, match=UNUSABLE):
        resume(checkpoint)


def test_damaged_tensors_are_refused(checkpoint: Path) -> None:
    path = checkpoint / TENSORS
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=UNUSABLE):
        resume(checkpoint)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "gated_factors.safetensors", TENSORS])
def test_a_flipped_bit_is_refused(name: str, checkpoint: Path) -> None:
    path = checkpoint / name
    content = bytearray(path.read_bytes())
    content[-9] ^= 1  # within the last tensor
    path.write_bytes(bytes(content))
    words = f"{name} has other content than was written"
    with pytest.raises(UserError, match=f"{UNUSABLE}ValueError: {re.escape(words)}"):
        resume(checkpoint)


def test_a_state_of_another_step_is_refused(checkpoint: Path) -> None:
    rewrite(checkpoint, step=4)
    with pytest.raises(UserError, match=rf"{UNUSABLE}ValueError: {re.escape(MARKER)} is of step 4\)"):
        resume(checkpoint)


@pytest.mark.parametrize("bad_steps", [9, -1, 10**9])
def test_a_state_that_no_run_can_have_is_refused(bad_steps: int, checkpoint: Path) -> None:
    rewrite(checkpoint, bad_steps=bad_steps)
    with pytest.raises(UserError, match=f"^the allocation's state is damaged: bad_steps is {bad_steps} and should be"):
        resume(checkpoint)


TWO_RANKS = Budget(average_rank=2)


def another_run(difference: str) -> str:
    """The whole sentence, as a pattern, that refuses a checkpoint of another run."""
    words = f"the checkpoint belongs to another run: its {difference}; resume with the settings it was made with"
    return f"^{re.escape(words)}$"


@pytest.mark.parametrize(
    ("settings", "difference"),
    [
        ({"method": AdaLoRA(Budget(average_rank=3))}, "schedule has target=12 where this run has 18"),
        ({"method": AdaLoRA(Budget(fraction=0.5))}, "schedule has start=24 where this run has 768"),
        ({"method": AdaLoRA(TWO_RANKS, warmup=5)}, "schedule has warmup=3 where this run has 5"),
        ({"method": AdaLoRA(TWO_RANKS, cooldown=2)}, "schedule has fallen=14 where this run has 22"),
        ({"method": AdaLoRA(TWO_RANKS, interval=2)}, "schedule has interval=1 where this run has 2"),
        ({"max_steps": 48}, "schedule has total_steps=24 where this run has 48"),
        ({"method": AdaLoRA(TWO_RANKS, beta1=0.5)}, "settings has beta1=0.85 where this run has 0.5"),
        ({"method": AdaLoRA(TWO_RANKS, beta2=0.5)}, "settings has beta2=0.85 where this run has 0.5"),
        (
            {"method": AdaLoRA(TWO_RANKS, importance="magnitude")},
            'settings has importance="smoothed" where this run has "magnitude"',
        ),
        (
            {"method": AdaLoRA(TWO_RANKS, order="reference")},
            'settings has order="paper" where this run has "reference"',
        ),
        (
            {"method": AdaLoRA(TWO_RANKS, penalty="paper")},
            'settings has penalty="reference" where this run has "paper"',
        ),
        ({"method": AdaLoRA(TWO_RANKS, gamma=0.0)}, "settings has gamma=0.1 where this run has 0.0"),
        ({"method": AdaLoRA(TWO_RANKS, parity=None)}, 'settings has parity="adam" where this run has null'),
    ],
    ids=lambda value: value.split("=")[0] if isinstance(value, str) else "",
)
def test_other_settings_are_refused_by_name(settings: dict[str, Any], difference: str, checkpoint: Path) -> None:
    with pytest.raises(UserError, match=another_run(difference)):
        resume(checkpoint, **settings)


def test_another_scale_of_the_adapter_is_refused(checkpoint: Path) -> None:
    site = "model.layers.0.self_attn.q_proj"
    difference = f"sites has {site}=[4, 16, 16, 1.5] where this run has [4, 16, 16, 3.0]"
    with pytest.raises(UserError, match=another_run(difference)):
        resume(checkpoint, model=tiny_peft("llama", lora_alpha=12))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("method", "ablora", "method is 'ablora', this run's is 'adalora'"),
        ("sites", {"x": [4, 16, 16, 1.5]}, "sites has x=[4, 16, 16, 1.5] where this run has null"),
    ],
)
def test_another_method_or_model_is_refused(key: str, value: Any, words: str, checkpoint: Path) -> None:
    rewrite(checkpoint, **{key: value})
    with pytest.raises(UserError, match=another_run(words)):
        resume(checkpoint)


def test_the_same_settings_are_accepted(checkpoint: Path) -> None:
    plan = resume(checkpoint, method=AdaLoRA(Budget(total_rank=12), warmup=3, cooldown=10)).plan
    assert plan is not None
    assert plan.total_rank == 12


# Where a process dies, and where it goes on.


def test_a_last_line_of_the_trace_that_was_cut_off_is_no_obstacle(
    uninterrupted: Callable[[str], Run], tmp_path: Path
) -> None:
    train_until_killed(tmp_path, 9, **settings_of(tmp_path))
    trace = tmp_path / "trace.jsonl"
    trace.write_text(trace.read_text()[:-9])
    trainer, _ = build(tmp_path, **settings_of(tmp_path))
    trainer.train(resume_from_checkpoint=True)
    assert trace.read_text() == uninterrupted("default").trace


@pytest.mark.parametrize("folder", ["new", "."])
def test_a_resumed_run_can_begin_a_trace(folder: str, checkpoint: Path, tmp_path: Path) -> None:
    trace = tmp_path / folder / "trace.jsonl"
    resume(checkpoint, trace=trace)
    events = read_trace(trace)
    assert [events[0]["event"], events[-1]["event"]] == ["start", "finish"]


def test_the_state_beside_another_run_of_the_same_step_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    """The state is read from the output folder; there it belongs to other weights than those that were named."""
    there = tmp_path / "there"
    train_until_killed(there, 9, seed=1, **SAVING)
    trainer, _ = build(there, **SAVING)
    difference = (
        r"^the allocation's state was taken with other weights than those loaded; resume from the folder in which"
    )
    with pytest.raises(UserError, match=f"{difference} both were saved$"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


# Going on in the same process, as in a notebook: right, or refused.


def test_an_interrupted_trainer_does_not_train_anew_from_the_middle(tmp_path: Path) -> None:
    trainer, _ = train_until_killed(tmp_path, 18)
    words = (
        "this allocation stopped after 18 steps of an earlier train(); go on with resume_from_checkpoint=True, or "
        "start over with a new model, callback and Trainer"
    )
    with pytest.raises(UserError, match=f"^{re.escape(words)}$"):
        trainer.train()


@pytest.mark.parametrize("method", ["default", "truncate"])
def test_an_interrupted_trainer_resumes_from_before_its_final_phase(
    method: str, uninterrupted: Callable[[str], Run], tmp_path: Path
) -> None:
    trainer, allocation = train_until_killed(tmp_path, 19, **settings_of(tmp_path, method))
    shutil.rmtree(tmp_path / "checkpoint-16")
    trainer.train(resume_from_checkpoint=True)
    resumed, expected = everything(trainer, allocation, tmp_path / "trace.jsonl"), uninterrupted(method)
    assert (resumed.plan, resumed.trace) == (expected.plan, expected.trace)
    assert same_tensors(resumed.parameters, expected.parameters)
