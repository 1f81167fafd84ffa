"""`loralloc train` with --quiet, --verbose and --json."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import transformers

from loralloc.recipe import run as pipeline

from .command import LANGUAGE, PLAIN, RECIPE, done, loralloc, read_json, refused
from .deaths import killed_at
from .test_cli_language import write_data

Write = Callable[[str], Path]
SEARCH = PLAIN.replace("name: lora", "name: autolora\n  check_every: 2")

pytestmark = pytest.mark.usefixtures("unreported")


@pytest.fixture(autouse=True)
def verbosity() -> Iterator[None]:
    """What the libraries say afterwards is what they said before."""
    libraries = (transformers.logging, datasets.logging)
    before = [library.get_verbosity() for library in libraries]
    yield
    for library, level in zip(libraries, before, strict=True):
        library.set_verbosity(level)


def events(text: str) -> list[dict[str, Any]]:
    """Every line as JSON, which knows neither NaN nor infinity."""
    return [
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON")) for line in text.splitlines()
    ]


class TestJson:
    def test_one_object_a_line_and_nothing_else(
        self, recipe: Path, here: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        alive = pipeline.export_adapter

        def chatty(*args: Any, **kwargs: Any) -> Any:
            print("a library that prints")
            return alive(*args, **kwargs)

        monkeypatch.setattr(pipeline, "export_adapter", chatty)
        result = loralloc("train", recipe, "--json", "--eval_every", 8)
        assert result.code == 0
        assert "a library that prints" in result.err
        told = events(result.out)
        kinds = [event["event"] for event in told]
        assert kinds == [
            "start",
            "evaluation",
            "training",
            *["log", "log", "evaluation"] * 2,
            *["evaluation"] * 4,  # a half of the 26 ranks, a quarter, an eighth, a sixteenth
            "evaluation",
            "outcome",
        ]
        start, untrained, training, first = told[:4]
        assert (start["task"], start["method"], start["examples"]) == (
            "sequence-classification",
            "adalora",
            {"train": 48, "validation": 21},
        )
        assert untrained["of"] == "the untrained model"
        assert (training["steps"], training["budget"], training["unit"]) == (16, 26, "ranks")
        assert [phase["phase"] for phase in training["phases"]] == ["warm-up", "budget falls", "final ranks"]
        assert (first["step"], first["rank/total"]) == (4, 42)
        outcome = told[-1]
        assert outcome["metrics"] == read_json(here / "run" / "metrics.json")
        assert sum(outcome["ranks"].values()) == 26
        assert Path(outcome["adapter"]).is_dir()

    def test_a_search_comes_first(self, write: Write) -> None:
        kinds = [event["event"] for event in events(done("train", write(SEARCH), "--json"))]
        order = ["start", "search", "training", "retraining", "training", "outcome"]
        assert [kind for kind in kinds if kind in order] == order

    def test_a_rehearsal_and_a_resumed_run(self, recipe: Path) -> None:
        words = ["train", recipe, "--save_every", 2]
        rehearsed = [event["event"] for event in events(done(*words, "--json", "--dry-run"))]
        assert rehearsed == ["start", "evaluation", "training"]
        with killed_at(9):
            done(*words)
        (training,) = [event for event in events(done(*words, "--resume", "--json")) if event["event"] == "training"]
        assert (training["done"], training["steps"]) == (8, 16)

    def test_what_must_not_be_overlooked_and_numbers_that_are_none(
        self, write: Write, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from loralloc.training.trainer import PlainTrainer

        step = PlainTrainer.training_step
        monkeypatch.setattr(PlainTrainer, "training_step", lambda *args, **kwargs: step(*args, **kwargs) * float("nan"))
        told = events(done("train", write(PLAIN), "--json"))
        assert [event["loss"] for event in told if event["event"] == "log"] == [None] * 4

    def test_a_mistake_is_told_on_stderr(self, recipe: Path) -> None:
        result = loralloc("train", recipe, "--json", "--steps", 0)
        assert (result.code, result.out) == (2, "")
        assert result.err == "error: --steps: training.steps must be at least 1, got 0\n"


class TestQuiet:
    def test_prints_one_line(self, recipe: Path, here: Path, data: Path) -> None:
        assert done("train", recipe, "--quiet") == (
            f"run/adapter: accuracy {read_json(here / 'run' / 'metrics.json')['validation']['accuracy']:.4f} on "
            "validation data, 26 ranks, "
            f"{read_json(here / 'run' / 'metrics.json')['final_parameters']:,} parameters\n"
        )
        assert " on test data, " in done("train", recipe, "--quiet", "--replace", "--data.test", data / "test.jsonl")

    @pytest.mark.filterwarnings("error")
    def test_keeps_warnings_to_itself(self, write: Write) -> None:
        text = RECIPE.replace("name: adalora\n  budget:\n    average_rank: 2", "name: allora\n  mode: paper")
        words = ["train", write(text.replace("alpha: 8", "alpha: 4")), "--replace"]
        result = loralloc(*words, "--quiet")
        assert (result.code, result.err) == (0, "")
        with pytest.raises(UserWarning, match="its step does not change"):
            loralloc(*words)

    def test_keeps_what_is_logged_to_itself(self, write: Write) -> None:
        path = write(LANGUAGE)
        words = [
            "train",
            path,
            "--data.text",
            "null",
            "--prompt",
            "{prompt} ",
            "--completion",
            "completion",
            "--chat",
            "false",
        ]
        long = ["--max_length", 11, "--replace"]
        result = loralloc(*words, *long, "--quiet")
        assert (result.code, result.err) == (0, "")
        assert "are longer than data.max_length = 11 tokens" in loralloc(*words, *long, "--verbose").err

    def test_draws_no_bars(self, write: Write, here: Path) -> None:
        words = ["train", write_data("preference", write, here), "--steps", 4, "--precompute_ref_log_probs", "true"]
        result = loralloc(*words, "--quiet")
        assert (result.code, result.err) == (0, "")
        assert "Computing reference log probs" in loralloc(*words, "--replace").err

    def test_says_why_it_ends(self, recipe: Path) -> None:
        assert refused("train", recipe, "--quiet", "--data.text", "txt").startswith("/")


class TestVerbose:
    def test_shows_what_the_libraries_log(self, recipe: Path, caplog: pytest.LogCaptureFixture) -> None:
        said = "***** Running training *****"
        done("train", recipe)
        assert said not in caplog.text
        assert "reloaded by stock PEFT" in done("train", recipe, "--replace", "--verbose")
        assert said in caplog.text
        assert logging.getLogger("loralloc").level == logging.NOTSET


@pytest.mark.parametrize("pair", [("--quiet", "--verbose"), ("--json", "--quiet"), ("--verbose", "--json")])
def test_they_exclude_each_other(pair: tuple[str, str], recipe: Path, here: Path) -> None:
    result = loralloc("train", recipe, *pair)
    assert result.code == 2
    assert "--quiet, --verbose and --json exclude each other: give one of" in result.err
    assert not (here / "run").exists()
