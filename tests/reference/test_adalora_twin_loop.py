"""The twin's loop on a small problem: what every run of it, in the paper's order and in the code's, must hold."""

from __future__ import annotations

import math

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from torch import Tensor

from .adalora import Mask, ReferenceAdaLoRA, Site, penalty, published_start, select_reference

SHAPES = [(5, 4), (4, 6), (3, 5)]
RANK = 4


# ---- A small problem: three linear layers in parallel, fresh inputs in every step ----


class Problem:
    """Least squares towards fixed weights; `loss(step)` is the loss of that step's inputs."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.goals = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
        self.sites = [published_start(0.0 * goal, RANK, 2.0 * RANK, generator) for goal in self.goals]

    def loss(self, step: int):
        def of_weights(weights: list[Tensor]) -> Tensor:
            generator = torch.Generator().manual_seed(100 + step)
            total = torch.zeros((), dtype=torch.float64)
            for weight, goal in zip(weights, self.goals, strict=True):
                x = torch.randn(8, goal.shape[1], generator=generator, dtype=torch.float64)
                total = total + ((x @ (weight - goal).T) ** 2).mean()
            return total

        return of_weights


def adam(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.0)


def sgd(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05)


def twin(optimizer=adam, **settings) -> tuple[ReferenceAdaLoRA, Problem]:
    problem = Problem()
    schedule = {"target": 6, "warmup": 5, "final_start": 40, "interval": 1}
    return ReferenceAdaLoRA(problem.sites, optimizer, **{**schedule, **settings}), problem


def run(optimizer=adam, steps: int = 60, **settings) -> tuple[ReferenceAdaLoRA, list[Mask]]:
    """The twin after `steps`, and which singular values were not zero at the end of each."""
    adalora, problem = twin(optimizer, **settings)
    living = []
    for t in range(steps):
        adalora.step(problem.loss(t))
        living.append(adalora.living())
    return adalora, living


def count(mask: Mask) -> int:
    return sum(sum(row) for row in mask)


# ---- The loop ----


@pytest.mark.parametrize("order", ["reference", "paper"])
@pytest.mark.parametrize("optimizer", [adam, sgd])
def test_budget_is_met_exactly_at_every_mask(order: str, optimizer):
    adalora, living = run(optimizer, order=order)
    assert adalora.start == 12
    for record, alive in zip(adalora.records, living, strict=True):
        if record.kept is None:
            assert record.step <= 5
            assert count(alive) == 12
        else:
            assert alive == record.kept
            assert count(alive) == record.budget
    assert adalora.records[-1].budget == 6
    if optimizer is adam:  # plain SGD gets nowhere in so few steps from a start this small
        assert adalora.records[-1].loss < 0.5 * adalora.records[0].loss


def test_mask_touches_lambda_alone():
    """Up to and including the first mask a run with a budget and one without differ in the pruned λ only."""
    pruning, _ = run(steps=9, interval=8)
    keeping, _ = run(steps=9, interval=8, target=12)
    kept = pruning.records[8].kept
    assert kept is not None
    assert count(kept) < 12
    for n, (ours, theirs) in enumerate(zip(pruning.parameters, keeping.parameters, strict=True)):
        expected = theirs.detach().clone()
        if n % 3 == 1:
            expected[~torch.tensor(kept[n // 3])] = 0.0
        assert torch.equal(ours, expected)
        state, other = pruning.optimizer.state[ours], keeping.optimizer.state[theirs]
        assert all(torch.equal(state[name], other[name]) for name in ("exp_avg", "exp_avg_sq"))


def test_equal_budgets_prune_nothing():
    _, living = run(target=12)
    assert all(count(alive) == 12 for alive in living)
    with pytest.raises(ValueError, match="reference rule"):
        run(target=12, rule=select_reference)


def test_a_poisoned_triplet_does_not_survive():
    adalora, problem = twin(target=6)
    adalora.U_bar[0][:, 1] = math.nan
    for t in range(60):
        adalora.step(problem.loss(t))
    assert math.isnan(adalora.scores[0][1])
    assert adalora.living()[0][1] is False
    assert count(adalora.living()) == 6


@pytest.mark.parametrize("order", ["reference", "paper"])
def test_pruned_triplets_live_between_masks_until_the_final_phase(order: str):
    adalora, living = run(order=order, interval=7)
    for record, alive in zip(adalora.records, living, strict=True):
        assert count(alive) == (12 if record.kept is None else record.budget)
    assert adalora.records[40].budget == 6
    assert count(living[40]) == 12  # t = T - t_f: the budget is the target, but 7 does not divide 40
    assert all(alive == living[41] for alive in living[41:])


@pytest.mark.parametrize("order", ["reference", "paper"])
def test_a_pruned_triplet_can_come_back(order: str):
    """Two triplets compete for one place; from step 40 on the goal needs the other one."""
    unit = [torch.eye(2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    lam = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    site = Site(torch.zeros(2, 2, dtype=torch.float64), unit[0], lam, unit[1], scale=1.0)
    adalora = ReferenceAdaLoRA([site], sgd, target=1, warmup=5, final_start=200, interval=10, order=order, gamma=0.0)
    for t in range(121):
        goal = torch.diag(torch.tensor([3.0, 0.1] if t < 40 else [0.0, 3.0], dtype=torch.float64))
        adalora.step(lambda weights, goal=goal: ((weights[0] - goal) ** 2).sum())
    assert adalora.records[30].kept == [[True, False]]
    assert adalora.records[120].kept == [[False, True]]


@pytest.mark.parametrize("order", ["reference", "paper"])
def test_sensitivity_of_a_zero_singular_value_tells_the_orders_apart(order: str):
    """At t = 0 and in the step after a mask: always zero in the paper's order, never in the code's.

    The task reaches neither P nor Q there, in both.
    """
    adalora, problem = twin(order=order, gamma=0.0)
    zeros = 0
    for t in range(40):
        alive = adalora.living()
        adalora.step(problem.loss(t))
        for k in range(len(SHAPES)):
            I_P, I_lam, I_Q = adalora.I[3 * k : 3 * k + 3]
            for i in range(RANK):
                if not alive[k][i]:
                    zeros += 1
                    assert not I_P[:, i].any()
                    assert not I_Q[i].any()
                    assert (I_lam[i] == 0) == (order == "paper")
    assert zeros > 50


@pytest.mark.parametrize("order", ["reference", "paper"])
@pytest.mark.parametrize("importance", ["smoothed", "sensitivity", "magnitude"])
def test_averages_and_scores_rest_in_the_final_phase(order: str, importance: str):
    adalora, problem = twin(order=order, importance=importance)
    for t in range(40):
        adalora.step(problem.loss(t))
    before = [tensor.clone() for tensor in adalora.I_bar + adalora.U_bar]
    scores = [list(row) for row in adalora.scores]
    for t in range(40, 60):
        adalora.step(problem.loss(t))
    assert all(torch.equal(a, b) for a, b in zip(before, adalora.I_bar + adalora.U_bar, strict=True))
    assert adalora.scores == scores
    assert count(adalora.living()) == 6


def test_simpler_importances():
    adalora, problem = twin(importance="sensitivity", order="paper")
    for t in range(3):
        adalora.step(problem.loss(t))
    I_P, I_lam, I_Q = adalora.I[3:6]
    assert adalora.scores[1] == pytest.approx((I_lam + I_P.mean(dim=0) + I_Q.mean(dim=1)).tolist())
    adalora, problem = twin(importance="magnitude")
    adalora.step(problem.loss(0))
    assert adalora.scores[1] == adalora.sites[1].lam.abs().tolist()


def test_clipping_reaches_the_penalty_as_published_or_not():
    for clip_penalty in (True, False):
        adalora, problem = twin(sgd, max_grad_norm=1e-9, clip_penalty=clip_penalty)
        adalora.step(problem.loss(0))
        norm = math.sqrt(sum((p.grad**2).sum().item() for p in adalora.parameters if p.grad is not None))
        assert (norm < 2e-9) == clip_penalty


@pytest.mark.parametrize("max_grad_norm", [None, 0.05])
def test_twin_walks_with_the_allocator_of_peft(max_grad_norm: float | None):
    """A third implementation: up to T - t_f, where PEFT begins to go its own way, nothing may differ."""
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(6, 8, bias=False, dtype=torch.float64)
    schedule = {"tinit": 5, "tfinal": 20, "deltaT": 3, "total_step": 60, "beta1": 0.8, "beta2": 0.9}
    config = AdaLoraConfig(init_r=4, target_r=2, lora_alpha=8, target_modules=["0"], **schedule)
    model = get_peft_model(torch.nn.Sequential(layer), config)
    theirs = model.base_model.model[0]
    theirs.ranknum["default"].requires_grad_(False)  # PEFT 0.21 trains it when the base is not float32
    P, lam, Q = (getattr(theirs, name)["default"] for name in ("lora_B", "lora_E", "lora_A"))
    leaves = [leaf.detach().clone().requires_grad_() for leaf in (P, lam.flatten(), Q)]
    ours = ReferenceAdaLoRA(
        [Site(layer.weight.detach().clone(), *leaves, scale=8 / (4 + 1e-5))],
        adam,
        target=2,
        warmup=5,
        final_start=40,
        interval=3,
        gamma=0.3,
        beta1=0.8,
        beta2=0.9,
        rule=select_reference,
        max_grad_norm=max_grad_norm,
    )
    optimizer = adam([P, lam, Q])
    for t in range(40):
        x, y = (torch.randn(16, n, generator=generator, dtype=torch.float64) for n in (6, 8))
        R = penalty([P], [Q], "reference")
        optimizer.zero_grad()
        (((model(x) - y) ** 2).mean() + 0.3 * R).backward()
        if max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_([P, lam, Q], max_grad_norm)
        optimizer.step()
        model.base_model.update_and_allocate(t)
        ours.step(lambda weights, x=x, y=y: ((x @ weights[0].T - y) ** 2).mean())
        for our, their in zip(leaves, (P, lam.flatten(), Q), strict=True):
            torch.testing.assert_close(our, their, rtol=0.0, atol=1e-12)
    assert count(ours.living()) == 2


def test_unknown_words_are_refused():
    for word in ({"order": "random"}, {"importance": "random"}):
        with pytest.raises(ValueError, match="'random'"):
            twin(**word)
