"""The progress of a training or an evaluation: a bar with times, or lines if the output is not a terminal."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loralloc.recipe.evaluations import without_times
from loralloc.training.callback import RankAllocation
from loralloc.training.run import AllocationRun

_WIDTH_WITHOUT_TERMINAL = 110

console = Console(highlight=False)
if not console.is_terminal:
    console = Console(highlight=False, width=_WIDTH_WITHOUT_TERMINAL)

clock = time.perf_counter

QUIET_SECONDS = 10
"""Seconds between lines of an evaluation or a loop if the output is not a terminal."""

_bar = Bar(
    TextColumn("  {task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TextColumn("{task.fields[pace]}"),
    TextColumn("{task.fields[news]}"),
    console=console,
)


def _start_bar() -> None:
    if console.is_terminal:  # elsewhere lines tell the same
        _bar.start()


@contextmanager
def _taken_down() -> Iterator[None]:
    """Remove the bar and restore the cursor, however the block ends."""
    try:
        yield
    finally:
        if _bar.live.is_started:  # else it would print an empty line
            _bar.stop()
        for task in _bar.task_ids:
            _bar.remove_task(task)


@contextmanager
def progress_bar() -> Iterator[None]:
    """Take the bar down however training ends, and say how to go on after an interruption."""
    with _taken_down():
        try:
            yield
        except KeyboardInterrupt:
            console.print("interrupted; a run with checkpoints (training.save_every) continues with --resume")
            raise


@contextmanager
def counted(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show the progress of a loop; the yielded function takes the number of finished rounds."""
    began = said = clock()
    with _taken_down():
        _start_bar()
        task = _bar.add_task(what, total=total, pace="", news="")

        def told(done: int) -> None:
            nonlocal said
            _bar.update(task, completed=done)
            if not console.is_terminal and clock() - said >= QUIET_SECONDS:
                said = clock()
                console.print(f"  {what} {done}/{total}  {said - began:.0f} s so far")

        yield told


class Pace:
    """How long the rounds of a loop take, and how long the rest will.

    Args:
        unit: What a round is called.
        total: Rounds of the whole loop.
        done: Rounds that were done before.

    Attributes:
        total: Rounds of the whole loop; may be set later.
        done: Rounds that are done.
        recent: Seconds of each of the last rounds.
    """

    def __init__(self, unit: str, total: int, done: int = 0) -> None:
        self.recent: deque[float] = deque(maxlen=20)
        self.total, self.done = total, done
        self._unit, self._before = unit, done
        self._start = self._begun = self._now = clock()

    def begin(self) -> None:
        """Start timing a round; without this call, a round starts when the last one has ended."""
        self._begun = clock()

    def end(self) -> None:
        """A round ends."""
        self._now = clock()
        self.recent.append(self._now - self._begun)
        self._begun = self._now
        self.done += 1

    def __str__(self) -> str:
        """The mean seconds of the last rounds, and the time left, which includes what comes between rounds."""
        if not self.recent:
            return ""
        left = (self._now - self._start) / (self.done - self._before) * (self.total - self.done)
        minutes, seconds = divmod(round(left), 60)
        hours, minutes = divmod(minutes, 60)
        rest = f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
        return f"{sum(self.recent) / len(self.recent):.2g} s a {self._unit}, {rest} left"


def show_schedule(run: AllocationRun) -> None:
    """Show the budget over the run, before it starts."""
    schedule = run.schedule
    table = Table(title="Budget", title_justify="left", box=None, pad_edge=False)
    for column in ("phase", "steps", f"budget ({run.unit})"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    for phase, first, last in schedule.spans():
        budgets = [f"{schedule.budget(step):,}" for step in (first, last)]
        table.add_row(phase, f"{first} to {last}", " → ".join(dict.fromkeys(budgets)))
    console.print(table)


class Progress(TrainerCallback):
    """A progress bar with times, the loss and the ranks; lines if the output is not a terminal.

    Lines are printed after the first step, after each tenth of the training, and during long evaluations.

    Attributes:
        pace: The steps of the training, once it has begun.
    """

    pace: Pace

    def __init__(self, allocation: RankAllocation | None) -> None:
        self._allocation = allocation
        self._news = ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the schedule, which is known by now, and start the bar."""
        if self._allocation is not None:
            show_schedule(self._allocation.run)
        _start_bar()
        self._task = _bar.add_task("training", total=state.max_steps, completed=state.global_step, pace="", news="")
        self.pace = Pace("step", state.max_steps, state.global_step)
        self._tenth = -1  # of the training, at the last line

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start timing a step: what comes between two steps, such as an evaluation, is not counted."""
        self.pace.begin()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar."""
        self.pace.end()
        _bar.update(self._task, completed=state.global_step, pace=str(self.pace))
        if not control.should_log:  # else the line waits for the loss
            self._print_line(state)
        if control.should_evaluate:
            self._begin_evaluation("evaluating")

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show an evaluation that comes with the end of an epoch (`eval_strategy: epoch`)."""
        if control.should_evaluate:
            self._begin_evaluation("evaluating")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the newest loss and ranks."""
        if not logs or "loss" not in logs or not _bar.tasks:
            return
        ranks = f"  ranks {logs['rank/total']:,}" if "rank/total" in logs else ""
        self._news = f"  loss {logs['loss']:.3f}{ranks}"
        _bar.update(self._task, news=self._news)
        self._print_line(state)

    def _print_line(self, state: TrainerState) -> None:
        tenth = 10 * state.global_step // state.max_steps
        if not console.is_terminal and tenth > self._tenth:
            self._tenth = tenth
            console.print(f"  step {state.global_step}/{state.max_steps}{self._news}  {self.pace}")

    @contextmanager
    def evaluating(self, what: str) -> Iterator[None]:
        """Show the progress of an evaluation outside the training.

        Args:
            what: What is evaluated.
        """
        with _taken_down():
            _start_bar()
            self._begin_evaluation(f"evaluating {what}")
            yield

    def _begin_evaluation(self, what: str) -> None:
        self._what, self._batches, self._said, self._loader = what, Pace("batch", 0), clock(), None
        self._evaluation = _bar.add_task(what, total=None, pace="", news="")

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show how far the evaluation is."""
        loader = kwargs["eval_dataloader"]
        if self._loader is not None and loader is not self._loader:  # the same evaluation goes on to generate answers
            self._batches = Pace("batch", 0)
        self._loader, batches = loader, self._batches
        batches.total = len(loader)
        batches.end()
        _bar.update(self._evaluation, total=batches.total, completed=batches.done, pace=str(batches))
        if not console.is_terminal and clock() - self._said >= QUIET_SECONDS:
            self._said = clock()
            console.print(f"  {self._what} {batches.done}/{batches.total}  {batches}")

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show what an evaluation within the training has found."""
        _bar.remove_task(self._evaluation)
        if metrics and _bar.tasks:
            found = without_times(metrics, "eval")
            figures = ", ".join(f"{name} {figure(value)}" for name, value in found.items())
            console.print(f"  step {state.global_step}/{state.max_steps}  validation: {figures}")


def figure(value: float | None) -> str:
    """Write the value of a metric; empty if there is none."""
    return "" if value is None else f"{value:.4f}"


def progress_of(trainer: Trainer) -> Progress:
    """Return the callback that shows how far a trainer is."""
    return next(found for found in trainer.callback_handler.callbacks if isinstance(found, Progress))
