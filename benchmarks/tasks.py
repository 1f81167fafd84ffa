"""Every task on real data: AdaLoRA beside plain LoRA at the same final budget, and the head alone as the floor.

    python benchmarks/tasks.py DATA                     # MiniLM: tags, questions, pairs, choices; records are kept
    python benchmarks/tasks.py DATA --model MODEL       # ARC by likelihood with a causal model, such as SmolLM2-135M
    python benchmarks/tasks.py --table                  # print the table of docs/tasks.md from the records

DATA is a folder with bc5cdr, wnut17, squad, qnli, boolq and commonsense_arc_* as packed JSON lines. Each run is one
call of `loralloc train`, one thread; the head alone is trained by the same Trainer in this process. One record a run
goes to benchmarks/results/tasks.jsonl: test metrics, the loss of every test row, seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from language import read
from transformers import set_seed

from loralloc import __version__
from loralloc.recipe.evaluations import without_times
from loralloc.recipe.from_recipe import task_data, trainer_class, training_arguments
from loralloc.recipe.schema import load_recipe
from loralloc.tasks.metrics import paired_difference
from loralloc.tasks.spec import TASKS

RESULTS = Path(__file__).parent / "results" / "tasks.jsonl"
STEPS, BATCH, AVERAGE, SEED = 200, 16, 4, 0
SHORT, SHORT_STEPS = ("squad", "boolq", "commonsense_arc_challenge"), 120
"""Sets whose rows are long, and their steps."""
TRAIN_ROWS, TEST_ROWS = 4000, 600
FLOOR = "head alone"

METHODS: Mapping[str, Mapping[str, Any]] = {
    "lora": {"method": {"name": "lora"}, "lora": {"r": AVERAGE, "alpha": 2 * AVERAGE}},
    "adalora": {"method": {"name": "adalora", "budget": {"average_rank": AVERAGE}}, "lora": {"r": 6, "alpha": 12}},
}
TAGS = {"task": "token-classification", "data": {"tokens": "tokens", "tags": "tags", "max_length": 96}}
CHOICES = {"prompt": "question", "choices": "choices", "answer": "answer", "max_length": 128}
SETS: Mapping[str, Mapping[str, Any]] = {
    "bc5cdr": TAGS,
    "wnut17": TAGS,
    "squad": {
        "task": "question-answering",
        "data": {"question": "question", "context": "context", "answers": "answers", "max_length": 256},
    },
    "qnli": {
        "task": "sequence-classification",
        "data": {"text": "question", "text_pair": "sentence", "label": "label", "max_length": 128},
    },
    "boolq": {
        "task": "sequence-classification",
        "data": {"text": "question", "text_pair": "passage", "label": "label", "max_length": 192},
    },
    "commonsense_arc_easy": {"task": "multiple-choice-head", "data": CHOICES},
    "commonsense_arc_challenge": {"task": "multiple-choice-head", "data": CHOICES},
}
LIKELIHOOD: Mapping[str, Mapping[str, Any]] = {
    "commonsense_arc_easy": {"task": "multiple-choice", "data": {**CHOICES, "max_length": 192}},
}
"""Sets that a causal model is trained on."""


def choice_rows(rows: Iterable[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Extract ARC from rows of instructions: the question, its four choices, and the right one."""
    found = []
    for row in rows:
        text = row["instruction"].removeprefix("Please choose the correct answer to the question: ")
        question, answers, _ = text.split("\n\n")
        choices = [choice.strip() for choice in re.split(r"Answer\d: ", answers)[1:]]
        if len(set(choices)) == 4:
            found.append({"question": question, "choices": choices, "answer": int(row["answer"][-1]) - 1})
    return found


def write_rows(data: Path, name: str, folder: Path) -> dict[str, str]:
    """Draw rows to train and to test on, always the same ones; returns their files."""
    reader: Callable[[Any], Any] = choice_rows if name.startswith("commonsense") else list
    files = [data / name / f"{split}.jsonl.gz" for split in ("train", "test")]
    if files[0].exists():
        train, test = (reader(read(file)) for file in files)
    else:  # a set that has development rows only
        rows = read(data / name / "dev.jsonl.gz")
        random.Random(0).shuffle(rows)
        train, test = rows[TEST_ROWS:], rows[:TEST_ROWS]
    paths = {}
    for split, rows, most in (("train", train, TRAIN_ROWS), ("test", test, TEST_ROWS)):
        random.Random(0).shuffle(rows)
        paths[split] = str(folder / f"{name}-{split}.jsonl")
        Path(paths[split]).write_text("".join(json.dumps(row) + "\n" for row in rows[:most]), encoding="utf-8")
    return paths


