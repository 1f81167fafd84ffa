"""How long the command line takes to answer: `loralloc --help`, beside importing what draws it, typer and rich."""

from __future__ import annotations

import resource
import subprocess
import sys
import time

from timing import Times

REFERENCE = "typer-rich"
PROCESSES = {
    REFERENCE: "import typer, rich",
    "loralloc-help": "import sys; sys.argv = ['loralloc', '--help']; from loralloc.cli.main import main; main()",
}
"""What each contender's process runs."""


def compare(turns: int) -> Times:
    """Start each contender's process once a turn, in an order that rotates.

    Args:
        turns: Turns that are counted, after one that is not: in it, Python writes its compiled files.
    """
    times = Times({name: [] for name in PROCESSES}, {name: [] for name in PROCESSES})
    order = list(PROCESSES)
    for turn in range(turns + 1):
        for name in order:
            wall, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, "-c", PROCESSES[name]], capture_output=True, check=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            if turn:
                times.wall[name].append(time.perf_counter() - wall)
                times.processor[name].append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        order.append(order.pop(0))
    return times
