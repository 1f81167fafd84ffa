"""Does one run's frontier pick the rank that a sweep of trainings picks, and at what share of the cost?

    python benchmarks/frontier_sweep.py DATA --base MODEL --runs DIR    # called again, it goes on
    python benchmarks/frontier_sweep.py --table                         # print the tables of docs/frontier.md

DATA is a folder with packed JSON lines of e2e_nlg and rnnlg_tv, MODEL stories260K in transformers' format. The sweep
trains plain LoRA at each of RANKS, for the first seed at each of RATES, for the others at the rate that was best there.
The frontier cuts the run of the largest rank, by every order, and lets each cut recover; for the first seed, by the
first order, also at other shares of the learning rate. Losses are on the same validation rows. Each run and each
frontier leaves one record in benchmarks/results/frontier.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import yaml
from studies import ROWS, write_rows

from loralloc import __version__
from loralloc.frontier.budgets import compare_points, recommend
from loralloc.frontier.run import DEFAULT_RATE, DEFAULT_RECOVERY

RESULTS = Path(__file__).parent / "results" / "frontier.jsonl"
TASKS, SEEDS, RANKS = ("e2e", "rnnlg"), (0, 1, 2), (16, 8, 4, 2, 1)
STEPS, BATCH, RATES = 150, 8, (5e-3, 1e-2, 2e-2)
ORDERS, SHARES = ("singular_value", "sensitivity", "ablation"), (0.1, 1.0)


def recipe_of(base: Path, task: str, seed: int, rank: int, rate: float) -> dict[str, Any]:
    """The recipe of a training in the sweep."""
    columns = {"prompt": "{mr}", "completion": "ref", "max_length": 256}
    return {
        "task": "causal-lm",
        "model": {"name": str(base.resolve())},
        "data": {"train": f"{task}-train.jsonl", "validation": f"{task}-test.jsonl", **columns},
        "method": {"name": "lora"},
        "lora": {"r": rank, "alpha": 2 * rank, "target_modules": "all-linear"},
        "training": {"steps": STEPS, "batch_size": BATCH, "learning_rate": rate, "warmup": 0.05, "seed": seed},
        "evaluate": {"cuts": 0},
        "output": name_of(task, seed, rank, rate),
    }


def name_of(task: str, seed: int, rank: int, rate: float) -> str:
    """The folder of a training."""
    return f"{task}-{seed}-{rank}-{rate:g}"


def loralloc(folder: Path, *words: object) -> None:
    """Call the command line in a folder, with one thread."""
    command = [str(Path(sys.executable).parent / "loralloc"), *map(str, words)]
    subprocess.run(command, check=True, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"})


def train(base: Path, folder: Path, task: str, seed: int, rank: int, rate: float) -> dict[str, Any]:
    """A training of the sweep; returns its record."""
    recipe = recipe_of(base, task, seed, rank, rate)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    loralloc(folder, "train", "recipe.yaml", "--replace")
    run = folder / recipe["output"]
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    losses = json.loads((run / "losses.json").read_text(encoding="utf-8"))["losses"]
    return {
        "kind": "training",
        "losses": [round(x, 5) for x in losses],
        "seconds": metrics["train_seconds"],
    }


def frontier(base: Path, folder: Path, task: str, seed: int, rate: float, order: str, share: float) -> dict[str, Any]:
    """A frontier of the run of the largest rank; returns its record."""
    out = f"{task}-{seed}-{rate:g}-{order}-{share:g}"
    recovery = ("--recover", DEFAULT_RECOVERY, "--recover_rate", share)
    ranks = ",".join(map(str, RANKS))
    run = name_of(task, seed, RANKS[0], rate)
    if not (folder / run / "metrics.json").is_file():  # its losses have a record, but DIR is another one
        train(base, folder, task, seed, RANKS[0], rate)
    loralloc(folder, "frontier", run, "--output", out, "--order", order, "--ranks", ranks, *recovery)
    points = []
    for path in sorted((folder / out / "points").glob("*/point.json")):
        point = json.loads(path.read_text(encoding="utf-8"))
        kept = {name: [round(x, 5) for x in point[name]["losses"]] for name in ("cut", "recovered") if point[name]}
        seconds = sum(point[name]["seconds"] for name in ("cut", "recovered") if point[name])
        points.append({"ranks": point["ranks"], **kept, "seconds": seconds})
    modules = json.loads((folder / out / "frontier.json").read_text(encoding="utf-8"))["modules"]
    return {"kind": "frontier", "modules": modules, "points": points}


def run(base: Path, data: Path, folder: Path) -> None:
    """Run what has no record."""
    for seed, task in product(SEEDS, TASKS):
        shares = SHARES if seed == SEEDS[0] else ()
        curves = [*product(ORDERS, (DEFAULT_RATE,)), *product(ORDERS[:1], shares)]
        write_rows(ROWS[task], data, task, folder)
        for rank in RANKS:
            for rate in RATES if seed == SEEDS[0] else [best_rate(task, rank)]:
                keep(train, base, folder, task, seed, rank=rank, rate=rate)
        for order, share in curves:
            keep(frontier, base, folder, task, seed, rate=best_rate(task, RANKS[0]), order=order, share=share)


def keep(make: Callable[..., dict[str, Any]], *where: Any, **named: Any) -> None:
    """Write a record, unless there is one."""
    *_, task, seed = where
    named = {"task": task, "seed": seed, **named}
    if any(all(record.get(name) == value for name, value in named.items()) for record in records()):
        return
    made = make(*where, *list(named.values())[2:])
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**named, **made, "loralloc": __version__}) + "\n")


def best_rate(task: str, rank: int) -> float:
    """The learning rate with the lowest loss at a rank, for the first seed."""
    tried = [one for one in records() if (one["task"], one["seed"], one.get("rank")) == (task, SEEDS[0], rank)]
    return float(min(tried, key=lambda one: mean(one["losses"]))["rate"])


def records() -> list[dict[str, Any]]:
    """What has been found so far."""
    if not RESULTS.exists():
        return []
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]


def tables() -> str:
    """For each task every order over all seeds, then every share of the rate for the first seed."""
    found, orders = records(), [*product(ORDERS, (DEFAULT_RATE,))]
    shares = [(ORDERS[0], share) for share in sorted({DEFAULT_RATE, *SHARES})]
    return "\n\n".join(
        table([one for one in found if one["task"] == task], task, seeds, curves)
        for task in TASKS
        for seeds, curves in ((SEEDS, orders), (SEEDS[:1], shares))
    )


def table(here: list[dict[str, Any]], task: str, seeds: Sequence[int], curves: Iterable[tuple[str, float]]) -> str:
    """Losses at every size over the seeds, the rank each curve picks, and its cost as a share of the sweep's."""
    rates = {rank: best_rate(task, rank) for rank in RANKS}
    trained = [one for one in here if one["kind"] == "training" and one["rate"] == rates[one["rank"]]]
    sweep = {seed: {one["rank"]: one for one in trained if one["seed"] == seed} for seed in seeds}
    title = f"{task}, {len(seeds)} seed{'s' * (len(seeds) > 1)}"
    lines = [f"| {title} | {' | '.join(map(str, RANKS))} | picks | cost |", f"|---{'|---' * (len(RANKS) + 2)}|"]
    losses = {seed: [np.array(runs[rank]["losses"]) for rank in RANKS] for seed, runs in sweep.items()}
    lines.append(row("trained at each rank", losses, dict.fromkeys(sweep, 1.0)))
    lines.append(f"| at the learning rate | {' | '.join(f'{rate:g}' for rate in rates.values())} | | |")
    for order, share in curves:
        points = {
            record["seed"]: sorted(record["points"], key=lambda point: -point["ranks"])
            for record in here
            if (record.get("order"), record.get("share"), record["rate"]) == (order, share, rates[RANKS[0]])
            and record["seed"] in sweep
        }
        if points.keys() != sweep.keys():  # some have not been run yet
            continue
        name = order.replace("_", " ")
        values = {seed: [best_of(point) for point in of] for seed, of in points.items()}
        if len(seeds) > 1:
            cuts = {seed: [np.array(point["cut"]) for point in of] for seed, of in points.items()}
            lines.append(row(f"{name}, cut", cuts, dict.fromkeys(cuts, cost_of(recovered=False))))
        lines.append(row(f"{name}, recovered at {share:g}", values, dict.fromkeys(values, cost_of(recovered=True))))
        if len(seeds) > 1:
            lines.append(f"| above the training, seed by seed | {' | '.join(differences(values, losses))} | | |")
    return "\n".join(lines)


