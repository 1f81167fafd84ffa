"""How long it takes to choose ranks in a model of Llama-3-70B's shapes.

    python benchmarks/selection.py --ranks 1000000

Every linear layer is adapted (560 modules); the ranks are dealt out evenly. Median of five turns on one thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from loralloc.allocate import select
from loralloc.budget import Budget, Modules, total_cost
from loralloc.methods.ablora.moves import reallocate

LAYERS = 80
HIDDEN, KEYS, INNER = 8192, 1024, 28672
SHAPES = (
    *((HIDDEN, HIDDEN), (HIDDEN, KEYS), (HIDDEN, KEYS), (HIDDEN, HIDDEN)),  # q, k, v, o
    *((HIDDEN, INNER), (HIDDEN, INNER), (INNER, HIDDEN)),  # gate, up, down
)
TURNS = 5


def modules_of(ranks: int) -> Modules:
    """The model's modules with this total of ranks, spread as evenly as possible."""
    parameters = [inputs + outputs for inputs, outputs in SHAPES * LAYERS]
    each, more = divmod(ranks, len(parameters))
    dealt = [each + (index < more) for index in range(len(parameters))]
    return Modules(ranks=dealt, parameters=parameters, bytes=[4 * cost for cost in parameters])


def seconds(work: Callable[[], object]) -> float:
    """Median seconds over `TURNS` calls."""
    found = []
    for _ in range(TURNS):
        begin = time.perf_counter()
        work()
        found.append(time.perf_counter() - begin)
    return statistics.median(found)


def measure(ranks: int) -> dict[str, float]:
    """Seconds of each kind of decision."""
    modules = modules_of(ranks)
    scores = torch.rand(ranks, generator=torch.Generator().manual_seed(0))
    half = total_cost(modules.ranks, modules.parameters) // 2
    budgets = {
        "half of the ranks": (Budget(total_rank=ranks // 2), ranks // 2),
        "half of the ranks, none above its cap": (
            Budget(total_rank=ranks // 2, max_rank=max(1, modules.ranks[0] * 3 // 4)),
            ranks // 2,
        ),
        "half of the parameters": (Budget(parameters=half), half),
    }
    found = {
        name: seconds(lambda budget=budget, limit=limit: select(scores, budget, modules, limit))
        for name, (budget, limit) in budgets.items()
    }
    owner = torch.arange(len(modules.ranks)).repeat_interleave(torch.tensor(modules.ranks)).tolist()
    room, costs = [1] * len(modules.ranks), [1] * len(modules.ranks)
    everyone = torch.ones(ranks, dtype=torch.bool)
    found["a round of ABLoRA, 7 ranks move"] = seconds(lambda: reallocate(scores, owner, everyone, 7, room, costs))
    return found


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table = {ranks: measure(ranks) for ranks in arguments.ranks}
    print("| decision |", " | ".join(f"{ranks:,} ranks" for ranks in table), "|")
    print("|---|" + "---|" * len(table))
    for name in next(iter(table.values())):
        print(f"| {name} |", " | ".join(f"{found[name]:.4f} s" for found in table.values()), "|")


if __name__ == "__main__":
    main()
