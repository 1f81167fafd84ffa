"""Every method on the demo's task at one budget: ranks, accuracy, time, and whether other seeds find the same ranks.

    python benchmarks/methods.py            # runs that have a record are not repeated
    python benchmarks/methods.py --table    # print the tables of docs/how-to-choose.md from the records

Each run is one call of the command line, `loralloc train` on the packaged recipe demo/adalora with other flags. One
record a run goes to benchmarks/results/methods.jsonl. Times are processor seconds of the whole command, start,
evaluations and export included, as the machine may be shared; a ratio is to the run of plain LoRA.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import mean

import torch

from loralloc import RankPlan, __version__
from loralloc.recipes import recipe_text

RESULTS = Path(__file__).parent / "results" / "methods.jsonl"
STEPS, SEEDS, AVERAGE = 100, (0, 1, 2), 8
BUDGET = f"budget: {{average_rank: {AVERAGE}}}"
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # threads that wait for each other count as processor time

METHODS: Mapping[str, Sequence[str]] = {  # every adapter starts at the scale 2, or at its equivalent
    "lora": ("--method", "{name: lora}", "--lora.r", "8", "--lora.alpha", "16"),
    "adalora": ("--method", f"{{name: adalora, {BUDGET}}}"),
    "ablora": ("--method", f"{{name: ablora, {BUDGET}}}", "--lora.r", "16", "--lora.alpha", "16"),
    "autolora": ("--method", "{name: autolora}", "--lora.r", "16", "--lora.alpha", "32"),
    "autolora, budget": ("--method", f"{{name: autolora, {BUDGET}}}", "--lora.r", "12", "--lora.alpha", "24"),
    "allora": ("--method", "{name: allora, mode: hybrid}", "--lora.r", "8", "--lora.alpha", "8"),
    "allora + adalora": (
        *("--method", f"{{name: allora, mode: hybrid, allocate: adalora, {BUDGET}}}"),
        *("--lora.r", "12", "--lora.alpha", "12"),
    ),
    "uniform": ("--method", f"{{name: uniform, {BUDGET}}}"),
    "random": ("--method", f"{{name: random, rank_seed: %SEED%, {BUDGET}}}"),
    "depth_linear": ("--method", f"{{name: depth_linear, {BUDGET}}}", "--lora.r", "16", "--lora.alpha", "32"),
    "truncate": ("--method", f"{{name: truncate, {BUDGET}}}"),
}


SEEDED = ("lora", "adalora", "ablora", "autolora", "uniform", "random", "truncate")
"""Methods that run on all seeds: those whose ranks depend on the run, and what they are compared with."""


def run(name: str, seed: int, folder: Path) -> dict:
    """One run of the command line; returns its record."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe_text("demo/adalora"), encoding="utf-8")
    flags = [flag.replace("%SEED%", str(seed)) for flag in METHODS[name]]
    options = ["--steps", str(STEPS), "--training.seed", str(seed), "--data.validation", "0.05"]
    options += ["--output", str(folder / "run")]
    command = [str(Path(sys.executable).parent / "loralloc"), "train", str(recipe), *flags, *options]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **ONE_THREAD})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    record = {
        "method": name,
        "seed": seed,
        "flags": flags,
        "steps": STEPS,
        "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "versions": {"loralloc": __version__, "torch": torch.__version__},
    }
    if done.returncode:
        return {**record, "failure": done.stderr.strip()[-500:]}
    plan = RankPlan.load(folder / "run" / "ranks.json")
    metrics = json.loads((folder / "run" / "metrics.json").read_text(encoding="utf-8"))
    return {
        **record,
        "accuracy": metrics["test"]["accuracy"],
        "reference": metrics["reference"],
        "ranks": plan.ranks,
        "total_rank": plan.total_rank,
        "parameters": plan.parameters,
    }


def records() -> list[dict]:
    """The records there are."""
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    return [json.loads(line) for line in lines]


