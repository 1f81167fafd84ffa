"""Draw the figures of the methods' pages, each from a training of its own: offline, some minutes each on one core.

python docs/figures.py adalora ablora autolora allora truncate

All train MiniLM for 120 steps on the demo's task (which area of Python's library is a docstring from?), seed 0, AdamW
at a learning rate of 1e-3 with 8 rows of at most 32 tokens a step, every linear layer adapted.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from loralloc import ABLoRA, AdaLoRA, ALLoRA, AutoLoRA, Budget, Truncate, attach
from loralloc.methods.allora.rows import row_norms, row_scales
from loralloc.methods.base import Method
from loralloc.methods.truncate import decompose
from loralloc.naming import kind_of
from loralloc.report.drawing import report_settings
from loralloc.report.palette import LIGHT
from loralloc.tasks.docstrings import build
from loralloc.tasks.locations import model_folder
from loralloc.training.run import AllocationRun

FOLDER = Path(__file__).resolve().parent / "figures"
STEPS, BATCH, LENGTH, RATE = 120, 8, 32, 1e-3
EIGHT = Budget(average_rank=8)
SAMPLES = 64  # that ABLoRA ablates on

Batch = dict[str, Tensor]
Watch = Callable[[AllocationRun], None]


@dataclass
class Task:
    """The demo's model and data.

    Attributes:
        train: Batches, over and over.
        held_out: Batches of validation data, 128 rows.
        classes: How many areas there are.
    """

    train: Iterator[Batch]
    held_out: list[Batch]
    classes: int

    @classmethod
    def load(cls) -> Task:
        """Tokenize the docstrings."""
        torch.manual_seed(0)
        tokenizer, splits = AutoTokenizer.from_pretrained(model_folder("demo:minilm")), build()
        areas = sorted({row["label"] for row in splits["train"]})

        def loader(split: str, shuffle: bool) -> DataLoader[Any]:
            rows = [
                {**tokenizer(row["text"], truncation=True, max_length=LENGTH), "label": areas.index(row["label"])}
                for row in splits[split]
            ]
            collate: Any = DataCollatorWithPadding(tokenizer)
            return DataLoader(rows, batch_size=BATCH, shuffle=shuffle, collate_fn=collate)  # type: ignore[arg-type]

        train = chain.from_iterable(repeat(loader("train", shuffle=True)))
        return cls(map(dict, train), [dict(batch) for batch in islice(loader("validation", False), 16)], len(areas))


@dataclass
class Course:
    """What a training was like.

    Attributes:
        run: The run, finished.
        events: What it told of its ranks.
    """

    run: AllocationRun
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def kinds(self) -> list[str]:
        """The kinds of modules in the order of the model, each once."""
        return list(dict.fromkeys(_kind(site.name) for site in self.run.sites))

    def ranks_by_kind(self, ranks: list[int]) -> dict[str, float]:
        """The mean rank of every kind of module."""
        found: dict[str, list[int]] = {}
        for site, rank in zip(self.run.sites, ranks, strict=True):
            found.setdefault(_kind(site.name), []).append(rank)
        return {kind: sum(values) / len(values) for kind, values in found.items()}


def train(task: Task, method: Method, capacity: int, watch: Watch | None = None, alpha: int | None = None) -> Course:
    """Train the demo's task; `watch` looks at the run after every optimizer step, before ranks are decided on."""
    torch.manual_seed(0)
    folder = model_folder("demo:minilm")
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=task.classes)
    config = LoraConfig(r=capacity, lora_alpha=alpha or 2 * capacity, target_modules="all-linear", task_type="SEQ_CLS")
    model = get_peft_model(base, config).train()
    run = attach(model, method, total_steps=STEPS)
    course = Course(run)
    run.on_event = course.events.append
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    for batch in islice(task.train, STEPS):
        model(**batch).loss.backward()
        run.before_step(optimizer)
        optimizer.step()
        if watch is not None:
            watch(run)
        run.after_step(optimizer)
        optimizer.zero_grad()
    run.finish()
    return course


def adalora(task: Task) -> Figure:
    """The falling budget, and the ranks of every kind of module under it."""
    course = train(task, AdaLoRA(EIGHT), capacity=12)
    allocations = [event for event in course.events if "ranks" in event]
    steps = [event["step"] for event in allocations]
    figure, (upper, lower) = panels()
    schedule = course.run.schedule
    upper.plot(range(STEPS), [schedule.budget(step) for step in range(STEPS)], color=LIGHT["area"], lw=6)
    upper.step(steps, [sum(event["ranks"]) for event in allocations], where="post", color=LIGHT["series-1"])
    _titled(upper, "open ranks: line, budget b(t): band", "step")
    for index, kind in enumerate(course.kinds):
        means = [course.ranks_by_kind(event["ranks"])[kind] for event in allocations]
        lower.step(steps, means, where="post", color=LIGHT[f"series-{index + 1}"], label=kind)
    _titled(lower, "mean rank of each kind of module", "step")
    _named(lower)
    return figure


