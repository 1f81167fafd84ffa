"""One run in a process of its own: it waits for an orphan that is at the same, and says what went wrong."""

from __future__ import annotations

import fcntl
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from loralloc.compare import cell, study
from loralloc.errors import UserError
from loralloc.recipe.changes import NotResumableError
from loralloc.recipe.run_folder import HEADER, RunFolder
from loralloc.recipe.schema import Recipe
from loralloc.recipe.stages import Stage

from .fabricate import recipe_for


def test_it_waits_for_a_run_whose_comparison_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, ran = tmp_path / "a.yaml", threading.Event()
    path.write_text("task: a\n")
    monkeypatch.setattr(cell, "train", lambda recipe, peer: ran.set())
    work = threading.Thread(target=cell.run_cell, args=(path, None, 1))
    with path.open() as orphans:
        fcntl.flock(orphans, fcntl.LOCK_EX)
        study._write_recipe(path, "task: a\n")  # as a comparison does that goes on
        work.start()
        assert not ran.wait(0.3)
    assert ran.wait(10)
    work.join()


def test_another_recipe_takes_the_place_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    for text in ("a", "b"):
        study._write_recipe(path, text)
        assert path.read_text() == text


def test_a_run_that_cannot_go_on_starts_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried: list[bool] = []

    def run(recipe: object, peer: str | None, resume: bool) -> None:
        tried.append(resume)
        if resume:
            raise NotResumableError("torch is 9.9 and was 2.10")

    (tmp_path / "run" / "checkpoints" / "checkpoint-4").mkdir(parents=True)
    (tmp_path / "run" / "recipe.yaml").write_text(HEADER)
    recipe = SimpleNamespace(output=str(tmp_path / "run"))
    monkeypatch.setattr(cell, "load_recipe", lambda path: recipe)
    monkeypatch.setattr(RunFolder, "holds", lambda folder, given: given is recipe)
    monkeypatch.setattr(cell, "_train", run)
    cell.train(tmp_path / "a.yaml", None)
    assert tried == [True, False]
    assert capsys.readouterr().err == "torch is 9.9 and was 2.10. The run starts over\n"


def test_who_has_diverged_is_told_what_a_comparison_can_do(tmp_path: Path) -> None:
    said = SimpleNamespace(recipe=recipe_for(tmp_path, "--training.learning_rate", "30"), screen=cell.Said())
    for bad, words in (
        (8, None),
        (9, "9 of 16 steps were skipped because their gradients were not finite, and more than"),
    ):
        plan = SimpleNamespace(provenance={"bad_steps": bad, "steps": 16})
        failure = Stage.failure(said, plan)  # type: ignore[arg-type]
        assert failure == (
            words
            and f"the training failed: {words} half is too many; the learning rate is 30: lower ones in "
            "compare.learning_rates may do better, and --retry repeats this run"
        )


def test_a_run_that_was_half_removed_starts_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_for(tmp_path)
    folder = RunFolder(tmp_path / "out")
    (folder.checkpoints / "checkpoint-4").mkdir(parents=True)
    (folder.checkpoints / "checkpoint-4" / "weights").write_text("old")
    folder.metrics.write_text("{}")
    tried: list[bool] = []

    def run(recipe: Recipe, peer: str | None, resume: bool) -> None:
        RunFolder.for_new_run(recipe, replace=not resume)
        tried.append(resume)

    monkeypatch.setattr(cell, "load_recipe", lambda path: recipe)
    monkeypatch.setattr(cell, "_train", run)
    cell.train(tmp_path / "a.yaml", None)
    assert tried == [False]


@pytest.mark.parametrize("error", [UserError("lower the rate"), FloatingPointError("lower the rate")])
def test_what_would_fail_again_has_an_exit_code_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def fail(recipe: Path, peer: str | None) -> None:
        raise error

    path = tmp_path / "a.yaml"
    path.touch()
    monkeypatch.setattr(cell, "train", fail)
    assert cell.run_cell(path, None, 1) == cell.REFUSED
    assert capsys.readouterr().err == "error: lower the rate\n"
    monkeypatch.setattr(cell, "train", lambda recipe, peer: None)
    assert cell.run_cell(path, None, 1) == 0
