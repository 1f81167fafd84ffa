"""What every method promises.

A test that does not hold for a method is a bug in the method or in the promise.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from loralloc.adapter.export import export_adapter
from loralloc.budget import Budget
from loralloc.errors import UserError
from loralloc.gating import is_gated
from loralloc.plan import RankPlan
from loralloc.testing.hooks import Hooks, Make
from loralloc.testing.loop import (
    FREEZE,
    HALF,
    STEPS,
    Loop,
    cost,
    may_be_open,
    may_stay,
    same,
    totals,
    with_examples,
    without_lowest_gates,
)
from loralloc.testing.models import logits
from loralloc.training.bad_steps import MAX_BAD_STEPS
from loralloc.training.run import attach

INF, NAN = float("inf"), float("nan")
FIRST, HEAD, EVERYWHERE = slice(1), slice(-1, None), slice(None)

AT_THE_END = ("at the end", "by a search")  # when ranks are closed that were open until then
BY_GATES = ("as it goes", "by a search")  # how ranks are chosen
LEARNING = ("while training", "by a search")  # perhaps from numbers of their own

BUDGETS: Mapping[str, Budget] = {
    "average_rank": Budget(average_rank=1.5),
    "total_rank": Budget(total_rank=5),
    "parameters": Budget(parameters=501),
    "fraction": Budget(fraction=0.4),
    "adapter_bytes, max_rank": Budget(adapter_bytes=1500, max_rank=3),
    "share_of_base": Budget(share_of_base=0.05),
    "max_rank": Budget(max_rank=2),
    "total_rank, max_rank": Budget(total_rank=8, max_rank=2),
    "all": Budget(average_rank=4),
    "one": Budget(total_rank=1),
}


class MethodContract(Hooks):
    """The promises, as tests over the table of methods that a subclass gives in `methods`."""

    # ---- Start and end ----

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_attaching_changes_no_output(self, method: Make, name: str, dtype: torch.dtype) -> None:
        """A run begins at the base model, bit for bit."""
        model = self.model(method, name, dtype=dtype)
        before = logits(model)
        attach(model, with_examples(method(HALF), name), STEPS)
        assert torch.equal(logits(model), before)

    def test_the_finished_model_is_plain_lora_that_computes_the_same(
        self, method: Make, name: str, tmp_path: Path
    ) -> None:
        """The result is plain LoRA for stock PEFT: it computes what was trained, without ranks closed at the end."""
        loop = self.loop(method, name).walk()
        base = logits(self.plain(name))
        trained = logits(loop.model)
        assert (trained - base).abs().max() > 0.01  # it did learn something
        gated = deepcopy(loop) if loop.decides in BY_GATES else None
        plan = loop.run.finish()
        assert not is_gated(loop.model, "default")
        if self._closes_when_finished(loop):
            assert (logits(loop.model) - trained).abs().max() > 1e-3
            trained = logits(loop.model) if gated is None else without_lowest_gates(gated, plan.ranks)
        assert (logits(loop.model) - trained).abs().max() < 1e-5
        export = export_adapter(loop.model, tmp_path / "adapter")
        assert export.ranks == plan.ranks
        stock = PeftModel.from_pretrained(self.plain(name).unload(), tmp_path / "adapter").eval()
        assert (logits(stock) - trained).abs().max() < 1e-5

    def test_frozen_weights_are_never_touched(self, method: Make, name: str) -> None:
        """Nothing but the adapter and a saved head moves."""
        loop = self.loop(method, name)
        frozen = {n: p.detach().clone() for n, p in loop.model.named_parameters() if "lora_" not in n}
        frozen = {n: value for n, value in frozen.items() if n not in loop.trainable}  # a head is trained
        assert len(frozen) > 10
        loop.walk().run.finish()
        after = dict(loop.model.named_parameters())
        assert all(torch.equal(after[n], value) for n, value in frozen.items())

    @pytest.mark.parametrize("autocast_adapter", [True, False], ids=["adapter-fp32", "adapter-bf16"])
    def test_dtypes_stay(self, method: Make, name: str, autocast_adapter: bool) -> None:
        """Gates and scores are fp32 whatever the model's dtype, and the model's own dtypes do not change."""
        model = self.model(method, name, dtype=torch.bfloat16)
        if not autocast_adapter:
            for n, parameter in model.named_parameters():
                if "lora_" in n:
                    parameter.data = parameter.data.to(torch.bfloat16)
        before = {n: p.dtype for n, p in model.named_parameters()}
        loop = self.loop(method, name, model=model).walk()
        assert {site.gate.dtype for site in loop.run.sites} == {torch.float32}
        kept = {t.dtype for t in loop.run.state_dict()[0].values() if t.is_floating_point()}
        assert kept <= ({torch.float32} if loop.decides in LEARNING else set())
        expected = totals(loop)
        plan = loop.run.finish()
        assert {n: p.dtype for n, p in model.named_parameters()} == before
        assert all(torch.isfinite(p).all() for p in model.parameters())
        assert plan.total_rank in expected

    # ---- Budget and plan ----

    @pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
    def test_the_budget_is_met_at_every_event_and_by_the_plan(self, method: Make, budget: Budget) -> None:
        """The schedule's budget is met in every step, the target at the end; statistics and events agree with it."""
        if self.decides(method(budget)) == "never" and budget != BUDGETS["all"]:
            pytest.skip("keeps every rank, whatever the budget")
        refusal = self.refusal(method(budget), budget)
        if refusal is not None:
            with pytest.raises(UserError, match=refusal):
                self.loop(method, "llama", budget)
            return
        loop = self.loop(method, "llama", budget)
        assert loop.run.unit == ("ranks" if loop.decides == "never" or loop.has_threshold else budget.unit)
        for t in range(STEPS):
            loop.walk(t + 1)
            open_gates = loop.open_gates()
            assert may_be_open(loop, open_gates, loop.run.schedule.budget(t))
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
                assert may_be_open(loop, event["ranks"], event["budget"])
                assert event["budget"] == loop.run.schedule.budget(event["step"])
            if event["event"] == "plan":
                assert may_stay(loop, event["ranks"])
            if event["event"] not in ("start", "bad_step"):
                assert event["parameters"] == cost(loop, event["ranks"])

    @pytest.mark.parametrize("steps", [0, 1, 8, FREEZE])
    @pytest.mark.parametrize("budget", [HALF, Budget(fraction=0.4)], ids=["ranks", "parameters"])
    def test_a_run_that_stops_early_meets_the_budget(self, method: Make, budget: Budget, steps: int) -> None:
        """A run may be finished after any step, even before the first."""
        loop = self.loop(method, "bert", budget).walk(steps)
        plan = loop.run.finish()
        assert may_stay(loop, list(plan.ranks.values()))
        assert plan.provenance["steps"] == steps

    def test_the_plan_is_the_gates_and_the_factors(self, method: Make, name: str) -> None:
        """Plan, factors, events and gates tell the same ranks."""
        loop = self.loop(method, name).walk()
        open_gates, sites = loop.open_gates(), list(loop.run.sites)
        plan = loop.run.finish()
        assert list(plan.ranks) == [site.name for site in sites]
        if self._closes_when_finished(loop):
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

    def test_a_seed_is_a_run(self, method: Make, name: str) -> None:
        """The same seed gives the same run bit for bit, another one does not."""
        (plan, weights), (again, same_weights) = (
            self._plan_and_weights(self.loop(method, name).walk()) for _ in range(2)
        )
        assert plan.to_dict() == again.to_dict()
        assert same(weights, same_weights)
        _, of_another_seed = self._plan_and_weights(self.loop(method, name, seed=1).walk())
        assert not same(weights, of_another_seed)

    def test_eight_accumulated_batches_are_one_batch(self, method: Make, name: str) -> None:
        """A step is an optimizer step, however many batches it is made of."""
        whole, parts = (self.loop(method, name, dtype=torch.float64).walk(10, parts) for parts in (1, 8))
        assert whole.open_gates() == parts.open_gates()
        for n, parameter in whole.trainable.items():
            torch.testing.assert_close(parameter, parts.trainable[n], rtol=1e-6, atol=1e-6)
        assert whole.run.finish().ranks == parts.run.finish().ranks

    def test_looking_changes_nothing(self, method: Make, name: str) -> None:
        """Statistics, checkpoints and evaluations leave a run as it is."""
        blind, watched = self.loop(method, name), self.loop(method, name)
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
    def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(self, method: Make, name: str, cut: int) -> None:
        """What a run remembers beyond the model and the optimizer is in its state."""
        if self.decides(method(HALF)) != "while training" and cut != 8:
            pytest.skip("has no phases")
        whole = self.loop(method, name).stumble().walk()
        first = self.loop(method, name).stumble().walk(cut)
        tensors, numbers = first.run.state_dict()
        second = self.loop(method, name, seed=7)  # another start, to be overwritten
        second.model.load_state_dict(first.model.state_dict())
        second.optimizer.load_state_dict(first.optimizer.state_dict())
        second.run.load_state_dict({n: t.clone() for n, t in tensors.items()}, numbers)
        assert second.run.statistics() == first.run.statistics()
        second.walk()
        assert second.losses == whole.losses[cut:]
        assert same(second.snapshot(), whole.snapshot())
        assert first.events + second.events == whole.events
        assert second.run.finish().to_dict() == whole.run.finish().to_dict()

    @pytest.mark.parametrize("cut", [1, 8, FREEZE, FREEZE + 3], ids=["warmup", "decrease", "freeze", "final"])
    def test_a_run_that_goes_back_in_its_own_process_is_the_uninterrupted_one(
        self, method: Make, name: str, cut: int
    ) -> None:
        """Nothing is left of the steps that are made again, nor of a last one that was interrupted before its end."""
        if self.decides(method(HALF)) != "while training" and cut != 8:
            pytest.skip("has no phases")
        whole = self.loop(method, name).walk(cut).stumble().walk()
        loop = self.loop(method, name).walk(cut)
        saved = deepcopy((loop.model.state_dict(), loop.optimizer.state_dict(), loop.run.state_dict()))
        loop.walk(STEPS - 1).backward()
        loop.run.before_step(loop.optimizer)
        loop.model.load_state_dict(saved[0])
        loop.optimizer.load_state_dict(saved[1])
        loop.run.load_state_dict(*saved[2])
        loop.losses.clear()
        loop.stumble().walk()
        assert loop.losses == whole.losses[cut:]
        assert same(loop.snapshot(), whole.snapshot())
        assert loop.run.finish().to_dict() == whole.run.finish().to_dict()

    # ---- Bad steps ----

    @pytest.mark.parametrize(
        ("at", "optimizer", "value", "where"),
        [
            (0, "adamw", INF, FIRST),
            (8, "momentum", NAN, HEAD),
            (8, "adamw", INF, EVERYWHERE),
            (FREEZE + 2, "momentum", NAN, EVERYWHERE),
            (FREEZE + 2, "adamw", NAN, FIRST),
        ],
    )
    def test_a_bad_step_moves_nothing_is_counted_and_does_not_spread(
        self, method: Make, at: int, optimizer: str, value: float, where: slice
    ) -> None:
        """A step with a gradient that is not finite is none, for weights, moments and scores."""
        loop = self.loop(method, "bert", optimizer=optimizer).walk(at)
        loop.backward()
        for n in loop.by_the_optimizer[where]:
            _spoil(loop.trainable[n], value)
        before = loop.snapshot()
        assert loop.run.before_step(loop.optimizer) is False
        loop.optimizer.step()
        assert same(loop.snapshot(), before)
        loop.run.after_step(loop.optimizer)
        assert all(torch.equal(t, before[f"run.{n}"]) for n, t in loop.run.state_dict()[0].items())
        if loop.decides != "while training":  # on a schedule, ranks are closed after a bad step too
            assert same(loop.snapshot(), before)
        assert [event for event in loop.events if event["event"] == "bad_step"] == [{"event": "bad_step", "step": at}]
        loop.walk()
        assert all(torch.isfinite(tensor).all() for tensor in loop.snapshot().values())
        expected = totals(loop)
        plan = loop.run.finish()
        assert plan.total_rank in expected
        assert plan.provenance["bad_steps"] == loop.run.bad_steps == 1

    @pytest.mark.parametrize("optimizer", ["adamw", "momentum"])
    def test_a_sound_step_does_move(self, method: Make, optimizer: str) -> None:
        """The partner of the test above."""
        loop = self.loop(method, "bert", optimizer=optimizer).walk(8)
        loop.backward()
        before = loop.snapshot()
        assert loop.run.before_step(loop.optimizer) is True
        loop.optimizer.step()
        after = loop.snapshot()
        assert all(not torch.equal(after[n], before[n]) for n in loop.by_the_optimizer)
        loop.run.after_step(loop.optimizer)
        after = loop.snapshot()
        assert all(not torch.equal(after[n], before[n]) for n in loop.trainable.keys() - loop.by_the_optimizer)

    def test_a_bad_step_at_the_freeze_still_freezes(self, freezing_method: Make) -> None:
        """The schedule goes on where a step is skipped."""
        loop = self.loop(freezing_method, "bert").walk(FREEZE).stumble()
        assert sum(loop.open_gates()) == loop.run.target
        assert [event["event"] for event in loop.events[-2:]] == ["bad_step", "freeze"]

    def test_bad_steps_without_end_are_given_up(self, method: Make) -> None:
        """More bad steps in a row than any loss scaler needs end the run, with what to do."""
        loop = self.loop(method, "bert", steps=3 * MAX_BAD_STEPS).walk(2)
        gate = loop.run.sites[0].gate
        for _ in range(MAX_BAD_STEPS):
            gate.grad = torch.full_like(gate, NAN)
            assert loop.update() is False
        gate.grad = torch.full_like(gate, NAN)
        with pytest.raises(FloatingPointError, match=rf"{MAX_BAD_STEPS + 1} optimizer steps in a row .*; lower"):
            loop.run.before_step(loop.optimizer)

    def test_a_sound_step_starts_the_count_of_bad_ones_anew(self, method: Make) -> None:
        """The partner of the test above."""
        loop = self.loop(method, "bert", steps=3 * MAX_BAD_STEPS).walk(2)
        gate = loop.run.sites[0].gate
        for sound in (False, True, False):
            for _ in range(1 if sound else MAX_BAD_STEPS):
                if sound:
                    loop.backward()
                gate.grad = torch.full_like(gate, 0.0 if sound else NAN)
                assert loop.update() is sound
        assert loop.run.bad_steps == 2 * MAX_BAD_STEPS

    def test_the_count_of_bad_steps_goes_on_after_a_checkpoint(self, method: Make) -> None:
        """A run that is resumed gives up where the uninterrupted one would."""
        first = self.loop(method, "bert", steps=3 * MAX_BAD_STEPS).walk(2)
        for _ in range(MAX_BAD_STEPS):
            first.run.sites[0].A.grad = torch.full_like(first.run.sites[0].A, NAN)
            assert first.update() is False
        second = self.loop(method, "bert", steps=3 * MAX_BAD_STEPS)
        second.model.load_state_dict(first.model.state_dict())
        second.run.load_state_dict(*first.run.state_dict())
        second.run.sites[0].A.grad = torch.full_like(second.run.sites[0].A, NAN)
        with pytest.raises(FloatingPointError, match=f"{MAX_BAD_STEPS + 1} optimizer steps in a row"):
            second.run.before_step(second.optimizer)

    def _closes_when_finished(self, loop: Loop) -> bool:
        """Whether ranks that are open until then are closed when the run is finished, under a budget of half."""
        return loop.decides in AT_THE_END or (loop.decides == "as it goes" and not loop.has_threshold)

    def _plan_and_weights(self, loop: Loop) -> tuple[RankPlan, dict[str, Tensor]]:
        plan = loop.run.finish()
        return plan, {n: p.detach() for n, p in loop.trainable.items()}


def _spoil(parameter: torch.nn.Parameter, value: float) -> None:
    """Put a number into a parameter's gradient."""
    assert parameter.grad is not None
    parameter.grad.view(-1)[0] = value