def ablora(task: Task) -> Figure:
    """The ranks of all modules at the end, and those of every kind of module over the rounds."""
    course = train(task, ABLoRA(EIGHT, task.held_out, samples=SAMPLES), capacity=16)
    rounds = [event for event in course.events if "pruned" in event]
    figure, (upper, lower) = panels()
    steps = [0, *(event["step"] for event in rounds)]
    start = next(event["ranks"] for event in course.events if event["event"] == "start")
    history = [start, *(event["ranks"] for event in rounds)]
    modules = range(len(start))
    upper.bar(modules, history[-1], color=LIGHT["area"])
    upper.axhline(EIGHT.average_rank or 0, color=LIGHT["ink"], lw=0.8)
    _titled(upper, "ranks at the end, and at the start (line)", "module, from input to output")
    for index, kind in enumerate(course.kinds):
        means = [course.ranks_by_kind(ranks)[kind] for ranks in history]
        lower.step(steps, means, where="post", color=LIGHT[f"series-{index + 1}"], label=kind)
    _titled(lower, "mean rank of each kind of module", "step")
    _named(lower)
    return figure


def autolora(task: Task) -> Figure:
    """Shares of all ranks against the threshold."""
    rows: list[Tensor] = []

    def note(run: AllocationRun) -> None:
        rows[:] = [run.state.shares()]

    course = train(task, AutoLoRA(task.held_out), capacity=8, watch=note)
    shares, ranks = rows[0].sort(dim=1, descending=True).values, course.run.plan
    assert ranks is not None
    figure, (upper, lower) = panels()
    upper.plot(range(1, shares.shape[1] + 1), shares.T, color=LIGHT["series-1"], lw=0.7, alpha=0.5)
    upper.axhline(1 / shares.shape[1], color=LIGHT["ink"], lw=0.8)
    _titled(upper, "shares of the ranks of each matrix; what is below 1/k goes", "rank, from the largest share on")
    counts = [list(ranks.ranks.values()).count(rank) for rank in range(shares.shape[1] + 1)]
    lower.bar(range(len(counts)), counts, color=LIGHT["area"])
    _titled(lower, "matrices by the number of ranks that stay", "ranks of a matrix")
    return figure


def allora(task: Task) -> Figure:
    """The scale of a row's gradient over its norm, and where the rows of the trained update are."""
    course = train(task, ALLoRA(mode="hybrid"), capacity=8, alpha=8)
    norms = torch.cat([_norms(site) for site in course.run.sites])
    figure, (upper, lower) = panels()
    grid = torch.linspace(0, float(norms.max()) * 1.05, 200)
    upper.plot(grid, row_scales(grid, 2.0), color=LIGHT["series-1"])
    _titled(upper, "factor of a row's gradient, η = 2", "norm of the row of ΔW")
    lower.hist(norms.numpy(), bins=40, color=LIGHT["area"])
    _titled(lower, "rows of all layers at the end of the run", "norm of the row of ΔW")
    return figure


def _norms(site: Any) -> Tensor:
    gates = torch.ones(1, site.rank)
    return row_norms(site.A.detach()[None], gates, site.B.detach()[None] * site.scaling)[0]


def truncate(task: Task) -> Figure:
    """Singular values of all updates at the cut, and the threshold that they share."""
    values: list[list[Tensor]] = []

    def note(run: AllocationRun) -> None:
        if run.schedule.cuts_after(run.step):  # type: ignore[attr-defined]
            values[:] = [[part[1] for part in decompose([(s.A.detach(), s.B.detach() * s.scaling) for s in run.sites])]]

    course = train(task, Truncate(EIGHT), capacity=12, watch=note)
    plan = course.run.plan
    assert plan is not None
    ranks = list(plan.ranks.values())
    kept = torch.cat([sigma[:rank] for sigma, rank in zip(values[0], ranks, strict=True)])
    figure, (upper, lower) = panels()
    for sigma in values[0]:
        upper.plot(range(1, len(sigma) + 1), sigma, color=LIGHT["series-1"], lw=0.7, alpha=0.5)
    upper.axhline(float(kept.min()), color=LIGHT["ink"], lw=0.8)
    upper.set_yscale("log")
    upper.yaxis.set_major_formatter("{x:g}")
    upper.set_xticks(range(1, 1 + max(map(len, values[0]))))
    _titled(upper, "singular values; those below the line go", "number of the singular value")
    means = course.ranks_by_kind(ranks)
    lower.barh(list(means), list(means.values()), color=LIGHT["area"])
    lower.invert_yaxis()
    _titled(lower, "mean rank of each kind of module", "rank")
    return figure


def panels() -> tuple[Figure, Sequence[Axes]]:
    """A figure of two panels, narrow enough for a telephone."""
    return plt.subplots(2, 1, figsize=(4.8, 5.4), layout="constrained")


def _kind(name: str) -> str:
    """The kind of a module, without what all names of this model begin with."""
    return kind_of(name).removeprefix("bert.").removeprefix("encoder.layer.")


def _named(axes: Axes) -> None:
    """Say below the axes which line is which."""
    axes.legend(frameon=False, fontsize=7.5, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.25))


def _titled(axes: Axes, title: str, x: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(x)


FIGURES: dict[str, Callable[[Task], Figure]] = {
    "adalora": adalora,
    "ablora": ablora,
    "autolora": autolora,
    "allora": allora,
    "truncate": truncate,
}


def main() -> None:
    """Draw what the command line names."""
    parser = argparse.ArgumentParser(description="Draw the figures of the methods' pages, each from a training.")
    parser.add_argument("methods", nargs="*", help=f"some of {', '.join(FIGURES)}; all of them by default")
    names = parser.parse_args().methods or [*FIGURES]
    for name in names:
        with report_settings():
            figure = FIGURES[name](Task.load())
            figure.savefig(FOLDER / f"method-{name}.svg", metadata={"Date": None, "Creator": None})
            plt.close(figure)
            print(FOLDER / f"method-{name}.svg")


if __name__ == "__main__":
    main()
