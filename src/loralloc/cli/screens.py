"""The other outputs of `loralloc train`: one line at the end, and JSON for scripts."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import IO, Any

from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loralloc.cli.terminal import Terminal, logging_from, quiet_libraries, verbose_libraries
from loralloc.files import finite
from loralloc.plain_lora import plain_sites
from loralloc.recipe.evaluations import without_times
from loralloc.recipe.outcome import Outcome
from loralloc.recipe.schema import Recipe
from loralloc.recipe.screen import Screen
from loralloc.tasks.base import TaskData, length_of
from loralloc.training import processes
from loralloc.training.callback import RankAllocation


@contextmanager
def screen_for(quiet: bool = False, verbose: bool = False, as_json: bool = False) -> Iterator[Screen]:
    """Yield the screen of a run, and set the verbosity of the libraries.

    Args:
        quiet: One line at the end, and nothing before.
        verbose: As usual, and what the libraries log.
        as_json: JSON lines on stdout; whatever else is printed there inside goes to stderr.
    """
    (verbose_libraries if verbose else quiet_libraries)()
    with ExitStack() as stack:
        if quiet:
            stack.enter_context(warnings.catch_warnings(action="ignore"))
            stack.enter_context(_no_bars())
        if quiet or verbose:
            stack.enter_context(logging_from(logging.ERROR if quiet else logging.INFO))
        lines = sys.stdout
        if as_json:
            stack.enter_context(redirect_stdout(sys.stderr))
        yield JsonLines(lines) if as_json else Quiet() if quiet else Terminal()


@contextmanager
def _no_bars() -> Iterator[None]:
    """Inside, no bars of tqdm, which TRL draws where it computes what the base model says of all answers."""
    name = "TQDM_DISABLE"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


class Quiet(Screen):
    """Shows how a run has ended, in one line."""

    def outcome(self, outcome: Outcome) -> None:
        """Show the metric, the ranks and the place of the adapter."""
        if outcome.export is None:  # a process that writes nothing
            return
        metrics, plan = outcome.metrics, outcome.plan
        split = "test" if metrics["test"] else "validation"
        found = f"{metrics['metric']} {metrics[split][metrics['metric']]:.4f} on {split} data"
        print(f"{outcome.folder.adapter}: {found}, {plan.total_rank:,} ranks, {plan.parameters:,} parameters")


class JsonLines(Screen):
    """Writes one JSON object a line for each event of a run.

    Each has a key `event`: `start`, `search` and `retraining` (with a search), `training`, `log`, `evaluation`,
    `note`, `warning`, `outcome`. Numbers that are not finite are null. With several processes, only the first one
    writes.

    Args:
        stream: Where to write.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, event: str, **values: Any) -> None:
        """Write one event, and flush it."""
        if processes.is_main():
            print(json.dumps({"event": event, **finite(values)}), file=self._stream, flush=True)

    def start(self, recipe: Recipe, data: TaskData, model: PeftModel, steps: int) -> None:
        """What is about to be trained."""
        splits = {"train": data.train, "validation": data.validation, "test": data.test}
        self.write(
            "start",
            task=recipe.task,
            model=recipe.model.name,
            method=recipe.method.name,
            output=recipe.output,
            examples={name: length_of(split) for name, split in splits.items() if split is not None},
            steps=steps,
            classes=dict(data.classes),
            modules=sum(1 for _ in plain_sites(model)),
            trainable_parameters=model.get_nb_trainable_parameters()[0],
            processes=processes.world_size(),
        )

    def search(self, steps: int, examples: int, held_out: int) -> None:
        """The search that precedes the training."""
        self.write("search", steps=steps, examples=examples, held_out=held_out)

    def retraining(self, steps: int, examples: int | None) -> None:
        """The training after the search."""
        self.write("retraining", steps=steps, examples=examples)

    def warning(self, sentence: str) -> None:
        """A sentence that must not be overlooked."""
        self.write("warning", message=sentence)

    def note(self, sentence: str) -> None:
        """A sentence about what the run does by itself."""
        self.write("note", message=sentence)

    def progress(self, allocation: RankAllocation | None) -> TrainerCallback:
        """Write the rows of the log, and evaluations within the training."""
        return _Rows(self, allocation)

    def evaluated(self, what: str, metrics: Mapping[str, float]) -> None:
        """What an evaluation outside of the training has found."""
        self.write("evaluation", of=what, metrics=dict(metrics))

    def outcome(self, outcome: Outcome) -> None:
        """What the run has produced; its metrics are those of metrics.json."""
        plan, export = outcome.plan, outcome.export
        if export is not None:
            ranks, paths = plan.ranks, {"output": str(outcome.folder.root), "adapter": str(outcome.folder.adapter)}
            self.write("outcome", **paths, metrics=dict(outcome.metrics), ranks=ranks, serving=export.serving)


class _Rows(TrainerCallback):
    """What happens in a training, as JSON lines."""

    def __init__(self, screen: JsonLines, allocation: RankAllocation | None) -> None:
        self._screen, self._allocation, self._trains = screen, allocation, False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the steps and, with an allocation, the schedule, which is known by now."""
        self._trains = True
        budget: dict[str, Any] = {}
        if self._allocation is not None:
            run = self._allocation.run
            phases = [{"phase": name, "first": first, "last": last} for name, first, last in run.schedule.spans()]
            budget = {"budget": run.target, "unit": run.unit, "phases": phases}
        self._screen.write("training", steps=state.max_steps, done=state.global_step, **budget)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write a row of the log; evaluations have an event of their own."""
        if logs and "loss" in logs:
            self._screen.write("log", step=state.global_step, **logs)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """An evaluation within the training."""
        if self._trains and metrics:
            found = without_times(metrics, "eval")
            self._screen.write("evaluation", of="validation data", step=state.global_step, metrics=found)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Later evaluations are reported by `JsonLines.evaluated`."""
        self._trains = False
