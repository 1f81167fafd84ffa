"""ABLoRA's budget over a whole run: it holds, or it shrinks as published and says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import event as note
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from test_ablora import Loop
from torch import nn

from loralloc import ABLoRA, Budget, UserError, attach
from loralloc.methods.base import StepContext, modules_of, open_ranks, ranks_by_site
from loralloc.methods.scaling import average_start


def test_as_published_the_budget_shrinks_when_every_module_lost_a_rank_and_says_so(caplog):
    """Property 13: three modules in a block, of which each loses its one rank or none. By default the budget holds."""
    for keep in (False, True):
        caplog.clear()
        loop = Loop(budget=Budget(total_rank=6), scope="block", n_prune=3, keep_budget=keep).walk()
        lost = [sum(event["pruned"]) - sum(event["grown"]) for event in loop.rounds]
        assert [event["lost"] for event in loop.rounds] == lost
        assert (sum(lost) > 0) == (not keep)
        assert sum(loop.rounds[0]["grown"]) == (4 if keep else 0)  # in each block the third module receives
        assert loop.rounds[-1]["budget"] == 6 - sum(lost) == sum(loop.rounds[-1]["ranks"]) >= 2
        assert loop.run.statistics()["budget"] == loop.run.statistics()["rank/total"] == 6 - sum(lost)
        plan = loop.run.finish()
        assert plan.total_rank == 6 - sum(lost)
        assert plan.provenance.get("budget_lost", 0) == sum(lost)
        told = [record.getMessage() for record in caplog.records if record.name == "loralloc.methods.ablora"]
        assert len(told) == sum(map(bool, lost))


def test_the_log_tells_how_far_the_budget_fell(caplog):
    settings = {"scope": "block", "n_prune": 3, "rounds": 1, "score": "sensitivity", "validation": None}
    loop = Loop(budget=Budget(total_rank=6), keep_budget=False, **settings).walk(4)
    assert loop.rounds[0]["lost"] == 6 - loop.rounds[0]["budget"] > 0
    assert [record.getMessage() for record in caplog.records] == [
        "round 1 of ABLoRA: every module that could have grown lost a rank, so the budget fell by "
        f"{loop.rounds[0]['lost']} ranks to {loop.rounds[0]['budget']} (keep_budget=True prunes fewer ranks instead)"
    ]


@st.composite
def networks(draw: st.DrawFn) -> dict[str, Any]:
    """Layers of several shapes in some blocks, and everything that decides how ranks move among them."""
    shapes = st.tuples(st.integers(1, 9), st.integers(1, 9))
    blocks = draw(st.lists(st.lists(shapes, min_size=1, max_size=3), min_size=1, max_size=2))
    capacity, unit = draw(st.integers(2, 6)), draw(st.sampled_from(["total_rank", "parameters"]))
    costs = [capacity * (1 if unit == "total_rank" else sum(shape)) for block in blocks for shape in block]
    return {
        "blocks": blocks,
        "capacity": capacity,
        "budget": Budget(
            **{unit: sum(costs) * draw(st.integers(20, 90)) // 100 or 1}, max_rank=draw(st.none() | st.integers(1, 6))
        ),
        "scope": draw(st.sampled_from(["global", "block"])),
        "n_prune": draw(st.none() | st.integers(1, 60)),
        "protect_rounds": draw(st.integers(0, 2)),
        "seed": draw(st.integers(0, 99)),
    }


@given(networks())
def test_the_budget_holds_from_the_first_step_to_the_last_whatever_the_shapes(network):
    """In ranks exactly; in parameters never above, and no further rank fits."""
    blocks = [{f"m{i}": nn.Linear(*shape) for i, shape in enumerate(block)} for block in network["blocks"]]
    base: Any = nn.ModuleDict({"h": nn.ModuleList(map(nn.ModuleDict, blocks))})
    model = get_peft_model(base, LoraConfig(r=network["capacity"], target_modules=r".*\.m\d"))
    torch.manual_seed(network["seed"])
    chosen = {key: network[key] for key in ("scope", "n_prune", "protect_rounds")}
    method = ABLoRA(network["budget"], score="sensitivity", warmup=1, interval=1, rounds=3, **chosen)
    try:
        run = attach(model, method, 9)
    except UserError:  # more than the capacity, less than a rank, or nothing that could move
        note("refused")
        return
    in_ranks, start, moves = method.budget.unit == "ranks", run.start, 0
    cap = network["budget"].max_rank or network["capacity"]
    most = [min(site.rank, site.inputs, site.outputs, cap) for site in run.sites]
    average = average_start(
        method.budget, modules_of(run.sites), [min(site.inputs, site.outputs) for site in run.sites]
    )
    assert [site.plan_scale for site in run.sites] == pytest.approx([8 / average] * len(run.sites)), "PEFT's alpha is 8"
    for step in range(3):
        run.state.sensitivity.copy_(torch.randint(3, run.state.open.shape))
        decision = method.on_step(run.state, StepContext(step, run.schedule, learning_rate=1.0))
        ranks = ranks_by_site(run.sites, run.state.open)
        assert ranks == open_ranks(run.sites)
        assert all(rank <= room for rank, room in zip(ranks, most, strict=True))
        if in_ranks:
            assert sum(ranks) == start == run.target
        else:
            left = run.target - sum(r * site.cost for r, site in zip(ranks, run.sites, strict=True))
            fits = [site.cost for r, room, site in zip(ranks, most, run.sites, strict=True) if r < room]
            assert 0 <= left < min(fits, default=left + 1)
        if decision is not None:
            assert decision.details["lost"] == 0
            moves += sum(decision.details["pruned"])
    note("ranks moved" if moves else "no rank moved")
