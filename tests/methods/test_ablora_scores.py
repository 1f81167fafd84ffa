"""AB-LoRA's scores against games whose answers are known, and the rules by which ranks move.

A game stands for the network: it says what S is for each setting of the gates. Property numbers are those of the
specification of ALoRA.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference.ablora import importance, one_round, shapley
from torch import Tensor

from loralloc.methods.ablora import scores as scores_module
from loralloc.methods.ablora.moves import Move, deal, reallocate
from loralloc.methods.ablora.scores import (
    ablation_importance,
    ablation_settings,
    rank_correlation,
    score_ranks,
    two_point_importance,
)
from loralloc.methods.ablora.settle import lowest, settle
from loralloc.naming import kind_of, places
from loralloc.plan import ModuleRank, RankPlan

R = 6


class QuadraticGame:
    """S(α) = −|y − Σ αᵣ uᵣ|² / 2, as losses of a single sample with one label."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.u = torch.randn(R, 4, generator=generator, dtype=torch.float64)
        self.y = torch.randn(4, generator=generator, dtype=torch.float64)
        self.forwards = 0.0

    def ablate(self, gates: Tensor) -> Tensor:
        self.forwards += len(gates)
        return (self.y - gates.double() @ self.u).square().sum(1) / 2

    def gate_gradients(self, gates: Tensor) -> tuple[Tensor, int]:
        gates = gates.double().requires_grad_()
        (gradient,) = torch.autograd.grad(self.ablate(gates[None]).sum(), gates)
        return gradient[None], 1

    def __call__(self, active: frozenset[int]) -> float:
        gates = torch.zeros(R)
        gates[list(active)] = 1
        return -float(self.ablate(gates[None]))


def exact(game: QuadraticGame, constant: float = 0.0) -> Tensor:
    losses = game.ablate(ablation_settings(torch.ones(R), torch.arange(R))) - constant
    return ablation_importance(losses)


# ---- Scores (properties 1, 2, 4, 5, 9, 10) ----


def test_in_an_additive_game_importance_is_twice_the_weight():
    """Property 1."""
    weights = [3.0, -1.0, 0.5, 0.0]
    game = importance(lambda active: 7.0 + sum(weights[r] for r in active), range(4))
    assert list(game.values()) == [7.0 + 2 * w for w in weights]
    losses = -(7.0 + ablation_settings(torch.ones(4), torch.arange(4)) @ torch.tensor(weights))
    assert (ablation_importance(losses) + sum(weights)).tolist() == pytest.approx([2 * w for w in weights])


@pytest.mark.parametrize("seed", range(3))
def test_in_a_quadratic_game_everything_has_a_closed_form(seed):
    """Property 2: both terms, their sum, the two-point estimate, Shapley values, completeness."""
    game = QuadraticGame(seed)
    u, y = game.u, game.y
    e = y - u.sum(0)
    everything, nothing = game(frozenset(range(R))), game(frozenset())
    naive = torch.tensor(list(importance(game, range(R)).values()), dtype=torch.float64)
    remove = torch.tensor([everything - game(frozenset(range(R)) - {r}) for r in range(R)])
    keep = torch.tensor([game(frozenset({r})) - nothing for r in range(R)])
    half_squares = u.square().sum(1) / 2
    close = {"rtol": 0, "atol": 1e-6}
    torch.testing.assert_close(remove.double(), u @ e + half_squares, **close)
    torch.testing.assert_close(keep.double(), u @ y - half_squares, **close)
    torch.testing.assert_close(naive - nothing, u @ (e + y), **close)
    torch.testing.assert_close(exact(game) + everything, naive, **close)
    on, off = (game.gate_gradients(gates)[0] for gates in (torch.ones(R), torch.zeros(R)))
    torch.testing.assert_close(two_point_importance(on, off, 0), naive - nothing, **close)  # no Fisher term: exact
    values = torch.tensor(list(shapley(game, range(R)).values()), dtype=torch.float64)
    torch.testing.assert_close((naive - nothing) / 2, values, **close)
    assert float(values.sum()) == pytest.approx(everything - nothing)


def test_with_one_rank_importance_is_twice_the_whole_less_nothing():
    """Property 4."""
    game = QuadraticGame()
    scores, _ = score_ranks(
        "exact", game, torch.eye(R)[2], [], torch.Generator()
    )  # ablations leave closed ranks closed
    whole, nothing = game(frozenset({2})), game(frozenset())
    assert scores[2].item() == pytest.approx(2 * whole - nothing)
    assert scores.isnan().tolist() == [r != 2 for r in range(R)]


def test_a_constant_in_s_changes_no_score():
    """Property 5."""
    game = QuadraticGame()
    torch.testing.assert_close(exact(game), exact(game, constant=100.0), rtol=0, atol=1e-10)
    assert lowest(exact(game), 3).tolist() == lowest(exact(game) + 3.0, 3).tolist()


