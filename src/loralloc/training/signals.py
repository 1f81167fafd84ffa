"""Signals that end a run: the step is finished, a checkpoint is written, and the process ends as a scheduler expects.

| signal | who sends it | exit code |
|---|---|---|
| SIGTERM | `kill`, schedulers and clouds that take a machine back | 143 |
| SIGUSR1 | schedulers that announce the end of the time (`sbatch --signal=USR1@300`) | 143 |
| SIGINT | Ctrl-C | 130 |
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loralloc.training import processes

EXIT_CODES = {signal.SIGTERM: 143, signal.SIGUSR1: 143, signal.SIGINT: 130}
PATIENCE = 1.0
"""Seconds after which a second Ctrl-C ends a run at once; launchers pass the first one on more than once."""


class Stopped(SystemExit):
    """A signal has ended the run.

    Attributes:
        signal: Which.
        step: The step after which it was saved; None where it was not training.
    """

    def __init__(self, number: int, step: int | None = None) -> None:
        self.signal, self.step = signal.Signals(number), step
        super().__init__(EXIT_CODES[self.signal])


class _Watch:
    """Handles the signals of a process, and remembers the first one."""

    def __init__(self) -> None:
        self.owner, self.training = os.getpid(), False
        self.asked: int | None = None
        self.since = 0.0

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Note a signal while training, and end at once otherwise."""
        del frame
        if os.getpid() != self.owner:  # a process that was forked
            if number == signal.SIGTERM:  # end it as if this handler did not exist
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return  # the others come to all processes of a terminal or of a job: the first one says when to end
        again = number == signal.SIGINT and self.asked is not None and time.monotonic() - self.since > PATIENCE
        if self.asked is None:
            self.asked, self.since = number, time.monotonic()
        if not self.training or again:
            raise Stopped(number)


_watch: _Watch | None = None


def spare_workers(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Make the workers of a data loader ignore SIGTERM, if the process is `listening`.

    Schedulers send it to every process of a job. A run whose worker dies of it can fetch no further batch, and ends
    before it is saved.
    """
    inner = getattr(loader, "base_dataloader", loader)  # accelerate's wrapper lets this one load
    if _watch is not None and inner.num_workers and not _spared(inner.worker_init_fn):
        inner.worker_init_fn = partial(_begin_worker, inner.worker_init_fn)
    return loader


def _spared(begin: Any) -> bool:
    return isinstance(begin, partial) and begin.func is _begin_worker


def _begin_worker(begin: Callable[[int], None] | None, worker: int) -> None:
    # PyTorch's own handler would end the worker. Not SIG_IGN, which processes that the worker starts would inherit.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    if begin is not None:
        begin(worker)


def _end_workers() -> None:
    """Kill the workers of data loaders: they ignore the SIGTERM that Python sends them when it exits."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would report a failure
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
            child.join()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL if before is None else before)


@contextmanager
def listening() -> Iterator[None]:
    """Answer the signals of `EXIT_CODES` inside, in the main thread of a process that runs a recipe or a comparison.

    Raises:
        Stopped: A signal has come, also where a library has turned that into an exit of its own, as Ray does.
    """
    global _watch
    watch = _watch = _Watch()
    before = {number: signal.signal(number, watch.handle) for number in EXIT_CODES}
    try:
        yield
    except SystemExit as error:
        if watch.asked is None or isinstance(error, Stopped):
            raise
        raise Stopped(watch.asked) from error
    finally:
        _watch = None
        _end_workers()
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def finishing_steps() -> Iterator[None]:
    """Let a signal end the training inside only after the current step, if the process is `listening`."""
    watch = _watch
    if watch is None:
        yield
        return
    if watch.asked is not None:  # an earlier Stopped was ignored, as Python does in destructors and forks
        raise Stopped(watch.asked)
    watch.training = True
    try:
        yield
    finally:
        watch.training = False
    if watch.asked is not None:  # in the last step, or after it
        raise Stopped(watch.asked)


class StopOnSignal(TrainerCallback):
    """Save after the step in which a signal has come to any process, and end there. Comes after all other callbacks."""

    _number = 0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a checkpoint."""
        if _watch is not None:
            self._number = int(max(processes.gather(_watch.asked or 0)))
            control.should_save |= self._number > 0

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """End, once the first process has completed the checkpoint."""
        if self._number:
            processes.gather(0)
            raise Stopped(self._number, state.global_step)
