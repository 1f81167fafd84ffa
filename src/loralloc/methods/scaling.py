"""What lora_alpha is divided by: a rule of the method that allocates the ranks, known before there is a model."""

from __future__ import annotations

from collections.abc import Sequence

from loralloc.budget import Budget, Modules
from loralloc.methods.ablora import ABLoRA
from loralloc.methods.ablora.moves import starting_ranks

AVERAGED = (ABLoRA.id,)
"""Methods that start with fewer ranks than they have room for, and are scaled by the average of these."""


def averages(method: str, allocate: str | None = None) -> bool:
    """Whether lora_alpha is divided by the average starting rank; else by `LoraConfig.r`.

    Args:
        method: The method's id.
        allocate: Id of the method that allocates for it; None where it does so itself.

    >>> averages("ablora"), averages("adalora"), averages("allora", "ablora")
    (True, False, True)
    """
    return (allocate or method) in AVERAGED


def average_start(budget: Budget, modules: Modules, sizes: Sequence[int]) -> float:
    """Return the average starting rank of such a method.

    Args:
        budget: Its budget.
        modules: The adapted modules, with their capacity as ranks.
        sizes: The smaller one of each module's inputs and outputs.

    Raises:
        UserError: The modules cannot have the budget.
    """
    room = [min(pair) for pair in zip(modules.capped(budget.max_rank), sizes, strict=True)]
    return sum(starting_ranks(budget, modules, room)) / len(room)
