"""Budgets: what the final adapter may cost. Numbers only: no tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Integral, Real
from typing import Annotated, Literal

from pydantic import Field

from loralloc.errors import UserError
from loralloc.setting_types import Count, Number, Positive

Unit = Literal["ranks", "parameters", "bytes"]

AMOUNTS = ("average_rank", "total_rank", "parameters", "fraction", "adapter_bytes", "share_of_base")
"""Of a budget's fields those that say how much; `max_rank` caps each module."""

_SHARES = {"fraction": "the starting parameters", "share_of_base": "the base model's parameters"}


@dataclass(frozen=True)
class Modules:
    """What a budget must know of the adapted modules and of the model that they are in.

    Attributes:
        ranks: Starting rank of each module.
        parameters: Parameters of one rank of each module, in + out.
        bytes: The same in bytes, at the dtypes of A and B.
        base_parameters: Parameters of the base model; None if it is not at hand, as for an adapter's folder.
        rankless: Further adapted modules, which have no rank to lose and count in averages.
    """

    ranks: Sequence[int]
    parameters: Sequence[int]
    bytes: Sequence[int]
    base_parameters: int | None = None
    rankless: int = 0

    def costs(self, unit: str) -> Sequence[int]:
        """Return what one rank of each module costs; 1 for every module if the unit is ranks."""
        return {"ranks": [1] * len(self.ranks), "parameters": self.parameters, "bytes": self.bytes}[unit]

    def total(self, unit: str, max_rank: int | None = None) -> int:
        """Return what all ranks cost, or at most `max_rank` ranks of each module."""
        return total_cost(self.capped(max_rank), self.costs(unit))

    def capped(self, max_rank: int | None) -> Sequence[int]:
        """Return the ranks that each module can have under a cap."""
        return self.ranks if max_rank is None else [min(rank, max_rank) for rank in self.ranks]