def test_the_fisher_term_is_half_the_labels_times_the_squares():
    on = torch.tensor([[0.1, 0.0], [-0.3, 0.2]], dtype=torch.float64)
    off = torch.zeros_like(on)
    estimate = two_point_importance(on, off, labels=10)
    assert estimate.tolist() == pytest.approx([0.2 + 5 * (0.01 + 0.09), -0.2 + 5 * 0.04])


def test_identical_ranks_score_the_same():
    """Property 7."""
    game = QuadraticGame()
    game.u[3] = game.u[1]
    assert float(exact(game)[3]) == pytest.approx(float(exact(game)[1]), abs=1e-12)
    assert abs(float(exact(game)[2] - exact(game)[1])) > 1e-3


def test_correlation_of_ranks():
    values = torch.tensor([0.0, 1.0, 2.0, 3.0])
    assert rank_correlation(values, values.exp()) == 1.0
    assert rank_correlation(values, -values) == -1.0
    assert math.isnan(rank_correlation(values[:1], values[:1]))


# ---- Where ranks go (property 13, 8 of the section on ambiguities) ----


def test_eight_ranks_over_three_modules_are_three_three_two():
    assert deal([0, 1, 2], [99] * 3, [1] * 3, 8) == [3, 3, 2]


def test_seven_ranks_over_many_modules_go_to_the_first_seven():
    order = list(range(217))[::-1]
    assert deal(order, [99] * 217, [1] * 217, 7) == [0] * 210 + [1] * 7


def flat(scores: dict[str, list[float]]) -> tuple[Tensor, list[int]]:
    module = [m for m, own in enumerate(scores.values()) for _ in own]
    return torch.tensor([score for own in scores.values() for score in own], dtype=torch.float64), module


def moved(
    scores: dict[str, list[float]], count: int, room: int = 99, **settings: Any
) -> tuple[list[int], list[int], Move]:
    values, module = flat(scores)
    size = len(scores)
    move = reallocate(
        values, module, torch.ones(len(values), dtype=torch.bool), count, [room] * size, [1] * size, **settings
    )
    return [sum(module[rank] == m for rank in move.pruned) for m in range(size)], list(move.grown), move


tables = st.dictionaries(
    st.sampled_from("abcdefgh"),
    st.lists(st.integers(-5, 5).map(float), max_size=4),
    min_size=1,
).filter(lambda table: sum(map(len, table.values())) > 1)


@given(tables, st.integers(1, 6))
def test_a_round_is_the_papers(scores, count):
    """Footnote 4 included, where asked for; without it, a round is the paper's with as many as somebody can receive."""
    total = sum(map(len, scores.values()))
    count = min(count, total - 1)
    pruned, grown, move = moved(scores, count, keep_budget=False)
    naive_pruned, naive_grown = one_round(scores, count)
    assert pruned == list(naive_pruned.values())
    assert grown == list(naive_grown.values())
    assert not any(p and g for p, g in zip(pruned, grown, strict=True))  # no module is pruned and grown
    assert sum(grown) == (count if 0 in pruned else 0)
    assert move.lost == count - sum(grown)
    kept = moved(scores, count)
    rounds = (one_round(scores, size) for size in range(count, 0, -1))
    largest = next(((p, g) for p, g in rounds if 0 in p.values()), ({}, {}))
    assert kept[0] == [largest[0].get(name, 0) for name in scores]
    assert kept[1] == [largest[1].get(name, 0) for name in scores]


@given(tables, st.integers(1, 30), st.integers(0, 2))
def test_a_round_keeps_the_budget_whatever_the_room_unless_told_otherwise(scores, count, room):
    total = sum(map(len, scores.values()))
    pruned, grown, move = moved(scores, count, room)
    assert sum(pruned) == sum(grown) <= count
    assert move.lost == 0
    assert max(grown) <= room
    pruned, grown, move = moved(scores, count, room, keep_budget=False)
    assert total - sum(pruned) + sum(grown) == total - move.lost >= 1
    if move.lost:
        assert (
            all(p for p, own in zip(pruned, scores.values(), strict=True) if own or total > 1) or total - move.lost == 1
        )


def test_where_every_module_lost_a_rank_fewer_are_pruned_or_the_budget_shrinks():
    both, one_more = {"a": [0.0, 9.0], "b": [1.0, 9.0]}, {"a": [0.0, 9.0], "b": [1.0, 9.0], "c": [2.0]}
    assert moved(both, 2)[2] == Move([0], [0, 1])
    assert moved(both, 2, keep_budget=False)[2] == Move([0, 2], [0, 0], lost=2)
    for keep in (True, False):  # the partner: somebody lost none
        assert moved(one_more, 2, keep_budget=keep)[2] == Move([0, 2], [0, 0, 2])
    assert moved({"a": [0.0, 1.0]}, 1)[2] == Move([], [0])
    assert moved({"a": [0.0, 1.0]}, 1, keep_budget=False)[2] == Move([0], [0], lost=1)


