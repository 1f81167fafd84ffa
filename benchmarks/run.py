"""Measure what rank allocation costs: loralloc and its peers, interleaved in one process.

    python benchmarks/run.py                          # all suites on the CPU: about an hour, one thread
    python benchmarks/run.py --quick                  # fewer settings and turns: minutes; this is `make bench`
    python benchmarks/run.py --device cuda            # 1B- and 3B-shaped models in bf16 on one GPU
    python benchmarks/run.py --suite steps --shape llama-512 --rank 48
    python benchmarks/run.py --table                  # only write table and plot anew

Every setting leaves one record in benchmarks/results/speed-DEVICE.jsonl; the table in benchmarks/README.md and the plot
benchmarks/speed.svg are made from the newest record of each setting.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))  # also where the file is imported

import record
import table
from shapes import SHAPES
from suites import SUITES, Plan


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, run the suites, write records, table and plot."""
    options = parser().parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device: leave out --device cuda, or run on a machine with a GPU")
    torch.set_num_threads(options.threads)
    turns = options.turns or (8 if options.quick else 30)
    plan = Plan(options.device, turns, options.quick, tuple(options.shape), options.rank)
    if not options.table:
        path = options.results / f"speed-{options.device}.jsonl"
        for suite in options.suite or SUITES:
            for made in SUITES[suite](plan):
                record.append(made, path)
                print(json.dumps({key: made[key] for key in made if key not in ("versions", "machine", "command")}))
                sys.stdout.flush()
    if options.results == record.RESULTS:
        table.write(list(record.read(options.results)))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument("--suite", action="append", choices=SUITES, help="may be repeated; all by default")
    made.add_argument("--shape", action="append", choices=SHAPES, default=[], help="may be repeated; the suite's own")
    made.add_argument("--rank", type=int, default=12, help="starting rank where a suite does not vary it")
    made.add_argument("--turns", type=int, help="turns of each comparison; 30, or 8 with --quick")
    made.add_argument("--threads", type=int, default=1, help="threads of a process on the CPU")
    made.add_argument("--quick", action="store_true", help="fewer settings and turns")
    made.add_argument("--results", type=Path, default=record.RESULTS, help="folder of the records")
    made.add_argument("--table", action="store_true", help="measure nothing, write table and plot anew")
    return made


if __name__ == "__main__":
    main()
