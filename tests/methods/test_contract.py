"""What every method promises, over one table of methods and two kinds of models.

A new method is a new row of `METHODS`; a test that does not hold for it is a bug in the method or in the promise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import labelled_batch, logits, tiny_peft
from peft import PeftModel
from torch import Tensor

from loralloc import ABLoRA, AdaLoRA, Budget, RankPlan, UserError, attach, export_adapter
from loralloc.gating import is_gated
from loralloc.methods.base import Method
from loralloc.training.run import MAX_BAD_STEPS

STEPS, WARMUP, COOLDOWN = 18, 2, 7
FREEZE = STEPS - COOLDOWN + 1  # the first step of the final phase
HALF = Budget(average_rank=2)  # of 4
PHASES: dict[str, Any] = {"warmup": WARMUP, "cooldown": COOLDOWN, "interval": 1}

UNSEEN = [{}]
"""Stands for validation batches, which depend on the model: see `made`."""

ROUNDS: dict[str, Any] = {"warmup": 3, "interval": 5, "rounds": 3, "samples": 12}  # after steps 2, 7 and FREEZE

METHODS: Mapping[str, Callable[[Budget], Method]] = {
    "adalora": lambda budget: AdaLoRA(budget, **PHASES),
    "adalora-reference": lambda budget: AdaLoRA(budget, order="reference", **PHASES),
    "adalora-published": lambda budget: AdaLoRA.as_published(budget, penalty="paper", **PHASES),
    "ablora": lambda budget: ABLoRA(budget, UNSEEN, **ROUNDS),
    "ablora-published": lambda budget: ABLoRA.as_published(budget, UNSEEN, **ROUNDS),
    "ablora-taylor": lambda budget: ABLoRA(budget, UNSEEN, mode="taylor", scope="block", n_prune=2, **ROUNDS),
}
INF, NAN = float("inf"), float("nan")
MODELS = ("llama", "bert")  # causal language model and sequence classification


def made(method: Callable[[Budget], Method], budget: Budget, name: str) -> Method:
    """The method, with validation batches of the model where it looks at any."""
    built: Any = method(budget)
    if getattr(built, "validation", None) is None:
        return built
    return replace(built, validation=[batch_of_8(name, 100 + index) for index in range(3)])


def needs_spare_capacity(method: Callable[[Budget], Method]) -> bool:
    """Whether ranks move into capacity that is closed at the start."""
    return method(HALF).id == "ablora"


SLOW = ("ablora-published", "ablora-taylor")
"""Rows that `make check` runs: they differ from their neighbours in how scores are computed, nothing else."""


@pytest.fixture(params=[pytest.param(m, marks=[pytest.mark.slow] if m in SLOW else []) for m in METHODS])
def method(request) -> Callable[[Budget], Method]:
    return METHODS[request.param]


@pytest.fixture(params=MODELS)
def name(request) -> str:
    return request.param


def adamw(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.01)


def momentum(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01)


class Loop:
    """The loop of `attach`'s documentation, on batches that depend on the step alone."""

    def __init__(
        self,
        method: Callable[[Budget], Method],
        name: str,
        budget: Budget = HALF,
        *,
        seed: int = 0,
        optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] = adamw,
        dtype: torch.dtype = torch.float32,
        model: PeftModel | None = None,
    ) -> None:
        self.name = name
        self.model = tiny_peft(name, dtype=dtype) if model is None else model
        torch.manual_seed(seed)
        self.run = attach(self.model, made(method, budget, name), STEPS)
        self.events: list[dict[str, Any]] = []
        self.run.on_event = self.events.append
        self.trainable = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = optimizer(list(self.trainable.values()))
        self.losses: list[float] = []

    def backward(self, parts: int = 1) -> None:
        """One batch of 8 samples, or as many smaller ones whose losses are averaged."""
        self.optimizer.zero_grad()
        batch = batch_of_8(self.name, self.run.step)
        total = 0.0
        for part in zip(*(value.chunk(parts) for value in batch.values()), strict=True):
            loss = self.model(**dict(zip(batch, part, strict=True))).loss / parts
            loss.backward()
            total += loss.item()
        self.losses.append(total)

    def update(self) -> bool:
        sound = self.run.before_step()
        self.optimizer.step()
        self.run.after_step(self.optimizer)
        return sound

    def stumble(self) -> Loop:
        """One step with a gradient that is not a number."""
        self.backward()
        next(iter(self.trainable.values())).grad.fill_(NAN)
        assert self.update() is False
        return self

    def walk(self, until: int = STEPS, parts: int = 1) -> Loop:
        while self.run.step < until:
            self.backward(parts)
            self.update()
        return self

    def open_gates(self) -> list[int]:
        return [int((site.gate * site.scale != 0).sum()) for site in self.run.sites]

    def snapshot(self) -> dict[str, Tensor]:
        """Every number that training moves: weights, optimizer state, scores."""
        tensors = {n: p.detach().clone() for n, p in self.trainable.items()}
        for n, parameter in self.trainable.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{n}.{key}"] = torch.as_tensor(value).clone()
        return tensors | {f"run.{n}": t.clone() for n, t in self.run.state_dict()[0].items()}