def agreement(plans: Sequence[Mapping[str, int]]) -> float:
    """Mean Spearman correlation of the ranks of all pairs of seeds; NaN for one seed, or equal ranks everywhere."""

    def places(plan: Mapping[str, int]) -> torch.Tensor:
        ranks = torch.tensor([plan[name] for name in plans[0]], dtype=torch.float64)
        below, same = ((ranks[:, None] > ranks).sum(1), (ranks[:, None] == ranks).sum(1))
        return below + (same - 1) / 2  # ties share the mean of their places

    pairs = [torch.corrcoef(torch.stack([places(a), places(b)]))[0, 1].item() for a, b in combinations(plans, 2)]
    return mean(pairs) if pairs else float("nan")


def table() -> str:
    """The table, in Markdown."""
    rows = [record for record in records() if "failure" not in record]
    base = mean([record["cpu_seconds"] for record in rows if record["method"] == "lora"] or [float("nan")])
    lines = [
        "| method | ranks | parameters | test accuracy by seed | mean | processor time ÷ LoRA | lowest to highest rank "
        "| rank correlation between seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in METHODS:
        mine = sorted((r for r in rows if r["method"] == name), key=lambda r: r["seed"])
        if not mine:
            continue
        ranks = [rank for r in mine for rank in r["ranks"].values()]
        varied, several = len(set(ranks)) > 1, len(mine) > 1
        agree = f"{agreement([r['ranks'] for r in mine]):.2f}" if varied and several else "&ndash;"
        times = [r["cpu_seconds"] / base for r in mine]
        accuracies = ", ".join(f"{r['accuracy']:.3f}" for r in mine)
        lines.append(
            f"| {name} | {span([r['total_rank'] for r in mine])} | {span([r['parameters'] for r in mine])} "
            f"| {accuracies} | {mean(r['accuracy'] for r in mine):.3f} "
            f"| {mean(times):.2f} | {min(ranks)} to {max(ranks)} "
            f"| {agree} |"
        )
    return "\n".join(lines)


def plans() -> str:
    """Mean rank by type of module, over layers and seeds, in Markdown."""
    rows = [record for record in records() if "failure" not in record]
    types = list(dict.fromkeys(kind(name) for record in rows for name in record["ranks"]))
    lines = [f"| method | {' | '.join(types)} |", "|---" * (len(types) + 1) + "|"]
    for name in METHODS:
        found = [(kind(module), rank) for r in rows if r["method"] == name for module, rank in r["ranks"].items()]
        if found:
            means = [mean(rank for of, rank in found if of == one) for one in types]
            lines.append(f"| {name} | {' | '.join(f'{value:.1f}' for value in means)} |")
    return "\n".join(lines)


def kind(module: str) -> str:
    """The type of a module: its name without the layer and the parts that say no more.

    >>> kind("bert.encoder.layer.3.attention.output.dense"), kind("bert.pooler.dense")
    ('attention.output', 'pooler')
    """
    parts = [part for part in module.split(".") if not part.isdigit()]
    return ".".join(part for part in parts if part not in ("bert", "encoder", "layer", "self", "dense"))


def span(values: Sequence[int]) -> str:
    """One number where all are equal, else the lowest and the highest."""
    return f"{min(values):,}" if len(set(values)) == 1 else f"{min(values):,} to {max(values):,}"


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="only print the table")
    if not parser.parse_args().table:
        done = {(record["method"], record["seed"]) for record in records()}
        for seed in SEEDS:
            wanted = METHODS if seed == SEEDS[0] else SEEDED
            for name in (name for name in wanted if (name, seed) not in done):
                with tempfile.TemporaryDirectory() as folder:
                    record = run(name, seed, Path(folder))
                print(
                    name,
                    seed,
                    record.get("accuracy"),
                    f"{record['cpu_seconds']} s",
                    record.get("failure", ""),
                    flush=True,
                )
                with RESULTS.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
    print(table(), plans(), sep="\n\n")


if __name__ == "__main__":
    main()
