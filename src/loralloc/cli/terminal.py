"""What `loralloc train` shows in the terminal."""

from __future__ import annotations

import json
import time
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import transformers.utils.logging
from peft import PeftModel
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loralloc.cli.folder import RunFolder
from loralloc.config import Recipe
from loralloc.export import Export
from loralloc.gating import plain_sites
from loralloc.plan import RankPlan
from loralloc.report.grid import arrange, short_names
from loralloc.tasks import labels
from loralloc.tasks.base import TaskData
from loralloc.training import processes
from loralloc.training.callback import RankAllocation
from loralloc.training.run import AllocationRun

_WIDTH_WITHOUT_TERMINAL = 110

if TYPE_CHECKING:
    from loralloc.cli.pipeline import Outcome

console = Console(highlight=False)
if not console.is_terminal:
    console = Console(highlight=False, width=_WIDTH_WITHOUT_TERMINAL)


def quiet_libraries() -> None:
    """Keep notes of the libraries underneath, which a user of the command line cannot act on, off the screen.

    Of several processes, the first one alone says what happens.
    """
    processes.join()
    console.quiet = not processes.is_main()
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for module in ("transformers", "peft", "torch"):
        warnings.filterwarnings("ignore", module=rf"{module}\b")


def show_start(recipe: Recipe, data: TaskData, model: PeftModel) -> None:
    """Show what is about to be trained."""
    sites = sum(1 for _ in plain_sites(model))
    trainable, total = model.get_nb_trainable_parameters()
    test = "" if data.test is None else f", {len(data.test):,} test"
    console.print(f"[bold]{escape(recipe.method.name)}[/] on {escape(recipe.model.name)} ({total:,} parameters)")
    console.print(f"  data      {len(data.train):,} train, {len(data.validation):,} validation{test} examples")
    if data.classes:
        counted = f"  classes   {len(data.classes):,} in the training data: {labels.class_words(data.classes)}"
        console.print(escape(counted), soft_wrap=True)
    for warning in labels.warnings(data.classes):
        console.print(f"  [yellow]warning[/]   {escape(warning)}", soft_wrap=True)
    console.print(f"  adapter   {sites} modules, {trainable:,} trainable parameters at the start (heads included)")


def show_processes(recipe: Recipe) -> None:
    """Say how many processes train together, where a launcher has started several."""
    count, each = processes.world_size(), recipe.training.batch_size * recipe.training.accumulation
    if count > 1:
        console.print(f"  processes {count}, each with {each} examples a step: {count * each} together")


def show_search(steps: int, examples: int, held_out: int) -> None:
    """Say what the search does that precedes the training."""
    console.print(
        f"[bold]search[/]    {steps:,} steps on {examples:,} examples; ranks are learned on {held_out:,} others"
    )


def show_retraining(steps: int, examples: int) -> None:
    """Say what follows the search."""
    console.print(f"[bold]then[/]      plain LoRA at the ranks found, {steps:,} steps on all {examples:,} examples")


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


def show_warning(sentence: str) -> None:
    """Show a sentence that must not be overlooked, above the bar."""
    console.print(f"  [yellow]{escape(sentence)}[/]")


def show_outcome(folder: RunFolder, plan: RankPlan, metrics: Mapping[str, Any], export: Export, report: Path) -> None:
    """Show metrics, ranks, and where things are."""
    console.print(_rank_table(plan))
    splits = {name: metrics[name] for name in ("validation", "test") if metrics[name]}
    show_metrics(splits, metrics["reference"], metrics["metric"])
    share = plan.parameters / plan.start_parameters
    budget = ", ".join(f"{name} {value:g}" for name, value in plan.budget.items())
    console.print(
        f"  ranks     {plan.total_rank:,} over {len(plan.modules)} modules" + (f" (budget: {budget})" if budget else "")
    )
    console.print(f"  size      {plan.parameters:,} parameters, {share:.0%} of the start")
    skipped = f", {metrics['bad_steps']:,} of them skipped (gradients not finite)" if metrics["bad_steps"] else ""
    console.print(f"  time      {metrics['train_seconds']:,.0f} s for {metrics['total_steps']:,} steps{skipped}")
    if "search" in metrics:
        console.print(
            f"  search    {metrics['search']['seconds']:,.0f} s for {metrics['search']['steps']:,} steps before"
        )
    console.print(f"  checked   reloaded by stock PEFT, largest difference of a logit {export.difference:.1e}")
    console.print(f"  adapter   {escape(str(folder.adapter))}")
    console.print(f"  report    {escape(str(report))}")
    for line in export.serving:
        console.print(f"  serve     {escape(line)}", soft_wrap=True)


def show_metrics(
    splits: Mapping[str, Mapping[str, float]], reference: Mapping[str, float] | None = None, metric: str = ""
) -> None:
    """Show a table of metrics, a row per split; references count in the column of the main metric."""
    names = list(dict.fromkeys(name for values in splits.values() for name in values))
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    for split, values in splits.items():
        table.add_row(escape(split), *(_figure(values.get(name)) for name in names))
    for name, value in (reference or {}).items():
        table.add_row(
            f"[dim]{escape(name)}[/]", *(f"[dim]{_figure(value)}[/]" if key == metric else "" for key in names)
        )
    console.print(table)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _rank_table(plan: RankPlan) -> Table:
    """Ranks as layer × module type; modules without a layer stand below."""
    grid = arrange(plan.modules)
    table = Table(title="Ranks", title_justify="left", box=None, pad_edge=False)
    table.add_column("layer", justify="right")
    for name in short_names(grid.types).values():
        table.add_column(escape(name), justify="right", overflow="fold")
    for stack, layer in grid.rows:
        names = [grid.cells.get((stack, layer, kind)) for kind in grid.types]
        table.add_row(str(layer), *("" if name is None else str(plan.modules[name].rank) for name in names))
    for name in grid.others:
        table.add_row(escape(name), str(plan.modules[name].rank))
    return table


