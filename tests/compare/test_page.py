"""The page, the table and the figures of a comparison that nobody has run."""

from __future__ import annotations

import csv
import html
import json
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cli.command import RECIPE
from matplotlib.figure import Figure

from loralloc.compare import study
from loralloc.compare.cells import comparable
from loralloc.compare.fairness import fairness
from loralloc.compare.figures import lines, rate_figure
from loralloc.compare.folder import CompareFolder
from loralloc.compare.grid import Cell
from loralloc.compare.page import write_page
from loralloc.compare.results import Entry, Moment, Row, entries, read_row
from loralloc.compare.tables import agreement, equal_time, result_table, signed
from loralloc.compare.verdict import Compared
from loralloc.recipe.schema import Recipe

from .fabricate import ROWS, SHAPES, Losses, cells_of, fabricate, noisy, recipe_for, write_run


def page_of(recipe: Recipe, losses: Losses) -> str:
    folder = fabricate(recipe, losses)
    write_page(folder, recipe, SHAPES, [read_row(folder, cell) for cell in cells_of(recipe)])
    return folder.page.read_text(encoding="utf-8")


def words_of(page: str) -> str:
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<(style|svg).*?</\1>|<[^>]+>", " ", page, flags=re.S)))


def test_it_says_who_is_better_first_and_how_it_knows(tmp_path: Path) -> None:
    page = page_of(recipe_for(tmp_path, "--budgets", "[1, 2]", "--seeds", "4"), noisy({"adalora": 0.3}, rows=0.02))
    words = words_of(page)
    (verdict,) = re.findall(r"<h1[^>]*>(.*?)</h1>", page)
    assert verdict.startswith("At average rank 1, AdaLoRA is better than plain LoRA by 0.")
    assert "; at average rank 2, AdaLoRA is better" in verdict
    for told in (
        "Average rank 1: 160 parameters",
        "the same 3 learning rates with the same 4 seeds, for 16 steps of 8 examples",
        "After 3 s of processor time, when the cheapest had ended",
        "DoRA has plain LoRA's rank; its magnitudes come on top",
        "random ranks",
        "truncation",
    ):
        assert told in words
    assert "Failed runs" not in words
    assert page.count("<svg") == 6


