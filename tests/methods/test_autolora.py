"""AutoLoRA: its selection variables, their optimizer, the plan they lead to, and what it leaves alone."""

from __future__ import annotations

import copy
import json
import math
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from autolora_loop import F64, HELD_OUT, RANK, STEPS, Loop, adamw, batch, net
from hypothesis import given
from hypothesis import strategies as st
from models import naive_delta, tiny_peft
from peft import LoraConfig, get_peft_model
from reference import autolora as twin
from torch import Tensor, nn

from loralloc import AutoLoRA, Budget, UserError, attach
from loralloc.allocate import keep_most
from loralloc.gating import Site
from loralloc.methods.autolora.state import keep_uniform_share
from loralloc.training.run import AllocationRun


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.02)


def delta(site: Site) -> Tensor:
    return naive_delta(site).double()


def fill(sites: list[Site]) -> None:
    for site in sites:
        nn.init.normal_(site.B)


class TestSelectionVariables:
    """Spec, 26 and 27."""

    def test_start_uniform_and_stay_a_distribution_for_each_matrix(self) -> None:
        loop = Loop(optimizer=adam, logit_learning_rate=0.1)
        assert all(torch.equal(site.gate.detach(), torch.full((RANK,), 1 / RANK, dtype=F64)) for site in loop.run.sites)
        loop.walk(12)
        first, second = (site.gate.detach() for site in loop.run.sites)
        for gate in (first, second):
            assert gate.sum().item() == pytest.approx(1)
            assert (gate > 0).all()
            assert gate.std() > 0.02
        assert not torch.allclose(first, second)

    @given(st.lists(st.floats(-5, 5), min_size=RANK, max_size=RANK), st.floats(-100, 100))
    def test_are_the_softmax_of_the_logits_and_do_not_see_a_shift(self, logits: list[float], shift: float) -> None:
        run = attach(net(), AutoLoRA(HELD_OUT), 9)
        first, second = run.state.logits
        first.copy_(torch.tensor(logits) + shift)
        second.fill_(shift)
        run.state.write_gates()
        assert run.sites[0].gate.tolist() == pytest.approx(
            twin.softmax(logits), rel=1e-3
        )  # a shift of 100 costs digits
        assert run.sites[1].gate.tolist() == pytest.approx([1 / RANK] * RANK)

    def test_matrices_of_different_ranks_are_apart(self) -> None:
        loop = Loop(model=net(rank_pattern={"first": 2, "second": 5}), optimizer=adam, logit_learning_rate=0.1).walk(6)
        assert [site.gate.numel() for site in loop.run.sites] == [2, 5]
        assert [site.gate.sum().item() for site in loop.run.sites] == pytest.approx([1, 1])
        assert loop.run.state_dict()[0]["logits"].shape == (7,)
        assert torch.isfinite(loop.run.state_dict()[0]["logits"]).all()
        assert all(1 <= m.rank <= m.start for m in loop.run.finish().modules.values())

    @pytest.mark.parametrize(("published", "factor"), [(False, 1.0), (True, 1 / RANK)])
    def test_uniform_ones_scale_loras_update(self, published: bool, factor: float) -> None:
        """As published by 1/k; by default not at all, so that LoRA's learning rate serves."""
        method = AutoLoRA.as_published(HELD_OUT) if published else AutoLoRA(HELD_OUT)
        sites = Loop(method=method).run.sites
        fill(sites)
        for site in sites:
            plain = site.scaling * site.B.detach() @ site.A.detach()
            torch.testing.assert_close(delta(site), factor * plain, rtol=1e-6, atol=1e-9, check_dtype=False)

    def test_one_hot_ones_leave_rank_one(self) -> None:
        loop = Loop()
        fill(loop.run.sites)
        loop.state.logits[:, 1] = 60.0
        loop.state.write_gates()
        assert [int(torch.linalg.matrix_rank(delta(site), rtol=1e-5)) for site in loop.run.sites] == [1, 1]
        assert list(loop.run.finish().ranks.values()) == [1, 1]

    def test_the_first_step_is_loras_by_default_and_k_times_smaller_as_published(self) -> None:
        def distance(method: AutoLoRA) -> list[float]:
            loop = Loop(method=method, optimizer=adam).walk(1)
            return [delta(site).norm().item() for site in loop.run.sites]

        plain = net().train()
        optimizer = adam([p for p in plain.parameters() if p.requires_grad])
        plain(**batch(0)).loss.backward()
        optimizer.step()
        layers = [plain.base_model.model.first, plain.base_model.model.second]  # type: ignore[union-attr]
        lora: list[float] = [layer.get_delta_weight("default").norm().item() for layer in layers]  # type: ignore[union-attr]
        slow = {"logit_learning_rate": 1e-12}
        assert distance(AutoLoRA(HELD_OUT, **slow)) == pytest.approx(lora, rel=1e-6)
        assert [RANK * d for d in distance(AutoLoRA.as_published(HELD_OUT, **slow))] == pytest.approx(lora, rel=0.01)


