"""The measures of AdaLoRA: closed forms, the published numbers, and the derivative of the penalty against autograd.

Q is a stack of A, [n, r, in], rank_dim 1; P is a stack of B, [n, out, r], rank_dim 2.
"""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loralloc.allocate import keep_top
from loralloc.methods.adalora.importance import per_rank, sensitivity, smooth_
from loralloc.methods.adalora.penalty import Penalty, penalty_gradient, penalty_value

RankDim = Literal[1, 2]
KINDS: tuple[Penalty, ...] = ("reference", "paper")
kinds = pytest.mark.parametrize("kind", KINDS)
rank_dims = pytest.mark.parametrize("rank_dim", [1, 2], ids=["Q", "P"])
betas = st.floats(0.05, 0.95)
F64 = torch.float64


def draw(n: int, rank: int, features: int, rank_dim: RankDim, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(n, *((rank, features) if rank_dim == 1 else (features, rank)), dtype=dtype)


def orthonormal(n: int, rank: int, features: int, rank_dim: RankDim, dtype: torch.dtype = F64) -> Tensor:
    stack = draw(n, rank, features, rank_dim, dtype)
    for factor in stack:
        torch.nn.init.orthogonal_(factor)
    return stack


def penalty_twin(factors: list[Tensor], rank_dim: RankDim, kind: Penalty, matrices: int) -> Tensor:
    """Entry by entry: E_ij = <row i, row j> − [i = j], over the ranks of one factor after the other."""
    total = torch.zeros((), dtype=factors[0].dtype)
    for factor in factors:
        ranks = factor if rank_dim == 1 else factor.T
        squares = [
            ((ranks[i] * ranks[j]).sum() - (1.0 if i == j else 0.0)) ** 2
            for i in range(len(ranks))
            for j in range(len(ranks))
        ]
        total = total + (sum(squares) if kind == "paper" else torch.stack(squares).sum().sqrt() / matrices)
    return total


def all_open(stack: Tensor, rank_dim: RankDim) -> Tensor:
    return torch.ones(stack.shape[0], stack.shape[rank_dim], dtype=torch.bool)


class TestSensitivity:
    def test_is_the_size_of_weight_times_gradient(self) -> None:
        weights, gradients = torch.tensor([2.0, -3.0, 0.0, 1.0]), torch.tensor([-1.0, -2.0, 5.0, 0.0])
        assert sensitivity(weights, gradients).tolist() == [2.0, 6.0, 0.0, 0.0]
        assert weights.tolist() == [2.0, -3.0, 0.0, 1.0], "neither is touched"
        assert gradients.tolist() == [-1.0, -2.0, 5.0, 0.0]

    def test_is_the_first_order_change_of_the_loss(self) -> None:
        weights = torch.randn(6, dtype=F64)
        slope = torch.randn(6, dtype=F64)
        for i in range(6):  # of a linear loss it is the change itself
            without = weights.clone()
            without[i] = 0
            change = (slope @ weights - slope @ without).abs()
            torch.testing.assert_close(sensitivity(weights, slope)[i], change)


def smoothed(currents: list[float], beta1: float, beta2: float) -> tuple[float, float]:
    mean, uncertainty = torch.zeros(1, dtype=F64), torch.zeros(1, dtype=F64)
    for current in currents:
        smooth_(mean, uncertainty, torch.tensor([current], dtype=F64), beta1, beta2)
    return mean.item(), uncertainty.item()


class TestSmoothing:
    @given(st.lists(st.floats(0, 1e6), max_size=30), betas, betas)
    def test_equals_the_two_recursions(self, currents: list[float], beta1: float, beta2: float) -> None:
        mean = uncertainty = 0.0
        for current in currents:
            mean = beta1 * mean + (1 - beta1) * current
            uncertainty = beta2 * uncertainty + (1 - beta2) * abs(current - mean)  # the mean just updated
        scale = max(currents, default=0.0)
        assert smoothed(currents, beta1, beta2) == pytest.approx(
            (mean, uncertainty), rel=1e-9, abs=1e-300 + 1e-12 * scale
        )

    @given(st.integers(0, 200), betas, st.floats(1e-3, 1e3))
    def test_closed_form_of_a_constant_sensitivity(self, t: int, beta: float, value: float) -> None:
        mean, uncertainty = smoothed([value] * t, beta, beta)
        assert mean == pytest.approx((1 - beta**t) * value, rel=1e-9)
        assert uncertainty == pytest.approx((1 - beta) * t * beta**t * value, rel=1e-7, abs=1e-12 * value)

    @given(st.integers(0, 200), betas, betas, st.floats(1e-3, 1e3))
    def test_closed_form_with_two_betas(self, t: int, beta1: float, beta2: float, value: float) -> None:
        if abs(beta1 - beta2) < 1e-3:  # the formula divides by the difference
            return
        _, uncertainty = smoothed([value] * t, beta1, beta2)
        closed = (1 - beta2) * beta1 * (beta1**t - beta2**t) / (beta1 - beta2) * value
        assert uncertainty == pytest.approx(closed, rel=1e-6, abs=1e-10 * value)

    def test_published_numbers(self) -> None:
        """β = 0.85: s₁ = 0.019125 I²; s peaks at t = 9 and then forgets a sensitivity that never varies."""
        mean, uncertainty = smoothed([4.0], 0.85, 0.85)
        assert mean * uncertainty == pytest.approx(0.019125 * 16)
        scores = [math.prod(smoothed([1.0] * t, 0.85, 0.85)) for t in range(60)]
        assert scores.index(max(scores)) == 9
        assert math.prod(smoothed([3.0] * 30, 0.85, 0.85)) == pytest.approx(0.3067, abs=5e-5)
        assert scores[59] < scores[30] < scores[9]

    def test_works_in_place_on_every_entry_alone(self) -> None:
        mean, uncertainty = torch.rand(2, 3, 4), torch.rand(2, 3, 4)
        current = torch.rand(2, 3, 4)
        expected = [
            0.85 * m + 0.15 * i for m, i in zip(mean.flatten().tolist(), current.flatten().tolist(), strict=True)
        ]
        where = mean.data_ptr(), uncertainty.data_ptr()
        smooth_(mean, uncertainty, current, 0.85, 0.5)
        assert mean.flatten().tolist() == pytest.approx(expected, rel=1e-6)
        assert where == (mean.data_ptr(), uncertainty.data_ptr())


class TestPerRank:
    def test_means_over_features_and_passes_gates_through(self) -> None:
        rows = torch.arange(24.0).view(2, 3, 4)
        for site in range(2):
            for rank in range(3):
                mean = sum(rows[site, rank].tolist()) / 4
                assert per_rank(rows, 1)[site, rank] == mean
                assert per_rank(rows.mT.contiguous(), 2)[site, rank] == mean
        gates = torch.rand(2, 3)
        assert torch.equal(per_rank(gates, 1), gates)

    @rank_dims
    def test_does_not_depend_on_the_number_of_features(self, rank_dim: RankDim) -> None:
        """A mean, not a sum: wide layers win nothing by being wide."""
        for features in (1, 7, 4096):
            stack = torch.full_like(draw(2, 3, features, rank_dim), 0.25)
            assert torch.equal(per_rank(stack, rank_dim), torch.full((2, 3), 0.25, dtype=F64))

    @rank_dims
    def test_moves_with_the_ranks(self, rank_dim: RankDim) -> None:
        stack, order = draw(2, 5, 4, rank_dim), torch.randperm(5)
        shuffled = per_rank(stack.index_select(rank_dim, order), rank_dim)
        torch.testing.assert_close(shuffled, per_rank(stack, rank_dim)[:, order])


def test_the_toy_of_two_matrices() -> None:
    """Scores 7, 6 and 5.25, 8 times 0.019125: the kept triplet of the second matrix has λ = 0."""
    P = [torch.tensor([[1.0, 0.0], [1.0, 2.0]]), torch.tensor([[1.0, 4.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])]
    Q = [torch.tensor([[1.0, 3.0], [0.0, 0.0]]), torch.tensor([[1.0], [2.0]])]
    gates = [torch.tensor([1.0, 2.0]), torch.tensor([2.0, 0.0])]

    def importance(weights: Tensor, rank_dim: RankDim) -> Tensor:
        current = sensitivity(weights, torch.ones_like(weights))
        mean, uncertainty = torch.zeros_like(current), torch.zeros_like(current)
        smooth_(mean, uncertainty, current, 0.85, 0.85)
        return per_rank(mean * uncertainty, rank_dim).flatten()

    triplets = zip(gates, P, Q, strict=True)
    scores = torch.cat(
        [importance(g[None], 1) + importance(p[None], 2) + importance(q[None], 1) for g, p, q in triplets]
    )
    torch.testing.assert_close(scores / 0.019125, torch.tensor([7.0, 6.0, 5.25, 8.0]))
    assert keep_top(scores, 2).tolist() == [True, False, False, True]
    assert keep_top(scores, 3).tolist() == [True, True, False, True]


class TestPenaltyValue:
    @kinds
    @rank_dims
    def test_equals_the_twin(self, kind: Penalty, rank_dim: RankDim) -> None:
        stack = draw(3, 4, 6, rank_dim)
        torch.testing.assert_close(
            penalty_value(stack, rank_dim, kind, 14), penalty_twin(list(stack), rank_dim, kind, 14)
        )

    @kinds
    def test_is_zero_exactly_for_orthonormal_factors(self, kind: Penalty) -> None:
        for rank_dim in (1, 2):
            stack = orthonormal(2, 3, 8, rank_dim)
            assert penalty_value(stack, rank_dim, kind, 4) < 1e-14
            stack[1] *= 1.01
            assert penalty_value(stack, rank_dim, kind, 4) > 1e-4

    @pytest.mark.parametrize(("kind", "expected", "within"), [("paper", 71.0, 0.5), ("reference", 0.214, 0.001)])
    def test_numbers_at_the_published_start(self, kind: Penalty, expected: float, within: float) -> None:
        """DeBERTaV3-base at rank 12, N(0, 0.02²), γ = 0.1: a factor of 330 lies between the two readings."""
        factors = 2 * 72
        total = 0.0
        for count, inputs, outputs in ((48, 768, 768), (12, 768, 3072), (12, 3072, 768)):
            Q, P = 0.02 * torch.randn(count, 12, inputs), 0.02 * torch.randn(count, outputs, 12)
            total += (penalty_value(Q, 1, kind, factors) + penalty_value(P, 2, kind, factors)).item()
        assert 0.1 * total == pytest.approx(expected, abs=within)


class TestPenaltyGradient:
    @kinds
    @rank_dims
    @pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 3), (3, 4, 7), (2, 5, 2)], ids=str)
    def test_is_the_derivative_of_the_value(
        self, kind: Penalty, rank_dim: RankDim, shape: tuple[int, int, int]
    ) -> None:
        stack = draw(*shape, rank_dim).requires_grad_()
        matrices = 2 * shape[0] + 6  # other stacks exist
        for value in (
            penalty_value(stack, rank_dim, kind, matrices),
            penalty_twin(list(stack), rank_dim, kind, matrices),
        ):
            (expected,) = torch.autograd.grad(value, stack)
            found = penalty_gradient(stack.detach(), rank_dim, all_open(stack, rank_dim), kind, matrices)
            torch.testing.assert_close(found, expected)
            assert found.any()

    @kinds
    @rank_dims
    def test_closed_ranks_take_no_part(self, kind: Penalty, rank_dim: RankDim) -> None:
        """It is the gradient on the open ranks alone, per site, and exactly zero on the closed ones."""
        stack = draw(4, 5, 7, rank_dim)
        open_ranks = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 1, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0]]).bool()
        found = penalty_gradient(stack, rank_dim, open_ranks, kind, 8)
        for site, keep in enumerate(open_ranks):
            ranks = found[site] if rank_dim == 1 else found[site].T
            assert not ranks[~keep].any()
            if not keep.any():
                continue
            part = (stack[site][keep] if rank_dim == 1 else stack[site][:, keep]).clone().requires_grad_()
            (expected,) = torch.autograd.grad(penalty_twin([part], rank_dim, kind, 8), part)
            torch.testing.assert_close(ranks[keep], expected if rank_dim == 1 else expected.T)
        everything = penalty_gradient(stack, rank_dim, torch.ones_like(open_ranks), kind, 8)
        torch.testing.assert_close(found[0], everything[0])
        assert not torch.allclose(found[1], everything[1]), "the partner: closing does change the others' gradient"

    @kinds
    @rank_dims
    @pytest.mark.parametrize("value", [1e6, 1e300, math.inf, -math.inf, math.nan])
    def test_closed_values_leave_no_trace(self, kind: Penalty, rank_dim: RankDim, value: float) -> None:
        stack, open_ranks = draw(2, 3, 5, rank_dim), torch.tensor([[True, False, True], [True, True, True]])
        found = penalty_gradient(stack, rank_dim, open_ranks, kind, 4)
        stack[0].select(rank_dim - 1, 1).fill_(value)
        assert torch.equal(found, penalty_gradient(stack, rank_dim, open_ranks, kind, 4))
        assert not found[0].select(rank_dim - 1, 1).any()
        opened = penalty_gradient(stack, rank_dim, torch.ones(2, 3).bool(), kind, 4)
        assert not torch.equal(found[0], opened[0]), "the partner: an open one does"
        assert torch.equal(found[1], opened[1])

    @kinds
    @rank_dims
    def test_a_stack_is_its_sites_one_by_one(self, kind: Penalty, rank_dim: RankDim) -> None:
        stack, open_ranks = draw(5, 4, 6, rank_dim), torch.rand(5, 4) < 0.6
        together = penalty_gradient(stack, rank_dim, open_ranks, kind, 10)
        for site in range(5):
            one = slice(site, site + 1)
            torch.testing.assert_close(together[one], penalty_gradient(stack[one], rank_dim, open_ranks[one], kind, 10))
        values = [penalty_value(stack[site : site + 1], rank_dim, kind, 10) for site in range(5)]
        torch.testing.assert_close(penalty_value(stack, rank_dim, kind, 10), torch.stack(values).sum())

    @rank_dims
    @pytest.mark.parametrize("matrices", [2, 144])
    def test_near_orthonormal_the_reference_kicks_and_the_paper_fades(self, rank_dim: RankDim, matrices: int) -> None:
        perfect, noise = orthonormal(1, 6, 20, rank_dim), draw(1, 6, 20, rank_dim)
        is_open, lengths = all_open(perfect, rank_dim), {}
        for distance in (1e-3, 1e-5, 1e-7):
            stack = perfect + distance * noise
            for kind in KINDS:
                lengths[kind, distance] = penalty_gradient(stack, rank_dim, is_open, kind, matrices).norm().item()
        assert lengths["reference", 1e-5] == pytest.approx(2 / matrices, rel=1e-3)
        assert lengths["reference", 1e-7] == pytest.approx(2 / matrices, rel=1e-5)
        assert lengths["paper", 1e-5] == pytest.approx(1e-2 * lengths["paper", 1e-3], rel=0.05)
        assert lengths["paper", 1e-7] == pytest.approx(1e-2 * lengths["paper", 1e-5], rel=1e-3)

    @rank_dims
    @pytest.mark.parametrize("dtype", [torch.float32, F64])
    @pytest.mark.parametrize(("rank", "features"), [(1, 8), (1, 4096), (2, 4096), (12, 384), (12, 3072), (64, 4096)])
    def test_rounding_alone_gives_exactly_nothing(
        self, rank_dim: RankDim, dtype: torch.dtype, rank: int, features: int
    ) -> None:
        """What QR leaves of E is noise; an optimizer that normalises would make full steps of it."""
        stack = orthonormal(3, rank, features, rank_dim, dtype)
        if rank > 2:  # one or two ranks may come out perfect
            assert penalty_value(stack, rank_dim, "reference", 6) > 0, "there is noise"
        assert not penalty_gradient(stack, rank_dim, all_open(stack, rank_dim), "reference", 6).any()
        stack[1] *= 1 + 1e-3  # the partner: what is no noise counts, in that site alone
        gradient = penalty_gradient(stack, rank_dim, all_open(stack, rank_dim), "reference", 6)
        assert gradient[1].norm().item() == pytest.approx(2 / 6, rel=0.01)
        assert not gradient[[0, 2]].any()

    @kinds
    def test_a_perfect_factor_has_no_gradient_and_no_nan(self, kind: Penalty) -> None:
        for open_ranks in (torch.ones(1, 3), torch.tensor([[1.0, 0.0, 1.0]]), torch.zeros(1, 3)):
            gradient = penalty_gradient(torch.eye(3, 4)[None], 1, open_ranks.bool(), kind, 2)
            assert torch.equal(gradient, torch.zeros(1, 3, 4))

    @kinds
    @rank_dims
    def test_a_step_against_it_lowers_the_penalty(self, kind: Penalty, rank_dim: RankDim) -> None:
        stack = 0.2 * draw(2, 3, 9, rank_dim)
        before = penalty_value(stack, rank_dim, kind, 4)
        step = 1e-3 * penalty_gradient(stack, rank_dim, all_open(stack, rank_dim), kind, 4)
        assert penalty_value(stack - step, rank_dim, kind, 4) < before < penalty_value(stack + step, rank_dim, kind, 4)

    def test_the_stack_is_left_alone(self) -> None:
        stack = draw(2, 3, 4, 1)
        before = stack.clone()
        penalty_gradient(stack, 1, torch.zeros(2, 3).bool(), "paper", 4)
        assert torch.equal(stack, before)
