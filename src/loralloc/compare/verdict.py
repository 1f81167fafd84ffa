"""The verdict: one sentence for every budget, from the differences alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from loralloc.compare.results import Entry
from loralloc.compare.statistics import MOST_SEEDS, Difference, rows_suffice, seeds_needed
from loralloc.errors import listed

IN_QUESTION = ("method", "peer")
"""Kinds of contender that are judged; controls and retrained plans only help to explain the verdict."""

NAMED = 3
"""Contenders that the verdict names one by one."""


@dataclass(frozen=True)
class Compared:
    """A contender beside plain LoRA at a budget.

    Attributes:
        entry: The contender.
        difference: The difference of its losses to plain LoRA's; None if no runs can be paired.
    """

    entry: Entry
    difference: Difference | None


def verdict(compared: Sequence[Compared], loss: float, margin: float) -> str:
    """Return the verdict at a budget.

    Args:
        compared: All contenders but plain LoRA.
        loss: Plain LoRA's mean loss of a held-out row, of which the differences are; percentages are of it.
        margin: The smallest difference that matters, as a share of this loss.
    """
    if not any(one.entry.contender.kind in IN_QUESTION for one in compared):
        return "only controls were compared with plain LoRA: name methods in compare.methods"
    asked = [one for one in compared if one.entry.contender.kind in IN_QUESTION]
    judged = [one for one in asked if one.difference is not None and one.entry.complete]
    others = [one.entry.contender.label for one in asked if one not in judged]
    if not judged:
        return f"no method can be judged, because runs of {listed(others)} or of plain LoRA have no result"
    unknown = f"; {listed(others)} cannot be judged, because runs have no result" if others else ""
    known = [(one.entry.contender.label, one.difference) for one in judged if one.difference is not None]
    return _judged(known, compared, loss, margin) + unknown


def _judged(known: Sequence[tuple[str, Difference]], compared: Sequence[Compared], loss: float, margin: float) -> str:
    count = sum(one.difference is not None for one in compared)
    if all(difference.seeds == 1 for _, difference in known):
        return _one_seed(known, loss)
    if better := [(label, one) for label, one in known if one.significant and one.mean < 0]:
        return _better(better, loss, count)
    least = margin * abs(loss)
    if undecided := [(label, one) for label, one in known if one.low_all <= -least]:
        return _ahead(undecided, loss, least, count) or _undecided(undecided, least, count, margin)
    return f"plain LoRA is enough here: nothing tried is better by {_percent(margin)} of its loss, or more"


def with_gaps(verdict: str, baseline: Entry, pending: int) -> str:
    """Return a verdict with what it lacks: plain LoRA's failed runs, and runs that the next call repeats.

    Args:
        verdict: The verdict at a budget.
        baseline: Plain LoRA.
        pending: Runs at the budget that have no result yet.
    """
    runs = len(baseline.chosen.rows)
    if 0 < baseline.failures < runs:
        verdict += f"; {baseline.failures} of {runs} runs of plain LoRA have no result, so only the other seeds count"
    if pending:
        told = f"{pending} run{'s that have' if pending > 1 else ' that has'} no result"
        verdict = f"the same command repeats {told}; so far, {verdict}"
    return verdict


def _one_seed(known: Sequence[tuple[str, Difference]], loss: float) -> str:
    label, one = min(known, key=lambda item: item[1].mean)
    seen = (
        f"{label} is ahead of plain LoRA by {_amount(one, loss)}"
        if one.mean < 0
        else f"plain LoRA is ahead of all, of {label} by {_amount(one, loss)}"
    )
    return f"one seed cannot tell: with this one {seen}; another may give another result, so use at least three"


def _better(better: Sequence[tuple[str, Difference]], loss: float, count: int) -> str:
    ordered = sorted(better, key=lambda item: item[1].mean)
    label, one = ordered[0]
    others = [name for name, _ in ordered[1:]]
    also = f"; so {'is' if len(others) == 1 else 'are'} {listed(others)}" if others else ""
    for_all = "95 % interval" if count == 1 else f"95 % interval for all {count} comparisons together"
    return f"{label} is better than plain LoRA by {_amount(one, loss)}, {for_all} {_interval(one)}{also}"


def _ahead(undecided: Sequence[tuple[str, Difference]], loss: float, least: float, count: int) -> str:
    """Say how many more seeds would confirm a lead of `least` or more: the largest that more seeds can confirm.

    Empty if there is no such lead.
    """
    ahead = [
        (label, one, total)
        for label, one in undecided
        if one.mean <= -least and (total := seeds_needed(one, -one.mean, count)) is not None
    ]
    more = [(label, one, total - one.seeds) for label, one, total in ahead if total > one.seeds]
    if not more:
        return ""
    label, one, seeds = min(more, key=lambda item: item[1].mean)
    told = f"not enough runs to tell whether {label} is better than plain LoRA: it is ahead by {_amount(one, loss)}"
    return f"{told}; if it really is, {_seeds(seeds)} would show it"


def _undecided(undecided: Sequence[tuple[str, Difference]], least: float, count: int, margin: float) -> str:
    labels = [label for label, _ in undecided]
    who = listed(labels if len(labels) <= NAMED else [*labels[: NAMED - 1], f"{len(labels) - NAMED + 1} others"])
    needed = [(seeds_needed(one, least, count), one.seeds) for _, one in undecided]
    told = f"not enough runs to tell whether {who} {'is' if len(undecided) == 1 else 'are'} better than plain LoRA by "
    told += f"{_percent(margin)} of its loss"
    if not all(rows_suffice(one, least, count) for _, one in undecided):
        return f"{told}: {MOST_SEEDS} seeds would not be enough, more test rows are needed"
    if any(total is None for total, _ in needed):
        return f"{told}: that would take more than {MOST_SEEDS} seeds"
    more = max(total - have for total, have in needed if total is not None)
    if more <= 0:
        return f"{told}: the difference is so close to it that more seeds may not tell either"
    return f"{told}: {_seeds(more)} would"


def _seeds(more: int) -> str:
    return f"{more} more seed{'s' if more > 1 else ''}"


def _amount(one: Difference, loss: float) -> str:
    share = f" ({abs(one.mean / loss):.1%})" if loss and math.isfinite(loss) else ""
    return f"{abs(one.mean):.4f} in loss{share}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g}\N{NO-BREAK SPACE}%"


def _interval(one: Difference) -> str:
    """The simultaneous interval of a gain; it ends at 0, since Holm's test, which finds more, has rejected 0."""
    return f"{max(0.0, -one.high_all):.4f} to {-one.low_all:.4f}"