@dataclass(frozen=True)
class Budget:
    """What the final adapter may cost. Give exactly one amount, `max_rank` beside it, or `max_rank` alone.

    A budget in ranks is met exactly. One in parameters or bytes is never exceeded, and no further rank fits under it.
    Parameters are the numbers in A and B, rank · (in + out) per module. Heads do not count, nor do AdaLoRA's singular
    values, which are multiplied into B. Bytes are of the same numbers in the adapter's dtype, as the profile `ragged`
    writes them; the file's header and heads come on top. For `share_of_base`, the base model's parameters are counted
    as if unquantised, without adapters and what is saved with them.

    `max_rank` is for servers that reserve memory for the largest rank: no module keeps more. Alone, it allows every
    module that many ranks.

    Raises:
        UserError: Nothing or several amounts are given, or a value is no number, or out of its range.
    """

    average_rank: Annotated[Positive | None, Field(description="ranks per adapted layer, on average")] = None
    total_rank: Annotated[Count | None, Field(description="ranks of all adapted layers together")] = None
    parameters: Annotated[Count | None, Field(description="parameters of all kept ranks together")] = None
    fraction: Annotated[Number | None, Field(gt=0, le=1, description="fraction of the starting parameters")] = None
    adapter_bytes: Annotated[Count | None, Field(description="bytes of all kept ranks, in the adapter's dtype")] = None
    share_of_base: Annotated[
        Number | None, Field(gt=0, le=1, description="parameters of all kept ranks, as a share of the base model's")
    ] = None
    max_rank: Annotated[
        Count | None, Field(description="most ranks that a layer may keep; together with one of the others, or alone")
    ] = None

    def __post_init__(self) -> None:
        chosen = self.to_dict()
        amounts = [name for name in chosen if name in AMOUNTS]
        if len(amounts) > 1 or not chosen:
            raise UserError(
                f"a budget is exactly one of {', '.join(AMOUNTS)}, or max_rank alone; "
                f"got {', '.join(amounts) or 'none'}"
            )
        for name, value in chosen.items():
            _check_amount(name, value)
            # Records are JSON, which does not know numpy's numbers.
            object.__setattr__(self, name, int(value) if isinstance(value, Integral) else float(value))

    @property
    def unit(self) -> Unit:
        """What is counted: ranks, parameters or bytes."""
        if self.adapter_bytes is not None:
            return "bytes"
        in_parameters = (self.parameters, self.fraction, self.share_of_base)
        return "ranks" if all(value is None for value in in_parameters) else "parameters"

    def to_dict(self) -> dict[str, float]:
        """Return the values given, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def resolve(self, modules: Modules) -> int:
        """Return the target in this budget's unit, at most what the modules can have under `max_rank`.

        Args:
            modules: The adapted modules at their start.

        Raises:
            UserError: The target is above what the modules start with, or too small for a single rank; a target in
                ranks is above what `max_rank` allows; or it is a share of a base model that is not at hand.

        >>> modules = Modules(ranks=[12, 12, 12], parameters=[100, 100, 200], bytes=[400, 400, 800])
        >>> Budget(average_rank=8).resolve(modules), Budget(fraction=0.5).resolve(modules)
        (24, 2400)
        >>> Budget(max_rank=4).resolve(modules), Budget(adapter_bytes=9999, max_rank=4).resolve(modules)
        (12, 6400)
        """
        amount = next(((name, value) for name, value in self.to_dict().items() if name in AMOUNTS), None)
        reachable = modules.total(self.unit, self.max_rank)
        if amount is None:
            return reachable
        target = self._asked(*amount, modules)
        if self.unit == "ranks" and target > reachable:
            least = next(cap for cap in range(1, max(modules.ranks) + 1) if modules.total("ranks", cap) >= target)
            raise UserError(
                f"the budget {amount[0]}={amount[1]} asks for {target} ranks, but with max_rank={self.max_rank} the "
                f"{len(modules.ranks)} adapted modules can have no more than {reachable}; raise max_rank to {least} or "
                f"lower the budget to total_rank={reachable}"
            )
        return min(target, reachable)

    def _asked(self, name: str, value: float, modules: Modules) -> int:
        """The target without the cap."""
        available, costs = modules.total(self.unit), modules.costs(self.unit)
        if name == "share_of_base" and modules.base_parameters is None:
            raise UserError(
                f"the budget share_of_base={value} is a share of the base model, which an adapter's folder does not "
                "hold; give parameters or adapter_bytes instead"
            )
        count = len(costs) + modules.rankless
        share_of = {
            "average_rank": count,
            "fraction": available,
            "share_of_base": modules.base_parameters,
        }.get(name)
        wanted = value if share_of is None else value * share_of
        if wanted > available * (1 + 1e-12):
            asked = wanted if type(wanted) is int else f"{wanted:.12g}"
            # An adapter's folder, which comes without the base model, has what it has.
            more = "" if modules.base_parameters is None else " or raise LoraConfig.r (lora.r in a recipe)"
            raise UserError(
                f"the budget {name}={value} asks for {asked} {self.unit}, but the {count} adapted modules start "
                f"with {available}; lower the budget{more}"
            )
        # The twelve digits are for products such as 0.7 · 10, which come out a hair below their whole number.
        target = wanted if type(wanted) is int else int(float(f"{wanted:.12g}"))
        if target < min(costs):
            raise UserError(
                f"the budget {name}={value} leaves {target} {self.unit} for {count} modules: not even one rank "
                f"(the cheapest costs {min(costs)})"
            )
        return target

    def cap(self, modules: Modules, limit: int) -> int | None:
        """Return the most ranks that each module may keep under a limit, None for any number.

        While a falling budget is above what the modules can have under `max_rank`, there is no cap.
        """
        fits = self.max_rank is not None and limit <= modules.total(self.unit, self.max_rank)
        return self.max_rank if fits else None


def _check_amount(name: str, value: float) -> None:
    """Refuse what a field of a budget cannot be."""
    if isinstance(value, bool) or not isinstance(value, Real):  # numpy's numbers are Real
        raise UserError(f"the budget must be a number, such as Budget(average_rank=8), got {name}={value!r}")
    if not value > 0:
        raise UserError(f"the budget must be positive, got {name}={value}")
    if name not in ("average_rank", *_SHARES) and not isinstance(value, Integral):
        raise UserError(f"the budget in {name} must be a whole number, got {value!r}")
    if name in _SHARES and value > 1:
        raise UserError(f"a budget as a fraction of {_SHARES[name]} is at most 1, got {name}={value}")


def in_words(budget: Mapping[str, float]) -> str:
    """Say a recorded budget in words; empty for none.

    >>> in_words({"adapter_bytes": 1048576, "max_rank": 8}), in_words({"max_rank": 8}), in_words({})
    ('adapter bytes 1,048,576, at most 8 ranks a module', 'at most 8 ranks a module', '')
    """
    amounts = [f"{name.replace('_', ' ')} {value:,}" for name, value in budget.items() if name != "max_rank"]
    most = budget.get("max_rank")
    caps = [] if most is None else [f"at most {most:,} rank{'s' * (most != 1)} a module"]
    return ", ".join(amounts + caps)


def total_cost(ranks: Sequence[int], costs: Sequence[int]) -> int:
    """Return what ranks cost together, from those of each module and the cost of one."""
    return sum(rank * cost for rank, cost in zip(ranks, costs, strict=True))
