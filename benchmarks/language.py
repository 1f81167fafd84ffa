"""AdaLoRA beside plain LoRA on a small language model: SmolLM2-135M-Instruct on three tasks, at one budget.

    python benchmarks/language.py MODEL DATA            # runs that have a record are not repeated
    python benchmarks/language.py --table               # print the table of docs/language-models.md from the records
    python benchmarks/language.py --judge e2e           # let the kept runs of a set answer test prompts

MODEL is a folder with SmolLM2-135M-Instruct, DATA one with e2e_nlg, gsm8k and dolly_open_qa as JSON lines. Each run is
one call of `loralloc train`, one thread. One record a run goes to benchmarks/results/language.jsonl: test loss of every
row, seconds and peak memory of the whole command. Scores of answers go to language-answers.jsonl beside it.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from loralloc import __version__
from loralloc.tasks.generation import Prompt, score
from loralloc.tasks.metrics import paired_difference

RESULTS = Path(__file__).parent / "results" / "language.jsonl"
ANSWERS = Path(__file__).parent / "results" / "language-answers.jsonl"
STEPS, BATCH, SEEDS, AVERAGE = 80, 4, (0, 1, 2), 8
TRAIN_ROWS, TEST_ROWS = 2000, 150

SETS: Mapping[str, Mapping[str, Any]] = {
    "e2e": {"files": ("e2e_nlg/train", "e2e_nlg/test"), "prompt": "{mr}", "completion": "ref", "max_length": 128},
    "dolly": {"files": ("dolly_open_qa/train", None), "max_length": 256},
    "gsm8k": {
        "files": ("gsm8k/train", "gsm8k/test"),
        "prompt": "{question}",
        "completion": "answer",
        "max_length": 256,
    },
}
GENERATE: Mapping[str, Mapping[str, Any]] = {
    "e2e": {"max_new_tokens": 60, "metrics": ["bleu", "chrf"], "samples": 60},
    "dolly": {"max_new_tokens": 60, "metrics": ["rouge"], "samples": 40},
    "gsm8k": {"max_new_tokens": 200, "metrics": ["exact_match"], "after": "####", "samples": 40},
}
"""What the model is asked to write by `--judge`, on the first prompts of the test rows."""

METHODS: Mapping[str, Mapping[str, Any]] = {
    "lora": {"method": {"name": "lora"}, "lora": {"r": AVERAGE, "alpha": 2 * AVERAGE}},
    "adalora": {
        "method": {"name": "adalora", "budget": {"average_rank": AVERAGE}},
        "lora": {"r": 12, "alpha": 24},
    },
}


def write_rows(data: Path, name: str, folder: Path) -> tuple[Path, Path]:
    """Draw the rows to train and to test on, always the same ones."""
    train, test = SETS[name]["files"]
    rows = read(data / f"{train}.jsonl.gz")
    random.Random(0).shuffle(rows)
    held_out = rows[-TEST_ROWS:] if test is None else read(data / f"{test}.jsonl.gz")
    random.Random(0).shuffle(held_out)
    paths = folder / f"{name}-train.jsonl", folder / f"{name}-test.jsonl"
    for path, chosen in zip(paths, (rows[:TRAIN_ROWS], held_out[:TEST_ROWS]), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
    return paths


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a packed file of JSON lines."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def run(model: str, data: Path, name: str, method: str, seed: int, folder: Path) -> dict[str, Any]:
    """One run of the command line; returns its record."""
    train, test = write_rows(data, name, folder)
    columns = {key: value for key, value in SETS[name].items() if key != "files"}
    output = folder / f"{name}-{method}-{seed}"
    recipe = {
        "task": "causal-lm",
        "model": {"name": model},
        "data": {"train": str(train), "validation": 0.01, "test": str(test), **columns},
        **METHODS[method],
        "training": {"steps": STEPS, "batch_size": BATCH, "learning_rate": 5e-4, "seed": seed},
        "output": str(output),
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    command = [str(Path(sys.executable).parent / "loralloc"), "train", str(path), "--replace"]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    metrics = json.loads((output / "metrics.json").read_text(encoding="utf-8"))
    losses = json.loads((output / "losses.json").read_text(encoding="utf-8"))["losses"]
    return {
        "set": name,
        "method": method,
        "seed": seed,
        "steps": STEPS,
        "batch": BATCH,
        "test": metrics["test"],
        "untrained": metrics["reference"]["untrained"],
        "parameters": metrics["final_parameters"],
        "seconds": metrics["train_seconds"],
        "peak_mib": round(usage.ru_maxrss / 1024),
        "losses": [round(loss, 5) for loss in losses],
        "versions": {"loralloc": __version__, "torch": torch.__version__},
    }


def judge(folder: Path, name: str) -> dict[str, Any]:
    """Let the adapter of a kept run answer test prompts; returns the scores of its answers."""
    recipe = folder / "recipe.yaml"
    tree = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    tree["evaluate"] = {"generate": dict(GENERATE[name])}
    header = recipe.read_text(encoding="utf-8").partition("\n")[0]
    recipe.write_text(f"{header}\n{yaml.safe_dump(tree)}", encoding="utf-8")
    answers = folder / "answers.jsonl"
    answers.unlink(missing_ok=True)  # of an earlier judgement
    command = [str(Path(sys.executable).parent / "loralloc"), "evaluate", str(folder), "--predictions", str(answers)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    rows = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    prompts = [Prompt((), row["prompt"], tuple(row["references"])) for row in rows]
    settings = GENERATE[name]
    return score([row["prediction"] for row in rows], prompts, settings["metrics"], settings.get("after"))


def table(records: list[dict[str, Any]]) -> str:
    """The records as a table: a row for each task and seed, with the paired difference of the two runs."""
    lines = [
        "| task | seed | untrained perplexity | LoRA | AdaLoRA | loss a row, AdaLoRA - LoRA (95 %) | seconds "
        "| peak MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    by = {(record["set"], record["seed"], record["method"]): record for record in records}
    for name, seed in sorted({key[:2] for key in by}):
        plain, adaptive = by.get((name, seed, "lora")), by.get((name, seed, "adalora"))
        if plain is None or adaptive is None:
            continue
        mean, low, high = paired_difference(np.array(adaptive["losses"]), np.array(plain["losses"]))
        lines.append(
            f"| {name} | {seed} | {plain['untrained']:.2f} | {plain['test']['perplexity']:.3f} | "
            f"{adaptive['test']['perplexity']:.3f} | {mean:+.4f} ({low:+.4f} to {high:+.4f}) | "
            f"{plain['seconds']:.0f}, {adaptive['seconds']:.0f} | {plain['peak_mib']}, {adaptive['peak_mib']} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run what has no record, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("data", nargs="?", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs/language"), help="where the runs are kept")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--judge", nargs="*", help="let the kept runs of these sets (all) answer test prompts")
    options = parser.parse_args()
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    records = [json.loads(line) for line in lines]
    if options.table:
        print(table(records))
        return
    if options.judge is not None:
        for record in records:
            name = f"{record['set']}-{record['method']}-{record['seed']}"
            if record["set"] in (options.judge or SETS) and (options.runs / name).is_dir():
                worth = judge(options.runs / name, record["set"])
                told = {key: record[key] for key in ("set", "method", "seed")} | {"worth": worth}
                with ANSWERS.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(told) + "\n")
        return
    done = {(record["set"], record["method"], record["seed"]) for record in records}
    options.runs.mkdir(parents=True, exist_ok=True)
    for seed in SEEDS:
        for name in SETS:
            for method in METHODS:
                if (name, method, seed) not in done:
                    record = run(options.model, options.data, name, method, seed, options.runs)
                    with RESULTS.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
