"""The twin's formulas, against numbers worked out by hand and the claims the paper and its code make true."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from .adalora import (
    Mask,
    budget,
    penalty,
    printed_budget,
    published_start,
    select,
    select_reference,
    smooth,
    triplet_scores,
)

BETA = 0.85
FIRST = 0.019125  # (1 - β) · (1 - β) · β: the importance of a sensitivity of 1 after one step


def count(mask: Mask) -> int:
    return sum(sum(row) for row in mask)


# ---- Start ----


def test_start_changes_nothing_and_only_lambda_feels_the_task():
    W0 = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    site = published_start(W0, 3, 8.0, torch.Generator().manual_seed(1))
    assert torch.equal(site.weight(), W0)
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    of_P, of_lam, of_Q = torch.autograd.grad(torch.tanh(x @ site.weight().T).sum(), site.parameters())
    assert not of_P.any()
    assert not of_Q.any()
    assert (of_lam != 0).all()


@pytest.mark.parametrize(("width", "distance", "tolerance"), [(768, 2.404, 0.05), (2500, 0.250, 0.06)])
def test_published_start_is_not_orthonormal(width: int, distance: float, tolerance: float):
    W0 = torch.zeros(width, width, dtype=torch.float64)
    site = published_start(W0, 12, 24.0, torch.Generator().manual_seed(3))
    assert site.scale == 2.0
    expected = 12 * ((1 - width * 0.0004) ** 2 + 2 * width * 0.0004**2) + 12 * 11 * width * 0.0004**2
    assert math.sqrt(expected) == pytest.approx(distance, abs=5e-4)
    for factor in (site.P.T, site.Q):
        assert factor.std().item() == pytest.approx(0.02, rel=0.03)
        measured = torch.linalg.norm(factor @ factor.T - torch.eye(12, dtype=torch.float64)).item()
        assert measured == pytest.approx(distance, abs=tolerance)


# ---- Penalty ----


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    random_matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(random_matrix).Q


def test_penalties_by_hand():
    P = [torch.tensor([[2.0], [0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])]  # 3 | zero
    Q = [torch.tensor([[1.0, 1.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])]  # 2 | [[0, 1], [1, 0]]
    assert penalty(P, Q, "paper").item() == pytest.approx(9 + 0 + 4 + 2)
    assert penalty(P, Q, "reference").item() == pytest.approx((3 + 0 + 2 + math.sqrt(2)) / 4)
    with pytest.raises(ValueError, match="'svd'"):
        penalty(P, Q, "svd")


def test_penalties_of_deberta_base_at_the_start():
    """72 matrices: in each of 12 layers four 768 × 768, one 3072 × 768 and one 768 × 3072."""
    generator = torch.Generator().manual_seed(0)
    shapes = 12 * (4 * [(768, 768)] + [(3072, 768), (768, 3072)])
    P = [0.02 * torch.randn(shape[0], 12, generator=generator, dtype=torch.float64) for shape in shapes]
    Q = [0.02 * torch.randn(12, shape[1], generator=generator, dtype=torch.float64) for shape in shapes]
    assert 0.1 * penalty(P, Q, "paper").item() == pytest.approx(71.0, abs=0.5)
    assert 0.1 * penalty(P, Q, "reference").item() == pytest.approx(0.214, abs=0.001)


@pytest.mark.parametrize("kind", ["paper", "reference"])
def test_penalty_and_its_gradient_vanish_for_orthonormal_factors_only(kind: str):
    P = torch.eye(8, 3, dtype=torch.float64, requires_grad=True)
    Q = torch.eye(3, 6, dtype=torch.float64, requires_grad=True)
    R = penalty([P], [Q], kind)
    assert R.item() == 0
    assert not any(gradient.any() for gradient in torch.autograd.grad(R, [P, Q]))
    assert penalty([P * 1.01], [Q], kind) > 0
    assert penalty([P], [Q * 1.01], kind) > 0


def test_penalty_gradient_near_the_optimum():
    """Reference: its norm tends to 2 / 2n in each factor. Paper: to 0, linearly."""
    P, Q = [], []
    for k in range(3):
        P.append((orthonormal(9, 4, k) + 1e-7 * orthonormal(9, 4, 10 + k)).requires_grad_())
        Q.append((orthonormal(7, 4, 20 + k).T + 1e-7 * orthonormal(7, 4, 30 + k).T).requires_grad_())
    for gradient in torch.autograd.grad(penalty(P, Q, "reference"), P + Q):
        assert torch.linalg.norm(gradient).item() == pytest.approx(2 / 6, rel=1e-5)
    for gradient in torch.autograd.grad(penalty(P, Q, "paper"), P + Q):
        assert 0 < torch.linalg.norm(gradient).item() < 1e-5


# ---- Budget ----

EXAMPLE = {"start": 216, "target": 144, "warmup": 10, "final_start": 70}


def test_budget_vector_and_mask_flags():
    steps = [0, 10, 11, 12, 20, 30, 40, 50, 55, 56, 60, 70, 71, 99]
    expected = [216, 216, 212, 209, 185, 165, 153, 146, 145, 144, 144, 144, 144, 144]
    assert [budget(t, **EXAMPLE)[0] for t in steps] == expected
    budgets = [budget(t, **EXAMPLE)[0] for t in range(100)]
    assert budgets == sorted(budgets, reverse=True)
    masked = [t for t in range(100) if budget(t, **EXAMPLE, interval=8)[1]]
    assert masked == [16, 24, 32, 40, 48, 56, 64, *range(71, 100)]
    example = {"start": 72 * 12, "target": 72 * 8, "warmup": 500, "final_start": 1500}
    assert [budget(t, **example)[0] for t in (1000, 1250, 1500)] == [612, 580, 576]


def test_paper_boundaries_differ_in_the_flags_of_two_steps_only():
    ours = [budget(t, **EXAMPLE, interval=8) for t in range(100)]
    papers = [budget(t, **EXAMPLE, interval=8, paper=True) for t in range(100)]
    assert [t for t in range(100) if ours[t] != papers[t]] == [70]
    assert (ours[70], papers[70]) == ((144, False), (144, True))
    assert (budget(10, **EXAMPLE), budget(10, **EXAMPLE, paper=True)) == ((216, False), (216, True))


def test_floating_point_never_shifts_the_truncated_budget():
    for start, target in [(216, 144), (864, 576), (144, 72), (12, 6), (54, 27)]:
        for length in (6, 9, 10, 30, 60, 300):
            for t in range(7, 7 + length + 1):
                exact = int(target + (start - target) * Fraction(7 + length - t, length) ** 3)
                assert budget(t, start, target, 7, 7 + length)[0] == exact


def test_printed_formula_is_wrong():
    printed = {"start": 216, "target": 144, "warmup": 10, "final": 30, "total": 100}
    assert printed_budget(10, **printed) == 387 > 216  # above the start
    assert printed_budget(69, **printed) == pytest.approx(153.93, abs=0.01)  # and never at the target
    mnli = {"start": 432, "target": 288, "warmup": 8000, "final": 50000, "total": 85904}
    assert int(printed_budget(8000, **mnli)) == 3421


# ---- Importance ----


def test_importance_after_one_step():
    I_bar, U_bar = smooth(3.0, 0.0, 0.0, BETA, BETA)
    assert I_bar * U_bar == pytest.approx(FIRST * 3.0**2)


def test_importance_of_a_constant_sensitivity_fades():
    """s_t = (1 - βᵗ)(1 - β) t βᵗ I²: it peaks at t = 9 and then goes to 0. Steady means unimportant."""
    value, I_bar, U_bar, s = 3.0, 0.0, 0.0, []
    for t in range(1, 201):
        I_bar, U_bar = smooth(value, I_bar, U_bar, BETA, BETA)
        s.append(I_bar * U_bar)
        assert I_bar == pytest.approx((1 - BETA**t) * value)
        assert U_bar == pytest.approx((1 - BETA) * t * BETA**t * value)
    assert s.index(max(s)) + 1 == 9
    assert s[29] == pytest.approx(0.3067, abs=5e-5)
    assert s[199] < 1e-10


def squared(matrix: list[list[float]]) -> list[list[float]]:
    return [[FIRST * value**2 for value in row] for row in matrix]


def two_matrices() -> list[list[float]]:
    """Scores after one step in which every gradient is 1."""
    M1 = triplet_scores(squared([[1, 0], [1, 2]]), squared([[1, 2]])[0], squared([[1, 3], [0, 0]]))
    M2 = triplet_scores(squared([[1, 4], [0, 0], [0, 0], [0, 0]]), squared([[2, 0]])[0], squared([[1], [2]]))
    return [M1, M2]


def test_two_matrices_by_hand():
    scores = two_matrices()
    assert [s / FIRST for s in scores[0] + scores[1]] == pytest.approx([7, 6, 5.25, 8])
    assert sorted(scores[0] + scores[1])[1] == pytest.approx(0.11475)
    for rule in (select, select_reference):
        assert rule(scores, 2) == [[True, False], [False, True]]  # the second of M2 although its λ is 0
        assert rule(scores, 3) == [[True, True], [False, True]]


def test_scores_follow_a_permutation_of_the_triplets():
    generator = torch.Generator().manual_seed(0)
    s_P, s_lam, s_Q = (torch.rand(shape, generator=generator) for shape in [(6, 4), (4,), (4, 5)])
    order = [2, 0, 3, 1]
    scores = triplet_scores(s_P, s_lam, s_Q)
    assert triplet_scores(s_P[:, order], s_lam[order], s_Q[order]) == [scores[i] for i in order]


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 8), (50, 2)])
def test_scores_are_means_and_blind_to_the_width(rows: int, columns: int):
    assert triplet_scores([[0.5] * 2] * rows, [1.0, 2.0], [[0.25] * columns] * 2) == [1.75, 2.75]


# ---- Selection ----


def test_selection_is_global():
    """Making one matrix matter more can leave the other without any rank."""
    scores = [[1.0, 2.0, 3.0], [1.5, 2.5, 3.5]]
    assert select(scores, 3) == [[False, False, True], [False, True, True]]
    assert select([[100 * s for s in scores[0]], scores[1]], 3) == [[True] * 3, [False] * 3]


def test_ties():
    equal = [[1.0, 1.0], [1.0, 1.0, 1.0]]
    assert select(equal, 3) == [[True, True], [True, False, False]]
    assert count(select_reference(equal, 3)) == 0
    assert count(select_reference([[0.0, 0.0]], 1)) == 0


def test_keeping_everything_or_nothing():
    scores = [[1.0, 2.0], [3.0]]
    assert count(select(scores, 3)) == 3
    assert count(select(scores, 99)) == 3
    assert count(select(scores, 0)) == count(select_reference(scores, 0)) == 0
    with pytest.raises(ValueError, match="budget is 3"):
        select_reference(scores, 3)
    with pytest.raises(ValueError, match="budget is -1"):
        select(scores, -1)


def test_not_a_number():
    scores = [[math.nan, 1.0], [0.0, math.nan]]
    assert select(scores, 2) == [[False, True], [True, False]]
    assert select(scores, 3) == [[True, True], [True, False]]  # room left over
    assert select_reference(scores, 3) == [[True, True], [False, True]]  # the published rule keeps both


def test_reference_rule_is_kthvalue_and_exact_without_ties():
    drawing = random.Random(0)
    for _ in range(50):
        b = drawing.randint(0, 11)
        tied = [[float(drawing.randint(0, 4)) for _ in range(4)] for _ in range(3)]
        threshold = torch.tensor(tied).flatten().kthvalue(12 - b).values
        assert select_reference(tied, b) == (torch.tensor(tied) > threshold).tolist()
        distinct = [[drawing.random() for _ in range(4)] for _ in range(3)]
        assert select_reference(distinct, b) == select(distinct, b)
        assert count(select(distinct, b)) == b
