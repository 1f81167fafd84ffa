"""Planted ranks (benchmarks/planted.py): what is planted is there, and every method learns it, the same twice."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
METHODS = (  # the names in benchmarks/planted_methods.py
    "true ranks",
    "uniform",
    "AdaLoRA",
    "random",
    "truncation",
    "cut and recover",
    "full capacity",
    "AutoLoRA",
    "AB-LoRA, taylor",
    "ALLoRA",
    "ALLoRA + AdaLoRA",
    "AdaLoRA, as published",
    "AdaLoRA, sensitivity",
    "AdaLoRA, magnitude",
    "cut and recover, 0.2",
    "cut and recover, 1 + 0.2",
    "AB-LoRA",
    "AutoLoRA, logits at 0.03",
    "ALLoRA, post",
    "AdaLoRA, retrained",
    "truncation, retrained",
    "cut and recover, 0.6",
    "cut and recover, moments kept",
    "cut and recover, from 4",
    "cut and recover, from 16",
)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    before = set(sys.modules)
    monkeypatch.syspath_prepend(FOLDER)
    names = {"main": "planted", "methods": "planted_methods", "problems": "planted_problem", "report": "planted_report"}
    yield SimpleNamespace(**{name: __import__(module) for name, module in names.items()})
    for name in set(sys.modules) - before:
        if (FOLDER / f"{name}.py").exists():
            del sys.modules[name]


@pytest.fixture
def teaching(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(bench.problems, "HELD_OUT", 8)
    monkeypatch.setattr(bench.methods, "SCORED", 8)
    settings = {"labels": "distribution", "steps": 10, "batch": 4, "tokens": 8, "seed": 0}
    return bench.problems.Teaching("tiny", concentration=2.0, average=2.6, capacity=8, strength=0.5, **settings)


def cost(ranks: Iterable[int], costs: Iterable[int]) -> int:
    """Parameters of these ranks."""
    return sum(rank * each for rank, each in zip(ranks, costs, strict=True))


class TestRanks:
    def test_in_proportion_are_those_of_webster(self, bench: SimpleNamespace) -> None:
        def naive(weights: list[int], capacity: int, target: int) -> list[int]:
            ranks = [0] * len(weights)
            for _ in range(target):  # the seat goes to the highest quotient, the first of equals
                quotients = [w / (r + 0.5) if r < capacity else -1 for w, r in zip(weights, ranks, strict=True)]
                ranks[quotients.index(max(quotients))] += 1
            return ranks

        draw = random.Random(0)
        for _ in range(50):
            weights, capacity = [draw.randint(0, 9) for _ in range(draw.randint(1, 6))], draw.randint(1, 9)
            target = draw.randint(0, capacity * len(weights))
            ours = bench.problems.in_proportion(weights, capacity, [1] * len(weights), "ranks", target)
            assert ours == naive(weights, capacity, target)

    @pytest.mark.parametrize("unit", ["ranks", "parameters"])
    def test_the_truth_at_its_own_cost_is_the_truth(self, bench: SimpleNamespace, unit: str) -> None:
        truth, costs = [0, 8, 1, 3, 0, 2], [10, 30, 20, 10, 30, 20]
        spent = sum(truth) if unit == "ranks" else cost(truth, costs)
        assert bench.problems.in_proportion(truth, 8, costs, unit, spent) == truth

    def test_concentration_goes_from_even_to_few_layers(self, bench: SimpleNamespace, teaching: Any) -> None:
        names = [f"layer {place}" for place in range(35)]
        spreads = []
        for concentration in (0.0, 0.5, 2.0, 8.0):
            generator = torch.Generator().manual_seed(1)
            asked = replace(teaching, concentration=concentration)
            ranks = list(bench.problems.planted_ranks(names, asked, generator).values())
            assert sum(ranks) == 91
            assert max(ranks) <= 8
            spreads.append(torch.tensor(ranks, dtype=torch.float64).std().item())
        assert spreads == sorted(set(spreads))
        assert ranks.count(8) == 10
        assert ranks != sorted(ranks, reverse=True), "the layers come in a random order"


class TestProblem:
    def test_the_teacher_has_the_planted_ranks_and_nothing_else(self, bench: SimpleNamespace, teaching: Any) -> None:
        problem = bench.problems.problem(teaching)
        assert len(problem.truth) == 14
        assert sum(problem.truth.values()) == 36
        teacher = dict(problem.train.teacher.named_parameters())
        for name, weight in problem.base.named_parameters():
            rank = problem.truth.get(name.removesuffix(".weight"), 0)
            sigma = torch.linalg.svdvals((teacher[name] - weight).double()) if weight.dim() == 2 else torch.zeros(0)
            own = teaching.strength * weight.norm() / math.sqrt(min(weight.shape))
            assert sigma[:rank].tolist() == pytest.approx([own.item()] * rank, rel=1e-4)
            assert (sigma[rank:] < 1e-6).all()

    def test_texts_of_training_and_judgement_are_apart_and_the_same_again(
        self, bench: SimpleNamespace, teaching: Any
    ) -> None:
        first = bench.problems.problem(teaching)
        parts = [lessons.texts for lessons in (first.train, first.validation, first.test)]
        assert [tuple(part.shape) for part in parts] == [(40, 8), (8, 8), (8, 8)]
        assert len({tuple(text) for part in parts for text in part.tolist()}) == 56
        bench.problems.problem.cache_clear()
        bench.problems.written.cache_clear()
        again = bench.problems.problem(teaching)
        assert torch.equal(first.train.texts, again.train.texts)
        assert again.truth == first.truth

    def test_sampled_labels_are_tokens_of_the_distribution_one_place_later(
        self, bench: SimpleNamespace, teaching: Any
    ) -> None:
        lessons = bench.problems.problem(teaching).train
        texts = lessons.texts[:1].repeat(4000, 1)
        asked = bench.problems.Lessons(lessons.teacher, texts, len(texts), "sampled")
        drawn, exact = asked[0]["labels"], lessons[0]["labels"][0]
        assert (drawn[:, 0] == -100).all()
        assert torch.equal(drawn, asked[0]["labels"])
        shares = functional.one_hot(drawn[:, 1:], exact.shape[1]).double().mean(0)
        assert (shares - exact[:-1]).abs().max() < 0.04  # five standard deviations of a share of 4,000
        assert (shares - exact[1:]).abs().max() > 0.04

    def test_the_loss_of_a_distribution_has_the_gradient_of_the_divergence(self, bench: SimpleNamespace) -> None:
        logits = torch.randn(2, 3, 5, requires_grad=True)
        target = torch.randn(2, 3, 5).softmax(-1)
        (ours,) = torch.autograd.grad(bench.problems.own_loss(logits, target, 5), logits)
        divergence = functional.kl_div(logits.log_softmax(-1), target, reduction="none").sum(-1).mean()
        torch.testing.assert_close(ours, torch.autograd.grad(divergence, logits)[0])

    def test_the_teacher_diverges_from_itself_by_nothing(self, bench: SimpleNamespace, teaching: Any) -> None:
        problem = bench.problems.problem(teaching)
        assert bench.problems.divergence(problem.test.teacher, problem.test) == pytest.approx(0, abs=1e-6)
        assert bench.problems.divergence(problem.base, problem.test) > 0.01

    def test_a_base_that_is_no_folder_is_refused(self, bench: SimpleNamespace) -> None:
        with pytest.raises(SystemExit, match=r"--base nowhere is no folder; give one with .*, or tiny, minilm"):
            bench.problems.base_model("nowhere")


def test_these_are_all_methods(bench: SimpleNamespace) -> None:
    assert tuple(bench.main.RUNS) == METHODS


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_within_the_budget_and_the_same_twice(
    bench: SimpleNamespace, teaching: Any, method: str
) -> None:
    setting = bench.main.Setting(teaching, method, 1.0, "parameters", 1e-2)
    first, again = bench.main.run(setting), bench.main.run(setting)
    assert {**first, "seconds": 0} == {**again, "seconds": 0}
    assert 0 < first["divergence"] < first["untrained"]
    costs = bench.problems.problem(teaching).costs
    limit = cost(first["truth"].values(), costs.values())
    spare = limit - first["parameters"]
    assert spare < 0 if method == "full capacity" else 0 <= spare < max(costs.values())
    assert first["recovered"] == 1 if method in ("true ranks", "full capacity") else 0 < first["recovered"] < 1


def test_a_budget_in_ranks_is_met(bench: SimpleNamespace, teaching: Any) -> None:
    setting = bench.main.Setting(teaching, "random", 0.5, "ranks", 1e-2)
    assert bench.main.run(setting)["total_rank"] == 18


def test_runs_with_a_record_are_not_repeated(
    bench: SimpleNamespace, teaching: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    made = []
    monkeypatch.setattr(bench.main, "run", lambda setting: made.append(setting) or made_up(setting.to_dict()))
    asked = ["--records", str(tmp_path / "new" / "planted.jsonl"), "--seeds", "0", "1", "--budgets", "1"]
    bench.main.main([*asked, "--methods", "true ranks", "uniform"])
    assert [(s.teaching.seed, s.teaching.concentration) for s in made[::2]] == [
        (s, c) for s in (0, 1) for c in (0, 0.5, 2)
    ]
    bench.main.main([*asked, "--methods", "true ranks", "uniform", "random"])
    assert [setting.method for setting in made[12:]] == ["random"] * 6
    assert "| random | 1.00 |" in capsys.readouterr().out


def made_up(setting: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A record."""
    figures = {"divergence": 0.5, "validation": 0.5, "recovered": 1.0, "correlation": 1.0, "seconds": 2.0}
    return {**setting, **figures, **changes}


