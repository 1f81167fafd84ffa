"""The drills of runs in short, and that what is lost in one is seen; `make drill` tries hundreds of cases."""

from __future__ import annotations

import errno
import importlib
import signal
from pathlib import Path
from random import Random

import pytest
import torch

from drills import checkpoints, disks, kills, numbers
from drills.apart import Ended, command
from drills.kills import Death
from drills.trainings import Training, fresh, whole
from drills.tries import Tried, tries
from loralloc.training import checkpoint
from loralloc.training.bad_steps import StepChecks

CASES = {"kills": 2, "checkpoints": 2, "disks": 2, "numbers": 20}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_nothing_is_lost(name: str) -> None:
    outcome = importlib.import_module(f"drills.{name}").drill(seed=2, cases=CASES[name])
    assert outcome.lost == []
    assert outcome.tried == CASES[name]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("death", "code"),
    [
        (Death(signal.SIGKILL, write=40), 137),
        (Death(signal.SIGKILL, seconds=0.2), 128 + signal.SIGPROF),
        (Death(signal.SIGTERM, write=40), 143),
        (Death(signal.SIGINT, seconds=0.2), 130),
    ],
)
def test_a_death_comes(death: Death, code: int) -> None:
    training = Training("lora")
    with fresh() as folder:
        ended = command(Path(folder), training.words, death.comes(Path(folder, "run")))
        assert (ended.code, death.wrong(ended)) == (code, "")
        assert not Path(folder, "run", "metrics.json").exists()


@pytest.mark.slow
def test_a_training_that_was_over_before_its_death_is_not_lost() -> None:
    never = Death(signal.SIGKILL, seconds=1e6)
    assert kills.tried(Training("lora"), [never, never]).lost == ""


@pytest.mark.slow
def test_a_disk_fails_at_every_kind_of_write() -> None:
    training = Training("lora")
    for number in (1, 20, whole(training).makes):
        with fresh() as folder:
            around = disks.failing(Path(folder, "run"), number, errno.ENOSPC, lasting=True)
            ended = command(Path(folder), training.words, around)
            assert ended.code == 2
            assert disks.wrong_about(ended, errno.ENOSPC, Path(folder, "run")) == ""


@pytest.mark.slow
def test_a_run_that_goes_on_as_another_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    whole(Training("adalora"))
    monkeypatch.setattr(checkpoint, "load_random_state", lambda path: None)  # dropout is drawn anew
    monkeypatch.setattr(Random, "choice", lambda self, found: "adalora" if "adalora" in found else found[0])
    outcome = checkpoints.drill(seed=1, cases=1)
    assert "another run than the one that was not ended: " in outcome.lost[0]
    assert "adapter/adapter_model.safetensors" in outcome.lost[0]


def test_a_bad_step_that_is_not_seen_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepChecks, "_not_finite", lambda *_: torch.zeros((), dtype=torch.bool))
    outcome = numbers.drill(seed=1, cases=4)
    assert any("a step is taken to be sound" in line for line in outcome.lost)


@pytest.mark.parametrize(
    ("ended", "wrong"),
    [
        (Ended(0), ""),
        (Ended(143, "stopped by SIGTERM; go on"), ""),
        (Ended(143), "SIGTERM: it said ''"),
        (Ended(1, "Traceback"), "SIGTERM: exit code 1: Traceback"),
        (Ended(0, noted=True), "SIGTERM: exit code 0"),
    ],
)
def test_a_wrong_end_is_seen(ended: Ended, wrong: str) -> None:
    assert Death(signal.SIGTERM, write=1).wrong(ended).startswith(wrong)


@pytest.mark.parametrize(
    ("said", "wrong"),
    [
        ("error: the disk with run is full", ""),
        ("error: [Errno 28] No space left on device", "a full disk is told as: error: [Errno 28]"),
        ("Traceback", "exit code 2: Traceback"),
    ],
)
def test_an_error_that_tells_too_little_is_seen(said: str, wrong: str, tmp_path: Path) -> None:
    assert disks.wrong_about(Ended(2, said), errno.ENOSPC, tmp_path).startswith(wrong)


def test_tries_can_be_repeated_one_by_one() -> None:
    drawn: list[float] = []

    def attempt(random: Random) -> Tried:
        drawn.append(random.random())
        if len(drawn) == 2:
            raise KeyError("a traceback")
        return Tried("a case", refused=len(drawn) == 1, lost="broken" if len(drawn) == 3 else "")

    outcome = tries("name", attempt, 4, seed=5)
    assert (outcome.refused, outcome.done, outcome.tried) == (1, 1, 4)
    assert "KeyError: 'a traceback'" in outcome.lost[0]
    assert outcome.lost[1] == "name 2: broken; case: a case"
    assert drawn[1] == Random("name 5 1").random()