@contextmanager
def silence() -> Iterator[None]:
    """Show nothing."""
    before, console.quiet = console.quiet, True
    try:
        yield
    finally:
        console.quiet = before


def show_comparison(outcomes: Mapping[str, Outcome]) -> None:
    """Show the runs of the demo side by side, and how to load the first one's adapter."""
    table = Table(title="The demo", title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    for column in ("test accuracy", "ranks", "parameters", "seconds"):
        table.add_column(column, justify="right")
    for name, outcome in outcomes.items():
        metrics = outcome.metrics
        figures = (metrics["final_ranks"], metrics["final_parameters"], metrics["train_seconds"])
        accuracy = f"{metrics['test']['accuracy']:.3f}"
        table.add_row(name, accuracy, *(f"{figure:,.0f}" for figure in figures))
    first = next(iter(outcomes.values()))
    for name, value in first.metrics["reference"].items():
        table.add_row(f"[dim]{name}[/]", f"[dim]{value:.3f}[/]")
    console.print(table)
    console.print("\nLoad the adapter with stock PEFT:\n")
    labels = len(json.loads((first.folder.model / "config.json").read_text(encoding="utf-8"))["id2label"])
    console.print(LOADING.format(labels=labels, adapter=first.folder.adapter), markup=False, soft_wrap=True)


LOADING = """\
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer
model = AutoPeftModelForSequenceClassification.from_pretrained("{adapter}", num_labels={labels})
tokenizer = AutoTokenizer.from_pretrained(model.peft_config["default"].base_model_name_or_path)
print(model(**tokenizer("Open a socket and connect to the server.", return_tensors="pt")).logits)"""


clock = time.perf_counter

QUIET_SECONDS = 10
"""Where output is no terminal, how long an evaluation goes on without a line."""

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
    """Give the cursor back however a loop ends."""
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


class Pace:
    """How long the rounds of a loop take, and how long the rest will.

    Args:
        unit: What a round is called.
        total: Rounds of the whole loop.
        done: Rounds that were done before.

    Attributes:
        total: Rounds of the whole loop; may become known after the first.
        done: Rounds that are done.
        recent: Seconds of the last rounds.
    """

    def __init__(self, unit: str, total: int, done: int = 0) -> None:
        self.recent: deque[float] = deque(maxlen=20)
        self.total, self.done = total, done
        self._unit, self._before = unit, done
        self._start = self._begun = self._now = clock()

    def begin(self) -> None:
        """A round begins; without this call it begins where the last one ended."""
        self._begun = clock()

    def end(self) -> None:
        """A round ends."""
        self._now = clock()
        self.recent.append(self._now - self._begun)
        self._begun = self._now
        self.done += 1

    def __str__(self) -> str:
        """Seconds a round, over the last ones, and the time left, counting what comes between rounds."""
        if not self.recent:
            return ""
        left = (self._now - self._start) / (self.done - self._before) * (self.total - self.done)
        minutes, seconds = divmod(round(left), 60)
        hours, minutes = divmod(minutes, 60)
        rest = f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
        return f"{sum(self.recent) / len(self.recent):.2g} s a {self._unit}, {rest} left"


class Progress(TrainerCallback):
    """A progress bar with times, the loss and the ranks; where output is no terminal, lines.

    There, a line comes after the first step, for each tenth of the training, and from an evaluation that takes long.

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
        self._tenth = -1  # that the last line was about

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A step is timed without what comes between two of them, such as an evaluation."""
        self.pace.begin()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar."""
        self.pace.end()
        _bar.update(self._task, completed=state.global_step, pace=str(self.pace))
        if not control.should_log:  # else the line waits for the loss
            self._print_line(state)
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
        """Show how far an evaluation is that is no part of the training.

        Args:
            what: What is evaluated.
        """
        with _taken_down():
            _start_bar()
            self._begin_evaluation(f"evaluating {what}")
            yield

    def _begin_evaluation(self, what: str) -> None:
        self._what, self._batches, self._said = what, Pace("batch", 0), clock()
        self._evaluation = _bar.add_task(what, total=None, pace="", news="")

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show how far the evaluation is."""
        batches = self._batches
        batches.total = len(kwargs["eval_dataloader"])
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
            figures = ", ".join(f"{name} {_figure(value)}" for name, value in found.items())
            console.print(f"  step {state.global_step}/{state.max_steps}  validation: {figures}")


def without_times(metrics: Mapping[str, float], prefix: str) -> dict[str, float]:
    """Return what a Trainer's evaluation has found, by its own names, without how long it took."""
    timing = ("_runtime", "_per_second", "_preparation_time")
    return {
        key.removeprefix(f"{prefix}_"): value
        for key, value in metrics.items()
        if not key.endswith(timing) and key != "epoch"
    }
