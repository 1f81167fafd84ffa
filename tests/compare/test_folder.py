"""The folder of a comparison: whose it is, and who may work in it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from loralloc.compare import study
from loralloc.compare.execute import Ended, Job
from loralloc.compare.folder import CompareFolder
from loralloc.compare.results import entries, read_row
from loralloc.errors import UserError
from loralloc.plan import RankPlan

from .fabricate import ROWS, SHAPES, cells_of, fabricate, noisy, recipe_for, uneven, write_run


def refusal(folder: CompareFolder, recipe: object) -> str:
    with pytest.raises(UserError) as error:
        folder.check(recipe)  # type: ignore[arg-type]
    return str(error.value)


def test_what_is_compared_may_change_and_nothing_else(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, "--seeds", "2")
    folder = CompareFolder.of(recipe)
    folder.check(recipe)
    folder.create(recipe, {})
    folder.check(recipe_for(tmp_path, "--seeds", "5", "--methods", "[adalora, ablora]", "--budgets", "[1, 2]"))
    folder.check(recipe_for(tmp_path))
    assert refusal(folder, recipe_for(tmp_path, "--seeds", "2", "--batch_size", "4")) == (
        f"output: {folder.root} holds the comparison of another recipe, which says batch_size: 8, not batch_size: 4; "
        "only the section compare may differ. Name another folder with --output"
    )


@pytest.mark.parametrize("spelled", ["./out", "out/", "../{name}/out", "{folder}/out", "link", "moved"])
def test_its_folder_may_be_named_in_another_way_and_may_move(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelled: str
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("--seeds", "1", "--learning_rates", "1e-2")
    recipe = recipe_for(tmp_path, *words, "--output", "out")
    folder = fabricate(recipe, noisy({"adalora": 0.3}))
    cells = cells_of(recipe)
    found = entries([read_row(folder, cell) for cell in cells], "loss")
    (planned,) = study._retrained(recipe, SHAPES, folder, found)
    write_run(folder.run(planned.name), planned, np.ones(ROWS))
    assert planned.recipe.plan is not None
    RankPlan.load(planned.recipe.plan).save(folder.run(planned.name).plan)
    refused = cells[0].name
    shutil.rmtree(folder.run(refused).root)
    folder.fail(refused, "refused", final=True)
    folder.run_recipe(refused).write_text(study._text(cells[0]))
    if spelled == "moved":
        folder.root.rename("moved")
    else:
        Path("link").symlink_to("out")
    again = recipe_for(tmp_path, *words, "--output", spelled.format(folder=tmp_path, name=tmp_path.name))
    folder = CompareFolder.of(again)
    folder.check(again)
    due = [*cells_of(again), *study._retrained(again, SHAPES, folder, found)]
    assert [cell.name for cell in due if study._is_due(folder, cell, retry=False)] == []
    for cell in due:
        study._check_kept(folder, cell)


def test_runs_of_one_comparison_have_the_same_threads(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path)  # without a section compare: one thread
    folder = CompareFolder.of(recipe)
    folder.create(recipe, {})
    other = recipe_for(tmp_path, "--threads", "2")
    folder.check(other)
    cell, *_ = cells_of(recipe)
    (folder.run(cell.name).checkpoints / "checkpoint-4").mkdir(parents=True)
    folder.check(recipe_for(tmp_path, "--threads", "1", "--seeds", "5"))
    assert refusal(folder, other) == (
        f"output: {folder.root} has runs that were made with compare.threads: 1, on which losses depend in their last "
        "digits, and this comparison has 2; give the same number, or name another folder with --output"
    )
    folder.create(other, {})
    folder.check(other)
    assert "with compare.threads: 2, on which" in refusal(folder, recipe)


def test_a_comparison_that_was_killed_at_once_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_for(tmp_path)
    folder = CompareFolder.of(recipe)
    folder.root.mkdir()
    (folder.root / ".compare.yaml.4711").write_text("half of a recipe")
    folder.check(recipe)
    alive = Path.mkdir

    def killed(path: Path, *args: bool, **kwargs: bool) -> None:
        if path.parent == folder.root:
            raise KeyboardInterrupt
        alive(path, *args, **kwargs)

    with monkeypatch.context() as patched, suppress(KeyboardInterrupt):
        patched.setattr(Path, "mkdir", killed)
        folder.create(recipe, {})
    folder.check(recipe)


def test_a_run_without_its_recipe_is_made_again(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, "--seeds", "1")
    cell, *_ = cells_of(recipe)
    folder = fabricate(recipe, noisy({}), [cell])
    folder.run(cell.name).recipe.unlink()
    study._check_kept(folder, cell)
    assert study._is_due(folder, cell, retry=False)


def test_rows_and_weights_may_not_change(tmp_path: Path) -> None:
    """Losses are compared row by row: runs of other rows would be paired with the wrong ones."""
    recipe = recipe_for(tmp_path)
    folder = CompareFolder.of(recipe)
    known = SHAPES.depends_on
    folder.check_unchanged(known)
    folder.create(recipe, {})
    folder.check_unchanged(known)
    fabricate(recipe, noisy({}), cells_of(recipe)[:1])
    folder.check_unchanged(known)
    other_rows = {**known, "data": {"test": {"rows": 15, "sha256": "another"}}}
    for changed, words in (
        (other_rows, "data.test has as many examples as before, but different ones or another order"),
        ({**known, "data": {"test": {"rows": 9, "sha256": "another"}}}, "data.test has 9 examples and had 15"),
        ({**known, "base": {"tensors": 4, "sha256": "another"}}, "the base model has other weights"),
    ):
        with pytest.raises(UserError) as error:
            folder.check_unchanged(changed)
        assert str(error.value) == (
            f"output: {folder.root} has runs that were made with something else: {words}. They cannot be compared with "
            "new ones; name another folder with --output"
        )


def test_a_recipe_that_reads_what_may_be_deleted(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path)
    folder = CompareFolder.of(recipe)
    inside = folder.runs / "one" / "merged"
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"name": str(inside)})})
    folder.create(recipe, {})
    folder.check(recipe)
    inside.mkdir(parents=True)
    assert refusal(folder, recipe) == (
        f"model.name: a run that is repeated deletes {inside}, which is read here; move it out of {folder.root}, or "
        "choose another folder with --output"
    )


def test_a_folder_that_is_something_else(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path)
    folder = CompareFolder.of(recipe)
    folder.root.write_text("a file")
    assert refusal(folder, recipe) == (
        f"output: {folder.root} is a file; name a folder for the comparison with --output"
    )
    folder.root.unlink()
    folder.root.mkdir()
    folder.check(recipe)
    (folder.root / "thesis.tex").touch()
    assert refusal(folder, recipe) == (
        f"output: {folder.root} exists and is no comparison; name another folder with --output"
    )


def test_one_comparison_at_a_time(tmp_path: Path) -> None:
    folder = CompareFolder.of(recipe_for(tmp_path))
    with folder.locked(), pytest.raises(UserError) as error, folder.locked():
        pass
    assert str(error.value) == f"output: another loralloc compare is at work in {folder.root}; wait for it"
    with folder.locked():
        pass


def test_a_run_of_other_settings_is_no_run_of_this_recipe(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path)
    first, second, *_ = cells_of(recipe)
    run = fabricate(recipe, noisy({}), [first]).run(first.name)
    assert run.holds(first.recipe)
    assert not run.holds(second.recipe)


def test_a_plan_is_trained_again_when_it_has_changed(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, "--seeds", "1", "--learning_rates", "1e-2")
    cells = {cell.contender.id: cell for cell in cells_of(recipe)}
    folder = fabricate(recipe, noisy({"adalora": 0.3}))
    found = entries([read_row(folder, cell) for cell in cells.values()], "loss")
    (again,) = study._retrained(recipe, SHAPES, folder, found)
    write_run(folder.run(again.name), again, np.ones(ROWS))
    adapted = {name: module for name, module in uneven((0, 4, 3, 2)).modules.items() if module.rank}
    RankPlan("made-up", adapted).save(folder.run(again.name).plan)
    assert not study._is_due(folder, again, retry=False)
    assert read_row(folder, again).ranks == RankPlan.load(folder.run(cells["adalora"].name).plan).ranks
    uneven((1, 1, 4, 3)).save(folder.run(cells["adalora"].name).plan)
    assert study._is_due(folder, again, retry=False)


def test_a_plan_is_trained_at_the_scale_of_all_other_runs(tmp_path: Path) -> None:
    """ALLoRA trains at scale 1, and so its plan says; plain LoRA at its ranks is compared with plain LoRA."""
    recipe = recipe_for(tmp_path, "--seeds", "1", "--learning_rates", "1e-2")
    cells = {cell.contender.id: cell for cell in cells_of(recipe)}
    folder = fabricate(recipe, noisy({"adalora": 0.3}))
    found = entries([read_row(folder, cell) for cell in cells.values()], "loss")
    own = folder.run(cells["adalora"].name).plan
    (again,) = study._retrained(recipe, SHAPES, folder, found)
    assert again.recipe.plan == str(own), "its scale is the recipe's, 8 / 4"
    plan = RankPlan.load(own)
    replace(plan, modules={name: replace(module, scale=1.0) for name, module in plan.modules.items()}).save(own)
    (again,) = study._retrained(recipe, SHAPES, folder, found)
    assert again.recipe.plan is not None
    assert RankPlan.load(again.recipe.plan).modules == plan.modules
    assert {module.scale for module in RankPlan.load(own).modules.values()} == {1.0}


def test_a_failed_plan_is_trained_again_when_it_has_changed(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, "--seeds", "1", "--learning_rates", "1e-2")
    cells = {cell.contender.id: cell for cell in cells_of(recipe)}
    folder = fabricate(recipe, noisy({"adalora": 0.3}))
    (again,) = study._retrained(
        recipe, SHAPES, folder, entries([read_row(folder, cell) for cell in cells.values()], "loss")
    )
    folder.fail(again.name, "refused", final=True)
    folder.run_recipe(again.name).write_text(study._text(again))
    assert not study._is_due(folder, again, retry=False)
    uneven((4, 3, 2, 0)).save(folder.run(cells["adalora"].name).plan)  # the same ranks in other modules
    assert study._is_due(folder, again, retry=False)


def test_a_failure_counts_for_the_settings_that_it_was_of(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, "--seeds", "1")
    cell, *_ = cells_of(recipe)
    folder = fabricate(recipe, noisy({}), [])
    folder.fail(cell.name, "refused", final=True)
    folder.run_recipe(cell.name).write_text(study._text(cell))
    assert not study._is_due(folder, cell, retry=False)
    changed = cells_of(recipe_for(tmp_path, "--seeds", "1", "--training.batch_size", "3"))[0]
    assert changed.name == cell.name
    assert study._is_due(folder, replace(cell, recipe=changed.recipe), retry=False)


def test_a_run_that_finished_but_diverged_is_repeated_on_request_alone(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, "--seeds", "1")
    diverged, fine, *_ = cells = cells_of(recipe)
    folder = fabricate(recipe, lambda cell: [np.nan] * ROWS if cell is diverged else [1.0] * ROWS, cells)
    assert study._is_due(folder, diverged, retry=True)
    assert not study._is_due(folder, diverged, retry=False)
    assert not study._is_due(folder, fine, retry=True)

    class Nothing:
        """Repeats nothing, but is asked to."""

        asked: Sequence[Job] = ()

        def run(self, jobs: Sequence[Job], started: object) -> Iterator[Ended]:
            self.asked = jobs
            return iter(())

    executor = Nothing()
    study._run(folder, cells, executor, True, 1, study.Watcher())
    assert [job.name for job in executor.asked] == [diverged.name]
    assert not folder.run(diverged.name).root.exists(), "or the run would take itself for finished"
    assert folder.run(fine.name).metrics.is_file()