def batch_of_8(name: str, step: int) -> dict[str, Tensor]:
    parts = [labelled_batch(name, seed=10 * step + part) for part in range(3)]  # 3 samples each
    return {key: torch.cat([part[key] for part in parts])[:8] for key in parts[0]}


def same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def cost(loop: Loop, ranks: list[int]) -> int:
    return sum(rank * site.cost for rank, site in zip(ranks, loop.run.sites, strict=True))


# ---- Start and end ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attaching_changes_no_output(method, name, dtype):
    model = tiny_peft(name, dtype=dtype)
    before = logits(model)
    attach(model, made(method, HALF, name), STEPS)
    assert torch.equal(logits(model), before)


def test_the_finished_model_is_plain_lora_that_computes_the_same(method, name, tmp_path):
    loop = Loop(method, name).walk()
    base = logits(tiny_peft(name))
    trained = logits(loop.model)
    assert (trained - base).abs().max() > 0.01  # it did learn something
    plan = loop.run.finish()
    assert not is_gated(loop.model, "default")
    assert (logits(loop.model) - trained).abs().max() < 1e-5
    export = export_adapter(loop.model, tmp_path / "adapter")
    assert export.ranks == plan.ranks
    stock = PeftModel.from_pretrained(tiny_peft(name).unload(), tmp_path / "adapter").eval()
    assert (logits(stock) - trained).abs().max() < 1e-5


def test_frozen_weights_are_never_touched(method, name):
    loop = Loop(method, name)
    parameters = [(n, p) for n, p in loop.model.named_parameters() if "lora_gate" not in n]  # gates will be gone
    frozen = {n: p.detach().clone() for n, p in parameters if not p.requires_grad}
    assert len(frozen) > 10
    loop.walk().run.finish()
    after = dict(loop.model.named_parameters())
    assert all(torch.equal(after[n], value) for n, value in frozen.items())


@pytest.mark.parametrize("autocast_adapter", [True, False], ids=["adapter-fp32", "adapter-bf16"])
def test_dtypes_stay(method, name, autocast_adapter):
    model = tiny_peft(name, dtype=torch.bfloat16)
    if not autocast_adapter:
        for n, parameter in model.named_parameters():
            if "lora_" in n:
                parameter.data = parameter.data.to(torch.bfloat16)
    before = {n: p.dtype for n, p in model.named_parameters()}
    loop = Loop(method, name, model=model).walk()
    assert {site.gate.dtype for site in loop.run.sites} == {torch.float32}
    assert {t.dtype for t in loop.run.state_dict()[0].values() if t.is_floating_point()} == {torch.float32}
    plan = loop.run.finish()
    assert {n: p.dtype for n, p in model.named_parameters()} == before
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert sum(plan.ranks.values()) == 2 * len(plan.ranks)


# ---- Budget and plan ----

BUDGETS = {
    "average_rank": Budget(average_rank=1.5),
    "total_rank": Budget(total_rank=5),
    "parameters": Budget(parameters=501),
    "fraction": Budget(fraction=0.4),
    "all": Budget(average_rank=4),
    "one": Budget(total_rank=1),
}


