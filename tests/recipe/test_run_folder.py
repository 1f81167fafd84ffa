"""A run folder that a killed process has begun, or half cleared, can be used again."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest

from loralloc.recipe import run_folder
from loralloc.recipe.run_folder import RunFolder
from loralloc.recipe.schema import Recipe, load_recipe
from loralloc.recipes import list_recipes


def recipe_of(folder: Path) -> Recipe:
    return load_recipe(list_recipes()["demo/compare"], ["--output", str(folder)])


def write_run(recipe: Recipe) -> RunFolder:
    """A run that has finished, with a file that somebody has put there."""
    folder = RunFolder.of(recipe)
    folder.create(recipe)
    for name in ("metrics.json", "losses.json", "report.html", "notes.txt"):
        (folder.root / name).write_text("{}")
    for path in (folder.checkpoints / "checkpoint-4", folder.search.root, folder.root / "merged"):
        path.mkdir(parents=True)
    return folder


@pytest.mark.parametrize("removed", range(20))
def test_one_that_was_half_cleared_is_a_run_to_replace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, removed: int
) -> None:
    recipe = recipe_of(tmp_path / "run")
    folder, alive, left = write_run(recipe), run_folder._remove, iter(range(removed))

    def remove(path: Path) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        alive(path)

    with monkeypatch.context() as patched, suppress(KeyboardInterrupt):
        patched.setattr(run_folder, "_remove", remove)
        folder.create(recipe)
    assert RunFolder.for_new_run(recipe, replace=True) == folder
    assert not (folder.metrics.is_file() and removed), "it would be taken for finished"
    folder.create(recipe)
    assert sorted(path.name for path in folder.root.iterdir()) == ["notes.txt", "recipe.yaml"]


def test_one_that_was_killed_while_it_wrote_its_recipe_is_unused(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path / "run")
    folder = RunFolder.of(recipe)
    folder.root.mkdir()
    (folder.root / ".recipe.yaml.4711").write_text("half of a recipe")
    assert RunFolder.for_new_run(recipe, replace=False) == folder
    folder.create(recipe)
    assert [path.name for path in folder.root.iterdir()] == ["recipe.yaml"]
