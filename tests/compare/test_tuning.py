"""Learning rates that are tried on some of the seeds: which runs there are, and who is judged by which."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from loralloc.compare import study
from loralloc.compare.cells import plan_cells
from loralloc.compare.execute import Ended, Job
from loralloc.compare.fairness import fairness
from loralloc.compare.folder import CompareFolder
from loralloc.compare.grid import Cell, Contender, tuning_seeds
from loralloc.compare.results import Row, entries, read_row, winner
from loralloc.compare.study import _tuned
from loralloc.plan import RankPlan
from loralloc.recipe.schema import Recipe, load_recipe

from .fabricate import SHAPES, Losses, cells_of, fabricate, noisy, recipe_for, write_run

FEW = ("--seeds", "4", "--tuning_seeds", "2", "--learning_rates", "[5e-3, 1e-2, 2e-2]", "--peers", "[]")


class Runner:
    """Gives every run its validation loss, and remembers what it was asked for."""

    def __init__(self, worse: dict[tuple[str, float, int], float | None] | None = None) -> None:
        self.calls: list[list[str]] = []
        self._worse = worse or {}

    def __call__(self, cells: Sequence[Cell]) -> list[Row]:
        self.calls.append([cell.name for cell in cells])
        return [self._row(cell) for cell in cells]

    def _row(self, cell: Cell) -> Row:
        added = self._worse.get((cell.contender.id, cell.learning_rate, cell.seed), 0.0)
        loss = 1.0 + 10 * abs(cell.learning_rate - 1e-2)
        return Row(cell, reason="killed") if added is None else Row(cell, validation={"loss": loss + added})


def tuned(recipe: Recipe, runner: Runner) -> list[Row]:
    return _tuned(cells_of(recipe), runner, recipe)


def test_all_seeds_try_every_rate_by_default(tmp_path: Path) -> None:
    recipe, runner = recipe_for(tmp_path, *FEW[:2], *FEW[4:]), Runner()
    assert tuning_seeds(recipe) == [0, 1, 2, 3]
    assert len(tuned(recipe, runner)) == 4 * 4 * 3
    assert runner.calls == [[cell.name for cell in cells_of(recipe)], []]


def test_the_others_train_at_the_rate_that_these_have_chosen(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, *FEW)
    runner = Runner({("adalora", 0.02, 0): -1.0, ("random", 0.01, 1): None, ("random", 0.02, 0): 0.3})
    rows = tuned(recipe, runner)
    first, second = runner.calls
    assert len(first) == 4 * 2 * 3
    rates = {"lora": "0.01", "adalora": "0.02", "random": "0.005", "truncate": "0.01"}
    assert second == [f"r2-{name}-lr{rate}-s{seed}" for name, rate in rates.items() for seed in (2, 3)]
    found = entries(rows, "loss", [0, 1])
    assert {entry.contender.id: len(entry.chosen.rows) for entry in found} == dict.fromkeys(rates, 4)
    assert all(len(trial.rows) == 2 for entry in found for trial in entry.trials if trial != entry.chosen)


def test_as_many_as_there_are_is_all(tmp_path: Path) -> None:
    assert tuning_seeds(recipe_for(tmp_path, "--seeds", "2", "--tuning_seeds", "5")) == [0, 1]
    assert tuning_seeds(recipe_for(tmp_path, "--seeds", "[7, 3]", "--tuning_seeds", "1")) == [7]


def test_other_seeds_change_no_choice_whatever_they_bring(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, *FEW)
    for worse in (5.0, None):
        rows = tuned(recipe, Runner({("adalora", 0.01, seed): worse for seed in (2, 3)}))
        found = {entry.contender.id: entry for entry in entries(rows, "loss", [0, 1])}
        assert found["adalora"].chosen.learning_rate == 0.01
        assert found["adalora"].chosen.score == pytest.approx(1.0)
        among_all = {entry.contender.id: entry for entry in entries(rows, "loss")}
        assert among_all["adalora"].chosen.learning_rate != 0.01, "it is the tuning seeds that keep it"


def test_without_a_result_of_a_tuning_seed_no_rate_is_chosen(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, *FEW)
    runner = Runner({("adalora", rate, seed): None for rate in (0.005, 0.01, 0.02) for seed in (0, 1)})
    found = {entry.contender.id: entry for entry in entries(tuned(recipe, runner), "loss", [0, 1])}
    assert not any("adalora" in name for name in runner.calls[1])
    assert len(runner.calls[1]) == 3 * 2
    assert not found["adalora"].chosen.finished
    assert not found["adalora"].at_edge


class Executor:
    """Leaves what a run would; remembers which runs it was asked for."""

    def __init__(self, recipe: Recipe, losses: Losses) -> None:
        self.folder, self._losses = CompareFolder.of(recipe), losses
        self.asked: list[str] = []

    def run(self, jobs: Sequence[Job], started: Callable[[str], None]) -> Iterator[Ended]:
        for job in jobs:
            started(job.name)
            self.asked.append(job.name)
            contender, rate, seed = re.fullmatch(r"r2-(.*)-lr(.*)-s(.*)", job.name).groups()  # type: ignore[union-attr]
            point, kind = cells_of(load_recipe(self.folder.recipe))[0].point, Contender(contender, contender, "method")
            cell = Cell(point, kind, float(rate), int(seed), load_recipe(Path(job.recipe)))
            write_run(self.folder.run(job.name), cell, np.array(self._losses(cell)))
            if cell.recipe.plan is not None:
                modules = {name: one for name, one in RankPlan.load(cell.recipe.plan).modules.items() if one.rank}
                RankPlan("made-up", modules).save(self.folder.run(job.name).plan)
            yield Ended(job.name)


def test_a_whole_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a second one: a rate that was not there chooses another one, for which the other seeds are run."""
    monkeypatch.setattr(study, "measure", lambda recipe: SHAPES)
    recipe = recipe_for(tmp_path, *FEW)
    executor = Executor(recipe, noisy({"adalora": 0.3}, rows=0.02))
    verdict = study.compare(recipe, executor, False, study.Watcher()).verdict
    assert verdict.startswith("AdaLoRA is better than plain LoRA by 0.")
    assert len(executor.asked) == 5 * (3 * 2 + 2), "plain LoRA, AdaLoRA, two controls, and the plan of the winner"
    others = sorted(name for name in executor.asked if name.endswith(("s2", "s3")) and "adalora" in name)
    assert others == [f"r2-{name}-lr0.01-s{seed}" for name in ("adalora", "plan-of-adalora") for seed in (2, 3)]
    words = executor.folder.page.read_text(encoding="utf-8")
    assert "Learning rates are chosen by 2 seeds of 4" in words
    with executor.folder.table.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert sum(row["chosen"] == "True" for row in rows) == 5 * 4
    asked = len(executor.asked)
    study.compare(recipe, executor, False, study.Watcher())
    assert len(executor.asked) == asked, "what has been run is not run again"
    more = recipe_for(tmp_path, *FEW[:4], "--learning_rates", "[1e-3, 5e-3, 2e-2]", "--peers", "[]")
    study.compare(more, executor, False, study.Watcher())
    assert {name.split("-s")[0] for name in executor.asked[asked:] if name.endswith("s3")} >= {"r2-lora-lr0.005"}


