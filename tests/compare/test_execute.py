"""Which GPU a run gets."""

from __future__ import annotations

import multiprocessing
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from loralloc.compare import execute
from loralloc.compare.execute import Ended, Job, LocalExecutor, RayExecutor, gpus_in_turn
from loralloc.errors import UserError


def job(folder: Path, name: str = "a") -> Job:
    return Job(name, str(folder / "a.yaml"), str(folder / "log"), None, 1, str(folder))


@pytest.mark.parametrize(
    ("visible", "jobs", "turns"),
    [
        ("3,5", 3, ["3", "5", "3"]),
        ("GPU-ab, GPU-cd", 1, ["GPU-ab"]),
        ("", 2, []),
        ("-1", 2, []),
    ],
)
def test_gpus_take_turns(monkeypatch: pytest.MonkeyPatch, visible: str, jobs: int, turns: list[str]) -> None:
    monkeypatch.setenv(execute.VISIBLE, visible)
    assert gpus_in_turn(jobs) == turns


def test_without_a_choice_all_gpus_of_the_machine_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(execute.VISIBLE, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert gpus_in_turn(4) == ["0", "1", "0", "1"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert gpus_in_turn(4) == []


@pytest.mark.parametrize(("visible", "seen"), [("3,5", {"3", "5"}), ("", {None})])
def test_two_runs_at_a_time_have_a_gpu_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str, seen: set[str | None]
) -> None:
    monkeypatch.setenv(execute.VISIBLE, visible)
    both, at_once = threading.Barrier(2, timeout=10), []

    def run_job(one: Job, track: object) -> Ended:
        both.wait()  # two are at work
        at_once.append(one.gpus)
        both.wait()
        return Ended(one.name)

    monkeypatch.setattr(execute, "run_job", run_job)
    jobs = [job(tmp_path, str(place)) for place in range(6)]
    assert {one.name for one in LocalExecutor(2).run(jobs, lambda name: None)} == {str(place) for place in range(6)}
    assert all(set(at_once[place : place + 2]) == seen for place in (0, 2, 4))


class Cluster:
    """Stands for Ray: it has machines, and refuses to run anything."""

    def __init__(self, *machines: dict[str, float]) -> None:
        self._machines = machines

    def nodes(self) -> list[dict[str, object]]:
        gone = {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}
        return [gone, *({"Alive": True, "Resources": one} for one in self._machines)]

    def cluster_resources(self) -> dict[str, float]:
        return {"GPU": sum(one.get("GPU", 0.0) for one in self._machines)}

    def remote(self, work: object) -> object:
        raise InterruptedError


def run_by_ray(folder: Path, cluster: Cluster, threads: int) -> None:
    executor = object.__new__(RayExecutor)
    executor._ray = cluster  # type: ignore[assignment]
    next(executor.run([replace(job(folder), threads=threads)], lambda name: None))


def test_a_run_that_no_machine_of_a_cluster_can_hold_is_refused(tmp_path: Path) -> None:
    small, with_gpu = {"CPU": 4.0}, {"CPU": 2.0, "GPU": 1.0}
    for cluster, threads, said in (
        (
            Cluster(small, small),
            5,
            "takes 5 processors (compare.threads), and no machine of the cluster has more than 4",
        ),
        (
            Cluster(small, with_gpu),
            3,
            "takes 3 processors (compare.threads), and no machine with a GPU of the cluster has more than 2",
        ),
    ):
        with pytest.raises(UserError) as error:
            run_by_ray(tmp_path, cluster, threads)
        assert str(error.value) == f"--ray: a run {said}; lower compare.threads, or add a machine"
    for cluster, threads in ((Cluster(small), 4), (Cluster(small, with_gpu), 2)):
        with pytest.raises(InterruptedError):
            run_by_ray(tmp_path, cluster, threads)


def test_a_run_sees_its_gpu_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "run_cell", lambda *_: os.write(1, os.environ[execute.VISIBLE].encode()) and 0)
    monkeypatch.setenv(execute.VISIBLE, "3,5")
    for gpus, seen in (("5", "5"), (None, "3,5")):
        (tmp_path / "log").unlink(missing_ok=True)
        one = job(tmp_path)
        work = multiprocessing.get_context("fork").Process(
            target=execute._work, args=(Job(**{**vars(one), "gpus": gpus}),)
        )
        work.start()
        work.join(30)
        assert work.exitcode == 0
        assert (tmp_path / "log").read_text() == seen
