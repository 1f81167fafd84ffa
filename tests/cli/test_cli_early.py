"""Wrong names and paths are refused before torch is imported, and by the same words as later ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from loralloc.cli import checks, terminal
from loralloc.recipe import run as pipeline
from loralloc.training import processes

from .command import PLAIN, RECIPE, done, files, refused

Write = Callable[[str], Path]

HEAVY = {"torch", "transformers", "peft", "datasets", "matplotlib", "pyarrow"}
COMMANDS = """
import json, sys
from contextlib import redirect_stderr
from io import StringIO
from loralloc.cli.main import main
said = []
for words in json.loads(sys.stdin.read()):
    sys.argv = ["loralloc", *words]
    with redirect_stderr(StringIO()) as err:
        try:
            main()
        except SystemExit as end:
            assert end.code == 2
    said.append(err.getvalue())
print(json.dumps([said, sorted({name.partition(".")[0] for name in sys.modules})]))
"""


def in_a_new_process(commands: list[list[str]]) -> tuple[list[str], set[str]]:
    """Run commands that are refused in a new interpreter; what each said, and all that was imported."""
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS], input=json.dumps(commands), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    said, loaded = json.loads(done.stdout.splitlines()[-1])
    return said, set(loaded)


INPUTS = ["--data.train", "none.jsonl", "--data.validation", "nyu-mll/glue", "--data.test", "demo:docstring"]
REFUSED = {  # command -> what it says
    "train none.yaml": "none.yaml: there is no such file",
    f"train recipe.yaml --dry-run --model.name ./none --plan none.json {' '.join(INPUTS)}": (
        "model.name: there is no folder ./none.\n"
        "none.jsonl: no such file.\n"
        'nyu-mll/glue: no such file. For a data set of the Hub put hub: before its name: "hub:nyu-mll/glue".\n'
        'No demo data "docstring"; there is demo:docstrings.\n'
        "none.json: cannot read the rank plan (No such file or directory)\n"
    ),
    "train recipe.yaml --plan cut.json": "cut.json: not JSON",
    "train recipe.yaml --output file/run": "output: file/run would lie in",
    "train recipe.yaml --output thesis": "thesis exists and is not a run",
    "train recipe.yaml --resume": "there is no folder run",
    "report none": "there is no folder none",
    "truncate thesis --output out --total_rank 3": "thesis is no adapter",
}


def test_wrong_paths_are_refused_without_importing_anything_heavy(recipe: Path, here: Path) -> None:
    (here / "file").touch()
    (here / "cut.json").write_text('{"format": 1, "modules": {', encoding="utf-8")
    (here / "thesis").mkdir()
    (here / "thesis" / "chapter.txt").touch()
    said, loaded = in_a_new_process([command.split() for command in REFUSED])
    for command, message, expected in zip(REFUSED, said, REFUSED.values(), strict=True):
        assert message.startswith("error: "), (command, message)
        assert expected in message, (command, message)
    assert not loaded & HEAVY


@pytest.mark.slow
@pytest.mark.usefixtures("recipe")
def test_what_only_the_data_tell_is_found_later() -> None:
    (message,), loaded = in_a_new_process([["train", "recipe.yaml", "--data.text", "txt", "--dry-run"]])
    assert 'no column "txt"' in message
    assert {"torch", "datasets"} <= loaded


def test_several_processes_look_at_the_folder_together(
    recipe: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that refused it before the others would leave them waiting; `recipe.run` checks where all are told."""
    processes.join()  # alone: with the variable below set, accelerate would wait for the others
    looked = []
    monkeypatch.setattr(checks, "check_output", lambda *_: looked.append(True))
    for act in ("run", "rehearse"):
        monkeypatch.setattr(pipeline, act, lambda *_, **__: None)
    for size, times in (("2", 0), ("1", 1)):
        monkeypatch.setenv("WORLD_SIZE", size)
        done("train", recipe)
        assert len(looked) == times
    done("train", recipe, "--dry-run")
    assert len(looked) == 2


