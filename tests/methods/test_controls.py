"""Controls: fixed ranks under a budget, and comparable with the methods that choose theirs."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_peft
from reference.controls import deal

from loralloc import AdaLoRA, Budget, DepthLinear, Random, Uniform, UserError, attach
from loralloc.allocate import keep_top, keep_within
from loralloc.methods.base import Method
from loralloc.methods.controls import depth_scores, depths_of, uniform_scores

capacities = st.lists(st.integers(1, 6), min_size=1, max_size=12)


def counts(keep: torch.Tensor, ranks: list[int]) -> list[int]:
    return [int(part.sum()) for part in keep.split(ranks)]


def ranks_of(method: Method, **settings) -> dict[str, int]:
    return attach(tiny_peft("llama", **settings), method, 10).finish().ranks


# ---- The shares ----


@given(capacities, st.data())
def test_uniform_ranks_differ_by_one_where_capacity_allows(ranks, data):
    total = data.draw(st.integers(0, sum(ranks)))
    given_out = counts(keep_top(uniform_scores(ranks), total), ranks)
    assert sum(given_out) == total
    for mine, capacity in zip(given_out, ranks, strict=True):
        assert mine == capacity or mine >= max(given_out) - 1


def test_what_does_not_divide_is_spread_over_the_depth():
    given_out = counts(keep_top(uniform_scores([4] * 16), 16 + 4), [4] * 16)
    assert [i for i, rank in enumerate(given_out) if rank == 2] == [0, 4, 8, 12]


@given(capacities, st.sampled_from(["increasing", "decreasing"]), st.data())
def test_ranks_by_depth_are_dealt_as_by_hand(ranks, direction, data):
    depths = sorted(data.draw(st.lists(st.integers(0, 4), min_size=len(ranks), max_size=len(ranks))))
    total = data.draw(st.integers(0, sum(ranks)))
    layers = max(depths) + 1
    weights = [depth + 1 if direction == "increasing" else layers - depth for depth in depths]
    found = counts(keep_top(depth_scores(depths, ranks, direction), total), ranks)
    expected = deal(weights, ranks, total)
    # Modules of equal weight and capacity may swap what does not divide: in floating point 1.5/3 and 2.5/5 tie or not.
    assert sum(found) == sum(expected) == total
    for w, mine, theirs in zip(weights, found, expected, strict=True):
        assert abs(mine - theirs) <= 1, w


def test_ranks_by_depth_are_a_straight_line():
    ranks = [24] * 12
    up = counts(keep_top(depth_scores(list(range(12)), ranks, "increasing"), 2 * 78), ranks)
    assert up == [2 * (depth + 1) for depth in range(12)]
    down = counts(keep_top(depth_scores(list(range(12)), ranks, "decreasing"), 2 * 78), ranks)
    assert down == up[::-1]


@given(capacities, st.integers(0, 500), st.integers(0, 2**16))
def test_a_budget_in_parameters_is_filled(ranks, limit, seed):
    costs = torch.randint(1, 30, (len(ranks),), generator=torch.Generator().manual_seed(seed))
    each = costs.repeat_interleave(torch.tensor(ranks))
    for scores in (uniform_scores(ranks), depth_scores(list(range(len(ranks))), ranks, "increasing")):
        kept = keep_within(scores, each, limit)
        spent = int(each[kept].sum())
        assert spent <= limit
        assert kept.all() or spent + int(each[~kept].min()) > limit


def test_depth_follows_names_in_the_models_order():
    names = [
        "shared",
        "encoder.block.0.q",
        "encoder.block.0.layer.1.v",
        "encoder.block.10.q",
        "decoder.block.0.q",
        "h2.x",
    ]
    assert depths_of(names) == [0, 1, 1, 2, 3, 4]
    assert depths_of(["0", "1", "10"]) == [0, 1, 2]


# ---- As methods ----


def test_each_control_at_the_same_budget():
    budget = Budget(average_rank=2)
    uniform, by_depth = ranks_of(Uniform(budget)), ranks_of(DepthLinear(budget))
    assert set(uniform.values()) == {2}
    layers = [[r for name, r in by_depth.items() if f"layers.{layer}." in name] for layer in (0, 1)]
    assert layers == [[1, 1, 1], [3, 3, 3]]  # 4/3 and 8/3, rounded such that they sum to 12
    draws = [ranks_of(Random(budget, rank_seed=seed)) for seed in (0, 0, 1, 2)]
    assert draws[0] == draws[1]
    assert len({tuple(draw.values()) for draw in draws}) == 3
    assert {sum(draw.values()) for draw in draws} == {12}


def test_random_keeps_every_rank_equally_often():
    total = Counter()
    for seed in range(300):
        kept = keep_top(Random(Budget(total_rank=3), rank_seed=seed).scores(["a", "b"], [4, 8]), 3)
        total.update(kept.nonzero().flatten().tolist())
    assert sum(total.values()) == 900
    assert all(45 <= total[rank] <= 105 for rank in range(12))  # 75 expected, standard deviation 7.5


@pytest.mark.parametrize("kind", [Uniform, Random, DepthLinear])
def test_a_cap_moves_ranks_to_other_modules(kind):
    free, capped = (ranks_of(kind(Budget(total_rank=10, max_rank=cap))) for cap in (None, 2))
    assert sum(free.values()) == sum(capped.values()) == 10
    assert max(capped.values()) == 2
    assert kind is Uniform or max(free.values()) > 2


def test_where_costs_differ_ranks_are_given_out_in_order_and_none_is_left_over():
    """Scores are no worth to be summed up: the first rank of a costly module comes before a second one elsewhere."""
    plan = attach(tiny_peft("llama"), Uniform(Budget(parameters=300)), 10).finish()
    assert set(plan.ranks.values()) == {1, 2}
    costs = {module.inputs + module.outputs for module in plan.modules.values()}
    assert 0 <= 300 - plan.parameters < min(costs)


@pytest.mark.parametrize("kind", [Uniform, Random, DepthLinear])
def test_the_scale_is_the_capacitys_as_for_the_methods_that_prune(kind):
    budget = Budget(total_rank=7)
    plans = [attach(tiny_peft("llama"), method(budget), 10).finish() for method in (kind, AdaLoRA)]
    assert [{module.scale for module in plan.modules.values()} for plan in plans] == [{1.5}, {1.5}]
    assert plans[0].peak == 7
    assert plans[0].budget == {"total_rank": 7}


@pytest.mark.parametrize("kind", [Uniform, Random, DepthLinear])
def test_the_schedule_is_the_budget_throughout(kind):
    run = attach(tiny_peft("llama"), kind(Budget(parameters=501)), 10)
    assert {run.schedule.budget(step) for step in range(10)} == {501}
    assert run.schedule.steps_until_final == 0
    assert run.schedule.spans() == [("final ranks", 0, 9)]


def test_a_trained_adapter_is_refused_where_a_rank_would_close():
    with pytest.raises(
        UserError, match=r"^all 6 adapted layers: the adapter has been trained already .*cut .* down with Truncate"
    ):
        attach(tiny_peft("llama", trained=True), Uniform(Budget(average_rank=3)), 10)
    attach(tiny_peft("llama", trained=True), Uniform(Budget(average_rank=4)), 10)


def test_an_unknown_direction_meets_the_nearest():
    with pytest.raises(
        UserError, match=r'direction must be one of increasing, decreasing; .*Did you mean "increasing"'
    ):
        DepthLinear(Budget(average_rank=2), direction="increase")  # type: ignore[arg-type]
