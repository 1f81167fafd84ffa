"""Measure on one GPU, in at most eight minutes: every part in its own process with its own time limit.

    benchmarks/gpu.sh                        # all parts, in the order of PARTS
    benchmarks/gpu.sh --rehearse             # the same in tiny shapes on the CPU: does everything run?
    benchmarks/gpu.sh --part compiled        # one part; may be repeated

It needs torch 2.11 or newer, transformers and peft. A part is left out, with the reason, if one of its packages is
missing; a part that fails or takes too long is ended, and the next one begins. Results are printed at once. Every
setting leaves one record in benchmarks/results/speed-cuda.jsonl, from which `python benchmarks/run.py --table` makes
the tables.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
SECONDS = 480
"""What all parts may take together."""

PATIENCE = 10
"""Factor on the time limits in a rehearsal, so that nothing is left out on a slow CPU."""

LEAST = 10
"""With fewer seconds left than this, no part begins."""

MODEL = ("torch", "transformers", "peft", "pydantic")
"""Packages that are needed to train a model with loralloc."""

TESTS = (
    "tests/test_kernel_device.py",
    "tests/methods/test_contract.py",
)
"""Tests that take `--device`."""


@dataclass(frozen=True)
class Part:
    """Something that is measured.

    Attributes:
        what: Its description.
        seconds: Its time limit, start-up included.
        needs: The packages without which it is left out.
    """

    what: str
    seconds: int
    needs: tuple[str, ...] = MODEL


PARTS: Mapping[str, Part] = {
    "tests": Part("the kernel's and the methods' tests on the device", 100, (*MODEL, "pytest", "hypothesis")),
    "kernel": Part("the kernel in C++, built and compared with the one in Python", 50, (*MODEL, "ninja")),
    "eager": Part("steps of training", 130),
    "compiled": Part("steps of training, every block compiled", 80),
    "calls": Part("the allocator's calls, and what the host waits for", 25),
    "memory": Part("peak memory of a step", 35),
    "round": Part("a round of AB-LoRA", 25),
    "four-bit": Part("steps over a base model in 4 bits", 35, (*MODEL, "bitsandbytes")),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts that were asked for; return how many of them failed."""
    options = parser().parse_args(arguments)
    results = options.results or (Path(tempfile.mkdtemp(prefix="rehearsal-")) if options.rehearse else HERE / "results")
    names, of = options.part or list(PARTS), lambda name: command(name, options.rehearse, results)
    outcomes = run_all(names, of) if not options.rehearse else run_all(names, of, PATIENCE * SECONDS, PATIENCE)
    print("\n".join(["", *(f"{name}: {outcome}" for name, outcome in outcomes.items()), f"records: {results}"]))
    return sum(outcome.startswith("failed") for outcome in outcomes.values())


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU")
    made.add_argument("--part", action="append", choices=PARTS, help="may be repeated; all by default")
    made.add_argument("--results", type=Path, help="folder of the records; with --rehearse a temporary one")
    return made


def command(name: str, rehearse: bool, results: Path) -> list[str]:
    """The command line of a part's process."""
    if name == "tests":
        chosen = ["-k", "llama-adalora or adalora-llama or recomputing or waits", "--maxfail=20"] if rehearse else []
        options = ["-q", "-p", "no:cacheprovider", "--device", "cpu" if rehearse else "cuda"]
        return [sys.executable, "-m", "pytest", *options, "-m", "not slow", *chosen, *TESTS]
    measured = [sys.executable, str(HERE / "gpu_parts.py"), name, "--seconds", str(PARTS[name].seconds)]
    return [*measured, "--results", str(results), *(["--rehearse"] if rehearse else [])]


def run_all(
    names: Sequence[str],
    command_of: Callable[[str], Sequence[str]],
    seconds: float = SECONDS,
    patience: float = 1,
) -> dict[str, str]:
    """Run parts one after the other; return what became of each.

    Args:
        names: The parts.
        command_of: Returns the command line of a part.
        seconds: Time limit of all parts together.
        patience: Factor on the time limit of a part.
    """
    outcomes, started = {}, time.monotonic()
    for name in names:
        left = seconds - (time.monotonic() - started)
        print(f"== {name}: {PARTS[name].what} ({left:.0f} s left)", flush=True)
        limit = min(patience * PARTS[name].seconds, left)
        outcomes[name] = _missing(PARTS[name].needs) or _run(command_of(name), limit)
        print(f"== {name}: {outcomes[name]}", flush=True)
    return outcomes


def _missing(packages: Sequence[str]) -> str | None:
    """The reason to leave a part out; None where there is none."""
    lost = [package for package in packages if importlib.util.find_spec(package) is None]
    return f"left out: {', '.join(lost)} not installed" if lost else None


def _run(arguments: Sequence[str], seconds: float) -> str:
    """Run a process, for so many seconds at most; return what became of it."""
    if seconds < LEAST:
        return "left out: the time is used up"
    started = time.monotonic()
    try:
        done = subprocess.run(arguments, cwd=HERE.parent, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:.0f} s; what was printed is measured"
    took = f"{time.monotonic() - started:.0f} s"
    return f"done in {took}" if done.returncode == 0 else f"failed with exit status {done.returncode} after {took}"


if __name__ == "__main__":
    sys.exit(main())