def recipe_of(
    model: str, name: str, chosen: Mapping[str, Any], method: str, data: Path, folder: Path
) -> dict[str, Any]:
    """The recipe of a run."""
    small = model != "demo:minilm"
    steps = 60 if small else SHORT_STEPS if name in SHORT else STEPS
    training = {"steps": steps, "batch_size": 4 if small else BATCH}
    return {
        "task": chosen["task"],
        "model": {"name": model},
        "data": {**write_rows(data, name, folder), "validation": 0.05, **chosen["data"]},
        **METHODS["lora" if method == FLOOR else method],
        "training": {**training, "learning_rate": 5e-4 if small else 2e-3, "seed": SEED},
        "output": str(folder / f"{name}-{method.replace(' ', '-')}"),
    }


def run(recipe: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """One run of the command line; returns test metrics, losses of the test rows, and seconds."""
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    command = [str(Path(sys.executable).parent / "loralloc"), "train", str(path), "--replace"]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    output = Path(recipe["output"])
    metrics = json.loads((output / "metrics.json").read_text(encoding="utf-8"))
    losses = json.loads((output / "losses.json").read_text(encoding="utf-8"))["losses"]
    kept = {"metric": metrics["metric"], "test": metrics["test"], "parameters": metrics["final_parameters"]}
    return {
        **kept,
        "untrained": metrics["reference"]["untrained"],
        "seconds": metrics["train_seconds"],
        "losses": losses,
    }


def head_alone(recipe: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Train the head and nothing else, with the data, steps and rate of the other runs."""
    torch.set_num_threads(1)
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    loaded = load_recipe(path)
    data, heads = task_data(loaded), TASKS[loaded.task].heads
    for name, weight in data.model.named_parameters():
        weight.requires_grad_(any(part.endswith(heads) for part in name.split(".")))
    set_seed(SEED)
    with TemporaryDirectory() as scratch:
        trainer = trainer_class(loaded)(
            model=data.model,
            args=training_arguments(loaded, Path(scratch), data.arguments),
            train_dataset=data.train,
            log=Path(scratch) / "log.jsonl",
            **data.options,
        )
        begun = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - begun
        found = trainer.evaluate(data.test, metric_key_prefix="test")
    assert data.example_losses is not None
    assert trainer.evaluated is not None
    return {
        "metric": data.metric,
        "test": without_times(found, "test"),
        "parameters": 0,
        "untrained": None,
        "seconds": round(seconds, 1),
        "losses": data.example_losses(trainer.evaluated).tolist(),
    }


def table(records: list[dict[str, Any]]) -> str:
    """The records as a table: a row for each set, with the paired difference of the two runs."""
    lines = [
        "| set | model | metric | untrained | head alone | LoRA | AdaLoRA | loss a row, AdaLoRA - LoRA (95 %) "
        "| seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    by = {(record["model"], record["set"], record["method"]): record for record in records}
    for model, name in dict.fromkeys(key[:2] for key in by):
        floor, plain, adaptive = (by.get((model, name, method)) for method in (FLOOR, "lora", "adalora"))
        if plain is None or adaptive is None:
            continue
        metric = plain["metric"]
        mean, low, high = paired_difference(np.array(adaptive["losses"]), np.array(plain["losses"]))
        worth = ["" if one is None else f"{one['test'][metric]:.3f}" for one in (floor, plain, adaptive)]
        lines.append(
            f"| {name} | {model} | {metric} | {plain['untrained']:.3f} | {' | '.join(worth)} | "
            f"{mean:+.4f} ({low:+.4f} to {high:+.4f}) | {plain['seconds']:.0f}, {adaptive['seconds']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run what has no record, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", type=Path)
    parser.add_argument("--model", default="demo:minilm")
    parser.add_argument("--sets", nargs="*", help="these alone")
    parser.add_argument("--runs", type=Path, default=Path("runs/tasks"), help="where the runs are kept")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    records = [json.loads(line) for line in lines]
    if options.table:
        print(table(records))
        return
    causal = options.model != "demo:minilm"
    label = Path(options.model).name
    done = {(record["model"], record["set"], record["method"]) for record in records}
    options.runs.mkdir(parents=True, exist_ok=True)
    sets = LIKELIHOOD if causal else SETS
    for name, chosen in {name: sets[name] for name in options.sets or sets}.items():
        for method in ("lora", "adalora", *(() if causal else (FLOOR,))):
            if (label, name, method) in done:
                continue
            recipe = recipe_of(options.model, name, chosen, method, options.data, options.runs)
            found = (head_alone if method == FLOOR else run)(recipe, options.runs)
            found["losses"] = [round(loss, 5) for loss in found["losses"]]
            record = {"model": label, "set": name, "method": method, "task": chosen["task"], "seed": SEED, **found}
            record["versions"] = {"loralloc": __version__, "torch": torch.__version__}
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
