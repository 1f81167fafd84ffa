"""Run the drills, and print what was tried, survived and lost."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import resource
import sys
import time
import warnings
from pathlib import Path

DRILLS = {
    "plans": 4000,
    "adapters": 3000,
    "recipes": 2000,
    "runs": 800,
    "kills": 100,
    "checkpoints": 100,
    "disks": 80,
    "numbers": 200,
}
"""The modules of this package that are drills, with the cases of each: minutes on one core."""

MEMORY = 8 * 2**30
"""Bytes of address space that a drill may take beyond what the libraries do: a bomb fails instead of the machine."""


def main() -> None:
    """Run the drills that the command line names, or all."""
    parser = argparse.ArgumentParser(prog="python -m drills", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="DRILL", help=f"one of {', '.join(DRILLS)}; by default all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, help="of each drill, instead of its own number")
    given = parser.parse_args()
    if unknown := set(given.names) - DRILLS.keys():
        parser.error(f"no such drill: {', '.join(sorted(unknown))}")
    _prepare()
    from drills.outcome import table

    outcomes = []
    for name in given.names or DRILLS:
        begun = time.perf_counter()
        outcome = importlib.import_module(f"drills.{name}").drill(given.seed, given.cases or DRILLS[name])
        print(f"{outcome.name}: {time.perf_counter() - begun:.0f} s", file=sys.stderr)
        for line in outcome.lost:
            print(f"  lost: {line}", file=sys.stderr)
        outcomes.append(outcome)
    print(table(outcomes))
    sys.exit(any(outcome.lost for outcome in outcomes))


def _prepare() -> None:
    """No network, no warnings, no more memory than a bomb would take."""
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", MPLBACKEND="Agg", **quiet)
    sys.path.append(str(Path(__file__).parents[1] / "tests"))  # tiny models, and how runs are compared
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    import peft  # noqa: F401 - what the libraries take is none of the drill's
    import torch

    torch.set_num_threads(1)
    with open("/proc/self/statm", encoding="ascii") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, resource.RLIM_INFINITY))


if __name__ == "__main__":
    main()