def test_fewer_ranks_move_where_receivers_are_full():
    pruned, grown, _ = moved({"a": [0.0, 1.0, 2.0], "b": [9.0]}, 3, room=1)
    assert (pruned, grown) == ([1, 0], [0, 1])
    assert moved({"a": [0.0, 1.0, 2.0], "b": [9.0]}, 3, room=0)[:2] == ([0, 0], [0, 0])


def test_ties_and_nan_go_by_position_and_first():
    nan = float("nan")
    assert lowest(torch.tensor([1.0, 1.0, 0.5, 1.0]), 3).tolist() == [2, 0, 1]
    assert lowest(torch.tensor([1.0, nan, 0.5]), 2).tolist() == [1, 2]
    assert moved({"a": [nan, 3.0], "b": [1.0], "c": [2.0]}, 1)[:2] == ([1, 0, 0], [0, 0, 1])


def test_parameters_are_never_exceeded_and_no_further_rank_fits():
    scores, module = flat({"a": [0.0, 1.0], "b": [5.0], "c": [4.0]})
    costs = [30, 50, 20]
    move = reallocate(scores, module, torch.ones(4, dtype=torch.bool), 1, [5, 5, 5], costs, spare=5)
    assert move == Move([0], [0, 0, 1])  # 35 are free: b's 50 do not fit
    spent = sum(n * c for n, c in zip(move.grown, costs, strict=True))
    assert 0 <= 35 - spent < min(costs)
    one_cannot_buy = reallocate(scores, module, torch.ones(4, dtype=torch.bool), 1, [5, 5, 0], costs)
    assert one_cannot_buy == Move([], [0, 0, 0])  # 30 buy none of b's ranks, and c is full
    scores, module = flat({"a": [0.0, 1.0, 2.0], "b": [9.0], "c": [8.0]})
    no_room = reallocate(scores, module, torch.ones(5, dtype=torch.bool), 3, [5, 0, 1], [30, 50, 20])
    assert no_room == Move([0], [0, 0, 1])  # three would free 90, of which c takes 20: 70 would go back to a


def test_blocks_and_types_of_modules():
    names = [f"h.{layer}.{part}" for layer in range(12) for part in ("attn.q", "mlp.up")]
    assert {(place.stack, place.layer) for place in places(names) if place} == {("h", layer) for layer in range(12)}
    assert {kind_of(name) for name in names} == {"h.attn.q", "h.mlp.up"}
    assert places(["layer1.conv2"]) == [None]


# ---- Counts (property 14) ----


def test_parameter_counts_of_the_paper():
    def plan(layers: int, shapes: dict[str, tuple[int, int]], moved: int = 0) -> RankPlan:
        """Rank 8 everywhere, but for ranks moved from the first feed-forward matrices to the first of attention."""
        modules = {
            f"{name}.{layer}": ModuleRank(8, 8, *shape, 1.0)
            for layer in range(layers)
            for name, shape in shapes.items()
        }
        for layer in range(moved):
            for name, change in (("q", 1), ("up", -1)):
                modules[f"{name}.{layer}"] = replace(modules[f"{name}.{layer}"], rank=8 + change)
        return RankPlan("ablora", modules)

    llama = dict.fromkeys("qkvo", (4096, 4096))
    llama |= {"gate": (4096, 11008), "up": (4096, 11008), "down": (11008, 4096)}
    even = plan(32, llama)
    assert (even.parameters, even.total_rank) == (19_988_480, 1_792)
    roberta = plan(24, {**dict.fromkeys("qkvo", (1024, 1024)), "up": (1024, 4096), "down": (4096, 1024)})
    assert (roberta.parameters, roberta.total_rank) == (3_538_944, 1_152)
    moved = plan(32, llama, 28)
    assert (even.parameters - moved.parameters, moved.total_rank) == (28 * (15_104 - 8_192), 1_792)
    # The paper's 56 moves of one rank from feed-forward to attention matrices:
    assert even.parameters - 2 * (even.parameters - moved.parameters) == 19_601_408


# ---- Looking up exact scores only where they matter (property 19) ----


