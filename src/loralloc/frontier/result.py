"""What a frontier has found, in words and in `frontier.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loralloc._version import __version__
from loralloc.files import finite, write_atomically
from loralloc.frontier.budgets import Worse
from loralloc.frontier.point import Measured, Point
from loralloc.frontier.source import Source


@dataclass(frozen=True)
class Recovery:
    """The training that every cut was given to recover.

    Attributes:
        share: Its steps, as a share of the run's.
        rate: Highest learning rate, as a share of the run's.
        steps: Its optimizer steps; 0 for no recovery.
    """

    share: float
    rate: float
    steps: int


@dataclass(frozen=True)
class Frontier:
    """Quality over size.

    Attributes:
        source: The adapter.
        order: The score by which terms were dropped.
        recovery: The training that every cut was given to recover.
        metric: The task's metric.
        points: The sizes, from large to small.
        worse: How much worse each point is than the best one.
        recommended: Index of the recommended point.
        modules: Number of adapted modules.
    """

    source: Source
    order: str
    recovery: Recovery
    metric: str
    points: Sequence[Point]
    worse: Sequence[Worse]
    recommended: int
    modules: int

    def average(self, point: Point) -> float:
        """Ranks per module on average."""
        return point.ranks / self.modules

    @property
    def choice(self) -> Point:
        """The recommended point."""
        return self.points[self.recommended]

    @property
    def best(self) -> int:
        """Index of the point with the lowest loss."""
        return int(np.argmin([point.best.mean for point in self.points]))

    def verdict(self) -> str:
        """Say in a sentence which size is recommended, and why."""
        point, n = self.choice, len(self.choice.best.losses)
        size = f"average rank {self.average(point):.3g} ({point.ranks:,} ranks, {megabytes(point.nbytes)})"
        if len(self.points) == 1:
            return f"{size[:1].upper()}{size[1:]} is the only size that was tried."
        if self.recommended == self.best:
            smaller = "; the next smaller one is worse" if self.choice is not self.points[-1] else ""
            larger = "; a larger one may be better still" if self.recommended == 0 else ""
            return f"Take {size}: it has the lowest loss of all sizes that were tried{smaller}{larger}."
        share = point.nbytes / self.points[0].nbytes
        return (
            f"Take {size}, {share:.0%} of the largest that was tried: from the best size down to it, none is "
            f"significantly worse on {n:,} validation examples."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return what is written to `frontier.json`."""
        rows = zip(self.points, self.worse, strict=True)
        return {
            "format": 1,
            "loralloc": __version__,
            "adapter": str(self.source.adapter),
            "fingerprint": self.source.fingerprint(),
            "order": self.order,
            "recovery": asdict(self.recovery),
            "metric": self.metric,
            "modules": self.modules,
            "examples": len(self.choice.best.losses),
            "points": [self._point(point, worse) for point, worse in rows],
            "recommended": self.choice.ranks,
            "verdict": self.verdict(),
            "seconds": {"training": self.source.seconds, "frontier": round(self.seconds, 1)},
        }

    @property
    def seconds(self) -> float:
        """Seconds that all points have taken."""
        return sum(measured.seconds for point in self.points for measured in (point.cut, point.recovered) if measured)

    def _point(self, point: Point, worse: Worse) -> dict[str, Any]:
        return {
            "average_rank": round(self.average(point), 4),
            "ranks": point.ranks,
            "parameters": point.parameters,
            "bytes": point.nbytes,
            "largest_rank": point.largest_rank,
            "cut": _found(point.cut),
            "recovered": None if point.recovered is None else _found(point.recovered),
            "worse_than_best": {"mean": worse.mean, "low": worse.low, "high": worse.high, "p": worse.p},
        }

    def save(self, path: Path) -> None:
        """Write it as JSON; an existing file stays whole until the new one is complete."""
        write_atomically(path, json.dumps(finite(self.to_dict()), indent=1, allow_nan=False) + "\n")


def _found(measured: Measured) -> dict[str, Any]:
    mean, half = loss_interval(measured)
    return {
        "metrics": dict(measured.metrics),
        "loss_per_example": mean,
        "half_width": half,
        "seconds": measured.seconds,
    }


def loss_interval(measured: Measured) -> tuple[float, float]:
    """Return the mean loss of an example and half the width of its 95 % interval."""
    losses = measured.array
    return float(losses.mean()), 1.96 * float(losses.std(ddof=1)) / math.sqrt(len(losses))


def megabytes(count: int) -> str:
    """Return a number of bytes as people write it.

    >>> megabytes(1_234_567), megabytes(45_678)
    ('1.2 MB', '46 kB')
    """
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"
