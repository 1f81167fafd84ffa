"""What runs have given, which learning rate is chosen, and who wins."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from loralloc.compare.grid import Cell
from loralloc.compare.results import (
    DIVERGED,
    Entry,
    Row,
    baseline_of,
    criterion,
    entries,
    paired,
    read_row,
    winner,
)
from loralloc.errors import UserError
from loralloc.trace import append, start_event

from .fabricate import ROWS, cells_of, fabricate, noisy, recipe_for, write_run


def rows_of(tmp_path: Path, found: dict[str, dict[float, list[float | None]]], metric: str = "loss") -> list[Row]:
    """Rows with these validation figures, by contender and learning rate, a seed each; None is a failure."""
    cells = cells_of(recipe_for(tmp_path))
    made = []
    for cell in cells:
        values = found.get(cell.contender.id, {}).get(cell.learning_rate)
        if values is None or cell.seed >= len(values):
            continue
        value = values[cell.seed]
        made.append(Row(cell, reason="killed") if value is None else Row(cell, validation={metric: value}))
    return made


def chosen(rows: list[Row], metric: str = "loss") -> dict[str, float]:
    return {entry.contender.id: entry.chosen.learning_rate for entry in entries(rows, metric)}


class TestLearningRates:
    def test_the_best_mean_over_the_seeds(self, tmp_path: Path) -> None:
        found = {"lora": {0.005: [1.0, 1.0], 0.01: [0.5, 2.0], 0.02: [0.9, 1.05]}}
        assert chosen(rows_of(tmp_path, found)) == {"lora": 0.02}

    def test_ties_go_to_the_smaller(self, tmp_path: Path) -> None:
        assert chosen(rows_of(tmp_path, {"lora": {0.02: [1.0], 0.01: [1.0], 0.005: [1.5]}})) == {"lora": 0.01}

    def test_a_rate_at_which_a_run_failed_is_not_chosen_unless_all_have_failures(self, tmp_path: Path) -> None:
        found = {"lora": {0.005: [1.0, 1.0], 0.01: [0.1, None]}, "adalora": {0.005: [None, None], 0.01: [0.1, None]}}
        assert chosen(rows_of(tmp_path, found)) == {"lora": 0.005, "adalora": 0.01}

    def test_a_metric_of_which_more_is_better(self, tmp_path: Path) -> None:
        found = {"lora": {0.005: [0.2], 0.01: [0.9], 0.02: [0.5]}}
        assert chosen(rows_of(tmp_path, found, "accuracy"), "accuracy") == {"lora": 0.01}

    def test_a_metric_that_no_run_has(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="these runs have no metric f1; they have loss"):
            entries(rows_of(tmp_path, {"lora": {0.01: [1.0]}}), "f1")

    def test_the_edge_of_three_is_told_and_that_of_two_is_not(self, tmp_path: Path) -> None:
        three = entries(rows_of(tmp_path, {"lora": {0.005: [1.0], 0.01: [2.0], 0.02: [3.0]}}), "loss")
        two = entries(rows_of(tmp_path, {"lora": {0.005: [1.0], 0.01: [2.0]}}), "loss")
        inside = entries(rows_of(tmp_path, {"lora": {0.005: [2.0], 0.01: [1.0], 0.02: [3.0]}}), "loss")
        assert [found[0].at_edge for found in (three, two, inside)] == [True, False, False]

    def test_by_the_recipes_metric_or_the_loss(self, tmp_path: Path) -> None:
        assert criterion(recipe_for(tmp_path)) == "loss"
        assert criterion(recipe_for(tmp_path, "--evaluate.metric", "macro_f1")) == "macro_f1"


def judged(tmp_path: Path, losses: object, *words: str) -> list[Entry]:
    recipe = recipe_for(tmp_path, *words)
    folder = fabricate(recipe, losses)  # type: ignore[arg-type]
    return entries([read_row(folder, cell) for cell in cells_of(recipe)], "loss")


class TestRows:
    def test_a_finished_run(self, tmp_path: Path) -> None:
        found = judged(tmp_path, noisy({}))
        for entry in found:
            row = entry.chosen.rows[0]
            assert row.finished
            assert row.losses is not None
            assert row.held_out["loss"] == pytest.approx(row.losses.mean())
            assert (row.parameters, row.adapter_bytes, row.memory_mib) == (row.cell.point.parameters, 4000, 116.0)
            assert entry.chosen.learning_rate == 0.01
        assert [moment.processor_seconds for moment in found[0].chosen.rows[0].course] == [0.75, 1.5, 2.25, 3.0]

    def test_a_search_comes_to_the_cost(self, tmp_path: Path) -> None:
        recipe = recipe_for(tmp_path)
        cell = cells_of(recipe)[0]
        folder = fabricate(recipe, noisy({}), [])
        search = {"seconds": 1.5, "processor_seconds": 2.0}
        write_run(folder.run(cell.name), cell, np.ones(ROWS), search=search)
        row = read_row(folder, cell)
        assert (row.seconds, row.processor_seconds) == (3.5, 5.0)
        assert [moment.processor_seconds for moment in row.course] == [2.75, 3.5, 4.25, 5.0]

    def test_more_ranks_than_it_may_keep_are_told(self, tmp_path: Path) -> None:
        recipe = recipe_for(tmp_path)
        cell = cells_of(recipe)[0]
        folder = fabricate(recipe, noisy({}), [])
        run = folder.run(cell.name)
        write_run(run, cell, np.ones(ROWS))
        start = start_event("made up", ["a", "b"], [(16, 16), (16, 16)], [4, 4], 16)
        append(run.trace, start, {"event": "allocate", "step": 9, "ranks": [2, 2], "budget": 4, "parameters": 128})
        assert [moment.over for moment in read_row(folder, cell).course] == [True, True, False, False]

    def test_a_loss_that_is_not_finite_is_a_failure(self, tmp_path: Path) -> None:
        recipe = recipe_for(tmp_path)
        cell = cells_of(recipe)[0]
        folder = fabricate(recipe, noisy({}), [])
        write_run(folder.run(cell.name), cell, np.full(ROWS, math.nan))
        assert read_row(folder, cell).reason == DIVERGED

    def test_so_is_that_of_one_example(self, tmp_path: Path) -> None:
        """Without it the run would leave the comparison without a word."""
        recipe = recipe_for(tmp_path)
        cell = cells_of(recipe)[0]
        folder = fabricate(recipe, noisy({}), [])
        write_run(folder.run(cell.name), cell, np.ones(ROWS))
        kept = json.loads(folder.run(cell.name).losses.read_text())
        kept["losses"][3] = None
        folder.run(cell.name).losses.write_text(json.dumps(kept))
        row = read_row(folder, cell)
        assert row.reason == "the losses of 1 of 15 held-out examples are not finite: they cannot be compared"
        assert not row.finished

    def test_what_has_not_run_and_what_has_failed(self, tmp_path: Path) -> None:
        recipe = recipe_for(tmp_path)
        first, second, *_ = cells_of(recipe)
        folder = fabricate(recipe, lambda cell: "out of memory", [second])
        assert [read_row(folder, cell).reason for cell in (first, second)] == ["not run yet", "out of memory"]


def test_pairs_are_runs_with_the_same_seed(tmp_path: Path) -> None:
    def losses(cell: Cell) -> list[float] | str:
        if cell.contender.id == "adalora" and cell.seed == 1:
            return "killed"
        return [100.0 * cell.seed + row + (0.5 if cell.contender.id == "adalora" else 0) for row in range(ROWS)]

    found = judged(tmp_path, losses)
    point = found[0].point
    by_id = {entry.contender.id: entry for entry in found}
    table = paired(by_id["adalora"], baseline_of(found, point))
    assert table is not None
    assert table.shape == (2, ROWS)
    assert np.all(table == 0.5)


def test_the_winner_is_the_best_method_that_chooses_ranks(tmp_path: Path) -> None:
    words = ("--methods", "[adalora, depth_linear]")
    found = judged(tmp_path, noisy({"adalora": 0.1, "depth_linear": 0.4, "random": 0.9}), *words)
    best = winner(found, found[0].point)
    assert best is not None
    assert best.contender.id == "depth_linear"
    assert winner([entry for entry in found if entry.contender.kind != "method"], found[0].point) is None
