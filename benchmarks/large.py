"""Large runs: a report of 20,000 layers, streamed text, and the time before a training's first step.

    python benchmarks/large.py report                  # 20,000 layers, 500 allocations, 300,000 logged rows
    python benchmarks/large.py stream --base MODEL     # a training on 10 MB, 100 MB and 1 GB of JSON lines
    python benchmarks/large.py first --base MODEL      # seconds before the first step

MODEL is a folder with a causal language model, such as stories260K in transformers' format. One thread.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

TESTS = Path(__file__).resolve().parents[1] / "tests"
MAIN = "from loralloc.cli.main import main; main()"
UNTIL_FIRST = """
import sys, time, transformers
def first(*args, **kwargs):
    print("before the first step:", round(time.process_time(), 1), "s of processor time", file=sys.stderr)
    raise SystemExit(0)
transformers.Trainer.training_step = first
"""
IMPORTS = """
import time, datasets, peft, transformers
from trl import SFTTrainer
print("the libraries alone:", round(time.process_time(), 1), "s of processor time")
"""
STEPS = 20


def run(words: list[str], before: str = "") -> tuple[float, float, float]:
    """Run the command line; returns wall-clock seconds, processor seconds, and peak memory in MiB."""
    begun = time.perf_counter()
    command = [sys.executable, "-c", before + MAIN, *words]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"loralloc {' '.join(words)}: exit code {process.returncode}")
    return time.perf_counter() - begun, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def report(folder: Path) -> None:
    """Time the report page of a very large run."""
    sys.path.append(str(TESTS))
    from report.large import ROWS, write_large

    write_large(folder)
    seconds, processor, memory = run(["report", str(folder)])
    size = (folder / "report.html").stat().st_size / 1e6
    print(f"{ROWS:,} rows: {seconds:.1f} s, {processor:.1f} s of processor time, {memory:.0f} MiB, page {size:.2f} MB")


def training(base: Path, folder: Path, data: Path) -> list[str]:
    """Write the recipe of a short training on a file of texts; returns the words of its command line."""
    validation = folder / "validation.jsonl"
    write_texts(validation, 1)
    recipe = {
        "task": "causal-lm",
        "model": {"name": str(base.resolve())},
        "data": {
            "train": str(data),
            "validation": str(validation),
            "text": "text",
            "streaming": True,
            "max_length": 128,
        },
        "method": {"name": "adalora", "budget": {"average_rank": 4}},
        "lora": {"r": 8, "alpha": 16},
        "training": {"steps": STEPS, "batch_size": 8, "learning_rate": 1e-3},
        "evaluate": {"cuts": 0},
        "output": str(folder / "run"),
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    return ["train", str(path), "--replace", "--quiet"]


def write_texts(path: Path, size: int) -> None:
    """Write JSON lines of made-up texts, ten at a time, until the file has `size` bytes or more."""
    with path.open("w", encoding="utf-8") as file:
        at = 0
        while file.tell() < size:
            texts = (f"Row {n} is a story of {n % 97} words. " * 8 for n in range(at, at + 10))
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
            at += 10


def stream(base: Path, folder: Path) -> None:
    """Time the same number of steps on files of several sizes."""
    for size in (10**7, 10**8, 10**9):
        data = folder / "texts.jsonl"
        write_texts(data, size)
        seconds, processor, memory = run(training(base, folder, data))
        print(f"{size / 1e6:,.0f} MB: {seconds:.1f} s, {processor:.1f} s of processor time, peak {memory:.0f} MiB")


def first(base: Path, folder: Path) -> None:
    """Time what comes before the first step and, for comparison, importing the libraries alone."""
    data = folder / "texts.jsonl"
    write_texts(data, 10**7)
    for _ in range(3):
        run(training(base, folder, data), UNTIL_FIRST)
        subprocess.run([sys.executable, "-c", IMPORTS], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def main() -> None:
    """Measure one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("report", "stream", "first"))
    parser.add_argument("--base", type=Path)
    given = parser.parse_args()
    with TemporaryDirectory() as scratch:
        if given.what == "report":
            report(Path(scratch))
        elif given.base is None:
            parser.error("--base MODEL")
        else:
            {"stream": stream, "first": first}[given.what](given.base, Path(scratch))


if __name__ == "__main__":
    main()