def differences(curves: Mapping[int, list[np.ndarray]], trained: Mapping[int, list[np.ndarray]]) -> Iterator[str]:
    """By how much a frontier is above the trainings at each size: in each seed, with * where p < .05 over the rows."""
    for place in range(len(RANKS)):
        pairs = [(curves[seed][place], trained[seed][place]) for seed in curves]
        yield ", ".join(
            f"{(ours - theirs).mean():+.3f}{'*' * any(one.significant for one in compare_points([ours, theirs]))}"
            for ours, theirs in pairs
        )


def best_of(point: Mapping[str, Any]) -> np.ndarray:
    """The losses of a size: of the cut, or of its recovery where that is better."""
    kept = [np.array(point[name]) for name in ("cut", "recovered") if name in point]
    return min(kept, key=lambda losses: losses.mean())


def cost_of(recovered: bool) -> float:
    """Steps of the largest training and its frontier, as a share of those of all trainings at one rate each."""
    return (1 + recovered * DEFAULT_RECOVERY * len(RANKS)) / len(RANKS)


def row(name: str, losses: Mapping[int, list[np.ndarray]], cost: Mapping[int, float]) -> str:
    """A row of the table: mean losses over the seeds, the rank that every seed picks, the mean cost."""
    means = [mean(float(of[place].mean()) for of in losses.values()) for place in range(len(RANKS))]
    picks = [RANKS[recommend(RANKS, compare_points(of))] for of in losses.values()]
    cells = [name, *(f"{value:.3f}" for value in means), ", ".join(map(str, picks)), f"{mean(cost.values()):.0%}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Run what has no record, or print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", type=Path)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs/frontier"), help="where the runs are kept")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        print(tables())
    elif arguments.data is None or arguments.base is None:
        parser.error("DATA and --base, or --table")
    else:
        run(arguments.base, arguments.data, arguments.runs)


if __name__ == "__main__":
    main()
