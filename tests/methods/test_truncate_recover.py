"""Cut and recover: what is kept trains on as a fresh adapter would with a fresh optimizer."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from adalora_loop import STEPS, Loop, adam, close_to, model_of, sgd
from models import labelled_batch, logits, tiny_peft
from torch import Tensor

from loralloc import Budget, Truncate, UserError, attach
from loralloc.schedule import CutSchedule
from loralloc.training.restart import WarmUp
from loralloc.training.run import AllocationRun

RECOVER, BUDGET = 10, Budget(total_rank=5)
CUT, WARM_UP = STEPS - RECOVER, RECOVER // 10


def adagrad(parameters) -> torch.optim.Optimizer:
    return torch.optim.Adagrad(parameters, lr=0.02, initial_accumulator_value=0.1)


def loop(optimizer=adam, recover: float = RECOVER, **options) -> Loop:
    return Loop(Truncate(BUDGET, recover=recover), model_of(), optimizer, **options)


def open_factors(run: Loop) -> list[tuple[Tensor, Tensor]]:
    kept = [site.scale != 0 for site in run.sites]
    return [
        (site.A[k].detach().clone(), site.B[:, k].detach().clone()) for site, k in zip(run.sites, kept, strict=True)
    ]


def own_loop(
    run: AllocationRun,
    name: str,
    optimizer: torch.optim.Optimizer,
    steps: int,
    shown=(True, True),
    between: Callable = lambda: None,
    after: Callable = lambda: None,
) -> None:
    for step in range(steps):
        run.model(**labelled_batch(name, seed=step)).loss.backward()
        run.before_step(optimizer if shown[0] else None)
        optimizer.step()
        between()
        run.after_step(optimizer if shown[1] else None)
        optimizer.zero_grad()
        after()


def adamw(run: AllocationRun) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in run.model.parameters() if p.requires_grad], lr=0.01)


@pytest.mark.parametrize("build", [adam, sgd, adagrad])
def test_what_is_kept_trains_like_a_fresh_adapter_with_a_fresh_optimizer(build: Callable) -> None:
    run = loop(build).walk(CUT)
    twin = [tuple(factor.requires_grad_() for factor in pair) for pair in open_factors(run)]
    assert sum(len(A) for A, _ in twin) == 5
    assert len({len(A) for A, _ in twin}) > 1  # of several ranks
    optimizer = build([factor for pair in twin for factor in pair])
    rate = optimizer.param_groups[0]["lr"]
    for step in range(CUT, STEPS):
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step - CUT + 1) / (WARM_UP + 1))
        rows = zip(run.model.get_base_model().layers, run.inputs(step), run.goals, twin, run.sites, strict=True)
        losses = [
            ((x @ (layer.base_layer.weight + site.scaling * B @ A).T - x @ goal.T) ** 2).mean()
            for layer, x, goal, (A, B), site in rows
        ]
        torch.stack(losses).sum().backward()
        optimizer.step()
    run.walk(STEPS)
    assert run.optimizer.param_groups[0]["lr"] == rate
    for (A, B), (A0, B0) in zip(open_factors(run), twin, strict=True):
        close_to(A, A0.detach(), 1e-9)
        close_to(B, B0.detach(), 1e-9)


def test_the_learning_rate_rises_over_a_tenth_of_the_recovery() -> None:
    run = attach(tiny_peft("llama"), Truncate(Budget(total_rank=5), recover=40), total_steps=60)
    optimizer, seen = torch.optim.SGD([p for p in run.model.parameters() if p.requires_grad], lr=1.0), []
    optimizer.register_step_pre_hook(lambda own, *_: seen.append(own.param_groups[0]["lr"]))
    own_loop(run, "llama", optimizer, 30)
    assert seen == pytest.approx([1.0] * 20 + [0.2, 0.4, 0.6, 0.8] + [1.0] * 6)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("between", [False, True])
def test_it_does_wherever_a_scheduler_steps(between: bool, relative: bool) -> None:
    """`LambdaLR` sets the rate, `ExponentialLR` multiplies what it finds."""
    run = attach(tiny_peft("llama"), Truncate(Budget(total_rank=5), recover=40), total_steps=60)
    optimizer, seen = torch.optim.SGD([p for p in run.model.parameters() if p.requires_grad], lr=1.0), []
    kinds = torch.optim.lr_scheduler
    half = kinds.ExponentialLR(optimizer, 0.5) if relative else kinds.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.register_step_pre_hook(lambda own, *_: seen.append(own.param_groups[0]["lr"]))
    own_loop(run, "llama", optimizer, 26, **{"between" if between else "after": half.step})
    rising = [1.0] * 20 + [0.2, 0.4, 0.6, 0.8] + [1.0] * 2
    assert seen == pytest.approx([share * 0.5**step for step, share in enumerate(rising)])


def test_a_step_that_is_not_made_leaves_the_rate_as_it_was() -> None:
    warm_up, optimizer = WarmUp(), torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=1.0)
    warm_up.begin(3)
    warm_up.before_step(optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.25
    warm_up.after_step()
    assert optimizer.param_groups[0]["lr"] == 1.0
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_the_cut_is_the_best_approximation_and_the_recovery_lowers_the_loss() -> None:
    """At the cut the run is one that ends there; what follows makes up for a part of what it cost."""
    ends = Loop(Truncate(BUDGET, recover=0), model_of()).walk(CUT)
    recovers = loop().walk(CUT)
    plan = ends.run.finish()
    for site, other in zip(ends.sites, recovers.sites, strict=True):
        close_to(site.B.detach() @ site.A.detach(), other.B.detach() @ other.A.detach(), 1e-12)
    cut = recovers.loss(0).item()
    recovers.walk(STEPS)
    assert recovers.loss(0).item() < cut
    assert recovers.run.finish().ranks == plan.ranks


def test_a_run_that_stops_before_the_cut_is_cut_when_it_ends() -> None:
    run = loop().walk(CUT - 1)
    assert run.run.finish().total_rank == 5


@pytest.mark.parametrize("at", [9, 10, 11])
def test_a_resumed_run_is_the_uninterrupted_one(at: int) -> None:
    """Before the cut, right after it, and within the warm-up that follows."""
    whole, first, resumed = (loop(recover=20) for _ in range(3))
    whole.walk(STEPS)
    first.walk(at)
    resumed.model.load_state_dict(first.model.state_dict())
    resumed.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    resumed.run.load_state_dict(*first.run.state_dict(), optimizer=resumed.optimizer)
    resumed.walk(STEPS)
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_compact_run_is_the_same_run() -> None:
    models = []
    for compact in (False, True):
        model = tiny_peft("llama").double()
        run = attach(model, Truncate(Budget(total_rank=5), recover=6), 12, compact=compact)
        own_loop(run, "llama", adamw(run), 12)
        ranks = [len(site.A) for site in run.sites]
        assert (sum(ranks) == 5) == compact
        run.finish()
        models.append(model)
    close_to(*map(logits, models), 1e-9)


def test_heads_keep_their_moments_and_the_adapter_does_not() -> None:
    model = tiny_peft("bert")
    run = attach(model, Truncate(Budget(total_rank=5), recover=6), 12)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = adamw(run)
    own_loop(run, "bert", optimizer, 6)
    known = {name for name, p in trained.items() if p in optimizer.state}
    assert known == {name for name in trained if "lora_" not in name} != set()


def test_an_optimizer_that_is_not_shown_is_asked_for() -> None:
    for shown in ((False, False), (False, True), (True, False)):
        run = attach(tiny_peft("llama"), Truncate(Budget(total_rank=5), recover=20), 24)
        with pytest.raises(
            UserError, match=r"^the method writes new factors in mid-run and .*\.after_step\(optimizer\)$"
        ):
            own_loop(run, "llama", adamw(run), 8, shown)
        assert run.step == 0  # not only at the cut, with a part of the training done


def test_steps_must_be_left_before_the_cut() -> None:
    with pytest.raises(UserError, match=r"^no step is left .*: recover=30 \(30 steps\) fills the 30 steps of the run$"):
        Truncate(BUDGET, recover=30).schedule(30, 12, 5)
    assert Truncate(BUDGET, recover=29).schedule(30, 12, 5) == CutSchedule(30, 12, 5, cut=1)
    assert Truncate(BUDGET, recover=0).schedule(30, 12, 5).cut == 30
