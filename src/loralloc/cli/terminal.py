"""What `loralloc train` shows in the terminal."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import datasets
import transformers.utils.logging
from peft import PeftModel
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from transformers import Trainer

from loralloc.budget import in_words
from loralloc.cli.progress import Progress, console, counted, figure, progress_bar, progress_of
from loralloc.naming import short_names
from loralloc.plain_lora import plain_sites
from loralloc.plan import RankPlan
from loralloc.recipe.outcome import Outcome
from loralloc.recipe.schema import Recipe
from loralloc.recipe.screen import Screen
from loralloc.report.grid import arrange
from loralloc.tasks import labels
from loralloc.tasks.base import TaskData, length_of
from loralloc.tasks.preview import Part
from loralloc.tasks.spec import TASKS
from loralloc.training import processes
from loralloc.training.callback import RankAllocation


def quiet_libraries() -> None:
    """Silence messages of the libraries on which a user of the command line cannot act.

    With several processes, only the first one prints.
    """
    processes.join()
    console.quiet = not processes.is_main()
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for module in ("transformers", "peft", "torch"):
        warnings.filterwarnings("ignore", module=rf"{module}\b")


def verbose_libraries() -> None:
    """Let transformers and datasets say what they do."""
    processes.join()
    console.quiet = not processes.is_main()
    transformers.utils.logging.set_verbosity_info()
    datasets.logging.set_verbosity_info()


@contextmanager
def logging_from(level: int) -> Iterator[None]:
    """Print log records from a level on to stderr: ours, and those of libraries without a verbosity setting."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("[%(name)s] %(message)s"))
    loggers = [logging.getLogger(name) for name in ("loralloc", "peft", "accelerate", "trl")]
    before = [(logger.level, logger.handlers) for logger in loggers]
    for logger in loggers:
        logger.level, logger.handlers = level, [handler]
    try:
        yield
    finally:
        for logger, kept in zip(loggers, before, strict=True):
            logger.level, logger.handlers = kept