class TestLogitOptimizer:
    """Spec, 38."""

    def test_is_adam(self) -> None:
        loop = Loop(optimizer=adam, logit_learning_rate=0.05)
        gradients, start = [], loop.state.logits.clone()
        mean = torch.zeros_like(start)
        for step in range(1, 8):
            loop.walk(step)
            gradients.append((loop.state.mean - 0.5 * mean) / 0.5)
            mean = loop.state.mean.clone()
        torch.testing.assert_close(loop.state.logits, twin.adam_steps(start, gradients, 0.05, 0.5, 0.999))

    def test_first_step_is_the_learning_rate_whatever_the_gradient(self) -> None:
        loop = Loop(optimizer=adam).walk(1)
        sure = loop.last_gradient().abs() > 1e-5
        assert sure.any()
        assert loop.state.logits[sure].abs() == pytest.approx(3e-4, rel=0, abs=1e-6)

    def test_a_gradient_that_is_not_finite_is_left_out_and_told(self) -> None:
        poisoned = [batch(1), {**batch(2), "y": batch(2)["y"] * math.inf}]
        loop = Loop(method=AutoLoRA(poisoned, check_every=1), optimizer=adam).walk(4)
        assert (loop.state.updates, loop.state.skipped) == (2, 2)
        assert [e["skipped"] for e in loop.events if e["event"] == "plan"] == [0, 1, 1, 2]
        assert all(torch.isfinite(p).all() for p in loop.model.parameters())
        assert torch.isfinite(loop.state.mean).all()

    def test_the_paper_mode_keeps_the_steps_own_gradient_then(self) -> None:
        poisoned = [batch(1), {**batch(2), "y": batch(2)["y"] * math.inf}]
        loop = Loop(method=AutoLoRA(poisoned, mode="paper"), optimizer=adam).walk(1)
        loop.backward()
        before = [p.grad.clone() for p in loop.model.parameters() if p.grad is not None]
        loop.run.before_step(loop.optimizer)
        after = [p.grad for p in loop.model.parameters() if p.grad is not None]
        assert all(torch.equal(b, a) for b, a in zip(before, after, strict=True))