def test_files_beside_it(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path)
    page_of(recipe, noisy({}))
    out = tmp_path / "out"
    assert sorted(path.name for path in (out / "figures").iterdir()) == [
        "r2-cost.png",
        "r2-differences.png",
        "r2-learning-rates.png",
    ]
    with (out / "compare.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(cells_of(recipe)) == 7 * 3 * 3
    assert {row["state"] for row in rows} == {"finished"}
    assert sum(row["chosen"] == "True" for row in rows) == 7 * 3
    assert {row["parameters"] for row in rows} == {"320"}


def test_what_the_page_says_stands_in_a_file_of_numbers(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, "--budgets", "[1, 2]", "--seeds", "4")
    words = words_of(page_of(recipe, noisy({"adalora": 0.3}, rows=0.02)))
    found = json.loads((tmp_path / "out" / "compare.json").read_text(encoding="utf-8"))
    assert [part["budget"] for part in found["budgets"]] == ["average rank 1", "average rank 2"]
    for part in found["budgets"]:
        assert part["verdict"] in words
        plain, *others = part["contenders"]
        assert plain["contender"] == "plain LoRA"
        assert "difference" not in plain
        assert plain["seeds"] == 4
        adalora = next(one for one in others if one["contender"] == "AdaLoRA")
        assert adalora["difference"]["mean"] == pytest.approx(adalora["loss"] - plain["loss"])
        assert adalora["difference"]["low"] < adalora["difference"]["mean"] < adalora["difference"]["high"] < 0
        assert signed(adalora["difference"]["mean"]) in words


def another_task_loss(folder: CompareFolder, recipe: Recipe, factor: float) -> list[Row]:
    """Make the task's loss another quantity than the mean loss of a row, as it is in multiple choice."""
    for cell in cells_of(recipe):
        run = folder.run(cell.name)
        metrics = json.loads(run.metrics.read_text(encoding="utf-8"))
        metrics["test"]["loss"] *= factor
        run.write_json(run.metrics, metrics)
    return [read_row(folder, cell) for cell in cells_of(recipe)]


def test_percentages_are_of_the_losses_that_differ(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path)
    folder = fabricate(recipe, noisy({"adalora": 0.3}, rows=0.02))
    write_page(folder, recipe, SHAPES, another_task_loss(folder, recipe, 6.0))
    (part,) = json.loads(folder.record.read_text(encoding="utf-8"))["budgets"]
    plain, adalora = part["contenders"][:2]
    assert plain["loss"] == pytest.approx(6 * plain["loss_per_example"])
    gain = -adalora["difference"]["mean"]
    assert gain == pytest.approx(plain["loss_per_example"] - adalora["loss_per_example"])
    assert f"by {gain:.4f} in loss ({gain / plain['loss_per_example']:.1%})" in part["verdict"]
    words = words_of(folder.page.read_text(encoding="utf-8"))
    assert "learning rate test loss accuracy loss of a row difference" in words
    assert re.search(rf"plain LoRA 0.01 {plain['loss']:.4f} \S+ {plain['loss_per_example']:.4f} AdaLoRA", words)
    with folder.table.open(encoding="utf-8") as file:
        row = next(csv.DictReader(file))
    assert float(row["held_out_loss"]) == pytest.approx(6 * float(row["held_out_loss_per_example"]))


def test_the_smallest_difference_that_matters_is_a_share_of_the_losses_that_differ(tmp_path: Path) -> None:
    """Of a row's loss of 1, not of a task's loss of 60, of which 1 % is more than these runs leave open."""
    recipe = recipe_for(tmp_path)
    folder = fabricate(recipe, noisy({}))
    told = write_page(folder, recipe, SHAPES, another_task_loss(folder, recipe, 60.0))
    assert told.startswith("Not enough runs to tell whether AdaLoRA, ")


def test_two_losses_are_told_apart_where_they_are_two(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path)
    folder = fabricate(recipe, noisy({}))
    one = entries([read_row(folder, cell) for cell in cells_of(recipe)], "loss")
    two = entries(another_task_loss(folder, recipe, 1.1), "loss")
    told = "The test loss is that of the task. Differences are of the loss of a row, and percentages of its mean: "
    for task, said in {
        "causal-lm": "every row counts the same, however long it is.",
        "multiple-choice": "minus the logarithm of the right choice's share of the likelihood of all choices, where "
        "the loss of the task is that of the right answers' tokens alone.",
    }.items():
        of_task = recipe.model_copy(update={"task": task})
        assert f"{told}{said}" in fairness(of_task, SHAPES, two)
        assert not any("the loss of a row" in sentence for sentence in fairness(of_task, SHAPES, one))
    assert "loss of a row" not in _result_head(one)
    assert "loss of a row" in _result_head(two)


def _result_head(found: Sequence[Entry]) -> tuple[str, ...]:
    return result_table([Compared(entry, None) for entry in found[1:]], found[0], "accuracy", "test").head


def test_a_column_of_its_own_has_a_cell_for_who_has_failed(tmp_path: Path) -> None:
    def losses(cell: Cell) -> object:
        return "killed" if cell.contender.id == "adalora" else noisy({})(cell)

    recipe = recipe_for(tmp_path)
    folder = fabricate(recipe, losses)  # type: ignore[arg-type]
    rows = [
        row if row.reason else replace(row, held_out={"loss": 6.0, "accuracy": 0.9})
        for row in (read_row(folder, cell) for cell in cells_of(recipe))
    ]
    found = entries(rows, "loss")
    table = result_table([Compared(entry, None) for entry in found[1:]], found[0], "accuracy", "test")
    assert {len(row) for row in table.rows} == {len(table.head)} == {8}
    assert table.rows[1] == ("AdaLoRA", *["\N{EN DASH}"] * 7)


def test_what_nobody_has_found_is_null_there(tmp_path: Path) -> None:
    page_of(recipe_for(tmp_path), lambda cell: "killed by SIGKILL")
    (part,) = json.loads((tmp_path / "out" / "compare.json").read_text(encoding="utf-8"))["budgets"]
    assert all(one["loss"] is None and one["loss_per_example"] is None for one in part["contenders"])
    assert all(one["difference"] is None for one in part["contenders"][1:])


def test_failures_are_rows_with_their_reasons(tmp_path: Path) -> None:
    def losses(cell: Cell) -> object:
        return "the loss diverged: <b>lower</b> it" if cell.learning_rate == 0.02 else noisy({})(cell)

    page = page_of(recipe_for(tmp_path), losses)  # type: ignore[arg-type]
    words = words_of(page)
    assert "21 runs of 63 failed; the reasons are below." in words
    assert "r2-adalora-lr0.02-s0" in words
    assert "&lt;b&gt;lower&lt;/b&gt;" in page
    assert "<b>lower" not in page


def test_all_may_have_failed(tmp_path: Path) -> None:
    words = words_of(page_of(recipe_for(tmp_path), lambda cell: "killed by SIGKILL"))
    assert "No method can be judged, because runs of AdaLoRA" in words


def test_rates_that_were_passed_over_are_told(tmp_path: Path) -> None:
    """One failed run at plain LoRA's best rate makes another rate its own, and a method look better."""

    def losses(cell: Cell) -> object:
        failed = cell.contender.id == "lora" and cell.learning_rate == 0.01 and cell.seed == 0
        return "logits differ" if failed else noisy({})(cell)

    words = words_of(page_of(recipe_for(tmp_path), losses))  # type: ignore[arg-type]
    assert "Learning rates at which a run has failed were passed over: 0.01 of plain LoRA." in words
    several = recipe_for(tmp_path, "--budgets", "[1, 2]", "--output", str(tmp_path / "several"))
    told = "passed over: 0.01 of plain LoRA at average rank 1 and 0.01 of plain LoRA at average rank 2."
    assert told in words_of(page_of(several, losses))  # type: ignore[arg-type]
    fine = page_of(recipe_for(tmp_path, "--output", str(tmp_path / "fine")), noisy({}))
    nothing = page_of(recipe_for(tmp_path, "--output", str(tmp_path / "nothing")), lambda cell: "killed")
    assert not any("passed over" in words_of(page) for page in (fine, nothing))


def test_runs_without_a_result_are_told_where_their_losses_are(tmp_path: Path) -> None:
    def losses(cell: Cell) -> object:
        return "diverged" if (cell.contender.id, cell.seed) == ("adalora", 1) else noisy({"adalora": 0.3})(cell)

    words = words_of(page_of(recipe_for(tmp_path, "--learning_rates", "1e-2", "--peers", "[]"), losses))  # type: ignore[arg-type]
    assert "No method can be judged, because runs of AdaLoRA or of plain LoRA have no result" in words
    assert "(2 of 3 runs)" in words


def test_a_run_that_will_be_repeated_makes_the_verdict_wait(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path)
    folder = fabricate(recipe, noisy({"adalora": 0.3}, rows=0.02))
    shutil.rmtree(folder.run(cells_of(recipe)[-1].name).root)
    write_page(folder, recipe, SHAPES, [read_row(folder, cell) for cell in cells_of(recipe)])
    assert "The same command repeats 1 run that has no result; so far, AdaLoRA is better" in words_of(
        folder.page.read_text(encoding="utf-8")
    )


def test_allora_is_told_to_be_without_dropout(tmp_path: Path) -> None:
    words = [
        words_of(page_of(recipe_for(tmp_path, "--methods", methods, "--output", str(tmp_path / name)), noisy({})))
        for name, methods in {"with": "[adalora, allora]", "without": "[adalora]"}.items()
    ]
    assert ["ALLoRA trains without dropout and at scale 1" in said for said in words] == [True, False]


def test_one_seed_and_one_rate_are_told_what_they_are_worth(tmp_path: Path) -> None:
    words = words_of(page_of(recipe_for(tmp_path, "--seeds", "1", "--learning_rates", "1e-2"), noisy({"adalora": 0.3})))
    assert "One seed cannot tell: with this one AdaLoRA is ahead of plain LoRA" in words
    assert "One seed: intervals are over the rows alone." in words
    assert "One learning rate: it may suit one method better than another." in words
    more = words_of(page_of(recipe_for(tmp_path, "--output", str(tmp_path / "more")), noisy({"adalora": 0.3})))
    assert "One seed" not in more
    assert "One learning rate" not in more


@pytest.mark.parametrize("seeds", [1, 3])
def test_rows_without_losses_of_their_own_have_no_part_in_intervals(tmp_path: Path, seeds: int) -> None:
    """Runs that learn preferences save no losses.json: their mean loss counts as a single row."""
    recipe = recipe_for(tmp_path, "--seeds", str(seeds), "--learning_rates", "1e-2")
    folder = fabricate(recipe, noisy({"adalora": 0.3}, seeds=0.05))
    for path in folder.runs.glob("*/losses.json"):
        path.unlink()
    write_page(folder, recipe, SHAPES, [read_row(folder, cell) for cell in cells_of(recipe)])
    words = words_of(folder.page.read_text(encoding="utf-8"))
    assert (
        "Intervals are over the seeds alone: of the test data only the mean loss of a run is known, so nothing says "
        "how much other rows would change it. A difference that is clear here may be one of these rows alone."
    ) in words
    assert "A difference is the mean over seeds of a contender's loss minus plain LoRA's, in runs" in words
    assert "Paired by seed. Thick" in words
    assert "over the rows" not in words
    assert ("One seed: there are no intervals." in words) == (seeds == 1)
    adalora = json.loads(folder.record.read_text(encoding="utf-8"))["budgets"][0]["contenders"][1]["difference"]
    assert all(
        (adalora[name] is None) == (seeds == 1) for name in ("low", "high", "low_all", "high_all", "p", "adjusted")
    )
    assert ("\N{EN DASH} \N{EN DASH}" in words) == (seeds == 1), "neither interval nor p"
    again = words_of(page_of(recipe, noisy({})))
    assert "Intervals are over the seeds alone" not in again
    assert "A difference is the mean over seeds and rows of a contender's loss minus plain LoRA's" in again


def test_no_test_data_are_told(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, test=None)
    folder = fabricate(recipe, noisy({}))
    rows = [read_row(folder, cell) for cell in cells_of(recipe)]
    write_page(folder, recipe, replace(SHAPES, test=None), rows)
    words = words_of(folder.page.read_text())
    assert "There are no test data: losses are of the validation data" in words
    assert "learning rate validation loss accuracy" in words
    assert "learning rate test loss accuracy" in words_of(
        page_of(recipe_for(tmp_path, "--output", str(tmp_path / "with")), noisy({}))
    )


def test_rows_that_have_been_seen_are_told(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path)
    folder = fabricate(recipe, noisy({}))
    rows = [read_row(folder, cell) for cell in cells_of(recipe)]
    for repeated in ({"training": 3, "validation": 0}, {}):
        write_page(folder, recipe, replace(SHAPES, repeated=repeated), rows)
        words = words_of(folder.page.read_text())
        told = "3 of the 15 rows on which methods are judged are among the training data too."
        assert (told in words) == bool(repeated)
        assert "among the validation data" not in words


def test_rows_cut_off_to_judge_by_are_told(tmp_path: Path) -> None:
    recipe = comparable(recipe_for(tmp_path, "--data.validation", "0.2", test=None))
    words = words_of(page_of(recipe, noisy({})))
    assert "and judged on a share of 0.2 of the training data, the same rows in all runs" in words
    named = recipe_for(tmp_path, "--output", str(tmp_path / "named"))
    assert "and judged on the test data" in words_of(page_of(named, noisy({})))


def test_the_cost_of_finding_a_plan_is_told(tmp_path: Path) -> None:
    told = "at a method's ranks is that of its own training; the run that found the ranks comes on top"
    recipe = recipe_for(tmp_path, "--seeds", "1", "--learning_rates", "1e-2")
    folder = fabricate(recipe, noisy({"adalora": 0.3}))
    rows = [read_row(folder, cell) for cell in cells_of(recipe)]
    for again in study._retrained(recipe, SHAPES, folder, entries(rows, "loss")):
        write_run(folder.run(again.name), again, np.ones(ROWS), processor_seconds=1.0)
        with_plan = [*rows, read_row(folder, again)]
    write_page(folder, recipe, SHAPES, with_plan)
    words = words_of(folder.page.read_text(encoding="utf-8"))
    assert told in words
    assert "After 3 s of processor time, when the cheapest had ended" in words
    write_page(folder, recipe, SHAPES, rows)
    assert told not in words_of(folder.page.read_text(encoding="utf-8"))


def test_at_equal_time_nobody_is_judged_by_the_middle_of_a_run(tmp_path: Path) -> None:
    """Half way 2, at the end 1: a run that is at 98 % then has a loss of 1.04, not of 2."""
    recipe = recipe_for(tmp_path, "--seeds", "1", "--learning_rates", "1e-2", "--peers", "[]")
    folder = fabricate(recipe, noisy({}))
    courses = {
        "lora": (Moment(50.0, 2.0, over=False), Moment(100.0, 1.0, over=False)),
        "adalora": (Moment(51.0, 2.0, over=True), Moment(102.0, 1.0, over=False)),
        "random": (Moment(101.0, 2.0, over=False), Moment(202.0, 1.0, over=False)),
    }
    rows = [
        replace(read_row(folder, cell), course=course, processor_seconds=course[-1].processor_seconds)
        for cell in cells_of(recipe)
        if (course := courses.get(cell.contender.id))
    ]
    limit, table = equal_time(entries(rows, "loss"))
    assert limit == pytest.approx(100)
    assert table is not None
    assert [row[1:] for row in table.rows] == [
        ("100%", "1.0000", "1.0000", ""),
        ("98%", "1.0392", "1.0000", "with more ranks than it may keep"),
        ("50%", "nothing yet", "1.0000", ""),
    ]


def test_the_cheapest_is_at_its_end_whatever_rounding_says(tmp_path: Path) -> None:
    """The sum of these three, divided by 3, is larger than their exact mean."""
    recipe = recipe_for(tmp_path, "--seeds", "3", "--learning_rates", "1e-2", "--peers", "[]")
    folder = fabricate(recipe, noisy({}))
    costs = (92.48, 5.75, 63.0)
    rows = [
        replace(row, course=(Moment(cost, 1.0, over=False),), processor_seconds=cost)
        for cell in cells_of(recipe)
        if (row := read_row(folder, cell)) and (cost := costs[cell.seed] * (2 if cell.contender.id == "random" else 1))
    ]
    _, table = equal_time(entries(rows, "loss"))
    assert table is not None
    assert [row[1:3] for row in table.rows[:2]] == [("100%", "1.0000")] * 2


def curves(figure: Figure) -> list[list[float]]:
    """The heights of the lines, without the dots and the lines to their labels."""
    return [list(map(float, line.get_ydata())) for line in figure.axes[0].lines if len(line.get_xdata()) == 3]


def test_one_that_diverges_does_not_hide_the_learning_rates_of_the_others(tmp_path: Path) -> None:
    def losses(cell: Cell) -> list[float]:
        return [90.0] * ROWS if (cell.contender.id, cell.learning_rate) == ("lora", 0.02) else noisy({})(cell)

    recipe = recipe_for(tmp_path)
    folder = fabricate(recipe, losses)
    found = entries([read_row(folder, cell) for cell in cells_of(recipe)], "loss")
    figure = rate_figure(found, "loss", lines(found))
    low, high = figure.axes[0].get_ylim()
    assert 0 < low < min(trial.score for entry in found for trial in entry.trials)
    assert max(entry.chosen.score for entry in found) < high < 5
    assert len(set(lines(found).values())) == len(found)


def test_a_metric_of_which_more_is_better_keeps_its_sign_in_the_figure(tmp_path: Path) -> None:
    """The accuracy of a made-up run is 1 − loss / 10: below 0 for a loss of 15."""
    recipe = recipe_for(tmp_path)
    folder = fabricate(recipe, lambda cell: [15.0] * ROWS if cell.learning_rate == 0.02 else [5.0] * ROWS)
    found = entries([read_row(folder, cell) for cell in cells_of(recipe)], "accuracy")
    drawn = curves(rate_figure(found, "accuracy", lines(found)))
    assert len(drawn) == len(found)
    assert all(heights == pytest.approx([0.5, 0.5, -0.5]) for heights in drawn)


def test_who_looks_at_training_examples_and_who_missed_the_budget_is_told(tmp_path: Path) -> None:
    variants = "{gated: {name: ablora, score: gate}}"
    recipe = recipe_for(tmp_path, "--methods", "[adalora, ablora, gated]", "--variants", variants)
    folder = fabricate(recipe, noisy({}))
    over = next(cell for cell in cells_of(recipe) if cell.contender.id == "adalora")
    run = folder.run(over.name)
    run.metrics.write_text(run.metrics.read_text().replace('"final_parameters": 320', '"final_parameters": 321'))
    write_page(folder, recipe, SHAPES, [read_row(folder, cell) for cell in cells_of(recipe)])
    words = words_of(folder.page.read_text(encoding="utf-8"))
    assert "AB-LoRA looks at held-out examples, which are cut from the training data" in words, "gates need none"
    assert "AdaLoRA did not keep to the budget" in words


def test_names_are_escaped_and_nothing_is_loaded_from_anywhere(tmp_path: Path) -> None:
    page = page_of(recipe_for(tmp_path, "--model.name", "<script>alert(1)</script>"), noisy({}))
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", page)


def test_the_same_runs_give_the_same_bytes(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path)
    assert page_of(recipe, noisy({})) == page_of(recipe, noisy({}))


@pytest.mark.parametrize(("seeds", "said"), [(1, "\N{EN DASH}"), (2, "in common"), (3, "in common")])
def test_plans_agree_between_seeds(tmp_path: Path, seeds: int, said: str) -> None:
    recipe = recipe_for(tmp_path, "--seeds", str(seeds), text=RECIPE)
    folder = fabricate(recipe, noisy({}))
    found = {
        entry.contender.id: entry for entry in entries([read_row(folder, cell) for cell in cells_of(recipe)], "loss")
    }
    assert agreement(found["lora"].chosen) == "even"
    assert agreement(found["adalora"].chosen).endswith(said)


def test_signs() -> None:
    assert (signed(0.0), signed(-math.inf)) == ("+0.0000", "\N{MINUS SIGN}inf")
