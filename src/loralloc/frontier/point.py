"""One point of a frontier: an adapter of a certain size, cut and evaluated, perhaps trained and evaluated again."""

from __future__ import annotations

import json
import math
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
        seconds: Time of the evaluation, and of the recovery before it if there was one.
    """

    metrics: Mapping[str, float]
    losses: tuple[float, ...]
    seconds: float

    @property
    def array(self) -> NDArray[np.floating]:
        """The losses, [n]."""
        return np.array(self.losses, dtype=np.float64)

    @property
    def mean(self) -> float:
        """The mean loss of an example; infinite if a loss is not finite."""
        return float(self.array.mean()) if np.isfinite(self.array).all() else math.inf


@dataclass(frozen=True)
class Point:
    """One size.

    Attributes:
        ranks: Ranks kept, over all modules.
        parameters: Parameters in A and B.
        nbytes: Bytes of these parameters in the adapter's file.
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
        """The evaluation that counts: after the recovery if it has lowered the loss, else of the cut."""
        return self.recovered if self.recovered is not None and self.gained else self.cut

    @property
    def gained(self) -> bool:
        """Whether a recovery has lowered the loss."""
        return self.recovered is not None and self.recovered.mean < self.cut.mean


@dataclass(frozen=True)
class PointFolder:
    """The folder of a point, so that an interrupted frontier continues.

    Attributes:
        root: The folder.
        of: What the point depends on: adapter, order, recovery and more. A record with other values is ignored.
    """

    root: Path
    of: Mapping[str, Any]

    @property
    def plan(self) -> Path:
        """The ranks."""
        return self.root / "ranks.json"

    @property
    def adapter(self) -> Path:
        """The plain PEFT adapter to which `Point.best` belongs."""
        return self.root / "adapter"

    @property
    def _record(self) -> Path:
        return self.root / "point.json"

    def read(self) -> Point | None:
        """Return the saved point; None if there is none, or if it depends on something else."""
        try:
            record = read_json(self._record)
            if record.pop("of") != dict(self.of):
                return None
            cut, recovered = record.pop("cut"), record.pop("recovered")
            return Point(**record, cut=_measured(cut), recovered=None if recovered is None else _measured(recovered))
        except (OSError, ValueError, AttributeError, KeyError, TypeError):
            return None

    def clear(self) -> None:
        """Make a folder for a point; of an earlier point, first the record and then the adapter are deleted."""
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
