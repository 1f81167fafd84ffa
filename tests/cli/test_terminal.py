"""What is shown while a training or an evaluation goes on: times of slow steps, figures, lines and bars."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from loralloc.cli import progress
from loralloc.cli.progress import Pace, Progress

from .command import RECIPE, done

Write = Callable[[str], Path]


class Clock:
    """Time that passes only when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress, "clock", made)
    return made


class TestPace:
    def test_tells_slow_steps_from_the_first_on(self, clock: Clock) -> None:
        pace = Pace("step", 300)
        assert str(pace) == ""
        clock.now += 58
        pace.end()
        assert str(pace) == "58 s a step, 4:49:02 left"

    def test_what_comes_between_steps_is_no_step_but_takes_time(self, clock: Clock) -> None:
        pace = Pace("step", 4)
        for _ in range(2):
            clock.now += 10  # an evaluation
            pace.begin()
            clock.now += 0.5
            pace.end()
        assert str(pace) == "0.5 s a step, 0:21 left"

    def test_a_resumed_run_counts_the_steps_of_its_own(self, clock: Clock) -> None:
        pace = Pace("batch", 100, done=90)
        clock.now += 2
        pace.end()
        assert str(pace) == "2 s a batch, 0:18 left"

    def test_the_last_rounds_decide(self, clock: Clock) -> None:
        pace = Pace("step", 1000)
        for seconds in [9.0, *[1.0] * 20]:
            clock.now += seconds
            pace.end()
        assert str(pace).startswith("1 s a step")


class Training:
    """The events of a training of 20 slow steps, or of an evaluation outside of one, without any."""

    def __init__(self, clock: Clock, steps: int = 20) -> None:
        self.clock, self.progress = clock, Progress(None)
        self.state = SimpleNamespace(max_steps=steps, global_step=0)
        self.args = SimpleNamespace()

    def tell(self, event: str, **kwargs: Any) -> None:
        control = SimpleNamespace(should_log=False, should_evaluate=False, **kwargs.pop("control", {}))
        vars(control).update(kwargs.pop("due", {}))
        getattr(self.progress, f"on_{event}")(self.args, self.state, control, **kwargs)

    def step(self, seconds: float = 58, log: bool = False, evaluate: bool = False) -> None:
        self.tell("step_begin")
        self.clock.now += seconds
        self.state.global_step += 1
        self.tell("step_end", due={"should_log": log, "should_evaluate": evaluate})
        if log:
            self.tell("log", logs={"loss": 0.5, "rank/total": 1234})

    def batches(self, count: int, of: int, seconds: float) -> None:
        for _ in range(count):
            self.clock.now += seconds
            self.tell("prediction_step", eval_dataloader=range(of))


@pytest.fixture
def training(clock: Clock) -> Training:
    return Training(clock)


class TestLines:
    """Where output is no terminal."""

    def test_one_comes_after_the_first_step_and_for_each_tenth(
        self, training: Training, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with progress.progress_bar():
            training.tell("train_begin")
            training.step()
            assert capsys.readouterr().out == "  step 1/20  58 s a step, 18:22 left\n"
            for step in range(2, 21):
                training.step(log=step % 10 == 0)
        steps = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
        assert steps == [f"{step}/20" for step in range(2, 21, 2)]

    def test_they_hold_the_newest_loss_and_ranks(self, training: Training, capsys: pytest.CaptureFixture[str]) -> None:
        with progress.progress_bar():
            training.tell("train_begin")
            for step in range(1, 5):
                training.step(log=step == 2)
        lines = capsys.readouterr().out.splitlines()
        assert lines[1:] == [
            "  step 2/20  loss 0.500  ranks 1,234  58 s a step, 17:24 left",
            "  step 4/20  loss 0.500  ranks 1,234  58 s a step, 15:28 left",
        ]

    def test_what_an_evaluation_found_is_shown(self, training: Training, capsys: pytest.CaptureFixture[str]) -> None:
        with progress.progress_bar():
            training.tell("train_begin")
            training.step(evaluate=True)
            capsys.readouterr()
            training.batches(2, of=2, seconds=1)
            training.tell("evaluate", metrics={"eval_loss": 0.25, "eval_accuracy": 0.5, "eval_runtime": 2, "epoch": 1})
        assert capsys.readouterr().out == "  step 1/20  validation: loss 0.2500, accuracy 0.5000\n"

    @pytest.mark.parametrize(("seconds", "lines"), [(58, 3), (4, 1), (1, 0)])
    def test_an_evaluation_that_takes_long_tells_how_far_it_is(
        self, seconds: float, lines: int, training: Training, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with training.progress.evaluating("the untrained model"):
            training.batches(3, of=4, seconds=seconds)
            training.tell("evaluate", metrics={"eval_loss": 0.25})
        said = capsys.readouterr().out.splitlines()
        assert len(said) == lines
        if seconds == 58:
            assert said[0] == "  evaluating the untrained model 1/4  58 s a batch, 2:54 left"


@pytest.fixture
def in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Console, "is_terminal", property(lambda self: True))


@pytest.mark.usefixtures("in_a_terminal")
class TestBar:
    @staticmethod
    def fields() -> list[tuple[str, float, float | None, str]]:
        return [(t.description, t.completed, t.total, t.fields["pace"]) for t in progress._bar.tasks]

    def test_tells_times_while_a_training_and_an_evaluation_in_it_go_on(self, training: Training) -> None:
        with progress.progress_bar():
            training.tell("train_begin")
            training.step(evaluate=True)
            assert self.fields() == [
                ("training", 1, 20, "58 s a step, 18:22 left"),
                ("evaluating", 0, None, ""),
            ]
            training.batches(1, of=4, seconds=2)
            assert self.fields()[1] == ("evaluating", 1, 4, "2 s a batch, 0:06 left")
            training.tell("evaluate", metrics={})
            assert [name for name, *_ in self.fields()] == ["training"]
        assert not progress._bar.tasks
        assert not progress._bar.live.is_started

    def test_is_up_from_the_beginning_of_an_evaluation_to_its_end(self, training: Training) -> None:
        with suppress(KeyboardInterrupt), training.progress.evaluating("the untrained model"):
            assert progress._bar.live.is_started
            assert self.fields() == [("evaluating the untrained model", 0, None, "")]
            raise KeyboardInterrupt
        assert not progress._bar.live.is_started
        assert not progress._bar.tasks


@pytest.mark.usefixtures("unreported")
def test_a_run_shows_its_evaluations_and_no_empty_lines(write: Write) -> None:
    said = done("train", write(RECIPE), "--steps", 4, "--eval_every", 2)
    assert re.findall(r"^  step (\d)/4  validation: loss 0\.\d{4}, accuracy 0\.\d{4}, ", said, re.M) == ["2", "4"]
    assert "\n\n" not in said
