"""Moments of ranks that close or start anew: as if each rank had an optimizer of its own (property 16)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models import tiny_peft
from torch import Tensor

from loralloc import UserError
from loralloc.gating import Site, attach_gates
from loralloc.training.fresh_ranks import FreshRanks, clear_moments
from loralloc.training.updates import RULES

LR = 0.01
Build = Callable[[list[Tensor]], torch.optim.Optimizer]

UPDATES: dict[str, Build] = {
    "adam": lambda p: torch.optim.Adam(p, lr=LR),
    "adam-l2": lambda p: torch.optim.Adam(p, lr=LR, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=LR, weight_decay=0.1),
    "eps": lambda p: torch.optim.AdamW(p, lr=LR, eps=1e-2),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=LR, amsgrad=True),
    "maximize": lambda p: torch.optim.Adam(p, lr=LR, maximize=True),
    "betas": lambda p: torch.optim.Adam(p, lr=LR, betas=(0.8, 0.95)),
    "foreach": lambda p: torch.optim.AdamW(p, lr=LR, foreach=True, weight_decay=0.1),
    "fused": lambda p: torch.optim.AdamW(p, lr=LR, fused=True, weight_decay=0.1),
    "tensor rate": lambda p: torch.optim.Adam(p, lr=torch.tensor(LR), foreach=False),
    "nadam": lambda p: torch.optim.NAdam(p, lr=LR),
    "nadam-l2": lambda p: torch.optim.NAdam(p, lr=LR, weight_decay=0.1, momentum_decay=0.1, foreach=True),
    "nadam-decoupled": lambda p: torch.optim.NAdam(p, lr=LR, weight_decay=0.1, decoupled_weight_decay=True),
    "nadam-maximize": lambda p: torch.optim.NAdam(p, lr=LR, weight_decay=0.1, maximize=True),
    "radam": lambda p: torch.optim.RAdam(p, lr=LR),
    "radam-l2": lambda p: torch.optim.RAdam(p, lr=LR, weight_decay=0.1, betas=(0.8, 0.95), foreach=True),
    "radam-decoupled": lambda p: torch.optim.RAdam(p, lr=LR, weight_decay=0.1, decoupled_weight_decay=True),
    "adamax": lambda p: torch.optim.Adamax(p, lr=LR),
    "adamax-l2": lambda p: torch.optim.Adamax(p, lr=LR, weight_decay=0.1, maximize=True, foreach=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=LR, weight_decay=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9),
    "nesterov": lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9, nesterov=True, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=LR, momentum=0.9, centered=True),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=LR, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=LR, weight_decay=0.1),
}


class Pair:
    """One site of a model, and a twin of its rank `fresh` with an optimizer of its own."""

    def __init__(self, build: Build, dtype: torch.dtype = torch.float64, fresh: int = 1) -> None:
        model = tiny_peft("llama").to(dtype)
        self.sites: list[Site] = attach_gates(model)
        self.site, self.rank = self.sites[0], fresh
        self.optimizer = build([p for site in self.sites for p in (site.A, site.B, site.gate)])
        self.ranks = FreshRanks(self.sites)
        self.build = build
        self.twin: list[Tensor] = []

    def open(self) -> None:
        opened = torch.zeros(sum(site.rank for site in self.sites), dtype=torch.bool)
        opened[self.rank] = True
        clear_moments(self.optimizer, self.sites, opened)
        self.ranks.open(opened)
        self.twin = [value.clone().requires_grad_() for value in self.values()]
        self.own = self.build(self.twin)

    def step(self, seed: int, correct: bool = True) -> None:
        generator = torch.Generator().manual_seed(seed)
        for site in self.sites:
            for parameter in (site.A, site.B, site.gate):
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter)
        if self.twin:
            self.twin[0].grad = self.site.A.grad[self.rank].clone()
            self.twin[1].grad = self.site.B.grad[:, self.rank].clone()
            self.twin[2].grad = self.site.gate.grad[self.rank].clone()
            self.own.step()
        self.ranks.before_step()
        self.optimizer.step()
        if correct:
            self.ranks.after_step(self.optimizer)

    def values(self) -> list[Tensor]:
        factors = [self.site.A.detach()[self.rank], self.site.B.detach()[:, self.rank]]
        return [*factors, self.site.gate.detach()[self.rank]]


def test_every_update_that_is_known_is_tested():
    made = {type(build([torch.ones(1, requires_grad=True)])) for build in UPDATES.values()}
    assert made == set(RULES)


@pytest.mark.parametrize("name", UPDATES)
def test_a_fresh_rank_moves_as_with_an_optimizer_of_its_own(name):
    """In its first step, in its tenth, and in all others."""
    pair = Pair(UPDATES[name])
    for seed in range(30):
        pair.step(seed)
    pair.open()
    close = 1e-7 if name.startswith(("nadam", "tensor")) else 1e-12  # torch has NAdam's product and such rates in fp32
    for seed in range(30, 50):
        pair.step(seed)
        for mine, twin in zip(pair.values(), pair.twin, strict=True):
            torch.testing.assert_close(mine, twin.detach(), rtol=0, atol=close)


@pytest.mark.parametrize(("kind", "right", "wrong"), [("NAdam", 1.06, 6.5), ("Adamax", 1.0, 0.1)])
def test_the_count_of_the_whole_parameter_would_give_steps_of_a_wrong_size(kind, right, wrong):
    """The partner: with an old optimizer's count a new rank's first step is not the learning rate."""
    for correct, length in ((True, right), (False, wrong)):
        pair = Pair(lambda p: getattr(torch.optim, kind)(p, lr=LR, eps=1e-30))
        pair.step(0)
        for state in pair.optimizer.state.values():  # what 20,000 steps would have left
            state["step"].fill_(20_000)
            if "mu_product" in state:
                state["mu_product"].fill_(0.0)
        pair.open()
        before = [value.clone() for value in pair.values()]
        pair.step(99, correct)
        for old, new in zip(before, pair.values(), strict=True):
            assert ((new - old).abs() / LR).flatten().tolist() == pytest.approx([length] * old.numel(), rel=2e-2)


@pytest.mark.parametrize("name", ["adamw", "tensor rate"])
def test_the_rate_is_that_of_the_step_whatever_a_scheduler_sets_after_it(name):
    usual, early = Pair(UPDATES[name]), Pair(UPDATES[name])
    for pair in (usual, early):
        pair.step(0)
        pair.open()
    usual.step(1)
    early.step(1, correct=False)
    for group in early.optimizer.param_groups:
        group["lr"] = group["lr"].fill_(7 * LR) if isinstance(group["lr"], Tensor) else 7 * LR
    early.ranks.after_step(early.optimizer)
    assert all(torch.equal(a, b) for a, b in zip(usual.values(), early.values(), strict=True))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_that_are_gone_are_asked_for(set_to_none):
    pair = Pair(UPDATES["nadam"])
    pair.open()
    pair.step(0, correct=False)
    pair.optimizer.zero_grad(set_to_none)
    with pytest.raises(UserError, match=r"which are gone: call run.after_step\(optimizer\) before optimizer.zero"):
        pair.ranks.after_step(pair.optimizer)


def test_the_first_step_of_a_fresh_rank_is_the_learning_rate():
    """Not 3.16 times as long, which is what Adam would make of it, as the partner shows."""
    for correct, length in ((True, 1.0), (False, 3.16)):
        pair = Pair(lambda p: torch.optim.Adam(p, lr=LR, eps=1e-30))
        for seed in range(20_000 if not correct else 50):
            if not correct and seed > 40:
                break
            pair.step(seed)
        if not correct:  # an old optimizer: its bias corrections are gone
            for state in pair.optimizer.state.values():
                state["step"].fill_(20_000)
        pair.open()
        before = [value.clone() for value in pair.values()]
        pair.step(99, correct)
        for old, new in zip(before, pair.values(), strict=True):
            assert ((new - old).abs() / LR).flatten().tolist() == pytest.approx([length] * old.numel(), rel=1e-2)


def test_all_other_ranks_move_as_ever():
    fresh, plain = Pair(UPDATES["adamw"]), Pair(UPDATES["adamw"])
    for seed in range(5):
        fresh.step(seed)
        plain.step(seed)
    fresh.open()
    for seed in range(5, 10):
        fresh.step(seed)
        plain.step(seed)
    others = torch.arange(4) != 1
    for mine, theirs in zip(fresh.sites, plain.sites, strict=True):
        same = others if mine is fresh.site else torch.ones(4, dtype=torch.bool)
        assert torch.equal(mine.A[same], theirs.A[same])
        assert torch.equal(mine.B[:, same], theirs.B[:, same])
    assert not torch.equal(fresh.site.A[1], plain.site.A[1])
    state = fresh.optimizer.state[fresh.site.A]["exp_avg"]
    assert torch.equal(state[others], plain.optimizer.state[plain.site.A]["exp_avg"][others])


def test_what_needs_no_correction_is_left_alone():
    pair = Pair(UPDATES["momentum"])
    pair.step(0)
    pair.open()
    pair.step(1)
    assert pair.ranks.state_dict() == {}


def test_a_step_that_moves_nothing_does_not_age():
    pair = Pair(UPDATES["adam"])
    pair.step(0)
    pair.open()
    for parameter in (p for site in pair.sites for p in (site.A, site.B, site.gate)):
        parameter.grad = None
    before = [value.clone() for value in pair.values()]
    pair.ranks.before_step()
    pair.optimizer.step()
    pair.ranks.after_step(pair.optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, pair.values(), strict=True))
    assert int(pair.ranks.state_dict()["fresh.ages"][1]) == 0
    pair.ranks.after_step(None)  # a step that was never begun
    pair.step(1)
    assert int(pair.ranks.state_dict()["fresh.ages"][1]) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ages_resume_bit_for_bit(dtype):
    whole = Pair(UPDATES["adamw"], dtype)
    for pair, cut in ((whole, False), (resumed := Pair(UPDATES["adamw"], dtype), True)):
        pair.step(0)
        pair.open()
        pair.step(1)
        if cut:
            tensors = pair.ranks.state_dict()
            pair.ranks = FreshRanks(pair.sites)
            pair.ranks.load_state_dict(tensors)
        pair.step(2)
    assert torch.equal(whole.site.A, resumed.site.A)
    assert torch.equal(whole.site.B, resumed.site.B)


def test_grown_ranks_cost_nothing_any_more():
    pair = Pair(lambda p: torch.optim.Adam(p, lr=LR, betas=(0.5, 0.6)))
    assert pair.ranks.state_dict() == {}
    pair.open()
    for seed in range(33):
        pair.step(seed)
        assert ("fresh.ages" in pair.ranks.state_dict()) == (seed < 31)  # 0.6 ** 32 is what fp32 no longer sees


def test_moments_in_eight_bits_are_refused():
    """A 0 in them is some other number: the first of a table, next to minus the largest."""
    pair = Pair(UPDATES["adam"])
    pair.step(0)
    pair.optimizer.state[pair.site.A]["exp_avg"] = torch.zeros(pair.site.A.shape, dtype=torch.uint8)
    with pytest.raises(UserError, match=r'Adam keeps its moments in torch.uint8, where .* \(optim="adamw_torch" in'):
        pair.open()


def test_closed_and_fresh_ranks_forget_and_no_others():
    pair = Pair(UPDATES["adam"])
    pair.step(0)
    pair.sites[2].set_scale(torch.tensor([True, True, False, True]))
    before = pair.optimizer.state[pair.sites[2].A]["exp_avg"].clone()
    pair.open()
    state = pair.optimizer.state
    assert not state[pair.site.B]["exp_avg_sq"][:, 1].any()
    assert not state[pair.sites[2].A]["exp_avg"][2].any()
    kept = torch.tensor([0, 1, 3])
    assert torch.equal(state[pair.sites[2].A]["exp_avg"][kept], before[kept])
    assert float(state[pair.site.A]["step"]) == 1
