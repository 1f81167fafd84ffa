"""The naive twin of ALoRA (Liu et al., NAACL 2024, https://arxiv.org/abs/2403.16187).

Plain and slow on purpose: read it beside the paper. It imports nothing from the package, so that a mistake has to be
made twice to go unnoticed.

A *game* is a function from the set of active ranks to S, the negative cross entropy: higher is better.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from math import factorial

Game = Callable[[frozenset[int]], float]


def importance(game: Game, ranks: Sequence[int]) -> dict[int, float]:
    """Equation 6: IS(r) = S(M) - S(M without r) + S(M with r alone). 2R + 1 evaluations.

    >>> importance(lambda active: float(len(active)), [0, 1])
    {0: 2.0, 1: 2.0}
    """
    everything = frozenset(ranks)
    whole = game(everything)
    return {r: whole - game(everything - {r}) + game(frozenset({r})) for r in ranks}


def shapley(game: Game, ranks: Sequence[int]) -> dict[int, float]:
    """The Shapley value of every rank: its marginal, averaged over all orders in which ranks can join."""
    values = {}
    n = len(ranks)
    for r in ranks:
        others = [other for other in ranks if other != r]
        total = 0.0
        for size in range(n):
            weight = factorial(size) * factorial(n - size - 1) / factorial(n)
            for joined in combinations(others, size):
                total += weight * (game(frozenset(joined) | {r}) - game(frozenset(joined)))
        values[r] = total
    return values


def one_round(scores: Mapping[str, Sequence[float]], n_prune: int) -> tuple[dict[str, int], dict[str, int]]:
    """One round of Algorithm 1: (ranks pruned, ranks grown) of every module.

    The ranks with the lowest scores go, wherever they are; ties go to the earlier module and the earlier rank. Modules
    that lost none, in the order of their average score (before pruning), get the same number of new ranks each, and the
    first ones one more while any are left. If there is no such module, nothing grows. A module without ranks has no
    average and comes last.

    >>> one_round({"a": [5, 5], "b": [0, 1], "c": [9, 9], "d": [7, 7]}, 2)
    ({'a': 0, 'b': 2, 'c': 0, 'd': 0}, {'a': 0, 'b': 0, 'c': 1, 'd': 1})
    """
    order = sorted((score, m, r) for m, name in enumerate(scores) for r, score in enumerate(scores[name]))
    names = list(scores)
    pruned = dict.fromkeys(names, 0)
    for _, m, _ in order[:n_prune]:
        pruned[names[m]] += 1
    average = {name: sum(own) / len(own) if own else float("-inf") for name, own in scores.items()}
    receivers = sorted((name for name in names if pruned[name] == 0), key=lambda name: -average[name])
    grown = dict.fromkeys(names, 0)
    if receivers:
        each, left = divmod(n_prune, len(receivers))
        for place, name in enumerate(receivers):
            grown[name] = each + (place < left)
    return pruned, grown