class TestReport:
    @staticmethod
    def records() -> list[dict[str, Any]]:
        problem = {"base": "tiny", "labels": "distribution", "average": 2.6, "capacity": 8, "strength": 0.5}
        problem |= {"steps": 10, "batch": 4, "tokens": 8, "unit": "ranks", "budget": 1.0}
        return [
            made_up({**problem, "concentration": concentration}, method=method, rate=rate, seed=seed, **figures)
            for concentration in (0.0, 2.0)
            for method, rate, seed, figures in (
                ("true ranks", 0.1, 0, {"divergence": 0.2}),
                ("true ranks", 0.1, 1, {"divergence": 0.4}),
                ("uniform", 0.1, 0, {"divergence": 0.3, "validation": 0.3}),
                ("uniform", 0.1, 1, {"divergence": 0.4, "validation": 0.5}),
                ("uniform", 0.2, 0, {"divergence": 0.1, "validation": 0.6}),
            )
        ]

    def test_ratios_are_taken_within_a_seed_at_the_rate_that_validation_chose(self, bench: SimpleNamespace) -> None:
        text = bench.report.tables(self.records())
        row = "| uniform | 1.25 (1.00 to 1.50) | 0.3500 (0.3000 to 0.4000) | 1.00 | 1.00 | 0.1 | 2 |"
        assert text.count(row) == 2
        assert "**tiny, 1 of the true ranks, concentration 2** (labels distribution, average 2.6, " in text

    def test_a_smaller_budget_is_compared_with_all_true_ranks(self, bench: SimpleNamespace) -> None:
        half = [{**record, "budget": 0.5, "divergence": 0.8} for record in self.records()[:2]]
        assert "| true ranks | 3.00 (2.00 to 4.00) | 0.8000 |" in bench.report.tables([*self.records(), *half])

    def test_the_page_has_the_tables_that_the_records_give(self, bench: SimpleNamespace) -> None:
        page = (FOLDER.parent / "docs" / "planted-ranks.md").read_text(encoding="utf-8")
        assert bench.report.tables(bench.main.records(bench.main.RESULTS)) in page

    def test_the_figure_has_a_panel_for_each_measure_of_each_problem(
        self, bench: SimpleNamespace, tmp_path: Path
    ) -> None:
        half = [{**record, "budget": 0.5} for record in self.records()]
        bench.report.plot([*self.records(), *half], tmp_path / "planted.svg")
        drawn = (tmp_path / "planted.svg").read_text(encoding="utf-8")
        assert drawn.count('id="axes_') == 2 * len(bench.report.DRAWN_MEASURES) == 6

    def test_one_concentration_is_no_figure(self, bench: SimpleNamespace, tmp_path: Path) -> None:
        with pytest.raises(SystemExit, match="no problem has records at several concentrations"):
            bench.report.plot(self.records()[:5], tmp_path / "planted.svg")
