"""Truncation at the end of a run: the best approximation of what was trained, module by module and over all."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from adalora_loop import F64, RANK, SHAPES, Loop, close_to, model_of
from hypothesis import given
from hypothesis import strategies as st
from models import logits, tiny_peft
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from loralloc import Budget, Truncate, UserError, attach
from loralloc.budget import Modules
from loralloc.methods.truncate import balanced, decompose, factor_svd, keep_largest


def deltas(run: Loop) -> list[Tensor]:
    return [(site.B * (site.gate * site.scale)).detach() @ site.A.detach() for site in run.sites]


def best(delta: Tensor, k: int) -> Tensor:
    U, sigma, Vt = torch.linalg.svd(delta, full_matrices=False)
    return (U[:, :k] * sigma[:k]) @ Vt[:k]


def trained(budget: Budget, steps: int = 10, **lora) -> Loop:
    return Loop(Truncate(budget, recover=0), model_of(**lora)).walk(steps)


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**16))
def test_the_decomposition_is_that_of_the_product(n, r, n1, n2, seed):
    generator = torch.Generator().manual_seed(seed)
    A, B = (torch.randn(*shape, generator=generator, dtype=F64) for shape in ((n, r, n2), (n, n1, r)))
    U, sigma, V = factor_svd(A, B)
    k = min(r, n1, n2)
    assert (U.shape, sigma.shape, V.shape) == ((n, n1, k), (n, k), (n, n2, k))
    close_to((U * sigma[:, None]) @ V.mT, B @ A, 1e-9)
    close_to(sigma, torch.linalg.svdvals(B @ A)[:, :k], 1e-9)
    for factor in (U, V):
        close_to(factor.mT @ factor, torch.eye(k, dtype=F64).expand(n, k, k), 1e-9)


def test_every_module_becomes_its_best_approximation():
    """Eckart and Young; SCALING is 2, so the scale is in it."""
    run = trained(Budget(total_rank=5))
    before, sites = deltas(run), list(run.sites)
    plan = run.run.finish()
    assert plan.total_rank == 5
    for site, delta, rank in zip(sites, before, plan.ranks.values(), strict=True):
        close_to(site.scaling * site.B.detach() @ site.A.detach(), best(delta, rank), 1e-9)


def test_no_choice_of_ranks_is_closer():
    run = trained(Budget(total_rank=5))
    spectra = [torch.linalg.svdvals(delta)[:RANK] for delta in deltas(run)]
    ranks = list(run.run.finish().ranks.values())

    def error(ranks) -> float:
        return sum(float(sigma[k:].square().sum()) for sigma, k in zip(spectra, ranks, strict=True))

    choices = [choice for choice in product(range(RANK + 1), repeat=len(SHAPES)) if sum(choice) == 5]
    assert error(ranks) == min(map(error, choices))
    assert len({error(choice) for choice in choices}) > 10


def test_factors_are_balanced_and_orthogonal():
    run = trained(Budget(total_rank=5))
    sites = list(run.sites)
    run.run.finish()
    for site in sites:
        gram = site.A.detach() @ site.A.detach().T
        close_to(gram, site.B.detach().T @ site.B.detach(), 1e-9)
        close_to(gram, torch.diag(gram.diagonal()), 1e-9)


def test_no_choice_under_a_budget_in_parameters_keeps_more():
    """A rank is worth σ². Per parameter the cheap ones are worth more, and fill the budget less well."""
    values = [torch.tensor([3.0, 1.0]), torch.tensor([2.0, 0.1])]
    modules = Modules([2, 2], [10, 4], [40, 16])
    for budget, expected in (
        (Budget(parameters=11), [True, False, False, False]),  # 9 beats 4 and 0.01
        (Budget(parameters=9), [False, False, True, True]),
        (Budget(adapter_bytes=56), [True, False, True, False]),
        (Budget(total_rank=3), [True, True, True, False]),
        (Budget(total_rank=2, max_rank=1), [True, False, True, False]),
    ):
        assert keep_largest(values, budget, modules, budget.resolve(modules)).tolist() == expected, budget


def test_with_every_rank_nothing_changes():
    model = tiny_peft("llama", trained=True)
    before = logits(model)
    plan = attach(model, Truncate(Budget(average_rank=4), recover=0), 10).finish()
    assert plan.total_rank == 24
    close_to(logits(model), before, 1e-5)


def test_an_adapter_of_zeros_keeps_directions_that_add_nothing():
    model = tiny_peft("llama")
    run = attach(model, Truncate(Budget(average_rank=2), recover=0), 10)
    sites = list(run.sites)
    plan = run.finish()
    assert plan.total_rank == 12
    for site, rank in zip(sites, plan.ranks.values(), strict=True):
        assert int((site.A != 0).any(1).sum()) == rank
        assert not site.B.any()
    A, B = balanced(torch.eye(3), torch.zeros(3), torch.eye(3))
    assert torch.equal(A, torch.eye(3))
    assert not B.any()


def test_what_processes_send_each_other_is_contiguous(monkeypatch):
    """NCCL refuses anything else, and factors from a decomposition are transposed."""
    run, alone = (trained(Budget(total_rank=5)) for _ in range(2))
    sent: list[Tensor] = []
    cut = torch.no_grad()(lambda loop: loop.run.method.finish(loop.run.state, 5))
    with monkeypatch.context() as several:
        several.setattr(torch.distributed, "is_initialized", lambda: True)
        several.setattr(torch.distributed, "broadcast", lambda tensor, src: sent.append(tensor))
        cut(run)
    assert len(sent) == 1 + 2 * len(SHAPES)
    assert all(tensor.is_contiguous() for tensor in sent)
    cut(alone)
    assert all(torch.equal(a.A, b.A) and torch.equal(a.B, b.B) for a, b in zip(run.sites, alone.sites, strict=True))


def test_shapes_may_differ_and_the_order_stays():
    pairs = [(torch.randn(2, i), torch.randn(o, 2)) for i, o in ((3, 4), (5, 6), (3, 4))]
    for (A, B), (U, sigma, V) in zip(pairs, decompose(pairs), strict=True):
        close_to((U * sigma) @ V.T, B @ A, 1e-5)


def test_more_ranks_than_dimensions_are_refused():
    model = get_peft_model(nn.Sequential(nn.Linear(3, 5)), LoraConfig(r=4, target_modules=["0"]))  # type: ignore[arg-type]
    with pytest.raises(
        UserError,
        match=r"^0: rank 4 is above the smaller dimension \(3\), .*values than that; lower LoraConfig.r .* to 3$",
    ):
        attach(model, Truncate(Budget(total_rank=2)), 10)
