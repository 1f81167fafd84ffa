"""What the shell completes, asked as a shell asks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from loralloc.cli import completion
from loralloc.recipes import list_recipes


def completed(*words: str) -> list[str]:
    """The lines that bash gets for a command line whose last word is incomplete."""
    asked = {
        "_LORALLOC_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(("loralloc", *words)),
        "COMP_CWORD": str(len(words)),
    }
    code = "import sys; sys.argv = ['loralloc']; from loralloc.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **asked},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (
        "adalora.yaml",
        "examples/qnli.yaml",
        "runs/a/recipe.yaml",
        "runs/a/adapter/adapter_config.json",
        "runs/b/recipe.yaml",
        "runs/notes.txt",
        ".hidden/recipe.yaml",
        "data/train.jsonl",
        "data/test.csv.gz",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_shell_is_told(place: Path) -> None:
    assert completed("init", "causal-lm/") == [name for name in list_recipes() if name.startswith("causal-lm/")]
    assert completed("report", "ru") == ["runs/a", "runs/b"]
    assert "train" in completed("tr")


@pytest.mark.parametrize(
    ("complete", "incomplete", "offered"),
    [
        (completion.runs, "", ["runs/a", "runs/b"]),
        (completion.runs, "runs/b", ["runs/b"]),
        (completion.runs, "nowhere/", []),
        (completion.adapters, "ru", ["runs/a/adapter"]),
        (completion.recipe_files, "", ["adalora.yaml", "examples/qnli.yaml"]),
        (completion.recipe_files, "ex", ["examples/qnli.yaml"]),
        (completion.data_files, "data/t", ["data/test.csv.gz", "data/train.jsonl"]),
        (completion.data_files, "./data/tr", ["./data/train.jsonl"]),
    ],
)
def test_paths(complete: object, incomplete: str, offered: list[str], place: Path) -> None:
    assert callable(complete)
    assert complete(incomplete) == offered


def test_absolute_paths_and_those_of_a_home(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert completion.runs(f"{place}/runs/") == [f"{place}/runs/a", f"{place}/runs/b"]
    monkeypatch.setenv("HOME", str(place))
    assert completion.runs("~/runs/a") == ["~/runs/a"]


def test_recipes_come_with_what_they_are_for() -> None:
    (offered,) = completion.recipes("demo/l")
    assert offered == ("demo/lora", "The baseline of demo/adalora")