class TestWhatTheTrainingLoopSees:
    """The gates are parameters, but the optimizer, weight decay and clipping pass them by."""

    @pytest.mark.parametrize("mode", ["fast", "paper"])
    def test_the_optimizer_does_not_move_the_gates(self, mode: str) -> None:
        loop = Loop(mode, optimizer=adamw, logit_learning_rate=1e-12).walk(5)
        gates = [site.gate.detach() for site in loop.run.sites]
        assert all(torch.allclose(gate, torch.full_like(gate, 1 / RANK), rtol=1e-6) for gate in gates)
        assert all(site.gate not in loop.optimizer.state for site in loop.run.sites)
        loop.run.check_optimizer(loop.optimizer)

    @pytest.mark.parametrize("mode", ["fast", "paper", "exact"])
    def test_looking_ahead_leaves_the_optimizer_as_it_was(self, mode: str) -> None:
        """Spec, 34: W' is made and undone without it."""
        loop = Loop(mode, optimizer=adam).walk(2)
        before = copy.deepcopy(loop.optimizer.state_dict())
        loop.backward()
        loop.run.before_step(loop.optimizer)
        after = loop.optimizer.state_dict()
        assert before["param_groups"] == after["param_groups"]
        for index, moments in before["state"].items():
            assert all(torch.equal(value, after["state"][index][key]) for key, value in moments.items())
        assert any(moments["exp_avg"].any() for moments in before["state"].values())

    def test_clipping_sees_the_weights_alone_and_the_difference_sees_unclipped_gates(self) -> None:
        """The gradient of the logits does not depend on where the loop clips; W′ does, so it is not moved here."""

        def still(parameters: Any) -> torch.optim.Optimizer:
            return torch.optim.SGD(parameters, lr=0.0)

        found = []
        for clip in (1e9, 1e-3):
            loop = Loop(optimizer=still)
            fill(loop.run.sites)
            loop.backward()
            norm = nn.utils.clip_grad_norm_(loop.model.parameters(), clip)
            weights = [p for p in loop.run.data.weights() if p.grad is not None]  # type: ignore[union-attr]
            assert len(weights) == len([p for p in loop.model.parameters() if p.grad is not None]) > 4
            before = [w.detach().clone() for w in weights]
            for group in loop.optimizer.param_groups:
                group["lr"] = 10.0
            loop.run.before_step(loop.optimizer)
            assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))
            loop.run.after_step(loop.optimizer)
            found.append((norm.item(), loop.last_gradient()))
        assert found[0][0] == found[1][0] > 0.01
        assert torch.equal(found[0][1], found[1][1])

    def test_a_bad_step_leaves_nothing_for_the_next(self) -> None:
        clean, bad = Loop(optimizer=adam).walk(3), Loop(optimizer=adam).walk(3)
        bad.backward()
        next(p for p in bad.model.parameters() if p.grad is not None).grad.fill_(math.nan)
        bad.update()
        clean.run.step += 1  # the batch of that step
        logits = bad.state.logits.clone()
        assert torch.equal(logits, clean.state.logits)
        for loop in (clean, bad):
            loop.walk(5)
        torch.testing.assert_close(clean.state.logits, bad.state.logits)
        assert not torch.equal(bad.state.logits, logits)

    def test_the_model_may_move_after_attaching(self) -> None:
        """To another precision here, which replaces tensors as a move to another device does."""
        loop = Loop(model=net(dtype=torch.float32), optimizer=adam)
        loop.model.double()
        loop.optimizer = adam([p for p in loop.model.parameters() if p.requires_grad])
        loop.walk(3)
        assert loop.state.updates == 3
        assert all(site.gate.sum().item() == pytest.approx(1) for site in loop.run.sites)

    def test_only_what_is_trained_is_moved(self) -> None:
        """Spec, 40, in every mode; adapters, head and gates do change."""
        for mode in ("fast", "paper", "exact", "first_order", "reference"):
            loop = Loop(mode, optimizer=adam)
            before = {n: p.detach().clone() for n, p in loop.model.named_parameters()}
            loop.walk(3)
            changed = {n for n, p in loop.model.named_parameters() if not torch.equal(p, before[n])}
            assert changed == {n for n, p in loop.model.named_parameters() if p.requires_grad}
            assert any("modules_to_save" in n for n in changed)


