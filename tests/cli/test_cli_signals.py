"""Signals end a training after the step: it is saved, the exit code is what schedulers expect, and it can go on."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import pytest
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from loralloc.cli import progress
from loralloc.recipe import run as pipeline
from loralloc.training import signals
from loralloc.training.checkpoint import newest_whole
from loralloc.training.trainer import RunTrainer

from .command import done, loralloc, read_json, refused
from .deaths import differences

pytestmark = pytest.mark.usefixtures("unreported")

WORDS = ["--steps", 12, "--log_every", 3, "--lora.dropout", 0.1]
SAVING = ["--save_every", 4]
CODES = {signal.SIGTERM: 143, signal.SIGUSR1: 143, signal.SIGINT: 130}


@contextmanager
def signalled(number: int, where: Any, name: str, step: int | None = None) -> Iterator[None]:
    """A signal comes to this process when a method is called; of a callback, after a step."""
    alive = getattr(where, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        if step is None or args[2].global_step == step:
            os.kill(os.getpid(), number)
        return alive(*args, **kwargs)

    with patch.object(where, name, call):
        yield


def at_step(number: int, step: int) -> Any:
    return signalled(number, progress.Progress, "on_step_end", step)


@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize("saving", [SAVING, []], ids=["saving", "not saving"])
def test_the_step_is_finished_saved_and_the_run_can_go_on(number: signal.Signals, saving: Any, recipe: Path) -> None:
    done("train", recipe, *WORDS, *saving)
    Path("run").rename("whole")
    handlers = {other: signal.getsignal(other) for other in CODES}
    with at_step(number, 6):
        result = loralloc("train", recipe, *WORDS, *saving)
    assert result.code == CODES[number]
    assert result.err == (
        f"stopped by {number.name} after step 6, which is saved; go on with loralloc train run/recipe.yaml --resume\n"
    )
    assert {other: signal.getsignal(other) for other in CODES} == handlers
    found = newest_whole(Path("run/checkpoints"))
    assert (found.checkpoint, found.skipped) == (Path("run/checkpoints/checkpoint-6"), {})
    assert not Path("run/adapter").exists()
    done(*result.err.partition("loralloc ")[2].split())
    apart = [name for name in differences(Path("run"), Path("whole")) if not name.startswith("checkpoints/")]
    assert apart == []


def test_a_search_is_stopped_and_goes_on_too(recipe: Path) -> None:
    search = [*WORDS, "--method", "{name: autolora, validation: 0.25, search: 12, check_every: 3}"]
    with at_step(signal.SIGTERM, 6):
        result = loralloc("train", recipe, *search)
    assert (result.code, "after step 6, which is saved" in result.err) == (143, True)
    assert [path.name for path in Path("run/search/checkpoints").iterdir()] == ["checkpoint-6"]
    done(*result.err.partition("loralloc ")[2].split())
    assert read_json(Path("run/metrics.json"))["search"]["steps"] == 12


def test_before_anything_is_saved_it_ends_at_once(recipe: Path) -> None:
    with signalled(signal.SIGTERM, pipeline, "task_data"):
        result = loralloc("train", recipe, *WORDS)
    assert (result.code, result.err) == (143, "stopped by SIGTERM before there was anything to save\n")
    assert not Path("run").exists()


def test_after_training_it_names_what_was_saved_before(recipe: Path) -> None:
    with signalled(signal.SIGTERM, pipeline, "export_adapter"):
        result = loralloc("train", recipe, *WORDS, *SAVING)
    assert result.code == 143
    go_on = "loralloc train run/recipe.yaml --resume"
    assert result.err == f"stopped by SIGTERM; go on from what was saved before with {go_on}\n"
    done("train", "run/recipe.yaml", "--resume")


def test_without_checkpoints_it_names_what_was_trained(recipe: Path) -> None:
    with signalled(signal.SIGTERM, pipeline, "export_adapter"):
        result = loralloc("train", recipe, *WORDS)
    assert (result.code, result.err) == (143, "stopped by SIGTERM; what it trained is kept: loralloc export run\n")
    with signalled(signal.SIGTERM, pipeline, "final_metrics"):
        result = loralloc("train", recipe, *WORDS, "--replace")
    commands = "loralloc evaluate run and loralloc report run look at it"
    assert (result.code, result.err) == (143, f"stopped by SIGTERM; its adapter is exported: {commands}\n")


def test_in_the_last_step_it_is_saved_like_any_other(recipe: Path) -> None:
    with at_step(signal.SIGUSR1, 12):
        result = loralloc("train", recipe, *WORDS, *SAVING)
    assert (result.code, "after step 12, which is saved" in result.err) == (143, True)
    done("train", "run/recipe.yaml", "--resume")


@pytest.mark.parametrize(("waited", "saved"), [(2 * signals.PATIENCE, False), (0.0, True)])
def test_only_a_second_ctrl_c_that_comes_later_ends_at_once(
    waited: float, saved: bool, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Launchers pass the first one on, so that it comes twice."""
    step = RunTrainer.training_step

    def twice(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 5:
            os.kill(os.getpid(), signal.SIGINT)
            now = time.monotonic() + waited
            monkeypatch.setattr(signals.time, "monotonic", lambda: now)
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(RunTrainer, "training_step", twice)
    result = loralloc("train", recipe, *WORDS, *SAVING)
    assert result.code == 130
    assert ("after step 6, which is saved" in result.err) == saved
    assert Path("run/checkpoints/checkpoint-6").exists() == saved


def test_a_dry_run_is_interrupted_as_usual(recipe: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell runs in the background ignores it
    try:
        with signalled(signal.SIGINT, pipeline, "task_data"):
            assert loralloc("train", recipe, "--dry-run").code == 130
    finally:
        signal.signal(signal.SIGINT, before)


def test_nothing_listens_outside_of_a_run() -> None:
    with pytest.raises(signals.Stopped) as stopped, signals.listening():
        os.kill(os.getpid(), signal.SIGTERM)
    assert (stopped.value.code, stopped.value.signal, stopped.value.step) == (143, signal.SIGTERM, None)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_libraries_that_exit_in_their_own_way_hide_no_signal() -> None:
    """Ray turns what a handler raises while it waits for a task into `SystemExit(1)`."""

    def wait() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except signals.Stopped as error:
            raise SystemExit(1) from error

    with pytest.raises(signals.Stopped) as stopped, signals.listening():
        wait()
    assert (stopped.value.code, stopped.value.signal) == (130, signal.SIGINT)
    with pytest.raises(SystemExit) as ended, signals.listening():
        raise SystemExit(3)
    assert ended.value.code == 3


def test_one_that_was_held_up_ends_the_run_before_it_trains() -> None:
    """Python ignores exceptions of destructors, and of what it calls while a process forks."""
    with signals.listening():
        with suppress(signals.Stopped):
            os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(signals.Stopped) as stopped, signals.finishing_steps():
            pytest.fail("it trains")
    assert (stopped.value.signal, stopped.value.step) == (signal.SIGUSR1, None)


def test_forked_processes_end_as_ever() -> None:
    reading, writing = os.pipe()
    with signals.listening():
        child = os.fork()
        if child == 0:
            os.write(writing, b"!")
            time.sleep(60)
            os._exit(0)
        os.read(reading, 1)  # Python forgets what comes to a process before it runs
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize("wrapped", [False, True])
def test_workers_load_until_the_run_has_ended(wrapped: bool) -> None:
    """A scheduler sends SIGTERM to all processes of a job; a run whose worker has died is not saved."""
    with signals.listening():
        loader: Any = DataLoader(list(range(100)), num_workers=1)
        loader = signals.spare_workers(prepare_data_loader(loader) if wrapped else loader)
        batches = iter(loader)
        assert int(next(batches)) == 0
        (worker,) = multiprocessing.active_children()
        os.kill(cast(int, worker.pid), signal.SIGTERM)
        assert [int(batch) for batch in islice(batches, 90)] == list(range(1, 91))  # more than were loaded before
        assert worker.is_alive()
    assert not worker.is_alive()


def test_workers_of_nobody_who_listens_are_as_ever() -> None:
    loader = signals.spare_workers(DataLoader([0, 1], num_workers=1))
    assert loader.worker_init_fn is None
    with signals.listening():
        assert signals.spare_workers(DataLoader([0, 1])).worker_init_fn is None  # loads for itself
        begun = signals.spare_workers(loader).worker_init_fn
        assert begun is not None
        assert signals.spare_workers(loader).worker_init_fn is begun


def test_workers_leave_what_all_processes_get_to_the_first_one() -> None:
    """Ctrl-C comes to every process of a terminal; a worker that died of it would end the run before it is saved."""
    stepping = signals._Watch()
    stepping.owner = -1
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGINT, signal.SIGUSR1):
        stepping.handle(number, None)
    assert stepping.asked is None
    assert signal.signal(signal.SIGINT, before) == signal.default_int_handler


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_scheduler_that_sends_it_from_outside_to_all_processes(recipe: Path, workers: int) -> None:
    words = ["train", "recipe.yaml", "--steps", "150", "--save_every", "75"]
    words += ["--training.trainer.dataloader_num_workers", str(workers)]
    command = [sys.executable, "-c", "from loralloc.cli.main import main; main()", *words]
    streams: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, start_new_session=True, **streams) as process:
        while not Path("run/log.jsonl").is_file() or not Path("run/log.jsonl").stat().st_size:
            assert process.poll() is None
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGTERM)
        said = process.communicate(timeout=120)[1]
    assert process.returncode == 143
    assert "which is saved; go on with loralloc train run/recipe.yaml --resume" in said
    assert "Traceback" not in said
    done("train", "run/recipe.yaml", "--resume")


def test_a_second_process_is_refused_and_a_killed_one_is_no_obstacle(recipe: Path) -> None:
    again: list[str] = []
    alive = pipeline.task_data

    def meanwhile(*args: Any) -> Any:
        if not again:
            again.append("")
            again[0] = refused("train", recipe, *WORDS)
        return alive(*args)

    with patch.object(pipeline, "task_data", meanwhile):
        done("train", recipe, *WORDS)
    assert again[0].startswith(f"run is in use: process {os.getpid()} on ")
    assert again[0].endswith("is at work in it; wait for it, or end it. A run folder takes one process at a time")
    assert not Path("run/.lock").exists()
    Path("run/.lock").write_text("process 1 on moon", encoding="utf-8")
    done("train", recipe, *WORDS, "--replace")
