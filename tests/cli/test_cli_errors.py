"""Mistakes in the input: exit code 2, one message that says what is wrong and where, no traceback, nothing lost."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from rich.console import Console

from loralloc.cli import progress
from loralloc.errors import UserError
from loralloc.recipe import evaluations
from loralloc.recipe import run as pipeline
from loralloc.training import processes

from .command import (
    LANGUAGE,
    PLAIN,
    RECIPE,
    done,
    examples,
    files,
    loralloc,
    read_json,
    refused,
    write_rows,
)

Write = Callable[[str], Path]

# Every case: words after `loralloc train recipe.yaml`, and a pattern of the message.
RECIPE_MISTAKES: dict[str, tuple[list[Any], str]] = {
    "unknown flag": (
        ["--learning_rat", 1],
        r'--learning_rat: unknown key "learning_rat". Did you mean "learning_rate"\?',
    ),
    "flag without a value": (["--steps"], "--steps: needs a value"),
    "ambiguous flag": (["--warmup", 3], "could mean --method.warmup, --training.warmup"),
    "stray word": (["fast"], "fast: an override is written --key value"),
    "wrong type": (["--steps", "many"], '--steps: training.steps must be an integer, got "many"'),
    "out of range": (["--lora.dropout", 1.5], "--lora.dropout: lora.dropout must be below 1, got 1.5"),
    "unknown method": (["--method", "{name: adalor}"], 'method.name must be .*"adalor". Did you mean "adalora"'),
    "two budgets": (["--method.budget", "{average_rank: 2, total_rank: 9}"], "needs exactly one of average_rank"),
    "rank above the capacity": (["--average_rank", 5], "average_rank is 5, but no layer can exceed lora.r, which is 4"),
    "phases fill the run": (
        ["--method.warmup", 0.5, "--cooldown", 0.5],
        r"method.warmup \(0.5\) \+ .* below 1",
    ),
    "phases in steps": (["--method.warmup", 10, "--cooldown", 6], r"is 16 of 16 steps: keep it below"),
    "column of another task": (["--data.messages", "chat"], "data.messages is for task causal-lm"),
    "column missing": (["--data.label", "null"], 'missing "label" in "data"'),
}
MODEL_MISTAKES: dict[str, tuple[list[Any], str]] = {
    "phases in fractions and steps": (["--method.warmup", 12, "--cooldown", 0.25], "fill the 16 steps of the run"),
    "warm-up as long as the run": (
        ["--training.warmup", 16],
        "^training.warmup: the learning rate would rise over 16 steps, and the training has 16; lower it, or write a "
        "fraction of the run, such as 0.1$",
    ),
    "run too short": (["--steps", 1], r"at least \d optimizer steps, the run has 1"),
    "total rank above the start": (["--total_rank", 53], "total_rank=53 asks for 53 ranks, .* start with 52"),
    "parameters above the start": (["--parameters", 1921], "asks for 1921 parameters, .* start with 1920"),
    "not one rank": (["--parameters", 31], r"not even one rank \(the cheapest costs 32\)"),
    "rank above the dimensions": (
        ["--lora.r", 17],
        r"^lora.r: rank 17 is above the 16 dimensions of \d+ layers whose .*query.*; lower it to 16 at most$",
    ),
    "a rank of a billion": (
        ["--lora.r", 10**9],
        r"^lora.r: rank 1000000000 is above the 32 dimensions of the model's widest layer; lower it to 32 at most$",
    ),
    "a pattern without end": (
        ["--target_modules", "(.*)*" * 12 + "y"],
        r"^lora.target_modules: .* takes longer than 0.3 s to compare with the names of \d+ modules; write it without",
    ),
    "no module matches": (
        ["--target_modules", "[q_proj, v_proj]"],
        r'^lora.target_modules: no module is named "q_proj" or "v_proj"\. .* dense \(7\), query \(2\), key \(2\)',
    ),
    "modules of the wrong kind": (
        ["--target_modules", "[LayerNorm]"],
        r"target_modules: .*LayerNorm.* query \(2\)",
    ),
    "embeddings": (
        ["--target_modules", "[word_embeddings]"],
        r"^bert.embeddings.word_embeddings: LoRA on Embedding layers is .*\(lora.target_modules in a recipe\)",
    ),
    "everything excluded": (["--exclude_modules", ".*"], "excluded"),
    "no such folder": (["--model.name", "./nothing"], "model.name: there is no folder ./nothing"),
    "no model in the folder": (["--model.name", "."], r"model.name: \. holds no model: it has no config.json"),
    "not found offline": (
        ["--model.name", "acme/no-such-model"],
        '"acme/no-such-model".*HF_HUB_OFFLINE.*path on this machine',
    ),
    "no such demo model": (["--model.name", "demo:minilm2"], 'Did you mean "demo:minilm"'),
    "longer than the model": (["--max_length", 33], "data.max_length is 33, but model .* has 32 positions"),
    "no such plan": (["--plan", "none.json"], "none.json: cannot read the rank plan"),
}
DATA_MISTAKES: dict[str, tuple[list[Any], str]] = {
    "no such file": (["--data.train", "own.json"], r'own.json: no such file. Did you mean "own.jsonl"\?'),
    "no such test file": (["--data.test", "none.csv"], "none.csv: no such file"),
    "unknown format": (["--data.train", "recipe.yaml"], 'cannot tell the format from the extension ".yaml"'),
    "a folder": (["--data.train", "."], r"\. is a folder; name a file in it"),
    "no such column": (["--data.text", "txt"], r'no column "txt" \(data.text\).*Did you mean "text"\?'),
    "labels not numbers": (["--data.labels", "regression"], '(?s)train.jsonl:1: column "label".*finite number.*"good"'),
    "too few labels": (["--data.labels", "[good, bed]"], 'train.jsonl:2: label "bad" is not among data.labels'),
}
ROWS: dict[str, tuple[list[dict[str, Any] | str], str]] = {
    "empty": ([], "own.jsonl is empty: it has no rows"),
    "cut off": (['{"text": "a film", "label": '], r'own.jsonl:7: not valid JSON \(.*\): {"text": "a film", "label":'),
    "not an object": (["[1, 2]"], r"own.jsonl:7: a row must be a JSON object, found \[1, 2\]"),
    "no label": ([{"text": "a film"}], r'own.jsonl:7: no value in column "label" \(data.label\): {"text": "a film"}'),
    "empty text": ([{"text": " ", "label": "good"}], 'own.jsonl:7: empty text in column "text"'),
    "label unknown": ([{"text": "a film", "label": "godo"}], '(?s)validation|own.jsonl:7: label "godo"'),
}


@pytest.mark.parametrize("case", RECIPE_MISTAKES)
def test_mistakes_in_the_recipe(case: str, recipe: Path, here: Path) -> None:
    words, pattern = RECIPE_MISTAKES[case]
    before = files(here)
    assert re.search(pattern, refused("train", recipe, *words))
    assert files(here) == before


@pytest.mark.parametrize("case", {**MODEL_MISTAKES, **DATA_MISTAKES})
def test_mistakes_about_model_and_data(case: str, recipe: Path, here: Path) -> None:
    words, pattern = {**MODEL_MISTAKES, **DATA_MISTAKES}[case]
    (here / "own.jsonl").write_text("kept\n", encoding="utf-8")
    message = refused("train", recipe, *words)
    assert re.search(pattern, message), message
    assert len(message.splitlines()) == 1
    assert (here / "own.jsonl").read_text(encoding="utf-8") == "kept\n"
    assert not (here / "run" / "metrics.json").exists()


def test_a_warm_up_that_the_epochs_or_a_search_are_too_short_for(recipe: Path) -> None:
    epochs = ["--epochs", 1, "--training.warmup", 6, "--dry-run"]  # 48 examples, 8 a batch
    assert "rise over 6 steps, and the training has 6; lower it" in refused("train", recipe, *epochs)
    search = ["--method", "{name: autolora, search: 4}", "--training.warmup", 4, "--dry-run"]
    assert "rise over 4 steps, and the training has 4; lower it" in refused("train", recipe, *search)
    done("train", recipe, "--training.warmup", 15, "--dry-run")


@pytest.mark.parametrize("case", ROWS)
def test_malformed_rows_are_quoted_with_their_place(case: str, recipe: Path, here: Path) -> None:
    rows, pattern = ROWS[case]
    write_rows(here / "own.jsonl", [*examples(6), *rows] if rows else [])
    words = ["--data.labels", "[good, bad]"] if case == "label unknown" else []
    assert re.search(pattern, refused("train", recipe, "--data.train", "own.jsonl", *words))


def test_a_bad_row_of_a_table(recipe: Path, here: Path) -> None:
    (here / "own.csv").write_text("text,label\na film,good\na film,bad,worse\n", encoding="utf-8")
    message = refused("train", recipe, "--data.train", "own.csv")
    assert 'own.csv:3: 3 values, but the header names 2 columns: ["a film", "bad", "worse"]' in message


def test_mistakes_in_the_file_are_told_together_with_their_lines(recipe: Path) -> None:
    text = recipe.read_text(encoding="utf-8").replace("batch_size: 8", "batchsize: 8").replace("r: 4", "r: four")
    recipe.write_text(text, encoding="utf-8")
    first, second = (text.splitlines().index(line) + 1 for line in ("  r: four", "  batchsize: 8"))
    assert refused("train", recipe).splitlines() == [
        f'{recipe}:{first}: lora.r must be an integer, got "four"',
        f'{recipe}:{second}: unknown key "batchsize" in "training". Did you mean "batch_size"?',
    ]


def test_no_recipe(here: Path) -> None:
    assert "none.yaml: there is no such file" in refused("train", "none.yaml")
    assert "cannot be read" in refused("train", here)


def test_a_plan_of_another_model(run: Path, write: Write) -> None:
    message = refused("train", write(LANGUAGE), "--plan", run / "ranks.json", "--output", "other")
    assert "the plan belongs to another model: bert.encoder.layer.0.attention.self.query is 16 x 16" in message


class TestNothingIsLost:
    """What stood in the output folder before a mistake stands there after it."""

    @pytest.mark.parametrize(
        "words",
        [
            ["--data.train", "none.jsonl"],
            ["--target_modules", "[q_proj]"],
            ["--total_rank", 999],
            ["--evaluate.metric", "pearson"],
        ],
    )
    def test_replace_with_a_mistake_keeps_the_earlier_run(self, words: list[Any], run: Path, recipe: Path) -> None:
        before = files(run)
        refused("train", recipe, "--replace", *words)
        assert files(run) == before

    @pytest.mark.parametrize("where", ["evaluate", "generation"])
    def test_nor_does_a_failure_before_the_first_step_cost_it(self, where: str, run: Path, recipe: Path) -> None:
        before = files(run)
        with patch.object(evaluations, where, side_effect=UserError("out of memory")):
            assert refused("train", recipe, "--replace") == "out of memory"
        assert files(run) == before

    @pytest.mark.usefixtures("unreported")
    def test_a_corrected_command_runs(self, recipe: Path) -> None:
        refused("train", recipe, "--data.train", "none.jsonl")
        done("train", recipe, "--steps", 3)

    @pytest.mark.usefixtures("unreported")
    def test_a_folder_with_the_recipe_and_the_data_is_no_run(self, recipe: Path, here: Path) -> None:
        (here / "data").mkdir()
        write_rows(here / "data" / "train.jsonl", examples(8))
        message = refused("train", recipe, "--output", here, "--replace", "--steps", 3)
        assert message == f"output: {here} exists and is not a run; nothing was overwritten: choose another folder"
        assert (here / "data" / "train.jsonl").exists()

    @pytest.mark.parametrize(
        ("key", "name"),
        [
            ("model.name", "run/merged"),
            ("plan", "run/ranks.json"),
            ("data", "run/figures/rows.jsonl"),
            ("data", "run/uniform/rows.jsonl"),  # a link there, to a file elsewhere
            ("data", "rows.jsonl"),  # a link to a file there
        ],
    )
    def test_what_a_run_reads_is_not_deleted_by_it(
        self, key: str, name: str, run: Path, here: Path, encoder: Path, recipe: Path
    ) -> None:
        shutil.copytree(encoder, run / "merged")
        write_rows(run / "figures" / "rows.jsonl", examples(12))
        (here / "elsewhere").mkdir()
        write_rows(here / "elsewhere" / "rows.jsonl", examples(12))
        (run / "uniform").symlink_to(here / "elsewhere", target_is_directory=True)
        (here / "rows.jsonl").symlink_to(run / "figures" / "rows.jsonl")
        before = files(run)
        for flag in [key] if key != "data" else ["data.train", "data.validation", "data.test"]:
            words = ["--replace", f"--{flag}", name]
            expected = (
                f"{key}: --replace deletes {name}, which is read here; move it out of run, or choose another folder "
                "with --output"
            )
            assert refused("train", recipe, *words) == expected
            assert refused("train", recipe, *words, "--dry-run") == expected
        assert files(run) == before

    @pytest.mark.parametrize(
        "words",
        [
            ["--data.also", "{more: run/figures/rows.jsonl}"],
            ["--data.train", "[{source: train.jsonl, weight: 1}, {source: run/figures/rows.jsonl, weight: 2}]"],
        ],
    )
    def test_nor_are_other_sources_of_data(self, words: list[str], run: Path, recipe: Path, here: Path) -> None:
        write_rows(here / "train.jsonl", examples(12))
        write_rows(run / "figures" / "rows.jsonl", examples(12))
        assert "data: --replace deletes run/figures/rows.jsonl" in refused("train", recipe, "--replace", *words)


class TestTracebacks:
    """Mistakes that are easily met too late, by a traceback."""

    def test_plain_lora_on_embeddings(self, write: Write) -> None:
        assert refused("train", write(PLAIN), "--target_modules", "[word_embeddings]", "--steps", 3) == (
            "bert.embeddings.word_embeddings: LoRA on Embedding layers is not supported (its update is a table "
            "look-up, not a product with an input); name linear layers in a new LoraConfig("
            'target_modules=["query", "key", "value", "attention.output.dense"]) (lora.target_modules in a recipe)'
        )
        assert not Path("run").exists()

    def test_a_broken_pattern(self, recipe: Path) -> None:
        message = refused("train", recipe, "--target_modules", "(query")
        assert message.startswith('lora.target_modules: "(query" is no regular expression')
        assert "missing ), unterminated subpattern at position 0" in message

    def test_bf16_where_there_is_none(self, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("loralloc.training.processes.on_cpu", lambda: False)  # an old GPU
        monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: False)
        monkeypatch.setattr(processes, "on_cpu", lambda: False)
        message = refused("train", recipe, "--bf16", "true")
        assert message.startswith("training: Your setup doesn't support bf16/gpu.")
        assert not Path("run").exists()

    @pytest.mark.parametrize("text", [RECIPE, PLAIN])
    def test_a_learning_rate_that_diverges(self, text: str, write: Write) -> None:
        message = refused("train", write(text), "--learning_rate", 1e30, "--steps", 60)
        pattern = r"^51 optimizer steps in a row had a non-finite gradient \(last: step \d+\); lower the learning rate"
        assert re.search(pattern, message), message

    def test_an_output_below_a_file(self, recipe: Path, here: Path) -> None:
        (here / "file").touch()
        message = refused("train", recipe, "--output", "file/run")
        assert message == f"output: file/run would lie in {here / 'file'}, which is a file; name another with --output"

    @pytest.mark.parametrize("name", ["link", "link/run"])
    def test_an_output_behind_a_link_that_leads_nowhere(self, name: str, recipe: Path, here: Path) -> None:
        (here / "link").symlink_to("nowhere")
        link = "link" if name == "link" else here / "link"
        message = refused("train", recipe, "--output", name)
        assert message == f"output: {link} is a link that leads nowhere; name another with --output"

    @pytest.mark.skipif(not Path("/proc/self").exists(), reason="there is no /proc")
    def test_an_output_where_there_is_no_place_for_it(self, recipe: Path) -> None:
        message = refused("train", recipe, "--output", "/proc/x")
        assert re.fullmatch(
            r"output: (/proc/x cannot be made in /proc \(No such file or directory\)|you may not write into /proc); "
            "name another with --output",
            message,
        )

    @pytest.mark.usefixtures("unreported")
    def test_replace_through_a_link(self, run: Path, recipe: Path, here: Path) -> None:
        run.rename(here / "disk")
        run.symlink_to(here / "disk", target_is_directory=True)
        done("train", recipe, "--replace", "--steps", 3)
        assert run.is_symlink()

    def test_a_plan_of_zeros(self, run: Path, recipe: Path, here: Path) -> None:
        plan = read_json(run / "ranks.json")
        for module in plan["modules"].values():
            module["rank"] = 0
        (here / "zeros.json").write_text(json.dumps(plan), encoding="utf-8")
        assert "zeros.json" in refused("train", recipe, "--plan", "zeros.json", "--output", "other")

    @pytest.mark.parametrize(
        "row", [r'{"text": "half \ud800", "label": "good"}', f'{{"text": "a", "label": {"1" * 5000}}}', "[" * 100_000]
    )
    def test_strange_json(self, row: str, recipe: Path, here: Path) -> None:
        write_rows(here / "own.jsonl", [*examples(6), row])
        assert "own.jsonl:7" in refused("train", recipe, "--data.train", "own.jsonl")


class TestSurprises:
    """Input that is accepted and then means something else."""

    @pytest.mark.usefixtures("unreported")
    def test_a_home_directory(self, recipe: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(here / "home"))
        recipe.write_text(recipe.read_text(encoding="utf-8").replace("output: run", "output: ~/run"), encoding="utf-8")
        done("train", recipe, "--steps", 4, "--save_every", 2)
        assert (here / "home" / "run" / "metrics.json").exists()
        assert not (here / "~").exists()

    def test_a_flag_before_the_recipe_is_not_taken_for_it(self, recipe: Path) -> None:
        message = refused("train", "--steps", 10, recipe, "--dry-run")
        assert message == "name the recipe before the flags: loralloc train RECIPE --steps ..."

    def test_resume_and_replace(self, run: Path, recipe: Path) -> None:
        before = files(run)
        message = refused("train", recipe, "--resume", "--replace")
        assert message == "--resume continues a run and --replace starts it over: give one of them"
        assert files(run) == before

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")
    def test_blocks_of_one_token(self, write: Write) -> None:
        assert "data.max_length" in refused("train", write(LANGUAGE), "--max_length", 1)

    def test_plain_lora_above_the_dimensions(self, write: Write) -> None:
        message = refused("train", write(PLAIN), "--lora.r", 17, "--steps", 3)
        assert message.startswith("lora.r: rank 17 is above the 16 dimensions of 9 layers whose names end in ")
        assert message.endswith("; lower it to 16 at most")
        assert not Path("run").exists()
        done("train", write(PLAIN), "--lora.r", 16, "--steps", 3, "--dry-run")  # the cure


class TestInterrupt:
    @pytest.fixture
    def interrupted(self, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
        def press(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(progress.Progress, "on_step_end", press)
        return loralloc("train", recipe)

    def test_ends_with_130_and_no_traceback(self, interrupted: Any) -> None:
        assert interrupted.code == 130
        assert "Traceback" not in interrupted.err

    def test_says_how_to_go_on(self, interrupted: Any) -> None:
        told = "interrupted; a run with checkpoints (training.save_every) continues with --resume"
        assert told in interrupted.out.splitlines()

    def test_gives_the_cursor_back(self, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Console, "is_terminal", property(lambda self: True))
        started: list[bool] = []

        def press(*_: object, **__: object) -> None:
            started.append(progress._bar.live.is_started)
            raise KeyboardInterrupt

        monkeypatch.setattr(progress.Progress, "on_step_end", press)
        loralloc("train", recipe)
        assert started == [True]
        assert not progress._bar.live.is_started
        assert not progress._bar.tasks


def test_an_error_of_ours_keeps_its_traceback(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("ours")

    monkeypatch.setattr(pipeline, "task_data", broken)
    with pytest.raises(RuntimeError, match="ours"):
        loralloc("train", recipe)
