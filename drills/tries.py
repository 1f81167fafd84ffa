"""Many tries of one thing, each drawn from the seed and its number alone, so that one can be repeated by itself."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from drills.outcome import Outcome


@dataclass(frozen=True)
class Tried:
    """One try.

    Attributes:
        case: What was done.
        refused: Whether it ended in words.
        lost: What was wrong about how it ended; nothing where it ended well.
    """

    case: str
    refused: bool = False
    lost: str = ""


def tries(name: str, attempt: Callable[[Random], Tried], number: int, seed: int) -> Outcome:
    """Try a thing so many times, and count.

    Args:
        name: What the drill is called.
        attempt: Draws a case, and does it.
        number: How many.
        seed: Of the draws.
    """
    outcome = Outcome(name)
    for index in range(number):
        try:
            tried = attempt(Random(f"{name} {seed} {index}"))
        except Exception:  # whatever it is: a traceback is what a user would have seen
            tried = Tried("", lost=traceback.format_exc(limit=-3))
        if tried.lost:
            outcome.lost.append(f"{name} {index}: {tried.lost}; case: {tried.case}")
        else:
            outcome.refused += tried.refused
            outcome.done += not tried.refused
    return outcome