class Terminal(Screen):
    """Shows a run in the terminal."""

    def start(self, recipe: Recipe, data: TaskData, model: PeftModel, steps: int) -> None:
        """Show what is about to be trained."""
        sites = sum(1 for _ in plain_sites(model))
        trainable, total = model.get_nb_trainable_parameters()
        test = "" if data.test is None else f", {len(data.test):,} test"
        size = f"{total:,} parameters" + (f" in {recipe.model.load_in}" if recipe.model.load_in else "")
        console.print(f"[bold]{escape(recipe.method.name)}[/] on {escape(recipe.model.name)} ({size})")
        count = length_of(data.train)
        train = "streamed" if count is None else f"{count:,}"
        console.print(f"  data      {train} train, {len(data.validation):,} validation{test} examples")
        if data.classes:
            counted = f"  classes   {len(data.classes):,} in the training data: {labels.class_words(data.classes)}"
            console.print(escape(counted), soft_wrap=True)
        for warning in labels.warnings(data.classes):
            console.print(f"  [yellow]warning[/]   {escape(warning)}", soft_wrap=True)
        console.print(f"  adapter   {sites} modules, {trainable:,} trainable parameters at the start (heads included)")
        count, each = processes.world_size(), recipe.training.batch_size * recipe.training.accumulation
        targets = recipe.data.target_length if "target_length" in TASKS[recipe.task].keys else 0
        tokens = count * each * (_choices(data) * recipe.data.max_length + targets)
        console.print(f"  steps     {steps:,} of {count * each} examples, {tokens:,} tokens at most")
        if count > 1:
            console.print(f"  processes {count}, each with {each} examples a step")

    def search(self, steps: int, examples: int, held_out: int) -> None:
        """Say what the search does that precedes the training."""
        console.print(
            f"[bold]search[/]    {steps:,} steps on {examples:,} examples; ranks are learned on {held_out:,} others"
        )

    def retraining(self, steps: int, examples: int | None) -> None:
        """Say what follows the search."""
        console.print(f"[bold]then[/]      plain LoRA at the ranks found, {steps:,} steps on all {examples:,} examples")

    def warning(self, sentence: str) -> None:
        """Show a warning above the bar."""
        console.print(f"  [yellow]{escape(sentence)}[/]")

    def note(self, sentence: str) -> None:
        """Show a note above the bar."""
        console.print(f"  {escape(sentence)}", soft_wrap=True)

    def progress(self, allocation: RankAllocation | None) -> Progress:
        """Show a bar, or lines."""
        return Progress(allocation)

    def training(self) -> AbstractContextManager[None]:
        """Take the bar down however training ends."""
        return progress_bar()

    def evaluating(self, trainer: Trainer, what: str) -> AbstractContextManager[None]:
        """Show a bar."""
        return progress_of(trainer).evaluating(what)

    def generating(self, count: int) -> AbstractContextManager[Callable[[int], None]]:
        """Show how many prompts are answered."""
        return counted("answering prompts", count)

    def preview(self, examples: Sequence[Sequence[Part]]) -> None:
        """Show the first examples, with what is learned in green."""
        for number, parts in enumerate(examples, 1):
            console.print(f"[bold]example {number}[/] as the model sees it; [green]green[/] is learned")
            for text, kind in parts:
                console.print(Text(_middle_out(text), style=STYLES[kind]), soft_wrap=True, end="")
            console.print()

    def outcome(self, outcome: Outcome) -> None:
        """Show metrics, ranks, and where things are."""
        folder, plan, metrics, export = outcome.folder, outcome.plan, outcome.metrics, outcome.export
        if export is None:  # a process that writes nothing
            return
        console.print(_rank_table(plan))
        splits = {name: metrics[name] for name in ("validation", "test") if metrics[name]} | metrics["also"]
        show_metrics(splits, metrics["reference"], metrics["metric"])
        if "generation" in metrics:
            show_generation(metrics["generation"])
        share = plan.parameters / plan.start_parameters
        budget = in_words(plan.budget)
        console.print(
            f"  ranks     {plan.total_rank:,} over {len(plan.modules)} modules"
            + (f" (budget: {budget})" if budget else "")
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
        console.print(f"  report    {escape(str(folder.root / 'report.html'))}")
        for line in export.serving:
            console.print(f"  serve     {escape(line)}", soft_wrap=True)


STYLES = {"context": "", "learned": "green", "rejected": "strike red"}
"""How the parts of an example look."""
MOST_SHOWN = 1500
"""Characters shown of one part of an example."""
MOST_COLUMNS = 6
"""Metrics that stand side by side; 80 characters hold no more."""


def _middle_out(text: str) -> str:
    """Leave the middle of a long text out."""
    half = MOST_SHOWN // 2
    return text if len(text) <= MOST_SHOWN else f"{text[:half]} [{len(text) - 2 * half:,} characters] {text[-half:]}"


def _choices(data: TaskData) -> int:
    """Number of texts per example: multiple choice with a head has one for each choice."""
    ids = data.validation[0].get("input_ids") if len(data.validation) else None
    return len(ids) if ids and isinstance(ids[0], list) else 1


def show_metrics(
    splits: Mapping[str, Mapping[str, float]], reference: Mapping[str, float] | None = None, metric: str = ""
) -> None:
    """Show a table of metrics, a row per split, or a column where there are many metrics.

    References are values of the main metric only.
    """
    names = list(dict.fromkeys(name for values in splits.values() for name in values))
    if len(names) > MOST_COLUMNS:
        console.print(_tall_table(names, splits, {name: {metric: value} for name, value in (reference or {}).items()}))
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    for split, values in splits.items():
        table.add_row(escape(split), *(figure(values.get(name)) for name in names))
    for name, value in (reference or {}).items():
        table.add_row(
            f"[dim]{escape(name)}[/]", *(f"[dim]{figure(value)}[/]" if key == metric else "" for key in names)
        )
    console.print(table)


def _tall_table(names: Sequence[str], *columns: Mapping[str, Mapping[str, float]]) -> Table:
    """A row per metric; a column per split, and dim ones for references."""
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for style, group in zip(("", "dim"), columns, strict=True):
        for name in group:
            table.add_column(escape(name), justify="right", style=style, header_style=style)
    for name in names:
        values = [one.get(name) for group in columns for one in group.values()]
        table.add_row(escape(name), *map(figure, values))
    return table


def show_generation(record: Mapping[str, Any]) -> None:
    """Show the model's answers before and after training, and their metrics."""
    for sample in record["samples"]:
        console.print("[bold]prompt[/]    ", Text(_middle_out(sample["prompt"])), soft_wrap=True)
        for name in ("reference", "before", "after"):
            if name in sample:
                console.print(f"  [bold]{name:9}[/]", Text(_middle_out(sample[name])), soft_wrap=True)
    if record["trained"]:
        show_metrics({name: record[name] for name in ("untrained", "trained") if name in record})


def _rank_table(plan: RankPlan) -> Table:
    """Ranks as layer × module type; modules without a layer stand below."""
    grid = arrange(plan.modules)
    table = Table(title="Ranks", title_justify="left", box=None, pad_edge=False)
    table.add_column("layer", justify="right", no_wrap=True)
    for name in short_names(grid.types).values():
        table.add_column(escape(name), justify="right", overflow="fold")
    for row, (stack, layer) in zip(grid.row_names, grid.rows, strict=True):
        names = [grid.cells.get((stack, layer, kind)) for kind in grid.types]
        table.add_row(escape(row), *("" if name is None else str(plan.modules[name].rank) for name in names))
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
