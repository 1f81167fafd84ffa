"""Nobody needs to read what a run prints: it goes on where its output ends, and is the same run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path

import pytest

from loralloc.cli import main
from loralloc.cli.streams import Lasting, lasting_streams

from .command import files

COMMAND = [sys.executable, "-c", "from loralloc.cli.main import main; main()", "train", "recipe.yaml", "--steps", "6"]


def test_what_is_written_arrives() -> None:
    inner = StringIO()
    stream = Lasting(inner)
    assert stream.write("words") == 5
    stream.flush()
    assert (inner.getvalue(), stream.isatty()) == ("words", False)


@pytest.mark.parametrize("act", ["write", "flush"])
def test_a_reader_that_has_left_costs_the_words_alone(act: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w", buffering=1 if act == "write" else -1) as pipe:
        stream = Lasting(pipe)
        stream.write("words\n")
        stream.flush()
        stream.write("more\n")
        stream.flush()
    # what the pipe still holds does not fail when it is closed


def test_a_process_without_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    with lasting_streams():
        print("words", flush=True)
    assert sys.stdout is None


def test_they_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    before = sys.stdout, sys.stderr
    with lasting_streams():
        assert isinstance(sys.stdout, Lasting)
        assert isinstance(sys.stderr, Lasting)
    assert (sys.stdout, sys.stderr) == before


@pytest.mark.parametrize("name", ["stdout", "stderr"])
@pytest.mark.parametrize(("errors", "shown"), [("strict", b"4 ? 2"), ("backslashreplace", b"4 \\u2192 2")])
def test_a_character_that_the_stream_lacks(
    name: str, errors: str, shown: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = BytesIO()
    monkeypatch.setattr(sys, name, TextIOWrapper(inner, encoding="latin-1", errors=errors))
    monkeypatch.setattr(main, "app", lambda: print("4 → 2", file=getattr(sys, name), flush=True))
    main.main()
    assert inner.getvalue().strip() == shown


@pytest.mark.parametrize("words", [["init"], ["schema"]])
def test_a_command_whose_output_is_closed_ends_well(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setattr(sys, "argv", ["loralloc", *words])
    with os.fdopen(writing, "w", buffering=1) as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with pytest.raises(SystemExit) as end:
            main.main()
        assert end.value.code in (0, None)
        assert sys.stdout is pipe


@pytest.mark.slow
def test_a_run_whose_output_is_closed_is_the_same_run(recipe: Path) -> None:
    subprocess.run(COMMAND, check=True, stdout=subprocess.DEVNULL)
    Path("run").rename("whole")
    adapter = "adapter/adapter_model.safetensors"
    for words in ([], ["--json"], ["--quiet"]):
        reading, writing = os.pipe()
        os.close(reading)
        result = subprocess.run([*COMMAND, *words], check=False, stdout=writing, stderr=subprocess.PIPE, text=True)
        os.close(writing)
        assert (result.returncode, result.stderr) == (0, ""), words
        assert Path("run", adapter).read_bytes() == Path("whole", adapter).read_bytes()
        assert files(Path("run")).keys() == files(Path("whole")).keys()
        shutil.rmtree("run")
