"""The record of a run without a recipe (your own loop or Trainer), and the folder that is written from it.

The files are those of `loralloc train`, as far as they are known: `trace.jsonl`, `log.jsonl`, `ranks.json`,
`metrics.json`, and the page made of them. What is missing is named on the page.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from loralloc.errors import UserError
from loralloc.files import finite, write_atomically
from loralloc.plan import RankPlan
from loralloc.trace import Event

Rows = Sequence[Mapping[str, Any]]

RECIPE, TRACE, LOG = "recipe.yaml", "trace.jsonl", "log.jsonl"


class Recorded(ABC):
    """Records an allocation run, and writes its report.

    Attributes:
        seconds: From the first step to the end; None before the end, and where the beginning is not known because the
            run was resumed.
    """

    step: int
    plan: RankPlan | None
    model: nn.Module
    seconds: float | None = None

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._rows: list[dict[str, Any]] = []
        self._begun: float | None = None

    def log(self, **values: float) -> None:
        """Record figures of the current step for the report, in a training loop of your own.

            run.log(loss=loss.item(), learning_rate=scheduler.get_last_lr()[0])
            run.log(eval_loss=0.61, eval_accuracy=0.8)

        The rank statistics are added to rows with a loss. Figures that are logged after the run has finished count for
        its last step.

        Args:
            values: By the names that a Trainer logs them under: `loss`, `learning_rate`, `grad_norm`, and `eval_...`
                for figures of an evaluation. `tokens_per_second` (or `examples_per_second`) and `memory_mib` are drawn
                too.
        """
        row = {name: float(value) for name, value in values.items()}
        self._rows.append({"step": self.step, **row, **(self.statistics() if "loss" in row else {})})

    @abstractmethod
    def statistics(self) -> dict[str, float]:
        """Return the rank statistics for a training log."""

    def write_report(self, folder: str | Path) -> Path:
        """Write the files and the page of a finished run, for a training loop of your own.

        A resumed run knows its ranks only from the resumption on, so its trace is left empty.

        Args:
            folder: Where to write; created if it does not exist.

        Returns:
            The path of the page, FOLDER/report.html.

        Raises:
            UserError: The run has not finished, or the folder is a file or holds a run of `loralloc train`.
        """
        if self.plan is None:
            raise UserError("the run has not finished, so its ranks are not final: call finish() before write_report()")
        folder = free_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        complete = bool(self._events) and self._events[0]["event"] == "start"
        for name, rows in {TRACE: self._events if complete else [], LOG: self._rows}.items():
            write_atomically(folder / name, "".join(json.dumps(finite(row)) + "\n" for row in rows))
        return write_run(folder, self, self._rows)

    def _remember(self, event: Event) -> None:
        self._events.append(event)
        if event["event"] == "start":
            self._begun = time.perf_counter()
        elif event["event"] == "finish" and self._begun is not None:
            self.seconds = time.perf_counter() - self._begun


def free_folder(folder: str | Path) -> Path:
    """Return a folder that a run may write its files into.

    Raises:
        UserError: It is a file, or `loralloc train` has written a run there.
    """
    path = Path(folder).expanduser()
    if path.is_file():
        raise UserError(f"{path} is a file; name a folder")
    if (path / RECIPE).exists():
        raise UserError(f"{path} holds a run of `loralloc train`, which would be overwritten; choose another folder")
    return path


def write_run(folder: Path, run: Recorded, rows: Rows) -> Path:
    """Write plan, figures and page of a finished run beside its trace and log.

    Args:
        folder: The folder, with `trace.jsonl` and `log.jsonl` as far as there are any.
        run: The run.
        rows: What it has logged, each row with its step.

    Returns:
        The path of the page.
    """
    from loralloc.report import write_report  # takes seconds, which a training without a page should not cost

    assert run.plan is not None
    base = getattr(run.model, "name_or_path", "") or "unknown"
    replace(run.plan, provenance={"base_model": base, **run.plan.provenance}).save(folder / "ranks.json")
    figures = json.dumps(finite(final_metrics(run.plan, rows, run.seconds)), indent=1)
    write_atomically(folder / "metrics.json", figures + "\n")
    return write_report(folder)


def final_metrics(plan: RankPlan, rows: Rows, seconds: float | None) -> dict[str, Any]:
    """Return what metrics.json says of a run whose task is not known: its last evaluation, and its ranks.

    Args:
        plan: The plan.
        rows: What was logged; the figures of an evaluation begin with `eval_`.
        seconds: How long training took, where that is known.
    """
    evaluations = (without_prefix(row) for row in reversed(rows))
    return {
        "metric": "loss",
        "greater_is_better": False,
        "validation": next(filter(None, evaluations), None),
        **({} if seconds is None else {"train_seconds": round(seconds, 1)}),
        "total_steps": plan.provenance["steps"],
        "bad_steps": plan.provenance["bad_steps"],
        "final_ranks": plan.total_rank,
        "final_parameters": plan.parameters,
    }


def without_prefix(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of an evaluation, without how long it took.

    >>> without_prefix({"step": 3, "eval_loss": 0.5, "eval_runtime": 1.2})
    {'loss': 0.5}
    """
    timing = ("_runtime", "_per_second", "_preparation_time")
    found = {name: value for name, value in row.items() if name.startswith("eval_") and not name.endswith(timing)}
    return {name.removeprefix("eval_"): value for name, value in found.items()}
