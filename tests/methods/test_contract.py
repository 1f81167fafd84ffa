"""What every method promises, over one table of methods (contract.py) and two kinds of models.

A test that does not hold for a method is a bug in the method or in the promise.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from contract import (
    FREEZE,
    FREEZING,
    HALF,
    INF,
    METHODS,
    NAN,
    STEPS,
    Loop,
    adamw,
    allocator,
    cost,
    decides,
    fresh_model,
    made,
    may_stay,
    meets,
    momentum,
    pytest_generate_tests,  # noqa: F401 - a hook of pytest
    same,
    totals,
    without_lowest_gates,
)
from models import logits, tiny_peft
from peft import PeftModel
from torch import Tensor

from loralloc import Budget, RankPlan, UserError, attach, export_adapter
from loralloc.gating import is_gated
from loralloc.methods.base import Method
from loralloc.training.bad_steps import MAX_BAD_STEPS

pytestmark = pytest.mark.filterwarnings("ignore:ALLoRA.*AdamW")  # tests/methods/test_allora.py is about it

AT_THE_END = ("at the end", "by a search")  # when ranks are closed; the function changes then
LEARNING = ("while training", "by a search")  # from numbers of their own


@pytest.fixture(params=FREEZING)
def freezing_method(request) -> Callable[[Budget], Method]:
    return METHODS[request.param]


# ---- Start and end ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attaching_changes_no_output(method, name, dtype):
    model = fresh_model(method, name, dtype=dtype)
    before = logits(model)
    attach(model, made(method, HALF, name), STEPS)
    assert torch.equal(logits(model), before)


def test_the_finished_model_is_plain_lora_that_computes_the_same(method, name, tmp_path):
    loop = Loop(method, name).walk()
    base = logits(tiny_peft(name))
    trained = logits(loop.model)
    assert (trained - base).abs().max() > 0.01  # it did learn something
    search = deepcopy(loop) if loop.decides == "by a search" else None
    plan = loop.run.finish()
    assert not is_gated(loop.model, "default")
    if loop.decides in AT_THE_END:
        assert (logits(loop.model) - trained).abs().max() > 1e-3
        trained = logits(loop.model) if search is None else without_lowest_gates(search, plan.ranks)
    assert (logits(loop.model) - trained).abs().max() < 1e-5
    export = export_adapter(loop.model, tmp_path / "adapter")
    assert export.ranks == plan.ranks
    stock = PeftModel.from_pretrained(tiny_peft(name).unload(), tmp_path / "adapter").eval()
    assert (logits(stock) - trained).abs().max() < 1e-5


def test_frozen_weights_are_never_touched(method, name):
    loop = Loop(method, name)
    frozen = {n: p.detach().clone() for n, p in loop.model.named_parameters() if "lora_" not in n}
    frozen = {n: value for n, value in frozen.items() if n not in loop.trainable}  # a head is trained
    assert len(frozen) > 10
    loop.walk().run.finish()
    after = dict(loop.model.named_parameters())
    assert all(torch.equal(after[n], value) for n, value in frozen.items())


@pytest.mark.parametrize("autocast_adapter", [True, False], ids=["adapter-fp32", "adapter-bf16"])
def test_dtypes_stay(method, name, autocast_adapter):
    model = fresh_model(method, name, dtype=torch.bfloat16)
    if not autocast_adapter:
        for n, parameter in model.named_parameters():
            if "lora_" in n:
                parameter.data = parameter.data.to(torch.bfloat16)
    before = {n: p.dtype for n, p in model.named_parameters()}
    loop = Loop(method, name, model=model).walk()
    assert {site.gate.dtype for site in loop.run.sites} == {torch.float32}
    kept = {t.dtype for t in loop.run.state_dict()[0].values() if t.is_floating_point()}
    assert kept == ({torch.float32} if loop.decides in LEARNING else set())
    expected = totals(loop)
    plan = loop.run.finish()
    assert {n: p.dtype for n, p in model.named_parameters()} == before
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert plan.total_rank in expected


# ---- Budget and plan ----

BUDGETS = {
    "average_rank": Budget(average_rank=1.5),
    "total_rank": Budget(total_rank=5),
    "parameters": Budget(parameters=501),
    "fraction": Budget(fraction=0.4),
    "all": Budget(average_rank=4),
    "one": Budget(total_rank=1),
}


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
def test_the_budget_is_met_at_every_event_and_by_the_plan(method, budget):
    if decides(method(budget)) == "never" and budget != BUDGETS["all"]:
        pytest.skip("keeps every rank, whatever the budget")
    if budget is BUDGETS["all"] and allocator(method(budget)).id == "ablora":
        with pytest.raises(UserError, match=r"the budget fills the whole capacity .* raise it to 8"):
            Loop(method, "llama", budget)
        return
    loop = Loop(method, "llama", budget)
    assert loop.run.unit == ("ranks" if loop.decides == "never" or loop.has_threshold else budget.unit)
    for t in range(STEPS):
        loop.walk(t + 1)
        open_gates = loop.open_gates()
        assert meets(loop, open_gates, loop.run.schedule.budget(t))
        statistics = loop.run.statistics()
        assert statistics["rank/total"] == sum(open_gates)
        assert statistics["params/active"] == cost(loop, open_gates)
        assert statistics["budget"] == loop.run.schedule.budget(t)
    plan = loop.run.finish()
    assert may_stay(loop, list(plan.ranks.values()))
    assert plan.parameters == cost(loop, list(plan.ranks.values()))
    assert loop.decides not in LEARNING or {"freeze", "plan"} & {event["event"] for event in loop.events}
    for event in loop.events:
        if event["event"] in ("allocate", "freeze"):
            assert meets(loop, event["ranks"], event["budget"])
            assert event["budget"] == loop.run.schedule.budget(event["step"])
        if event["event"] == "plan":
            assert may_stay(loop, event["ranks"])
        if event["event"] not in ("start", "bad_step"):
            assert event["parameters"] == cost(loop, event["ranks"])


@pytest.mark.parametrize("steps", [0, 1, 8, FREEZE])
@pytest.mark.parametrize("budget", [HALF, Budget(fraction=0.4)], ids=["ranks", "parameters"])
def test_a_run_that_stops_early_meets_the_budget(method, budget, steps):
    loop = Loop(method, "bert", budget).walk(steps)
    plan = loop.run.finish()
    assert may_stay(loop, list(plan.ranks.values()))
    assert plan.provenance["steps"] == steps


def test_the_plan_is_the_gates_and_the_factors(method, name):
    loop = Loop(method, name).walk()
    open_gates, sites = loop.open_gates(), list(loop.run.sites)
    plan = loop.run.finish()
    assert list(plan.ranks) == [site.name for site in sites]
    if loop.decides in AT_THE_END:
        assert open_gates == [site.rank for site in sites]
        assert plan.total_rank < sum(open_gates)
        open_gates = list(plan.ranks.values())
    assert list(plan.ranks.values()) == open_gates
    assert [int((site.A != 0).any(1).sum()) for site in sites] == open_gates
    assert [int((site.B != 0).any(0).sum()) for site in sites] == open_gates
    freeze = ["freeze"] if loop.decides == "while training" else []
    looks = [event["ranks"] for event in loop.events if event["event"] == "plan"]
    assert looks[-1:] == ([open_gates] if loop.decides == "by a search" else [])
    events = [event["event"] for event in loop.events if event["event"] not in ("allocate", "plan")]
    assert events == ["start", *freeze, "finish"]
    assert loop.events[-1]["ranks"] == open_gates
    assert loop.events[0]["sites"] == list(plan.ranks)


# ---- What a plan depends on, and what not ----


def plan_and_weights(loop: Loop) -> tuple[RankPlan, dict[str, Tensor]]:
    plan = loop.run.finish()
    return plan, {n: p.detach() for n, p in loop.trainable.items()}


def test_a_seed_is_a_run(method, name):
    (plan, weights), (again, same_weights) = (plan_and_weights(Loop(method, name).walk()) for _ in range(2))
    assert plan.to_dict() == again.to_dict()
    assert same(weights, same_weights)
    _, of_another_seed = plan_and_weights(Loop(method, name, seed=1).walk())
    assert not same(weights, of_another_seed)


def test_eight_accumulated_batches_are_one_batch(method, name):
    whole, parts = (Loop(method, name, dtype=torch.float64).walk(10, parts) for parts in (1, 8))
    assert whole.open_gates() == parts.open_gates()
    for n, parameter in whole.trainable.items():
        torch.testing.assert_close(parameter, parts.trainable[n], rtol=1e-6, atol=1e-6)
    assert whole.run.finish().ranks == parts.run.finish().ranks


def test_looking_changes_nothing(method, name):
    blind, watched = Loop(method, name), Loop(method, name)
    blind.run.on_event = None
    for t in range(STEPS):
        blind.walk(t + 1)
        watched.walk(t + 1)
        watched.run.statistics()
        watched.run.state_dict()
        logits(watched.model)  # an evaluation
    assert same(blind.snapshot(), watched.snapshot())
    assert blind.run.finish().to_dict() == watched.run.finish().to_dict()


# ---- Checkpoints ----


@pytest.mark.parametrize("cut", [1, 8, FREEZE, FREEZE + 3], ids=["warmup", "decrease", "freeze", "final"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(method, name, cut):
    if decides(method(HALF)) != "while training" and cut != 8:
        pytest.skip("has no phases")
    whole = Loop(method, name).stumble().walk()
    first = Loop(method, name).stumble().walk(cut)
    tensors, numbers = first.run.state_dict()
    second = Loop(method, name, seed=7)  # another start, to be overwritten
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.run.load_state_dict({n: t.clone() for n, t in tensors.items()}, numbers)
    assert second.run.statistics() == first.run.statistics()
    second.walk()
    assert second.losses == whole.losses[cut:]
    assert same(second.snapshot(), whole.snapshot())
    assert first.events + second.events == whole.events
    assert second.run.finish().to_dict() == whole.run.finish().to_dict()


# ---- Bad steps ----


FIRST, HEAD, EVERYWHERE = slice(1), slice(-1, None), slice(None)


@pytest.mark.parametrize(
    ("at", "optimizer", "value", "where"),
    [
        (0, adamw, INF, FIRST),
        (8, momentum, NAN, HEAD),
        (8, adamw, INF, EVERYWHERE),
        (FREEZE + 2, momentum, NAN, EVERYWHERE),
        (FREEZE + 2, adamw, NAN, FIRST),
    ],
)
def test_a_bad_step_moves_nothing_is_counted_and_does_not_spread(method, at, optimizer, value, where):
    loop = Loop(method, "bert", optimizer=optimizer).walk(at)
    loop.backward()
    for n in loop.by_the_optimizer[where]:
        loop.trainable[n].grad.view(-1)[0] = value
    before = loop.snapshot()
    assert loop.run.before_step(loop.optimizer) is False
    loop.optimizer.step()
    assert same(loop.snapshot(), before)
    loop.run.after_step(loop.optimizer)
    assert all(torch.equal(t, before[f"run.{n}"]) for n, t in loop.run.state_dict()[0].items())
    assert [event for event in loop.events if event["event"] == "bad_step"] == [{"event": "bad_step", "step": at}]
    loop.walk()
    assert all(torch.isfinite(tensor).all() for tensor in loop.snapshot().values())
    expected = totals(loop)
    plan = loop.run.finish()
    assert plan.total_rank in expected
    assert plan.provenance["bad_steps"] == loop.run.bad_steps == 1


@pytest.mark.parametrize("optimizer", [adamw, momentum])
def test_a_sound_step_does_move(method, optimizer):
    """The partner of the test above."""
    loop = Loop(method, "bert", optimizer=optimizer).walk(8)
    loop.backward()
    before = loop.snapshot()
    assert loop.run.before_step(loop.optimizer) is True
    loop.optimizer.step()
    after = loop.snapshot()
    assert all(not torch.equal(after[n], before[n]) for n in loop.by_the_optimizer)
    loop.run.after_step(loop.optimizer)
    after = loop.snapshot()
    assert all(not torch.equal(after[n], before[n]) for n in loop.trainable.keys() - loop.by_the_optimizer)


def test_a_bad_step_at_the_freeze_still_freezes(freezing_method):
    loop = Loop(freezing_method, "bert").walk(FREEZE).stumble()
    assert sum(loop.open_gates()) == loop.run.target
    assert [event["event"] for event in loop.events[-2:]] == ["bad_step", "freeze"]


def test_bad_steps_without_end_are_given_up(method):
    loop = Loop(method, "bert", steps=3 * MAX_BAD_STEPS).walk(2)
    gate = loop.run.sites[0].gate
    for _ in range(MAX_BAD_STEPS):
        gate.grad = torch.full_like(gate, NAN)
        assert loop.update() is False
    gate.grad = torch.full_like(gate, NAN)
    with pytest.raises(FloatingPointError, match=rf"{MAX_BAD_STEPS + 1} optimizer steps in a row .*; lower"):
        loop.run.before_step(loop.optimizer)


def test_a_sound_step_starts_the_count_of_bad_ones_anew(method):
    loop = Loop(method, "bert", steps=3 * MAX_BAD_STEPS).walk(2)
    gate = loop.run.sites[0].gate
    for sound in (False, True, False):
        for _ in range(1 if sound else MAX_BAD_STEPS):
            if sound:
                loop.backward()
            gate.grad = torch.full_like(gate, 0.0 if sound else NAN)
            assert loop.run.before_step(loop.optimizer) is sound
    assert loop.run.bad_steps == 2 * MAX_BAD_STEPS


def test_the_count_of_bad_steps_goes_on_after_a_checkpoint(method):
    first = Loop(method, "bert", steps=3 * MAX_BAD_STEPS).walk(2)
    for _ in range(MAX_BAD_STEPS):
        first.run.sites[0].A.grad = torch.full_like(first.run.sites[0].A, NAN)
        assert first.update() is False
    second = Loop(method, "bert", steps=3 * MAX_BAD_STEPS)
    second.model.load_state_dict(first.model.state_dict())
    second.run.load_state_dict(*first.run.state_dict())
    second.run.sites[0].A.grad = torch.full_like(second.run.sites[0].A, NAN)
    with pytest.raises(FloatingPointError, match=f"{MAX_BAD_STEPS + 1} optimizer steps in a row"):
        second.run.before_step(second.optimizer)