def meets(loop: Loop, budget: Budget, ranks: list[int], limit: int) -> bool:
    """In ranks exactly; in parameters never above, and no further rank fits."""
    if budget.unit == "ranks":
        return sum(ranks) == limit
    spare = limit - cost(loop, ranks)
    cheapest = min(
        (site.cost for site, rank in zip(loop.run.sites, ranks, strict=True) if rank < site.rank), default=spare + 1
    )
    return 0 <= spare < cheapest


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
def test_the_budget_is_met_at_every_event_and_by_the_plan(method, budget):
    if budget is BUDGETS["all"] and needs_spare_capacity(method):
        with pytest.raises(UserError, match=r"the budget fills the whole capacity .* raise it to 8"):
            Loop(method, "llama", budget)
        return
    loop = Loop(method, "llama", budget)
    for t in range(STEPS):
        loop.walk(t + 1)
        open_gates = loop.open_gates()
        assert meets(loop, budget, open_gates, loop.run.schedule.budget(t))
        statistics = loop.run.statistics()
        assert statistics["rank/total"] == sum(open_gates)
        assert statistics["params/active"] == cost(loop, open_gates)
        assert statistics["budget"] == loop.run.schedule.budget(t)
    plan = loop.run.finish()
    assert meets(loop, budget, list(plan.ranks.values()), loop.run.target)
    assert plan.parameters == cost(loop, list(plan.ranks.values()))
    for event in loop.events:
        if event["event"] in ("allocate", "freeze"):
            assert meets(loop, budget, event["ranks"], event["budget"])
            assert event["budget"] == loop.run.schedule.budget(event["step"])
            assert event["parameters"] == cost(loop, event["ranks"])


@pytest.mark.parametrize("steps", [0, 1, 8, FREEZE])
@pytest.mark.parametrize("budget", [HALF, Budget(fraction=0.4)], ids=["ranks", "parameters"])
def test_a_run_that_stops_early_meets_the_budget(method, budget, steps):
    loop = Loop(method, "bert", budget).walk(steps)
    plan = loop.run.finish()
    assert meets(loop, budget, list(plan.ranks.values()), loop.run.target)
    assert plan.provenance["steps"] == steps


def test_the_plan_is_the_gates_and_the_factors(method, name):
    loop = Loop(method, name).walk()
    open_gates, sites = loop.open_gates(), list(loop.run.sites)
    plan = loop.run.finish()
    assert list(plan.ranks) == [site.name for site in sites]
    assert list(plan.ranks.values()) == open_gates
    assert [int((site.A != 0).any(1).sum()) for site in sites] == open_gates
    assert [int((site.B != 0).any(0).sum()) for site in sites] == open_gates
    assert [event["event"] for event in loop.events if event["event"] != "allocate"] == ["start", "freeze", "finish"]
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
    for parameter in list(loop.trainable.values())[where]:
        parameter.grad.view(-1)[0] = value
    before = loop.snapshot()
    assert loop.run.before_step() is False
    loop.optimizer.step()
    assert same(loop.snapshot(), before)
    loop.run.after_step(loop.optimizer)
    assert all(torch.equal(t, before[f"run.{n}"]) for n, t in loop.run.state_dict()[0].items())
    assert [event for event in loop.events if event["event"] == "bad_step"] == [{"event": "bad_step", "step": at}]
    loop.walk()
    assert all(torch.isfinite(tensor).all() for tensor in loop.snapshot().values())
    plan = loop.run.finish()
    assert sum(plan.ranks.values()) == 2 * len(plan.ranks)
    assert plan.provenance["bad_steps"] == loop.run.bad_steps == 1


@pytest.mark.parametrize("optimizer", [adamw, momentum])
def test_a_sound_step_does_move(method, optimizer):
    """The partner of the test above."""
    loop = Loop(method, "bert", optimizer=optimizer).walk(8)
    loop.backward()
    before = loop.snapshot()
    assert loop.run.before_step() is True
    loop.optimizer.step()
    after = loop.snapshot()
    assert all(not torch.equal(after[n], before[n]) for n in loop.trainable)


def test_a_bad_step_at_the_freeze_still_freezes(method):
    loop = Loop(method, "bert").walk(FREEZE).stumble()
    assert sum(loop.open_gates()) == loop.run.target
    assert [event["event"] for event in loop.events[-2:]] == ["bad_step", "freeze"]


def test_bad_steps_without_end_are_given_up(method):
    loop = Loop(method, "bert").walk(2)
    gate = loop.run.sites[0].gate
    for _ in range(MAX_BAD_STEPS):
        gate.grad = torch.full_like(gate, NAN)
        assert loop.update() is False
    gate.grad = torch.full_like(gate, NAN)
    with pytest.raises(FloatingPointError, match=rf"{MAX_BAD_STEPS + 1} optimizer steps in a row .*; lower"):
        loop.run.before_step()


def test_a_sound_step_starts_the_count_of_bad_ones_anew(method):
    loop = Loop(method, "bert").walk(2)
    gate = loop.run.sites[0].gate
    for sound in (False, True, False):
        for _ in range(1 if sound else MAX_BAD_STEPS):
            gate.grad = torch.full_like(gate, 0.0 if sound else NAN)
            assert loop.run.before_step() is sound
    assert loop.run.bad_steps == 2 * MAX_BAD_STEPS
