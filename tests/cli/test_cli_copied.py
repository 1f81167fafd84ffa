"""Commands that are printed to be copied mean the same in a shell, whatever folders are called."""

from __future__ import annotations

import shlex
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from loralloc import UserError
from loralloc.adapter.model_card import Export
from loralloc.files import in_shell
from loralloc.frontier.source import Source
from loralloc.recipe import run as pipeline
from loralloc.recipe.going_on import farewell
from loralloc.recipe.run_folder import RunFolder
from loralloc.recipe.schema import load_recipe
from loralloc.training.signals import Stopped

from .command import done, refused

ODD = "my run's $x"


@pytest.mark.parametrize("name", [ODD, "-x", "a;b", "(a)", "é & ü", "plain/name.yaml"])
def test_a_name_is_one_word(name: str) -> None:
    (word,) = shlex.split(in_shell(name))
    assert Path(word) == Path(name)


def test_the_recipe_that_was_copied(here: Path) -> None:
    said = done("init", "causal-lm/adalora", "--to", f"{ODD}/mine.yaml")
    assert shlex.split(said.partition("then: ")[2]) == ["loralloc", "train", f"{ODD}/mine.yaml"]


def test_a_run_that_goes_on(recipe: Path) -> None:
    settings = load_recipe(recipe, ["--output", ODD])
    said = farewell(Stopped(signal.SIGTERM, 4), settings)
    assert shlex.split(said.partition("go on with ")[2]) == ["loralloc", "train", f"{ODD}/recipe.yaml", "--resume"]


def test_what_a_run_has_kept(run: Path, here: Path) -> None:
    folder = RunFolder(run.rename(here / ODD))
    folder.metrics.unlink()
    word = in_shell(here / ODD)
    kept = f"; its adapter is exported: loralloc evaluate {word} and loralloc report {word} look at it"
    assert folder.kept_hint() == kept
    folder.adapter.rename(folder.trained)
    assert folder.kept_hint() == f"; what it trained is kept: loralloc export {word}"
    assert f"loralloc export {word} writes it" in refused("frontier", here / ODD)


@pytest.mark.usefixtures("unreported")
def test_an_export_that_failed(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise UserError("no")

    monkeypatch.setattr(pipeline, "export_adapter", fail)
    said = refused("train", recipe, "--output", ODD, "--steps", 4)
    command = f"loralloc export {in_shell(ODD)}"
    assert said.endswith(f"what was trained is kept in {ODD}/trained: {command} writes it from there")


def test_a_frontier(run: Path, recipe: Path, here: Path) -> None:
    shutil.copytree(run / "adapter", here / "my adapter")
    given = Source.of(Path("my adapter"), recipe.rename("my recipe.yaml"), Path("my curve"))
    words = ["my adapter", "--recipe", "my recipe.yaml", "--output", "my curve"]
    assert shlex.split(given.named) == words
    run = run.rename(ODD)
    assert shlex.split(Source.of(run, None, None).named) == [ODD]
    assert shlex.split(Source.of(run, None, Path("my curve")).named) == [ODD, "--output", "my curve"]


def test_serving() -> None:
    merged = Export(Path(ODD), "merged", {"a": 4}, 0.0, 1e-5)
    assert shlex.split(merged.serving[0]) == ["vllm", "serve", ODD]
    (line,) = Export(Path(ODD), "ragged", {"a": 4}, 0.0, 1e-5, base="my base", revision="v 1").serving
    words = ["vllm", "serve", "my base", "--revision", "v 1", "--enable-lora", "--max-lora-rank", "8"]
    assert shlex.split(line, comments=True) == [*words, "--lora-modules", f"adapter={ODD}"]