class TestThreshold:
    """Spec, 37."""

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
    @pytest.mark.parametrize("k", range(1, 65))
    def test_equal_shares_all_stay(self, k: int, dtype: torch.dtype) -> None:
        if dtype == torch.float16:
            k = 2 ** (k % 7)  # others are not near 1/k in it
        shares = torch.softmax(torch.full((2, k), 0.3, dtype=dtype), 1)
        assert keep_uniform_share(shares).all()

    def test_examples(self) -> None:
        logits = torch.tensor([[0.0, 1.0, 1.02, 2.0], [9.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
        assert keep_uniform_share(torch.softmax(logits, 1)).sum(1).tolist() == [1, 1, 4]
        assert twin.kept_by_raw_rule([0.0, 1.0, 1.02, 2.0]) == 2  # the rule we do not use

    @given(st.lists(st.lists(st.floats(-8, 8), min_size=1, max_size=9), min_size=1, max_size=4))
    def test_keeps_what_the_twin_keeps_and_never_none(self, rows: list[list[float]]) -> None:
        width = max(map(len, rows))
        logits = torch.full((len(rows), width), -math.inf, dtype=F64)
        for at, row in enumerate(rows):
            logits[at, : len(row)] = torch.tensor(row, dtype=F64)
        shares = torch.softmax(logits, 1).masked_fill(logits == -math.inf, -1)
        kept = keep_uniform_share(shares, tolerance=1e-9)
        for at, row in enumerate(rows):
            assert kept[at].sum().item() == max(1, twin.kept_by_softmax(row))
            assert not kept[at, len(row) :].any()
            assert 1 <= kept[at].sum() <= len(row)

    def test_nan_is_never_above_and_a_row_never_empty(self) -> None:
        nan = math.nan
        kept = keep_uniform_share(torch.tensor([[nan, 0.7, 0.3], [nan, nan, nan]]))
        assert kept.tolist() == [[False, True, False], [True, False, False]]


class TestPlan:
    def test_a_budget_takes_the_largest_shares_of_all_matrices(self) -> None:
        loop = Loop(method=AutoLoRA(HELD_OUT, Budget(total_rank=3)))
        loop.state.logits.copy_(torch.tensor([[3.0, 2.0, 0.0, 0.0], [1.0, 0.9, 0.0, 0.0]]))
        loop.state.write_gates()
        shares = torch.softmax(loop.state.logits, 1)
        best = shares.flatten().argsort(descending=True)[:3].tolist()
        plan = loop.run.finish()
        assert list(plan.ranks.values()) == [sum(i // 4 == row for i in best) for row in range(2)]
        assert plan.budget == {"total_rank": 3}

    def test_a_budget_compares_shares_with_an_equal_one(self) -> None:
        """0.4 of 2 is less than an equal share, 0.3 of 5 is more."""
        model = net(rank_pattern={"first": 2, "second": 5})
        loop = Loop(model=model, method=AutoLoRA(HELD_OUT, Budget(total_rank=3)))
        logits = [torch.tensor(row).log() for row in ([0.6, 0.4], [0.3, 0.3, 0.2, 0.1, 0.1])]
        loop.state.logits[0, :2], loop.state.logits[1] = logits
        assert list(loop.run.finish().ranks.values()) == [1, 2]

    def test_a_share_is_an_order_and_not_what_a_rank_is_worth(self) -> None:
        """Among nearly equal shares the most valuable set would be all the cheap ranks, whatever was learned."""
        loop = Loop(model=net(r=16), method=AutoLoRA(HELD_OUT, Budget(parameters=13 * 14)))
        costs = [site.cost for site in loop.state.sites]
        assert costs == [14, 13]
        loop.state.logits[0, :13] = 0.01
        shares = 16 * torch.softmax(loop.state.logits, 1).flatten()
        assert keep_most(shares, torch.tensor(costs).repeat_interleave(16), 13 * 14).sum() == 14  # of the cheap ones
        assert list(loop.run.finish().ranks.values()) == [13, 0]

    @pytest.mark.parametrize("budget", [Budget(average_rank=2), Budget(fraction=0.5)])
    def test_equal_shares_take_turns(self, budget: Budget) -> None:
        """A search that learned nothing leaves the same rank in every matrix, not all of the first ones."""
        ranks = Loop(method=AutoLoRA(HELD_OUT, budget)).run.finish().ranks
        assert list(ranks.values()) == [RANK // 2, RANK // 2]

    def test_equal_shares_of_different_ranks_take_turns_too(self) -> None:
        """In fp32 41 shares of 1/41 are not quite equal shares."""
        logits = torch.zeros(41, dtype=torch.float32)
        assert (41 * torch.softmax(logits, 0)[0]) != 1
        model = net(rank_pattern={"first": 41, "second": 4}).float()
        loop = Loop(model=model, method=AutoLoRA(HELD_OUT, Budget(total_rank=6)))
        assert list(loop.run.finish().ranks.values()) == [3, 3]

    @given(st.lists(st.floats(-4, 4).filter(lambda logit: abs(logit) > 1e-6), min_size=2, max_size=2))
    def test_of_two_ranks_half_the_budget_is_one_in_every_matrix(self, logits: list[float]) -> None:
        """One share of two is at least a half, so that such a search cannot move ranks from matrix to matrix."""
        loop = Loop(model=net(r=2), method=AutoLoRA(HELD_OUT, Budget(average_rank=1)))
        loop.state.logits[:, 0] = torch.tensor(logits, dtype=F64)
        assert list(loop.run.finish().ranks.values()) == [1, 1]

    def test_a_budget_in_parameters_is_never_exceeded(self) -> None:
        loop = Loop(method=AutoLoRA(HELD_OUT, Budget(parameters=45)), optimizer=adam).walk(5)
        assert 45 - 13 < loop.run.finish().parameters <= 45

    def test_the_trace_tells_the_plan_as_it_would_be(self) -> None:
        loop = Loop(optimizer=adam, check_every=4, logit_learning_rate=0.05).walk(STEPS)
        plans = [event for event in loop.events if event["event"] == "plan"]
        assert [event["step"] for event in plans] == list(range(3, STEPS, 4))
        assert all(sum(event["ranks"]) < 2 * RANK for event in plans)
        assert loop.run.statistics()["rank/total"] == 2 * RANK  # nothing is closed yet
        assert list(loop.run.finish().ranks.values()) == plans[-1]["ranks"]
        json.dumps(loop.events)

    def test_looks_are_about_fifty_unless_told_otherwise(self) -> None:
        loop = Loop(optimizer=adam).walk(6)
        assert sum(event["event"] == "plan" for event in loop.events) == 6  # 40 steps: at every one
        long = Loop(optimizer=adam)
        long.run.begin(400)
        long.walk(33)
        assert [event["step"] for event in long.events if event["event"] == "plan"] == [7, 15, 23, 31]  # 400 / 50 = 8

    def test_patience_settles_the_plan(self) -> None:
        loop = Loop(optimizer=adam, check_every=2, patience=2, logit_learning_rate=0.5).walk(STEPS)
        plans = [event for event in loop.events if event["event"] == "plan"]
        settled = next(event for event in plans if event["settled"])
        assert settled["unchanged"] == 2
        assert [event["ranks"] for event in plans if event["step"] >= settled["step"] - 4][:3] == [settled["ranks"]] * 3
        assert loop.run.settled
        assert loop.state.updates == settled["step"] + 1 < STEPS
        assert list(loop.run.finish().ranks.values()) == settled["ranks"]

    def test_without_patience_it_never_settles(self) -> None:
        loop = Loop(optimizer=adam, check_every=1, logit_learning_rate=1e-12).walk(12)
        assert not loop.run.settled
        assert loop.state.unchanged > 5

    def test_a_settled_run_stays_settled_when_resumed(self) -> None:
        settings: dict[str, Any] = {"optimizer": adam, "check_every": 1, "patience": 1, "logit_learning_rate": 0.5}
        first = Loop(**settings)
        while not first.run.settled:
            first.walk(first.run.step + 1)
        second = Loop(**settings)
        second.model.load_state_dict(first.model.state_dict())
        tensors, numbers = first.run.state_dict()
        second.run.load_state_dict(tensors, json.loads(json.dumps(numbers)))
        assert second.run.settled
        second.walk(second.run.step + 1)
        assert torch.equal(second.state.logits, first.state.logits)

    def test_a_planted_problem(self) -> None:
        """Spec, 44: one layer has to learn an update of rank 1, the other one of full rank."""
        torch.manual_seed(0)
        run = Planted().search()
        shares = {site.name: site.gate.detach() for site in run.sites}
        ranks = run.finish().ranks
        assert ranks["one"] < ranks["full"]
        assert shares["one"].max() > 1.25 / Planted.K > shares["full"].max()


class Planted(nn.Module):
    """Two layers side by side; each is to learn its own update."""

    K = 4

    def __init__(self) -> None:
        super().__init__()
        self.one, self.full = (nn.Linear(8, 8, bias=False, dtype=F64) for _ in range(2))
        orthogonal = nn.init.orthogonal_(torch.empty(2, 8, 8, dtype=F64)[0])
        self.goals = (
            self.one.weight.detach() + 3 * torch.outer(orthogonal[0], orthogonal[1]),
            self.full.weight.detach() + 1.5 * orthogonal[:4].T @ orthogonal[4:],
        )

    def forward(self, x: Tensor) -> Any:
        pairs = zip((self.one, self.full), self.goals, strict=True)
        loss = sum(((layer(x) - x @ goal.T) ** 2).mean() for layer, goal in pairs)
        return SimpleNamespace(loss=loss)

    def search(self, steps: int = 300) -> AllocationRun:
        model = get_peft_model(self, LoraConfig(r=self.K, lora_alpha=self.K, target_modules=["one", "full"]))
        generator = torch.Generator().manual_seed(1)
        data = [{"x": torch.randn(16, 8, generator=generator, dtype=F64)} for _ in range(40)]
        run = attach(model, AutoLoRA(data[30:], logit_learning_rate=0.02), steps)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
        draw = random.Random(0)
        for _ in range(steps):
            optimizer.zero_grad()
            model(**draw.choice(data[:30])).loss.backward()
            run.before_step(optimizer)
            optimizer.step()
            run.after_step(optimizer)
        return run


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"mode": "papers"}, r'mode must be one of fast, .*got "papers". Did you mean "paper"\?'),
            ({"beta1": 1.0}, "beta1 must be below 1, got 1.0"),
            ({"beta2": -0.1}, "beta2 must be at least 0, got -0.1"),
            ({"logit_learning_rate": 0}, "logit_learning_rate must be above 0, got 0"),
            ({"radius": math.inf}, "radius must be a finite number, got Infinity"),
            ({"check_every": 0}, "check_every must be at least 1, got 0"),
            ({"patience": 1.5}, "patience must be an integer, got 1.5"),
        ],
    )
    def test_numbers_out_of_range(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError, match=message):
            AutoLoRA(HELD_OUT, **settings)

    def test_a_trained_adapter(self) -> None:
        with pytest.raises(UserError, match=r"trained already \(B is not zero\), and AutoLoRA searches from the start"):
            attach(tiny_peft("llama", trained=True), AutoLoRA(HELD_OUT), 9)
