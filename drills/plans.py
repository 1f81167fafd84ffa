"""Rank plans of strangers, read and put on a model."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from torch import nn

from drills.attempt import Place, attempts
from drills.grammar import FILES, as_json, damaged, mutated, put
from drills.outcome import Outcome

NAMES = tuple(f"layers.{layer}.{kind}" for layer in range(2) for kind in ("q", "up"))

PLAN: dict[str, Any] = {
    "format": 1,
    "method": "adalora",
    "modules": {name: {"rank": 2, "start": 4, "in": 8, "out": 8, "scale": 2.0} for name in NAMES},
    "budget": {"average_rank": 2},
    "cost": {"peak": {"ranks": 16}},
    "provenance": {"loralloc": "1.0", "steps": 20, "settings": {"gamma": 0.1}},
}


@st.composite
def _cases(draw: st.DrawFn) -> tuple[bytes, str]:
    return draw(damaged(as_json(draw(mutated(PLAN))))), draw(FILES)


def _run(place: Place, case: tuple[bytes, str]) -> None:
    from loralloc import RankPlan, lora_config

    path = place.inside / "ranks.json"
    put(path, *case, place.outside)
    plan = RankPlan.load(path)
    layer = lambda: nn.ModuleDict({"q": nn.Linear(8, 8), "up": nn.Linear(8, 8)})  # noqa: E731
    model = nn.ModuleDict({"layers": nn.ModuleList([layer(), layer()])})
    lora_config(plan, model)
    plan.save(place.written / "ranks.json")
    assert RankPlan.load(place.written / "ranks.json") == plan


def drill(seed: int, cases: int) -> Outcome:
    """Read plans; a plan that is read is the same when it was written again."""
    return attempts("plans", _cases(), _run, cases, seed)
