"""One point of a frontier: an adapter of a certain size, cut and evaluated, perhaps trained on and evaluated again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loralloc.files import finite, write_atomically
from loralloc.reading import read_json


@dataclass(frozen=True)
class Measured:
    """What an evaluation on the validation data has found.

    Attributes:
        metrics: Metrics by name, the loss among them.
        losses: The loss of every example.
        seconds: What it took to get there: the evaluation, or the recovery before it.
    """

    metrics: Mapping[str, float]
    losses: tuple[float, ...]
    seconds: float

    @property
    def array(self) -> NDArray[np.floating]:
        """The losses, [n]."""
        return np.array(self.losses, dtype=np.float64)


@dataclass(frozen=True)
class Point:
    """One size.

    Attributes:
        ranks: Ranks kept, over all modules.
        parameters: Numbers in A and B.
        nbytes: Bytes of these numbers, as the adapter's file holds them.
        largest_rank: The largest rank of a module, which servers size their memory by.
        cut: The adapter as it was cut.
        recovered: The adapter after more training; None where there was none.
    """

    ranks: int
    parameters: int
    nbytes: int
    largest_rank: int
    cut: Measured
    recovered: Measured | None = None

    @property
    def best(self) -> Measured:
        """What the point is worth: after the recovery, unless that has made it worse."""
        return self.recovered if self.recovered is not None and self.gained else self.cut

    @property
    def gained(self) -> bool:
        """Whether there was a recovery, and it has lowered the loss."""
        return self.recovered is not None and bool(self.recovered.array.mean() < self.cut.array.mean())


@dataclass(frozen=True)
class PointFolder:
    """Where a point is kept, so that a frontier that was interrupted goes on.

    Attributes:
        root: Its folder.
        of: What the point belongs to: the adapter, the order, the recovery. Another point's record does not count.
    """

    root: Path
    of: Mapping[str, Any]

    @property
    def plan(self) -> Path:
        """The ranks."""
        return self.root / "ranks.json"

    @property
    def adapter(self) -> Path:
        """The adapter that `Point.best` is about, a plain one of PEFT."""
        return self.root / "adapter"

    @property
    def _record(self) -> Path:
        return self.root / "point.json"

    def read(self) -> Point | None:
        """Return the point that was kept; None where there is none, or one of something else."""
        try:
            record = read_json(self._record)
            if record.pop("of") != dict(self.of):
                return None
            cut, recovered = record.pop("cut"), record.pop("recovered")
            return Point(**record, cut=_measured(cut), recovered=None if recovered is None else _measured(recovered))
        except (OSError, ValueError, AttributeError, KeyError, TypeError):
            return None

    def clear(self) -> None:
        """Make room for a point; what is there of another one goes, its record first."""
        self._record.unlink(missing_ok=True)
        shutil.rmtree(self.adapter, ignore_errors=True)
        self.root.mkdir(parents=True, exist_ok=True)

    def write(self, point: Point) -> None:
        """Keep a point."""
        record = {"of": dict(self.of), **asdict(point)}
        write_atomically(self._record, json.dumps(finite(record), allow_nan=False) + "\n")


def _measured(record: Mapping[str, Any]) -> Measured:
    """Read what an evaluation has found; what was not finite is null in JSON."""

    def number(value: float | None) -> float:
        return float("nan") if value is None else float(value)

    metrics = {name: number(value) for name, value in record["metrics"].items()}
    return Measured(metrics, tuple(map(number, record["losses"])), float(record["seconds"]))
