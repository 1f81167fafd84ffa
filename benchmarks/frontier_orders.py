"""Which order of terms is the best for a frontier on tags? MiniLM, whose layers need few ranks.

    python benchmarks/frontier_orders.py DATA --runs DIR    # called again, it goes on
    python benchmarks/frontier_orders.py --table            # print the table of docs/frontier.md

DATA is a folder with wnut17 and bc5cdr as packed JSON lines. Plain LoRA at the largest of SIZES is trained on each as
in tasks.py, but validated on the test rows; its frontier is made by every order, with recovery. frontier_sweep.py does
the same on language models, beside trainings at each rank. One record a frontier goes to
benchmarks/results/frontier_orders.jsonl.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import yaml
from frontier_sweep import ORDERS, loralloc
from tasks import TAGS, write_rows

from loralloc import __version__

RESULTS = Path(__file__).parent / "results" / "frontier_orders.jsonl"
SETS, SEEDS, SIZES = ("wnut17", "bc5cdr"), (0,), (4, 2, 1, 0.5)
STEPS, BATCH, RATE = 200, 16, 2e-3


def recipe_of(data: Path, folder: Path, name: str, seed: int) -> dict[str, Any]:
    """The recipe of a run; its output is named after set and seed."""
    rows = write_rows(data, name, folder)
    return {
        "task": TAGS["task"],
        "model": {"name": "demo:minilm"},
        "data": {"train": rows["train"], "validation": rows["test"], **TAGS["data"]},
        "method": {"name": "lora"},
        "lora": {"r": SIZES[0], "alpha": 2 * SIZES[0]},
        "training": {"steps": STEPS, "batch_size": BATCH, "learning_rate": RATE, "seed": seed},
        "evaluate": {"cuts": 0},
        "output": f"{name}-{seed}",
    }


def frontier(data: Path, folder: Path, name: str, seed: int, order: str) -> Iterator[dict[str, float]]:
    """Make a frontier, of a run that is trained if need be; yield the mean losses at each of SIZES."""
    run = folder / f"{name}-{seed}"
    if not (run / "metrics.json").is_file():
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe_of(data, folder, name, seed)), encoding="utf-8")
        loralloc(folder, "train", "recipe.yaml", "--replace")
    out = f"{run.name}-{order}"
    loralloc(folder, "frontier", run.name, "--output", out, "--order", order, "--ranks", ",".join(map(str, SIZES)))
    points = [json.loads(path.read_text(encoding="utf-8")) for path in (folder / out / "points").glob("*/point.json")]
    for point in sorted(points, key=lambda point: -point["ranks"]):
        yield {name: round(mean(point[name]["losses"]), 5) for name in ("cut", "recovered") if point[name]}


def records() -> list[dict[str, Any]]:
    """What has been found so far."""
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    return [json.loads(line) for line in lines]


def table(found: list[dict[str, Any]]) -> str:
    """For every set and order, the losses over its seeds after the cut, and of the better of cut and recovery."""
    lines = []
    for name in dict.fromkeys(record["set"] for record in found):
        seeds = len({record["seed"] for record in found if record["set"] == name})
        sizes = " | ".join(f"{size:g}" for size in SIZES)
        title = f"{name}, {seeds} seed{'s' * (seeds > 1)}"
        lines += [f"| {title} | cut: {sizes} | recovered: {sizes} |", f"|---{'|---' * 2 * len(SIZES)}|"]
        for order in ORDERS:
            curves = [r["points"] for r in found if (r["set"], r["order"]) == (name, order)]
            points = list(zip(*curves, strict=True))
            cut = [mean(point["cut"] for point in of) for of in points]
            better = [mean(min(point.values()) for point in of) for of in points]
            lines.append(f"| {order} | {' | '.join(f'{loss:.3f}' for loss in (*cut, *better))} |")
        lines.append("")
    return "\n".join(lines).strip()


def main() -> None:
    """Make the frontiers that have no record, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs/frontier_orders"), help="where the runs are kept")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(records()))
        return
    if arguments.data is None:
        parser.error("DATA, or --table")
    arguments.runs.mkdir(parents=True, exist_ok=True)
    there = {(record["set"], record["seed"], record["order"]) for record in records()}
    for seed, name, order in product(SEEDS, SETS, ORDERS):
        if (name, seed, order) not in there:
            points = list(frontier(arguments.data.resolve(), arguments.runs.resolve(), name, seed, order))
            record = {"set": name, "seed": seed, "order": order, "points": points, "loralloc": __version__}
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