def settled(estimates: Tensor, scores: Tensor, count: int, groups: int = 1, seed: int = 0):
    asked: list[int] = []

    def look_up(ranks: Tensor) -> Tensor:
        asked.extend(ranks.tolist())
        return scores[ranks]

    counts = [(torch.arange(g, len(scores), groups), count) for g in range(groups)]
    found = settle(estimates, torch.ones_like(estimates), counts, look_up, torch.Generator().manual_seed(seed))
    assert len(asked) == len(set(asked)) == int(found.ablated.sum())  # nothing is asked twice
    for positions, n in counts:
        assert set(lowest(found.scores[positions], n).tolist()) == set(lowest(scores[positions], n).tolist())
    return found


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize(("ranks", "most"), [(400, 16), (40_000, 36)])
def test_good_estimates_are_rarely_looked_up(ranks, most, groups):
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(ranks, generator=generator, dtype=torch.float64)
    estimates = scores + 1e-4 * torch.randn(ranks, generator=generator, dtype=torch.float64) + 5.0  # a bias
    found = settled(estimates, scores, 7, groups)
    assert int(found.ablated.sum()) <= most
    assert found.corrected == pytest.approx(-5.0, abs=1e-3)


@pytest.mark.parametrize("seed", range(5))
def test_noise_as_estimates_makes_it_look_nearly_everything_up(seed):
    generator = torch.Generator().manual_seed(seed)
    scores, noise = torch.randn(2, 168, generator=generator, dtype=torch.float64).unbind()
    found = settled(noise, scores, 7, seed=seed)
    assert int(found.ablated.sum()) > 0.9 * 168


def test_estimates_that_are_no_numbers_are_not_believed():
    scores = torch.arange(20.0, dtype=torch.float64)
    estimates = scores.clone()
    estimates[3] = float("nan")
    assert settled(estimates, scores, 3).ablated.all()


def test_nothing_is_looked_up_for_a_boundary_that_does_not_exist():
    scores = torch.arange(20.0, dtype=torch.float64)
    for count in (0, 20, 99):
        assert int(settled(scores, scores, min(count, 20)).ablated.sum()) <= 8


@pytest.mark.parametrize("mode", ["exact", "taylor", "fast"])
def test_the_three_modes_agree_on_a_quadratic_game_without_fisher(mode, monkeypatch):
    game = QuadraticGame(1)
    if mode != "exact":  # the game's curvature is known to be |u|², which one sample cannot tell
        monkeypatch.setattr(game, "gate_gradients", lambda gates, f=game.gate_gradients: (f(gates)[0], 0))
    gates = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    counts = [(gates != 0, 2)]
    scores, measured = score_ranks(mode, game, gates, counts, torch.Generator().manual_seed(0))
    assert scores.isnan().tolist() == (gates == 0).tolist()
    naive = importance(game, [0, 1, 3, 4, 5])
    mine = scores[gates != 0]
    shift = mine - torch.tensor(list(naive.values()), dtype=torch.float64)
    assert float(shift.std()) < 1e-6  # equal up to a constant
    assert measured["mode"] == mode


# ---- Several processes ----


class RoundedGame:
    """Forty ranks whose losses another device computes with other roundings; notes which settings it is asked for."""

    def __init__(self, noise: float) -> None:
        self._generator = torch.Generator().manual_seed(1)
        self._worth = torch.linspace(-1, 1, 40, dtype=torch.float64)
        self._noise = noise
        self.asked: list[Tensor] = []
        self.forwards = 0.0

    def ablate(self, gates: Tensor) -> Tensor:
        self.asked.append(gates)
        exact = -(gates.double() @ self._worth)
        return exact + self._noise * torch.randn(len(gates), generator=self._generator, dtype=torch.float64)

    def gate_gradients(self, gates: Tensor) -> tuple[Tensor, int]:
        noise = self._noise * torch.randn(8, 40, generator=self._generator, dtype=torch.float64)
        return -self._worth.expand(8, 40) / 8 + noise, 1


def asked_of(game: RoundedGame) -> list[Tensor]:
    """The settings that a round of `fast` measures."""
    groups = [(torch.ones(40, dtype=torch.bool), 7)]
    score_ranks("fast", game, torch.ones(40), groups, torch.Generator().manual_seed(0))
    return game.asked


def test_every_process_ablates_what_the_first_one_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Roundings differ between devices; a pass through a sharded model waits for a process that asks for another."""
    said: list[Tensor] = []
    monkeypatch.setattr(scores_module, "agree", lambda numbers: said.append(numbers.clone()) or numbers)
    first = asked_of(RoundedGame(0.3))
    apart = asked_of(RoundedGame(0.31))
    assert [len(asked) for asked in apart] != [len(asked) for asked in first] or not all(
        torch.equal(a, b) for a, b in zip(apart, first, strict=True)
    )
    heard = iter(said)
    monkeypatch.setattr(scores_module, "agree", lambda numbers: next(heard))
    second = asked_of(RoundedGame(0.31))
    assert len(second) == len(first)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(second, first, strict=True))
