"""Compaction: from the final phase on closed ranks are out of the tensors, and nothing else changes.

A compacted run and a masked one (closed ranks stay, shut off) end with the same weights, to rounding; a compact run
resumed on either side of the boundary is the uninterrupted one, bit for bit.
"""

from __future__ import annotations

import copy
import re

import pytest
import torch
import transformers
from models import labelled_batch, logits, tiny_peft
from torch import Tensor

from loralloc import ABLoRA, AdaLoRA, ALLoRA, Budget, Truncate, Uniform, UserError, attach
from loralloc.training import compaction
from loralloc.training.run import AllocationRun

STEPS, WARMUP, COOLDOWN = 18, 2, 8
FREEZE = STEPS - COOLDOWN + 1
BUDGETS = {"quarter": Budget(total_rank=6), "few": Budget(total_rank=2), "parameters": Budget(fraction=0.3)}


def adamw(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)


def amsgrad(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1, amsgrad=True, foreach=False)


def momentum(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.1)


def torchs_adafactor(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(parameters, lr=0.01)


def adafactor(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return transformers.Adafactor(parameters, lr=0.01, relative_step=False, scale_parameter=False)


class Loop:
    """An own loop with clipping; batches depend on the step alone."""

    def __init__(
        self,
        *,
        compact: bool,
        budget: Budget = BUDGETS["quarter"],
        optimizer=adamw,
        name: str = "llama",
        wrap=lambda method: method,
    ):
        self.name, self.model = name, tiny_peft(name, lora_alpha=4).double()
        torch.manual_seed(0)
        method = wrap(AdaLoRA(budget, warmup=WARMUP, cooldown=COOLDOWN, interval=1))
        self.run: AllocationRun = attach(self.model, method, STEPS, compact=compact)
        self.trainable = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = optimizer(list(self.trainable.values()))
        self.losses: list[float] = []

    def walk(self, until: int = STEPS) -> Loop:
        while self.run.step < until:
            self.optimizer.zero_grad()
            loss = self.model(**labelled_batch(self.name, seed=self.run.step)).loss
            loss.backward()
            self.losses.append(loss.item())
            torch.nn.utils.clip_grad_norm_(list(self.trainable.values()), 0.5)
            self.run.before_step(self.optimizer)
            self.optimizer.step()
            self.run.after_step(self.optimizer)
        return self

    def ranks(self) -> list[int]:
        return [site.rank for site in self.run.sites]


@pytest.mark.parametrize("optimizer", [adamw, amsgrad, momentum])
@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
def test_a_compacted_run_ends_with_the_weights_of_a_masked_one(budget, optimizer):
    masked, compact = (Loop(compact=flag, budget=budget, optimizer=optimizer).walk() for flag in (False, True))
    assert sum(compact.ranks()) < sum(masked.ranks())
    torch.testing.assert_close(compact.losses, masked.losses, rtol=1e-9, atol=1e-9)
    assert compact.run.finish().to_dict()["modules"] == masked.run.finish().to_dict()["modules"]
    for n, parameter in masked.trainable.items():
        torch.testing.assert_close(compact.trainable[n], parameter, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("mode", ["hybrid", "post"])
def test_so_does_one_whose_rows_are_scaled(mode):
    def allora(method):
        return ALLoRA(mode=mode, allocate=method)

    masked, compact = (Loop(compact=flag, budget=BUDGETS["few"], wrap=allora).walk() for flag in (False, True))
    assert sum(compact.ranks()) < sum(masked.ranks())
    torch.testing.assert_close(compact.losses, masked.losses, rtol=1e-9, atol=1e-9)


def ablora(method):
    """Instead of AdaLoRA: rounds that end at the same step; new ranks are of different ages at the boundary."""
    validation = [labelled_batch("llama", seed=100 + index) for index in range(3)]
    return ABLoRA(method.budget, validation, warmup=5, interval=3, rounds=3, samples=9, n_prune=3)


@pytest.mark.parametrize("cut", [10, FREEZE + 2])
def test_ranks_of_any_age_go_on_after_the_last_round(cut):
    settings = {"budget": Budget(average_rank=2), "wrap": ablora}
    masked, whole, first, second = (Loop(compact=flag, **settings) for flag in (False, True, True, True))
    masked.walk(), whole.walk(), first.walk(cut)
    assert sum(whole.ranks()) == 12 < sum(masked.ranks())
    torch.testing.assert_close(whole.losses, masked.losses, rtol=1e-9, atol=1e-9)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.run.load_state_dict(*first.run.state_dict(), second.optimizer)
    second.walk()
    assert second.losses == whole.losses[cut:]
    assert second.run.finish().to_dict() == whole.run.finish().to_dict()


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_the_boundary_changes_no_output(name):
    masked, compact = (Loop(compact=flag, name=name).walk(FREEZE + 1) for flag in (False, True))
    torch.testing.assert_close(logits(compact.model), logits(masked.model), rtol=1e-12, atol=1e-12)


def test_closed_ranks_leave_everything_that_is_as_wide_as_the_rank():
    loop = Loop(compact=True).walk(FREEZE)
    assert set(loop.ranks()) == {4}
    loop.walk(FREEZE + 1)
    ranks = loop.ranks()
    assert sum(ranks) == 6
    assert 0 in ranks  # a module without any rank is among them
    for site, rank in zip(loop.run.sites, ranks, strict=True):
        assert (len(site.A), site.B.shape[1], len(site.gate), len(site.scale)) == (rank, rank, rank, rank)
        for parameter in (site.A, site.B, site.gate):
            moments = [loop.optimizer.state[parameter][key] for key in ("exp_avg", "exp_avg_sq")]
            assert {moment.shape for moment in moments} == {parameter.shape}
    assert set(loop.run.state_dict()[0]) == {"final", "run.final"}


@pytest.mark.parametrize("optimizer", [torchs_adafactor, adafactor])
def test_averages_that_ranks_share_start_anew(optimizer):
    loop = Loop(compact=True, budget=BUDGETS["few"], optimizer=optimizer).walk(FREEZE + 1)
    assert max(loop.ranks()) < 4
    for site in loop.run.sites:
        assert site.A not in loop.optimizer.state
        assert site.B not in loop.optimizer.state
        assert loop.optimizer.state[site.gate]["step"] == FREEZE + 1  # an average for each rank
    loop.walk()
    assert all(parameter.isfinite().all() for parameter in loop.trainable.values())


@pytest.mark.parametrize("cut", [FREEZE - 3, FREEZE + 1, FREEZE + 4], ids=["before", "at", "after"])
@pytest.mark.parametrize("optimizer", [adamw, momentum, torchs_adafactor, adafactor])
def test_a_run_resumed_on_either_side_is_the_uninterrupted_one_bit_for_bit(cut, optimizer):
    whole = Loop(compact=True, optimizer=optimizer).walk()
    first = Loop(compact=True, optimizer=optimizer).walk(cut)
    saved = copy.deepcopy((first.model.state_dict(), first.optimizer.state_dict(), first.run.state_dict()))
    second = Loop(compact=True, optimizer=optimizer)
    second.model.load_state_dict(saved[0])
    second.optimizer.load_state_dict(saved[1])
    second.run.load_state_dict(*saved[2], second.optimizer)
    assert second.ranks() == first.ranks()
    second.walk()
    assert second.losses == whole.losses[cut:]
    assert second.run.finish().to_dict() == whole.run.finish().to_dict()
    assert all(torch.equal(second.trainable[n], parameter) for n, parameter in whole.trainable.items())


def test_what_is_saved_has_the_full_shapes_and_loads_into_a_compact_run():
    loop = Loop(compact=True).walk(FREEZE + 2)
    model, optimizer = loop.model.state_dict(), loop.optimizer.state_dict()
    assert {tensor.shape[0] for name, tensor in model.items() if "lora_A" in name} == {4}
    assert {tensor.shape[1] for name, tensor in model.items() if "lora_B" in name} == {4}
    before = logits(loop.model)
    moments = {n: loop.optimizer.state[p]["exp_avg"].clone() for n, p in loop.trainable.items()}
    loop.model.load_state_dict(model)
    loop.optimizer.load_state_dict(optimizer)
    assert torch.equal(logits(loop.model), before)
    assert all(torch.equal(loop.optimizer.state[p]["exp_avg"], moments[n]) for n, p in loop.trainable.items())


@pytest.mark.parametrize("cut", [FREEZE - 3, FREEZE + 2], ids=["before", "after"])
def test_a_compacted_run_goes_back_in_a_new_one_only(cut):
    whole, loop, anew = (Loop(compact=True) for _ in range(3))
    loop.walk(cut)
    saved = copy.deepcopy((loop.model.state_dict(), loop.optimizer.state_dict(), loop.run.state_dict()))

    def load(into: Loop) -> None:
        into.model.load_state_dict(saved[0])
        into.optimizer.load_state_dict(saved[1])
        into.run.load_state_dict(*saved[2], into.optimizer)

    loop.walk()
    words = (
        "closed ranks have left the tensors of this run already (compact=True), so it cannot go back in this process; "
        "build model, optimizer and run (with a Trainer: model, callback and Trainer) anew and load the checkpoint "
        "into these"
    )
    with pytest.raises(UserError, match=f"^{re.escape(words)}$"):
        load(loop)
    load(anew)  # the cure
    assert anew.walk().losses == whole.walk().losses[cut:]


def test_a_compact_run_needs_the_optimizer():
    loop = Loop(compact=True).walk(FREEZE)
    loop.optimizer.zero_grad()
    loop.model(**labelled_batch("llama")).loss.backward()
    loop.run.before_step()
    loop.optimizer.step()
    with pytest.raises(UserError, match=r"compact=True shrinks the optimizer's state too: pass the optimizer to after"):
        loop.run.after_step()


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(UserError, match=r"^compact=True removes ranks from the tensors, .*; leave it out, or"):
        attach(tiny_peft("llama"), AdaLoRA(Budget(average_rank=2)), STEPS, compact=True)


def test_processes_that_have_joined_later_are_refused_before_ranks_leave(monkeypatch):
    loop = Loop(compact=True).walk(FREEZE)
    monkeypatch.setattr(compaction, "world_size", lambda: 2)
    with pytest.raises(UserError, match=r"^compact=True removes ranks from the tensors, .*; leave it out, or"):
        loop.walk(FREEZE + 1)


def test_a_method_that_closes_nothing_for_good_is_refused():
    two, held = Budget(average_rank=2), [{"input_ids": [1, 2]}]
    words = "^compact=True needs a decision, before the run ends, on which ranks are closed for good, and {} with these"
    for method in (
        AdaLoRA(two, order="reference"),
        Uniform(two),
        ABLoRA(two, held, rounds=0),
        Truncate(two, recover=0),
    ):
        with pytest.raises(UserError, match=words.format(method.id)):
            attach(tiny_peft("llama"), method, STEPS, compact=True)
    for method in (AdaLoRA(two), ABLoRA(two, held, rounds=1), Truncate(two)):
        attach(tiny_peft("llama"), method, STEPS, compact=True)
