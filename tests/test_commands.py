"""Every command line that a page shows is one: its program, its options and their values are there.

`loralloc` is parsed by its own command line, and the flags for a recipe's keys by the recipe's reader. Scripts are
started until they have parsed their arguments. Programs of others are taken on trust, and listed in `OTHERS`.
"""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from itertools import dropwhile
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

import pytest
import torch.distributed.run as torchrun
import typer.main
from accelerate.commands.launch import launch_command_parser

from loralloc.cli.main import app
from loralloc.compare.cells import comparable
from loralloc.recipe.schema import load_recipe
from loralloc.recipes import list_recipes

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY", "benchmarks/README")),
    ROOT / "examples" / "own_method" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
BLOCK = re.compile(r"^```(?:sh|bash)\n(.*?)^```", re.M | re.S)
ASSIGNMENT = re.compile(r"\w+=")
SPAN = re.compile(r"`(loralloc [^`]+)`")
OTHERS = {"vllm", "llama-cli", "lm_eval", "scontrol", "hf", "pytest", "pre-commit", "if", "fi", "then"}
"""Programs of others, and words of the shell."""

WRAPPERS = {"srun": 0, "/usr/bin/time": 1}
"""Programs that start another one, and how many options stand before it."""

KEYS = ("train", "compare", "estimate")
"""Verbs that take the keys of a recipe as flags."""


def command_lines(text: str) -> Iterator[list[str]]:
    """Yield the commands of a page's shell blocks and sentences, word by word, without comments."""
    for block in BLOCK.findall(text):
        for line in re.sub(r"\\\n", " ", block).splitlines():
            for part in _split(shlex.split(line, comments=True), {"&&", ";", "|"}):
                words = list(dropwhile(ASSIGNMENT.match, part))
                if words and not words[0].startswith("["):
                    yield words
    for span in SPAN.findall(BLOCK.sub("", text)):
        words = next(_split(shlex.split(span), {"|"}))
        if not is_abridged(words):
            yield words


def is_abridged(words: Sequence[str]) -> bool:
    """Whether a command in a sentence leaves out what it is about, as in `loralloc train --plan`."""
    return len(words) == 2 or words[2].startswith("--")


def _split(words: Sequence[str], at: set[str]) -> Iterator[list[str]]:
    part: list[str] = []
    for word in words:
        if word in at:
            yield part
            part = []
        else:
            part.append(word)
    yield part


class Parsed(Exception):  # noqa: N818 -- no error
    """A script has taken its arguments."""


def check(words: Sequence[str]) -> None:
    """Raise where a command could not be started as it stands."""
    program, *rest = words[0].removeprefix(".venv/bin/"), *words[1:]
    if program in WRAPPERS:
        check(rest[WRAPPERS[program] :])
    elif program in CHECKS:
        CHECKS[program](rest)
    elif "/" in program:
        assert (ROOT / program).is_file(), program
    else:
        assert program in OTHERS, f"what is {program}?"


def check_loralloc(words: Sequence[str]) -> None:
    """Parse by the command line; of a verb that takes keys, read the recipe with these flags."""
    group: Any = typer.main.get_command(app)
    verb, *rest = words
    if verb.startswith("--"):
        assert verb in {option for parameter in group.params for option in parameter.opts}
        return
    context = group.commands[verb].make_context(verb, [word for word in rest if word not in ("2>&1", "$more")])
    if verb in KEYS:
        recipe = load_recipe(recipe_called(context.params["recipe"]), context.args)
        if verb == "compare":
            comparable(recipe)
    elif verb == "init" and context.params["name"] is not None:
        assert context.params["name"] in list_recipes()
    else:
        assert context.args == []


def recipe_called(path: str) -> Path:
    """The recipe that a page means: a file of the repository, or the packaged one of this name."""
    if (ROOT / path).is_file():
        return ROOT / path
    known = {name.rpartition("/")[2]: file for name, file in list_recipes().items()}
    first = {file.stem: file for name, file in list_recipes().items() if name.startswith("sequence-classification/")}
    return {**known, **first}.get(Path(path).stem, first["adalora"])


def check_script(words: Sequence[str]) -> None:
    """Start a script, or a module with -m, until it has parsed its arguments."""
    if words[0] == "convert_lora_to_gguf.py":
        return
    module = words[0] == "-m"
    name, arguments = (words[1], words[2:]) if module else (words[0], words[1:])
    assert module or (ROOT / name).is_file(), name
    if not arguments:
        return

    def parse(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> NoReturn:
        original(self, *args, **kwargs)
        raise Parsed

    def parse_known(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        found = original_known(self, *args, **kwargs)
        if sys._getframe(1).f_globals["__name__"] == "argparse":  # one that takes all words itself
            return found
        raise Parsed

    original, original_known = argparse.ArgumentParser.parse_args, argparse.ArgumentParser.parse_known_args
    argv, path = [name, *arguments], [str((ROOT / name).parent), *sys.path]
    start, target = (runpy.run_module, name) if module else (runpy.run_path, str(ROOT / name))
    with (
        patch.object(argparse.ArgumentParser, "parse_args", parse),
        patch.object(argparse.ArgumentParser, "parse_known_args", parse_known),
        patch.object(sys, "argv", argv),
        patch.object(sys, "path", path),
        pytest.raises(Parsed),
    ):
        start(target, run_name="__main__")  # type: ignore[operator]


def check_launched(arguments: argparse.Namespace) -> None:
    """What a launcher starts."""
    program = [arguments.training_script, *arguments.training_script_args]
    check(program if arguments.no_python else ["python", *program])


def check_make(words: Sequence[str]) -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert [word for word in words if "=" not in word and word not in targets] == []


def check_pip(words: Sequence[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert words[0] == "install"
    extras = {extra for word in words for extra in re.findall(r"^loralloc\[(\w+)\]$", word)}
    assert extras <= set(project["optional-dependencies"])


CHECKS: dict[str, Callable[[Sequence[str]], None]] = {
    "loralloc": check_loralloc,
    "python": check_script,
    "torchrun": lambda words: check_launched(torchrun.get_args_parser().parse_args(list(words))),
    "accelerate": lambda words: check_launched(launch_command_parser().parse_args(list(words[1:]))),
    "make": check_make,
    "pip": check_pip,
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_line_is_one(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = []
    for words in command_lines(page.read_text(encoding="utf-8")):
        try:
            check(words)
        except (Exception, SystemExit) as error:
            wrong.append(f"{shlex.join(words)}: {error!r} {capsys.readouterr().err.strip()[-200:]}")
    assert wrong == []


@pytest.mark.parametrize(
    "line",
    [
        "loralloc trian adalora.yaml",
        "loralloc train adalora.yaml --learning_rte 1e-3",
        "loralloc train adalora.yaml --learning_rate much",
        "loralloc export runs/NAME --profile flat",
        "loralloc init no/such",
        "torchrun --no-python loralloc train adalora.yaml --sept 3",
        "accelerate launch --num_process 2 examples/accelerate_loop.py",
        "python benchmarks/gone.py",
        "python benchmarks/methods.py --tabel",
        "make demmo",
        'pip install "loralloc[gone]"',
        "loraloc demo",
    ],
)
def test_a_wrong_command_line_is_found(line: str) -> None:
    with pytest.raises((Exception, SystemExit)):
        check(shlex.split(line))
