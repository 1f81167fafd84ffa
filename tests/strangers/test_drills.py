"""The drills of hostile files in short; `make drill` runs thousands of cases. tests/test_drills.py has the others."""

from __future__ import annotations

import importlib

import pytest

CASES = {"plans": 40, "adapters": 40, "recipes": 30, "runs": 8}


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_lost(name: str) -> None:
    outcome = importlib.import_module(f"drills.{name}").drill(seed=1, cases=CASES[name])
    assert outcome.lost == []
    assert outcome.tried >= CASES[name] * 0.9
    assert outcome.refused > 0
    assert outcome.done > 0


def test_what_is_lost_is_seen() -> None:
    from hypothesis import strategies as st

    from drills import attempt

    def leak(place: attempt.Place, case: int) -> None:
        if case == 0:
            raise KeyError("a traceback")
        if case == 1:
            raise OSError(place.outside.read_text())
        if case == 2:
            place.outside.write_text("")
        if case == 3:
            (place.outside.parent / "more").write_text("")
        if case == 4:
            (place.inside / "report.html").write_text(attempt.SECRET)
        if case == 5:
            raise OSError

    outcome = attempt.attempts("leaks", st.sampled_from(range(7)), leak, 100, 0)
    found = {line.partition("; case: ")[2]: line for line in outcome.lost}
    assert sorted(found) == [str(case) for case in range(6)]
    assert "KeyError: 'a traceback'" in found["0"]
    assert "the secret was told" in found["1"]
    assert "a file outside was changed" in found["2"]
    assert "a file outside was changed" in found["3"]
    assert "the secret was told" in found["4"]
    assert "OSError without a word" in found["5"]
    assert outcome.done