def test_who_wins_is_asked_of_all_seeds(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, *FEW, "--methods", "[adalora, ablora]")

    def losses(cell: Cell) -> Sequence[float] | str:
        lead = {"adalora": 0.1 if cell.seed < 2 else -0.4}.get(cell.contender.id, 0.0)
        return noisy({cell.contender.id: lead}, rows=0.0)(cell)

    folder = fabricate(recipe, losses)

    def run(cells: Sequence[Cell]) -> list[Row]:
        return [read_row(folder, cell) for cell in cells]

    found = entries(_tuned(cells_of(recipe), run, recipe), "loss", [0, 1])
    best = winner(found, found[0].point)
    assert best is not None
    assert best.contender.id == "ablora"
    two = entries(run([cell for cell in cells_of(recipe) if cell.seed < 2]), "loss")
    on_two = winner(two, two[0].point)
    assert on_two is not None
    assert on_two.contender.id == "adalora"


def test_the_page_says_which_seeds_have_tried(tmp_path: Path) -> None:
    some, every = recipe_for(tmp_path, *FEW), recipe_for(tmp_path, *FEW[:2], *FEW[4:])
    cells = plan_cells(some, SHAPES, CompareFolder.of(some).runs)
    found = entries(Runner()(cells), "loss", [0, 1])
    told, of_every = (fairness(recipe, SHAPES, found)[1] for recipe in (some, every))
    assert "the same 3 learning rates with the same 2 of 4 seeds, for" in told
    assert told.endswith("The other seeds train at the chosen rate alone.")
    assert "the same 3 learning rates with the same 4 seeds, for" in of_every
    assert "alone" not in of_every
