"""Who finds planted ranks, and what is that worth? Every method on a problem whose right ranks are known.

    python benchmarks/planted.py --base MODEL           # runs that have a record are not repeated
    python benchmarks/planted.py --base MODEL --concentration 2 --unit ranks --methods "true ranks" uniform AdaLoRA
    python benchmarks/planted.py --base minilm --seeds 0 --rates 0.001 0.003
    python benchmarks/planted.py --quick                # a random base of 14 layers, one seed: minutes
    python benchmarks/planted.py --table                # print the tables of docs/planted-ranks.md from the records
    python benchmarks/planted.py --plot                 # redraw docs/figures/planted.svg

MODEL is a folder with a causal language model, such as the stories260K of llama2.c; tiny and minilm are random ones.
`planted_problem.py` says how ranks are planted, `planted_methods.py` what learns them. One record a run goes to
benchmarks/results/planted.jsonl. Where a method has several learning rates, the tables show the one with the lowest
divergence on validation texts, the mean over seeds. Seconds, of the processor, are kept in the records, but of runs on
different days they say nothing.

All students learn the teacher's distribution at every position (`--labels distribution`). One token drawn from it
(`--labels sampled`) is closer to real data. But fitting P parameters to N such labels costs about P / 2N nats, which at
this size is as much as the difference that ranks make: the comparison would be about who overfits least.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import planted_report
import torch
from planted_methods import EXPERIMENTS, METHODS, Task
from planted_problem import RANDOM, Problem, Teaching, divergence, problem

from loralloc import Budget, __version__
from loralloc.budget import Unit
from loralloc.tasks.metrics import spearman

RESULTS = Path(__file__).parent / "results" / "planted.jsonl"
RUNS = METHODS | EXPERIMENTS


@dataclass(frozen=True)
class Setting:
    """The settings of a run: all of them go into its record, and together they identify it.

    Attributes:
        teaching: The problem.
        method: Name of the method.
        budget: Share of what the planted ranks cost.
        unit: What the budget counts.
        rate: Highest learning rate.
    """

    teaching: Teaching
    method: str
    budget: float
    unit: Unit
    rate: float

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as a flat mapping, a base's folder by its name, which is the same on every machine."""
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "teaching"}
        return {**asdict(self.teaching), "base": Path(self.teaching.base).name, **own}


def run(setting: Setting) -> dict[str, Any]:
    """One run; returns its record."""
    teaching = setting.teaching
    learned = problem(teaching)
    started = time.process_time()
    task = Task(learned, budget_of(setting, learned), teaching.capacity, setting.rate, teaching.seed)
    student, ranks = RUNS[setting.method](task)
    seconds = time.process_time() - started
    found, planted = (np.array([of[name] for name in learned.truth], dtype=float) for of in (ranks, learned.truth))
    return {
        **setting.to_dict(),
        "divergence": divergence(student, learned.test),
        "validation": divergence(student, learned.validation),
        "untrained": divergence(learned.base, learned.test),
        "recovered": float(np.minimum(found, planted).sum() / planted.sum()),
        "correlation": spearman(found, planted),
        "total_rank": sum(ranks.values()),
        "parameters": sum(rank * learned.costs[name] for name, rank in ranks.items()),
        "ranks": dict(ranks),
        "truth": dict(learned.truth),
        "seconds": round(seconds, 1),
        "versions": {"loralloc": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def budget_of(setting: Setting, learned: Problem) -> Budget:
    """What the run may keep: a share of what the planted ranks cost."""
    in_ranks = setting.unit == "ranks"
    cost = sum(rank * (1 if in_ranks else learned.costs[name]) for name, rank in learned.truth.items())
    limit = round(setting.budget * cost)
    return Budget(total_rank=limit) if in_ranks else Budget(parameters=limit)


def settings(options: argparse.Namespace) -> Iterator[Setting]:
    """Yield the settings of all runs that are asked for, one budget after the other, so that tables fill up early."""
    rest = {name: getattr(options, name) for name in ("base", "average", "capacity", "strength", "labels")}
    rest |= {name: getattr(options, name) for name in ("steps", "batch", "tokens")}
    for budget, seed, concentration in product(options.budgets, options.seeds, options.concentration):
        teaching = Teaching(concentration=concentration, seed=seed, **rest)
        for method, rate in product(options.methods, options.rates):
            yield Setting(teaching, method, budget, options.unit, rate)


def records(path: Path) -> list[dict[str, Any]]:
    """The records there are."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def measure(wanted: Iterator[Setting], path: Path) -> None:
    """Make the runs that have no record."""
    done = records(path)
    for setting in wanted:
        told = setting.to_dict()
        if any(told.items() <= record.items() for record in done):
            continue
        record = run(setting)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
        shown = {key: round(record[key], 4) for key in ("divergence", "recovered", "correlation", "seconds")}
        print(setting.method, f"budget {setting.budget}", f"concentration {setting.teaching.concentration}", end=" ")
        print(f"seed {setting.teaching.seed}", f"rate {setting.rate}", shown, flush=True)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--base", default="tiny", help=f"folder of a causal language model, or {', '.join(RANDOM)}")
    made.add_argument("--concentration", type=float, nargs="+", default=[0.0, 0.5, 2.0], help="0 is even")
    made.add_argument("--budgets", type=float, nargs="+", default=[1.0, 0.5, 2.0], help="shares of the true cost")
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    made.add_argument(
        "--methods", nargs="+", choices=RUNS, default=list(METHODS), metavar="METHOD", help=" | ".join(RUNS)
    )
    made.add_argument("--rates", type=float, nargs="+", default=[1e-2], help="learning rates")
    made.add_argument("--unit", choices=("parameters", "ranks"), default="parameters", help="of the budget")
    made.add_argument("--labels", choices=("distribution", "sampled"), default="distribution")
    made.add_argument("--average", type=float, default=2.6, help="planted ranks of a layer, the mean")
    made.add_argument("--capacity", type=int, default=8, help="most ranks of a layer")
    made.add_argument("--strength", type=float, default=0.5, help="size of a planted rank, see planted_problem.py")
    made.add_argument("--steps", type=int, default=300)
    made.add_argument("--batch", type=int, default=16, help="texts in a step")
    made.add_argument("--tokens", type=int, default=32, help="tokens of a text")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--records", type=Path, default=RESULTS)
    made.add_argument("--quick", action="store_true", help="one seed and budget, 60 steps")
    made.add_argument("--table", action="store_true", help="only print the tables")
    made.add_argument("--plot", action="store_true", help="only draw the figure")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, make the runs, print tables or draw."""
    options = parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.quick:
        options.seeds, options.budgets, options.steps = options.seeds[:1], options.budgets[:1], 60
    if options.plot:
        planted_report.plot(records(options.records))
        return
    if not options.table:
        measure(settings(options), options.records)
    print(planted_report.tables(records(options.records)))


if __name__ == "__main__":
    main()
