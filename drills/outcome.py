"""What came of a drill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Outcome:
    """The cases of a drill.

    Attributes:
        name: What was tried.
        refused: Cases that were refused in words.
        done: Cases that did what was asked.
        lost: The others, each in a line.
    """

    name: str
    refused: int = 0
    done: int = 0
    lost: list[str] = field(default_factory=list)

    @property
    def survived(self) -> int:
        """Cases that ended as they should."""
        return self.refused + self.done

    @property
    def tried(self) -> int:
        """All cases."""
        return self.survived + len(self.lost)


def table(outcomes: Sequence[Outcome]) -> str:
    """Return the table that `make drill` prints.

    >>> print(table([Outcome("plans", refused=7, done=2, lost=["hangs"])]))
    | drill | tried | survived | of them refused in words | lost |
    |---|---|---|---|---|
    | plans | 10 | 9 | 7 | 1 |
    """
    rows = [(o.name, o.tried, o.survived, o.refused, len(o.lost)) for o in outcomes]
    lines = ["| drill | tried | survived | of them refused in words | lost |", "|---|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])
