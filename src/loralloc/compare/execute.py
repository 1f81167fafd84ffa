"""Runs cells, each in a process of its own, here or on the machines of a Ray cluster."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from queue import SimpleQueue
from typing import Protocol

import torch

from loralloc.compare.cell import REFUSED, run_cell
from loralloc.errors import UserError
from loralloc.report.wording import count

VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Job:
    """A cell as it is sent to the process, here or on another machine, that runs it.

    Attributes:
        name: The cell.
        recipe: Its recipe, an absolute path.
        log: Where its output goes, an absolute path.
        peer: The name of a peer, which is a variant of LoRA from PEFT; None for any other contender.
        threads: Processor threads.
        folder: The current directory, to which a recipe's paths are relative.
        gpus: CUDA_VISIBLE_DEVICES of its process; None: the value in the process that starts it.
    """

    name: str
    recipe: str
    log: str
    peer: str | None
    threads: int
    folder: str
    gpus: str | None = None


@dataclass(frozen=True)
class Ended:
    """How a run has ended.

    Attributes:
        name: The cell.
        reason: Why it has failed; None for success.
        final: Whether it would fail again.
    """

    name: str
    reason: str | None = None
    final: bool = False


class Executor(Protocol):
    """Runs jobs, some at a time."""

    def run(self, jobs: Sequence[Job], started: Callable[[str], None]) -> Iterator[Ended]:
        """Run jobs and yield their outcomes in the order in which they end; `started` gets each name at its start."""
        ...


def run_job(job: Job, track: Callable[[BaseProcess], None] = lambda process: None) -> Ended:
    """Run a cell in a process of its own, and wait for it.

    Args:
        job: The cell.
        track: Gets the process once it has started.
    """
    if not Path(job.recipe).is_file():
        return Ended(job.name, f"this machine does not see {job.recipe}: all machines must share the output folder")
    log = Path(job.log)
    begun = log.stat().st_size if log.is_file() else 0
    if job.gpus is None:  # the fork server of a Ray worker may have another GPU, from an earlier job
        job = replace(job, gpus=os.environ.get(VISIBLE))
    process = _server().Process(target=_work, args=(job,), name=job.name)
    process.start()
    track(process)
    process.join()
    code = process.exitcode or 0
    if code == 0:
        return Ended(job.name)
    return Ended(job.name, _reason(code, log, begun), final=code == REFUSED)


def _server() -> ForkServerContext:
    """A fork server that has the imports done: they take longer than a small run."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["loralloc.compare.preload"])
    return context


def _work(job: Job) -> None:
    """Run a cell in this process, and exit with its code."""
    if job.gpus is not None:
        os.environ[VISIBLE] = job.gpus
    with Path(job.log).open("ab") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    os.chdir(job.folder)
    sys.exit(run_cell(Path(job.recipe), job.peer, job.threads))


def _reason(code: int, log: Path, begun: int) -> str:
    """The last error or last line in a run's log, or the signal that has killed the run."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}; see {log}"
    with log.open("rb") as file:
        file.seek(begun)
        lines = [line for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
    told = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "")
    return told.removeprefix("error: ").strip() or f"ended with exit code {code}; see {log}"


def gpus_in_turn(jobs: int) -> list[str]:
    """Return a GPU for each job that runs at the same time, assigned in turn; an empty list without GPUs."""
    named = os.environ.get(VISIBLE)
    known = [str(place) for place in range(torch.cuda.device_count())] if named is None else named.split(",")
    known = [gpu.strip() for gpu in known if gpu.strip() not in ("", "-1")]
    return [known[place % len(known)] for place in range(jobs)] if known else []


class LocalExecutor:
    """Runs jobs on this machine; GPUs are assigned in turn.

    Args:
        jobs: How many at a time.
    """

    def __init__(self, jobs: int) -> None:
        self._jobs = jobs

    def run(self, jobs: Sequence[Job], started: Callable[[str], None]) -> Iterator[Ended]:
        """Run jobs; an interruption also terminates the jobs that are running."""
        free: SimpleQueue[str | None] = SimpleQueue()
        for gpu in gpus_in_turn(self._jobs) or [None] * self._jobs:
            free.put(gpu)
        with _processes() as track, ThreadPoolExecutor(self._jobs) as pool:

            def work(job: Job) -> Ended:
                started(job.name)
                gpu = free.get()
                try:
                    return run_job(replace(job, gpus=gpu), track)
                finally:
                    free.put(gpu)

            waiting: set[Future[Ended]] = {pool.submit(work, job) for job in jobs}
            try:
                while waiting:
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    yield from (one.result() for one in done)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                track.stop()
                raise


class _Tracked:
    """The processes that are at work."""

    def __init__(self) -> None:
        self._lock, self._stopped = threading.Lock(), False
        self._alive: list[BaseProcess] = []

    def __call__(self, process: BaseProcess) -> None:
        with self._lock:
            self._alive = [*(one for one in self._alive if one.is_alive()), process]
            if self._stopped:
                process.terminate()

    def stop(self) -> None:
        """Terminate the processes that are at work, and any that are added later."""
        with self._lock:
            self._stopped = True
            for process in self._alive:
                if process.is_alive():
                    process.terminate()


@contextmanager
def _processes() -> Iterator[_Tracked]:
    tracked = _Tracked()
    try:
        yield tracked
    finally:
        tracked.stop()


class RayExecutor:
    """Runs jobs on a Ray cluster; each gets its threads' number of CPUs and, if the cluster has GPUs, one GPU.

    The output folder, and the data that a recipe names by path, must be the same on all machines.

    Args:
        address: Of the cluster, or `auto`.

    Raises:
        UserError: Ray is not installed, or there is no cluster.
    """

    def __init__(self, address: str) -> None:
        try:
            import ray
        except ImportError as error:
            raise UserError('--ray needs the package ray: pip install "loralloc[ray]"') from error
        self._ray = ray
        try:
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, ignore_reinit_error=True)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(f"--ray {address}: {str(error).splitlines()[0]}") from error

    def run(self, jobs: Sequence[Job], started: Callable[[str], None]) -> Iterator[Ended]:
        """Run jobs; if a machine is lost, the jobs that ran on it count as failed.

        Raises:
            UserError: No machine has so many processors beside a GPU; Ray would wait for one for ever.
        """
        ray, gpus = self._ray, 1 if self._ray.cluster_resources().get("GPU") else 0
        if jobs:
            self._check_room(max(job.threads for job in jobs), gpus)
        remote = ray.remote(run_job)
        names = {}
        for job in jobs:
            names[remote.options(num_cpus=job.threads, num_gpus=gpus, max_retries=0).remote(job)] = job.name
            started(job.name)
        waiting = list(names)
        try:
            while waiting:
                done, waiting = ray.wait(waiting, num_returns=1)
                for one in done:
                    try:
                        yield ray.get(one)
                    except ray.exceptions.RayError as error:
                        yield Ended(names[one], f"lost by Ray: {str(error).strip().splitlines()[0]}")
        except BaseException:
            for one in waiting:
                ray.cancel(one, force=True)
            raise

    def _check_room(self, threads: int, gpus: int) -> None:
        machines = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        most = int(max((one.get("CPU", 0) for one in machines if one.get("GPU", 0) >= gpus), default=0))
        if most < threads:
            where = "machine with a GPU" if gpus else "machine"
            raise UserError(
                f"--ray: a run takes {count(threads, 'processor')} (compare.threads), and no {where} of the cluster "
                f"has more than {most:,}; lower compare.threads, or add a machine"
            )
