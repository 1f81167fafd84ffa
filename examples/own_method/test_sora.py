"""SoRA keeps the contract of every method, and does what its paper says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import pytest
import torch
from loralloc_sora import SoRA, soft_threshold
from torch import Tensor

from loralloc.budget import Budget
from loralloc.errors import UserError
from loralloc.methods.base import Method
from loralloc.testing import MethodContract
from loralloc.testing.hooks import Make
from loralloc.testing.loop import Decides, Loop, adamw
from loralloc.testing.models import TINY, adapted, labelled_batch
from loralloc.training.run import attach


def slow_momentum(parameters: list[Tensor]) -> torch.optim.Optimizer:
    """At AdamW's learning rate, which the penalties here are made for."""
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=0.01)


class TestContract(MethodContract):
    methods: ClassVar[Mapping[str, Make]] = {
        "sora": lambda budget: SoRA(penalty=5.6),  # 18 steps of 0.01: some gates become 0
        "sora-budget": lambda budget: SoRA(penalty=1.0, budget=budget),
    }
    optimizers: ClassVar[Mapping[str, Callable[[list[Tensor]], torch.optim.Optimizer]]] = {
        "adamw": adamw,
        "momentum": slow_momentum,
    }

    def decides(self, method: Method) -> Decides:
        return "as it goes"


def walked(penalty: float) -> Loop:
    """A run to its last step."""
    return Loop(SoRA(penalty=penalty), adapted(TINY["llama"]), "llama", decides="as it goes").walk()


class TestProximalStep:
    def test_is_the_papers_by_cases(self) -> None:
        g = torch.cat([torch.linspace(-2, 2, 41), torch.tensor([0.0, -0.0, 0.3, -0.3])])
        expected = []
        for value in g.tolist():
            if value > 0.3:
                expected.append(value - 0.3)
            elif value < -0.3:
                expected.append(value + 0.3)
            else:
                expected.append(0.0)
        torch.testing.assert_close(soft_threshold(g, 0.3), torch.tensor(expected))

    def test_leaves_exact_zeros_and_no_sign_behind(self) -> None:
        assert soft_threshold(torch.tensor([0.3, -0.2]), 0.3).tolist() == [0.0, 0.0]

    def test_follows_the_optimizers(self) -> None:
        """With plain gradient descent a step is T_ηλ(g − η ∇_g L)."""
        model = adapted(TINY["llama"])
        run = attach(model, SoRA(penalty=3.0), 10)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        gate = run.sites[0].gate
        gate.grad = torch.tensor([2.0, 0.0, -1.0, 9.0])
        run.before_step(optimizer)
        optimizer.step()
        run.after_step(optimizer)
        torch.testing.assert_close(gate.detach(), torch.tensor([0.5, 0.7, 0.8, 0.0]))

    def test_a_rank_can_come_back(self) -> None:
        model = adapted(TINY["llama"])
        run = attach(model, SoRA(penalty=1.0), 10)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        gate, counts = run.sites[0].gate, []
        for gradient in (9.0, 0.0, -5.0):
            gate.grad = torch.tensor([gradient, 0.0, 0.0, 0.0])
            run.before_step(optimizer)
            optimizer.step()
            run.after_step(optimizer)
            counts.append(int((gate != 0).sum()))
        assert counts == [3, 3, 4]


class TestPenalty:
    def test_closes_more_ranks_as_it_grows(self) -> None:
        ranks = [walked(penalty).run.finish().total_rank for penalty in (1.0, 5.4, 5.7, 6.0)]
        assert ranks[0] == 24
        assert ranks == sorted(ranks, reverse=True)
        assert len(set(ranks)) == 4

    def test_one_that_closes_every_rank_is_refused_with_the_cure(self) -> None:
        with pytest.raises(UserError, match=r"closed every rank at step \d+ of 18: .* lower penalty=20 \(method"):
            walked(20.0)

    def test_a_module_may_end_with_no_rank(self) -> None:
        loop = walked(1.0)
        with torch.no_grad():
            loop.run.sites[0].gate.zero_()
        plan = loop.run.finish()
        assert (plan.total_rank, min(plan.ranks.values())) == (20, 0)

    @pytest.mark.parametrize("penalty", [0.0, -1.0])
    def test_must_be_above_0(self, penalty: float) -> None:
        with pytest.raises(UserError, match="penalty must be above 0, got"):
            SoRA(penalty=penalty)


def test_a_budget_keeps_the_largest_gates_of_all_modules() -> None:
    model = adapted(TINY["llama"])
    run = attach(model, SoRA(penalty=1.0, budget=Budget(total_rank=3)), 10)
    with torch.no_grad():
        for number, site in enumerate(run.sites):
            site.gate.copy_(torch.tensor([0.1, -0.28, 0.3, 0.0]) * (number + 1))
    assert list(run.finish().ranks.values()) == [0, 0, 0, 0, 1, 2]


def test_the_optimizer_must_be_shown() -> None:
    model = adapted(TINY["llama"])
    run = attach(model, SoRA(penalty=1.0), 10)
    model(**labelled_batch("llama")).loss.backward()
    run.before_step()
    with pytest.raises(UserError, match=r"needs the learning rate of the step, .*: call run.after_step\(optimizer\)"):
        run.after_step()
