"""The sentence that a comparison comes to."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from loralloc.compare.grid import Contender, Point
from loralloc.compare.page import headline
from loralloc.compare.results import Entry, Row, Trial
from loralloc.compare.statistics import differences
from loralloc.compare.verdict import Compared, verdict, with_gaps

POINT = Point("r2", "average rank 2", 960, (2, 2))
NBSP = "\N{NO-BREAK SPACE}"


def compared(
    *shifts: float, seeds: int = 3, spread: float = 0.0, rows: float = 0.0, mixed: float = 0.01, kind: str = "method"
) -> list[Compared]:
    """Contenders A, B, ... whose losses differ from plain LoRA's by so much.

    They vary between the seeds by `spread`, between the rows by `rows`, and between both by `mixed`.
    """
    draw = np.random.default_rng(0)
    shape = (seeds, 400)
    tables = [
        shift + draw.normal(0, spread, (seeds, 1)) + draw.normal(0, rows, (1, 400)) + draw.normal(0, mixed, shape)
        for shift in shifts
    ]
    made = []
    for label, one in zip("ABCDE", differences(tables), strict=False):
        trial = Trial(1e-3, (), (), 1.0, 1.0)
        made.append(Compared(Entry(POINT, Contender(label.lower(), label, kind), (trial,), trial), one))  # type: ignore[arg-type]
    return made


def test_one_is_better() -> None:
    said = verdict(compared(-0.1, 0.05), loss=2.0, margin=0.01)
    assert said.startswith("A is better than plain LoRA by 0.1000 in loss (5.0%), 95 % interval for all 2 ")
    assert said.endswith(" comparisons together 0.0982 to 0.1018")


def test_one_alone_needs_no_interval_for_all() -> None:
    (one,) = compared(-0.1)
    assert one.difference is not None
    assert (one.difference.low, one.difference.high) == (one.difference.low_all, one.difference.high_all)
    assert "(5.0%), 95 % interval 0.09" in verdict([one], loss=2.0, margin=0.01)


def test_an_interval_of_one_that_is_better_does_not_reach_below_nothing() -> None:
    """Holm's test may find a difference that the simultaneous interval, which is wider, would leave open."""
    found, other = compared(-0.1, 0.0)
    assert found.difference is not None
    wide = replace(found, difference=replace(found.difference, high_all=0.001))
    assert "together 0.0000 to 0.1" in verdict([wide, other], loss=2.0, margin=0.01)


def test_several_are_better() -> None:
    assert verdict(compared(-0.1, -0.2, -0.3), loss=2.0, margin=0.01).endswith("; so are B and A")
    assert verdict(compared(-0.1, -0.2), loss=2.0, margin=0.01).endswith("; so is A")


def test_plain_lora_is_enough() -> None:
    said = verdict(compared(0.0, 0.1), loss=2.0, margin=0.01)
    assert said == f"plain LoRA is enough here: nothing tried is better by 1{NBSP}% of its loss, or more"


def test_not_enough_runs() -> None:
    said = verdict(compared(0.0, spread=0.1), loss=2.0, margin=0.01)
    assert said.startswith(f"not enough runs to tell whether A is better than plain LoRA by 1{NBSP}% of its loss: ")
    assert said.endswith(" more seeds would")
    fewer, more = (int(verdict(compared(0.0, spread=s), 2.0, 0.01).split(": ")[1].split()[0]) for s in (0.06, 0.1))
    assert 1 <= fewer < more


def test_not_enough_runs_of_one_that_is_ahead() -> None:
    said = verdict(compared(-0.15, 0.05, spread=0.1), loss=2.0, margin=0.01)
    assert said.startswith("not enough runs to tell whether A is better than plain LoRA: it is ahead by 0.1")
    assert said.endswith("1 more seed would show it")
    fewer, more = (
        int(verdict(compared(shift, 0.05, spread=0.1), 2.0, 0.01).split("really is, ")[1].split()[0])
        for shift in (-0.15, -0.1)
    )
    assert 1 <= fewer < more


def with_runs(one: Compared, *reasons: str) -> Compared:
    """A contender whose runs at the chosen rate have ended so."""
    rows = tuple(Row(None, reason=reason) for reason in reasons)  # type: ignore[arg-type]
    trial = replace(one.entry.chosen, rows=rows)
    return replace(one, entry=replace(one.entry, trials=(trial,), chosen=trial))


