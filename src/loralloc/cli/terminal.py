"""What `loralloc train` shows in the terminal."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import transformers.utils.logging
from peft import PeftModel
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
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
    console.print(f"  time      {metrics['train_seconds']:,.0f} s for {metrics['total_steps']:,} steps")
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


_bar = Bar(
    TextColumn("  training"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeRemainingColumn(),
    TextColumn("{task.description}"),
    console=console,
)


@contextmanager
def progress_bar() -> Iterator[None]:
    """Take the bar down however training ends, and say how to go on after an interruption."""
    try:
        yield
    except KeyboardInterrupt:
        console.print("interrupted; a run with checkpoints (training.save_every) continues with --resume")
        raise
    finally:
        _bar.stop()
        for task in _bar.task_ids:
            _bar.remove_task(task)


class Progress(TrainerCallback):
    """A progress bar with the loss and the ranks; where output is no terminal, a line per tenth of the run."""

    def __init__(self, allocation: RankAllocation | None) -> None:
        self._allocation = allocation

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the schedule, which is known by now, and start the bar."""
        if self._allocation is not None:
            show_schedule(self._allocation.run)
        _bar.start()
        self._task = _bar.add_task("", total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar."""
        _bar.update(self._task, completed=state.global_step)

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
        text = f"loss {logs['loss']:.3f}{ranks}"
        _bar.update(self._task, description=text)
        tenth = max(1, state.max_steps // 10)
        if not console.is_terminal and state.global_step // tenth != (state.global_step - args.logging_steps) // tenth:
            console.print(f"  step {state.global_step}/{state.max_steps}  {text}")
