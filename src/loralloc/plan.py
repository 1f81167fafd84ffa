"""The rank plan: which rank every adapted module has. A file (`ranks.json`) that any run can write or start from."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loralloc.errors import UserError
from loralloc.files import write_atomically
from loralloc.naming import is_module_name
from loralloc.reading import read_json

FORMAT = 1

MOST_FEATURES = 2**31 - 1
"""Inputs or outputs of a layer, at most."""


class PlanError(UserError):
    """A file is not a usable rank plan; the message names the file, the entry and the rule."""


@dataclass(frozen=True)
class ModuleRank:
    """One adapted module.

    Attributes:
        rank: Ranks kept; above the start in a module that was given ranks of others.
        start: Ranks at the start of training.
        inputs: Input features of the layer.
        outputs: Output features of the layer.
        scale: Factor of B·A while training; the plan keeps it so that retraining at another rank does not change it.
    """

    rank: int
    start: int
    inputs: int
    outputs: int
    scale: float

    @property
    def parameters(self) -> int:
        """Numbers in A and B at the kept rank: rank · (inputs + outputs)."""
        return self.rank * (self.inputs + self.outputs)


@dataclass(frozen=True)
class RankPlan:
    """Ranks by full module name, with what they cost and where they come from.

    Attributes:
        method: Id of the method that found the plan, for example `adalora`.
        modules: Full module name to its ranks, in the model's order.
        budget: The budget as the user gave it, for example `{"average_rank": 8}`; empty for none.
        peak: Most ranks that were on at any time.
        provenance: Free-form record: versions, settings, steps.
    """

    method: str
    modules: Mapping[str, ModuleRank]
    budget: Mapping[str, float] = field(default_factory=dict)
    peak: int | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ranks(self) -> dict[str, int]:
        """Full module name to kept rank.

        >>> plan = RankPlan("adalora", {"q_proj": ModuleRank(rank=3, start=4, inputs=8, outputs=8, scale=2.0)})
        >>> plan.ranks, plan.parameters
        ({'q_proj': 3}, 48)
        """
        return {name: module.rank for name, module in self.modules.items()}

    @property
    def total_rank(self) -> int:
        """Sum of the kept ranks."""
        return sum(module.rank for module in self.modules.values())

    @property
    def parameters(self) -> int:
        """Numbers in all kept A and B: Σ rank · (inputs + outputs). Heads are not counted."""
        return sum(module.parameters for module in self.modules.values())

    @property
    def start_parameters(self) -> int:
        """The same count at the starting ranks."""
        return sum(module.start * (module.inputs + module.outputs) for module in self.modules.values())

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as written to `ranks.json`."""
        start_rank = sum(module.start for module in self.modules.values())
        return {
            "format": FORMAT,
            "method": self.method,
            "modules": {
                name: {"rank": m.rank, "start": m.start, "in": m.inputs, "out": m.outputs, "scale": m.scale}
                for name, m in self.modules.items()
            },
            "budget": dict(self.budget),
            "cost": {
                "start": {"ranks": start_rank, "parameters": self.start_parameters},
                **({} if self.peak is None else {"peak": {"ranks": self.peak}}),
                "final": {"ranks": self.total_rank, "parameters": self.parameters},
            },
            "provenance": dict(self.provenance),
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON; an existing file stays whole until the new one is complete."""
        write_atomically(Path(path), json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RankPlan:
        """Read a plan.

        Raises:
            PlanError: The file is missing, not JSON, of another format, or an entry breaks its rule.
        """
        path = Path(path)
        data = _read(path)
        found = data.get("format") if isinstance(data, dict) else None
        if type(found) is not int or found != FORMAT or not isinstance(data.get("modules"), dict):
            raise PlanError(
                f'{path}: not a rank plan: it must have "format": {FORMAT} and "modules", got format {found!r}'
            )
        for key in ("budget", "cost", "provenance"):
            if not isinstance(data.get(key, {}), dict):
                raise PlanError(f'{path}: "{key}" must be a mapping, got {data[key]!r}')
        for key, value in data.get("budget", {}).items():
            if not _is_finite(value):
                raise PlanError(f'{path}: "budget.{key}" must be a finite number, got {value!r}')
        if not isinstance(data.get("method", ""), str):
            raise PlanError(f'{path}: "method" must be text, got {data["method"]!r}')
        modules = {name: _module(path, name, entry) for name, entry in data["modules"].items()}
        if not any(module.rank for module in modules.values()):
            raise PlanError(f"{path}: the plan keeps no rank in any module")
        peak = data.get("cost", {}).get("peak", {"ranks": None})
        if not isinstance(peak, dict) or not _is_count(peak.get("ranks", "")):
            raise PlanError(f'{path}: "cost.peak" must be {{"ranks": N}}, got {peak!r}')
        return cls(
            method=data.get("method", ""),
            modules=modules,
            budget=data.get("budget", {}),
            peak=peak["ranks"],
            provenance=data.get("provenance", {}),
        )


def _module(path: Path, name: str, entry: Any) -> ModuleRank:
    """Check one entry before anything is allocated from it."""
    if not is_module_name(name):
        raise PlanError(f"{path}: {name[:80]!r} is not the name of a module")
    try:
        numbers = {key: entry[key] for key in ("rank", "start", "in", "out", "scale")}
    except (KeyError, TypeError) as error:
        raise PlanError(f'{path}: module "{name}" needs rank, start, in, out and scale, got {entry!r}') from error
    rank, start, inputs, outputs, scale = numbers.values()
    whole = all(type(n) is int for n in (rank, start, inputs, outputs))
    if not whole or min(inputs, outputs) < 1 or not 0 <= min(rank, start) <= max(rank, start) <= max(inputs, outputs):
        raise PlanError(
            f'{path}: module "{name}" must have whole numbers with 0 <= rank, start <= max(in, out), '
            f"got rank={rank!r}, start={start!r}, in={inputs!r}, out={outputs!r}"
        )
    if max(inputs, outputs) > MOST_FEATURES:
        raise PlanError(f'{path}: module "{name}" has {max(inputs, outputs):,} features, more than any layer has')
    if not _is_finite(scale) or scale <= 0:
        raise PlanError(f'{path}: the scale of module "{name}" must be a positive finite number, got {scale!r}')
    return ModuleRank(rank, start, inputs, outputs, float(scale))


def _is_count(value: Any) -> bool:
    return value is None or (type(value) is int and 0 <= value < 2**63)


def _is_finite(value: Any) -> bool:
    """Whether a value of JSON is a number that a float can hold; True and False are none."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _read(path: Path) -> Any:
    """Parse a file, and refuse a module that is named twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            raise PlanError(f'{path}: "{twice}" occurs twice')
        return found

    try:
        return read_json(path, unique)
    except OSError as error:
        raise PlanError(f"{path}: cannot read the rank plan ({error.strerror})") from error
    except PlanError:
        raise
    except UserError as error:
        raise PlanError(str(error)) from error
    except ValueError as error:
        raise PlanError(f"{path}: not JSON ({error})") from error