def test_who_failed_is_not_better_than_anybody() -> None:
    best, second = compared(-0.3, -0.1)
    assert verdict([best, second], loss=2.0, margin=0.01).startswith("A is better")
    said = verdict([with_runs(best, "", "diverged", ""), second], loss=2.0, margin=0.01)
    assert said.startswith("B is better")
    assert said.endswith("; A cannot be judged, because runs have no result")
    assert verdict([with_runs(best, "", "diverged")], loss=2.0, margin=0.01) == (
        "no method can be judged, because runs of A or of plain LoRA have no result"
    )
    no_rate = replace(best, entry=replace(best.entry, chosen=replace(best.entry.chosen, score=math.nan)))
    assert verdict([no_rate, second], loss=2.0, margin=0.01).startswith("B is better")
    level = verdict([with_runs(second, "", ""), replace(best, difference=None)], loss=2.0, margin=0.01)
    assert level.startswith("B is better")
    assert level.endswith("; A cannot be judged, because runs have no result")


def test_a_verdict_says_what_it_lacks() -> None:
    plain = compared(0.0)[0]
    assert with_gaps("X", with_runs(plain, "", "").entry, 0) == "X"
    assert with_gaps("X", with_runs(plain, "", "killed").entry, 0) == (
        "X; 1 of 2 runs of plain LoRA have no result, so only the other seeds count"
    )
    assert with_gaps("X", plain.entry, 1) == "the same command repeats 1 run that has no result; so far, X"
    assert with_gaps("X", plain.entry, 3).startswith("the same command repeats 3 runs that have no result; so far")


def test_one_that_rows_cannot_tell_hides_no_other() -> None:
    noisy = compared(-0.5, rows=40.0)[0]
    clear = compared(-0.1, spread=0.1)[0]
    both = [noisy, Compared(replace(clear.entry, contender=Contender("b", "B", "method")), clear.difference)]
    assert noisy.difference is not None
    assert noisy.difference.mean < -0.2
    assert "whether B is better than plain LoRA: it is ahead" in verdict(both, loss=2.0, margin=0.01)


def test_not_enough_rows() -> None:
    said = verdict(compared(0.0, 0.0, 0.0, 0.0, rows=20.0), loss=2.0, margin=0.01)
    assert "whether A, B and 2 others are better" in said
    assert said.endswith("100 seeds would not be enough, more test rows are needed")


def test_more_rows_are_asked_for_only_where_seeds_cannot_help() -> None:
    """Rows that differ in another way with every seed become fewer with more seeds."""
    said = verdict(compared(0.0, mixed=0.6, seeds=5), loss=2.0, margin=0.01)
    assert said.endswith(" more seeds would")
    assert verdict(compared(0.0, mixed=1.2), loss=2.0, margin=0.01).endswith(": that would take more than 100 seeds")


def test_where_there_are_seeds_enough_no_more_are_asked_for() -> None:
    said = verdict(compared(-0.0045, seeds=20, spread=0.03), loss=2.0, margin=0.01)
    assert said == (
        f"not enough runs to tell whether A is better than plain LoRA by 1{NBSP}% of its loss: the difference is so "
        "close to it that more seeds may not tell either"
    )


@pytest.mark.parametrize(
    ("shift", "ahead"), [(-0.1, "A is ahead of plain LoRA"), (0.1, "plain LoRA is ahead of all, of A")]
)
def test_one_seed_cannot_tell_however_clear_it_looks(shift: float, ahead: str) -> None:
    said = verdict(compared(shift, seeds=1), loss=2.0, margin=0.01)
    assert said.startswith(f"one seed cannot tell: with this one {ahead} by 0.")
    assert said.endswith("another may give another result, so use at least three")


def test_controls_do_not_win() -> None:
    controls = compared(-0.5, kind="control")
    assert verdict([*controls, *compared(0.0)], loss=2.0, margin=0.01).startswith("plain LoRA is enough here")
    assert verdict(controls, loss=2.0, margin=0.01) == (
        "only controls were compared with plain LoRA: name methods in compare.methods"
    )


def test_several_budgets_make_one_sentence() -> None:
    assert headline([("average rank 1", "a is better")]) == "A is better."
    assert headline([("rank 1", "x"), ("rank 8", "y")]) == "At rank 1, x; at rank 8, y."
