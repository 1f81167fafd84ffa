"""Rank statistics in the log: their names are fixed, because trackers plot by name.

| name | what it is |
|---|---|
| `rank/total` | open ranks of all modules |
| `rank/min`, `rank/max` | open ranks of the module with the fewest, and of the one with the most |
| `budget` | what the schedule allows, in the budget's unit |
| `params/active` | parameters of the open ranks |
| `rank/mean/KIND` | mean open rank of the modules of a kind |
| `rank/closed/KIND` | share of their ranks that is closed, 0 to 1 |

A kind is a module's name within its layer, without numbers, shortened as long as no other kind has the same name:
`q_proj`, or `attention.output` if `output` alone would be ambiguous. The report's figures use the same names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loralloc.naming import kind_of, places, short_names

Kinds = Mapping[str, Sequence[tuple[int, int]]]
"""For each kind of modules, by its short name: (index, capacity) of each module."""


def kinds(capacities: Mapping[str, int]) -> Kinds:
    """Sort modules by kind.

    Args:
        capacities: The most ranks that each can have, by its name.

    >>> kinds({"layers.0.q_proj": 4, "layers.0.up_proj": 8, "layers.1.q_proj": 4})
    {'q_proj': [(0, 4), (2, 4)], 'up_proj': [(1, 8)]}
    """
    found: dict[str, list[tuple[int, int]]] = {}
    for at, (place, (name, capacity)) in enumerate(zip(places(capacities), capacities.items(), strict=True)):
        kind = kind_of(place.kind) if place is not None else ""  # experts are of one kind
        found.setdefault(kind or name, []).append((at, capacity))
    short = short_names(list(found))
    return {short[kind]: members for kind, members in found.items()}


def rank_statistics(kinds: Kinds, ranks: Sequence[int], budget: int, parameters: int) -> dict[str, float]:
    """Return the statistics of one step.

    Args:
        kinds: The modules.
        ranks: The open ranks of all of them.
        budget: What the schedule allows.
        parameters: Of the open ranks.

    >>> rank_statistics({"q": [(0, 4), (1, 4)]}, [3, 0], 4, 48)["rank/closed/q"]
    0.625
    """
    statistics: dict[str, float] = {
        "rank/total": sum(ranks),
        "rank/min": min(ranks),
        "rank/max": max(ranks),
        "budget": budget,
        "params/active": parameters,
    }
    for kind, members in kinds.items():
        kept, most = sum(ranks[at] for at, _ in members), sum(capacity for _, capacity in members)
        statistics[f"rank/mean/{kind}"] = kept / len(members)
        statistics[f"rank/closed/{kind}"] = 1 - kept / most
    return statistics