@pytest.fixture
def read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody may write anywhere."""
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK and allowed(path, mode))


@pytest.mark.usefixtures("read_only")
def test_an_output_that_cannot_be_written(recipe: Path, here: Path) -> None:
    message = refused("train", recipe, "--output", "a/b/run")
    assert message == f"output: you may not write into {here}; name another with --output"


UNWRITABLE: dict[str, tuple[list[Any], str]] = {
    "a run that goes on": (
        ["train", "recipe.yaml", "--resume"],
        "output: you may not write into run; a run goes on in its own folder: let yourself write there",
    ),
    "predictions": (
        ["evaluate", "run", "--predictions", "p"],
        "--predictions: you may not write into {here}; name a file elsewhere",
    ),
    "an export": (["export", "run", "--to", "a"], "{here}/a: you may not write into {here}; choose another folder"),
    "a truncation": (
        ["truncate", "run/adapter", "--output", "a/b", "--total_rank", 2],
        "a/b: you may not write into {here}; choose another folder",
    ),
    "a frontier": (["frontier", "run"], "--output: you may not write into {here}/run; name another folder"),
    "a size of a frontier": (
        ["frontier", "run", "--output", "a/b"],
        "--output: you may not write into {here}; name another folder",
    ),
    "a report": (["report", "run"], "run: you may not write into run; copy the run to where you may"),
    "a comparison": (
        ["compare", "recipe.yaml", "--output", "a"],
        "output: you may not write into {here}; name another with --output",
    ),
    "a demo": (["demo", "--output", "a"], "--output: you may not write into {here}; name another folder"),
    "a schema": (["schema", "--output", "a/b"], "--output: you may not write into {here}; choose another file"),
    "a recipe": (
        ["init", "causal-lm/adalora"],
        "adalora.yaml: you may not write into {here}; choose another file with --to",
    ),
}


@pytest.mark.usefixtures("read_only", "recipe", "run")
@pytest.mark.parametrize("case", UNWRITABLE)
def test_what_nobody_may_write_is_refused_before_anything_is_loaded(case: str, here: Path) -> None:
    words, expected = UNWRITABLE[case]
    before = files(here)
    with patch.object(terminal, "quiet_libraries", side_effect=AssertionError("loaded")):
        assert refused(*words) == expected.format(here=here)
    assert files(here) == before


def test_a_folder_that_would_lie_in_a_file(run: Path, here: Path) -> None:
    message = refused("export", run, "--to", run / "recipe.yaml" / "a" / "b")
    lies = f"{run}/recipe.yaml/a would lie in {run}/recipe.yaml, which is a file"
    assert refused("export", run, "--to", run / "recipe.yaml" / "a") == (
        f"{run}/recipe.yaml/a: {run}/recipe.yaml is a file; choose another folder"
    )
    assert message == f"{run}/recipe.yaml/a/b: {lies}; choose another folder"


MISTAKES: dict[str, tuple[list[Any], str]] = {
    "one of two": (
        ["--target_modules", "[query, valeu]"],
        'lora.target_modules: no module is named "valeu". Did you mean "value"? Correct it or leave it out; '
        "the model has dense (7), query (2), key (2), value (2), classifier (1)",
    ),
    "a path of which the end is wrong": (
        ["--target_modules", "[query, self.valeu]"],
        'no module is named "self.valeu". Did you mean "self.value"?',
    ),
    "part of a name": (["--target_modules", "[query, alue]"], 'no module is named "alue". Did you mean "value"?'),
    "excluded": (
        ["--exclude_modules", "[quary]"],
        'lora.exclude_modules: no module is named "quary". Did you mean "query"? Correct it or leave it out',
    ),
    "excluded by a pattern": (
        ["--exclude_modules", ".*quary"],
        'lora.exclude_modules: no module fits the pattern ".*quary". Did you mean "query"?',
    ),
    "trained in full": (
        ["--modules_to_save", "[word_embedings]"],
        'lora.modules_to_save: no module is named "word_embedings". Did you mean "word_embeddings"?',
    ),
    "one name as a pattern": (
        ["--target_modules", "query"],
        'lora.target_modules: no module fits the pattern "query". A name is written in a list: [query]',
    ),
    "a part of a pattern": (
        ["--target_modules", r".*\.(query|valeu)"],
        r'no module fits the part "valeu" of the pattern ".*\.(query|valeu)". Did you mean "value"? Correct it or',
    ),
}
CURES: dict[str, list[Any]] = {
    "one of two": ["--target_modules", "[query, value]"],
    "a path of which the end is wrong": ["--target_modules", "[query, self.value]"],
    "part of a name": ["--target_modules", "[query, value]"],
    "excluded": ["--exclude_modules", "[query]"],
    "excluded by a pattern": ["--exclude_modules", ".*query"],
    "trained in full": ["--modules_to_save", "[word_embeddings]"],
    "one name as a pattern": ["--target_modules", "[query]"],
    "a part of a pattern": ["--target_modules", r".*\.(query|value)"],
}


@pytest.mark.parametrize("case", MISTAKES)
def test_modules_that_do_not_exist(case: str, write: Write) -> None:
    words, message = MISTAKES[case]
    recipe = write(PLAIN)
    assert message in refused("train", recipe, "--dry-run", *words)
    assert "modules," in done("train", recipe, "--dry-run", *CURES[case])


def test_every_key_at_fault_has_its_line(write: Write) -> None:
    words = ["--target_modules", "[quary, valeu, key]", "--exclude_modules", "[dens]", "--modules_to_save", "[klass]"]
    lines = refused("train", write(RECIPE), "--dry-run", *words).splitlines()
    assert [line.partition(".")[2].partition(":")[0] for line in lines] == [
        "target_modules",
        "exclude_modules",
        "modules_to_save",
    ]
    assert 'no module is named "quary" or "valeu". Did you mean "query"? Did you mean "value"?' in lines[0]


def test_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert refused("report", "run") == (
        "the command line needs Linux or macOS; on Windows take WSL, or use loralloc from Python"
    )
