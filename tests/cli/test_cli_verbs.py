"""What the other verbs do with a run, and what surrounds them: demo, init, env, help."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import chdir
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from peft import PeftModel
from rich.text import Text
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from loralloc import __version__
from loralloc.cli.main import app
from loralloc.recipe.schema import dump_recipe, load_recipe
from loralloc.recipes import list_recipes, recipe_text

from .command import done, examples, files, loralloc, ranks, read_json, refused, write_rows

Write = Callable[[str], Path]


def _row(table: str, name: str) -> dict[str, str]:
    """A row of a printed table, by the names in its head."""
    head, *rows = [line.split() for line in table.splitlines() if line.strip()]
    return next(dict(zip(head, row[1:], strict=True)) for row in rows if row[0].endswith(name))


def _shown(metrics: dict[str, float]) -> dict[str, str]:
    return {name: f"{value:.4f}" for name, value in metrics.items()}


@torch.no_grad()
def _logits(model: torch.nn.Module, folder: Path, rows: int = 8) -> Tensor:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer([row["text"] for row in examples(rows, 9)], return_tensors="pt", padding=True)
    return model.eval()(**batch).logits


@pytest.fixture
def unfinished(run: Path) -> Path:
    """A run that was killed while it trained."""
    for name in ("ranks.json", "metrics.json", "report.html"):
        (run / name).unlink()
    for name in ("adapter", "figures", "model"):
        shutil.rmtree(run / name, ignore_errors=True)
    return run


class TestEvaluate:
    def test_repeats_the_metrics_of_the_run(self, run: Path) -> None:
        before = files(run)
        table, metrics = done("evaluate", run), read_json(run / "metrics.json")
        assert _row(table, "validation") == _shown(metrics["validation"])
        assert _row(table, "test") == _shown(metrics["test"])
        assert files(run) == before

    def test_other_data(self, run: Path, data: Path) -> None:
        shutil.copy(data / "validation.jsonl", "new.jsonl")
        table = done("evaluate", run, "--data", "new.jsonl")
        assert _row(table, "new.jsonl") == _shown(read_json(run / "metrics.json")["validation"])
        assert "validation " not in table

    def test_a_run_may_be_moved(self, run: Path) -> None:
        moved = run.rename(run.with_name("moved"))
        assert _row(done("evaluate", moved), "test") == _shown(read_json(moved / "metrics.json")["test"])

    def test_the_plan_that_a_run_was_trained_at_may_be_gone(self, run: Path) -> None:
        recipe = load_recipe(run / "recipe.yaml").model_copy(update={"plan": "gone/ranks.json"})
        (run / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
        assert _row(done("evaluate", run), "test") == _shown(read_json(run / "metrics.json")["test"])
        assert "is the only size" in done("frontier", run, "--recover", 0.2, "--ranks", 1)
        assert "gone/ranks.json" in refused("train", run / "recipe.yaml", "--replace"), "a training needs it"

    def test_other_data_alone_are_read(self, run: Path, here: Path, data: Path) -> None:
        """The run has been moved, and its own data are gone; even one class is enough."""
        (moved := here / "elsewhere").mkdir()
        shutil.copy(data / "validation.jsonl", moved / "new.jsonl")
        write_rows(moved / "one.jsonl", [{"text": "a dull film", "label": "bad"}])
        recipe = (run / "recipe.yaml").read_text(encoding="utf-8")
        (run / "recipe.yaml").write_text(recipe.replace(str(data), "gone"), encoding="utf-8")
        run.rename(moved / "run")
        with chdir(moved):
            table = done("evaluate", "run", "--data", "new.jsonl")
            assert _row(table, "new.jsonl") == _shown(read_json(Path("run/metrics.json"))["validation"])
            assert _row(done("evaluate", "run", "--data", "one.jsonl"), "one.jsonl")["accuracy"] in ("0.0000", "1.0000")
            assert "gone/train.jsonl: no such file" in refused("evaluate", "run"), "without, they are needed"

    @pytest.mark.parametrize(
        "settings",
        [
            {"compact": True},
            {"eval_every": 4, "save_every": 4, "keep_best": True, "early_stopping": 2},
            {"trainer": {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}},
            {"trainer": {"tf32": True}},  # of a GPU, and this may be another machine
        ],
    )
    def test_settings_of_the_training_do_not_matter(self, settings: dict[str, Any], run: Path, data: Path) -> None:
        recipe = load_recipe(run / "recipe.yaml")
        changed = recipe.model_copy(update={"training": recipe.training.model_copy(update=settings)})
        (run / "recipe.yaml").write_text(dump_recipe(changed), encoding="utf-8")
        metrics = read_json(run / "metrics.json")
        shutil.copy(data / "test.jsonl", "new.jsonl")
        assert _row(done("evaluate", run), "test") == _shown(metrics["test"])
        assert _row(done("evaluate", run, "--data", "new.jsonl"), "new.jsonl") == _shown(metrics["test"])
        assert "is the only size" in done("frontier", run, "--recover", 0, "--ranks", 1)

    def test_writes_nothing(self, run: Path) -> None:
        done("evaluate", run)
        assert not (run / "checkpoints").exists()

    def test_data_that_do_not_fit(self, run: Path, here: Path) -> None:
        assert "new.jsonl: no such file" in refused("evaluate", run, "--data", "new.jsonl")
        write_rows(here / "new.jsonl", [{"text": "a film", "label": "god"}])
        message = refused("evaluate", run, "--data", "new.jsonl")
        assert 'new.jsonl:1: label "god" is not among' in message
        assert 'Did you mean "good"?' in message

    def test_a_damaged_adapter(self, run: Path) -> None:
        (run / "adapter" / "adapter_model.safetensors").write_bytes(b"\0" * 20)
        message = refused("evaluate", run)
        assert message.startswith(f"{run / 'adapter' / 'adapter_model.safetensors'} cannot be read: ")


class TestExport:
    @pytest.mark.parametrize("profile", ["ragged", "uniform"])
    def test_adapters_compute_what_the_run_computes(self, run: Path, encoder: Path, profile: str) -> None:
        said = done("export", run, "--profile", profile)
        base = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2)
        expected = _logits(PeftModel.from_pretrained(base, str(run / "adapter")), encoder)
        base = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2)
        model = PeftModel.from_pretrained(base, str(run / profile))
        torch.testing.assert_close(_logits(model, encoder), expected, rtol=0, atol=1e-5)
        widths = {len(t) for name, t in model.state_dict().items() if ".lora_A." in name}
        assert widths == ({max(ranks(run).values())} if profile == "uniform" else set(ranks(run).values()) - {0})
        assert f"wrote {run / profile} ({profile}, largest rank {max(ranks(run).values())})" in said
        assert "vllm" not in said, "it serves no classifiers with a head of their own"

    def test_merged_is_a_model_by_itself(self, run: Path, encoder: Path) -> None:
        said = done("export", run, "--profile", "merged")
        base = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2)
        expected = _logits(PeftModel.from_pretrained(base, str(run / "adapter")), encoder)
        model = AutoModelForSequenceClassification.from_pretrained(run / "merged")
        torch.testing.assert_close(_logits(model, run / "merged"), expected, rtol=0, atol=1e-5)
        assert model.config.id2label == {0: "bad", 1: "good"}
        assert "vllm" not in said

    def test_needs_no_data(self, run: Path, data: Path) -> None:
        recipe = (run / "recipe.yaml").read_text(encoding="utf-8")
        (run / "recipe.yaml").write_text(recipe.replace(str(data), "gone"), encoding="utf-8")
        done("export", run)

    def test_to_a_folder_of_choice_and_again(self, run: Path, here: Path) -> None:
        before = files(run)
        done("export", run, "--to", "out/adapter")
        done("export", run, "--to", "out/adapter", "--profile", "uniform")
        assert read_json(here / "out/adapter/adapter_config.json")["rank_pattern"] == {}
        assert [path.name for path in (here / "out").iterdir()] == ["adapter"], "nothing temporary is left"
        assert files(run) == before

    def test_what_is_no_export_is_left_alone(self, run: Path, here: Path) -> None:
        (here / "own").mkdir()
        (here / "own" / "thesis.txt").write_text("years of work", encoding="utf-8")
        assert "nothing was overwritten" in refused("export", run, "--to", "own")
        assert "is a file" in refused("export", run, "--to", "own/thesis.txt")
        assert "nothing was overwritten" in refused("export", run, "--to", run)
        assert (here / "own" / "thesis.txt").read_text(encoding="utf-8") == "years of work"

    def test_the_base_model_is_left_alone(self, run: Path, here: Path, encoder: Path) -> None:
        shutil.copytree(encoder, here / "base")
        before = files(here / "base")
        assert refused("export", run, "--to", "base").endswith(
            "base exists and is no export of loralloc; nothing was overwritten: choose another folder"
        )
        assert files(here / "base") == before

    def test_nor_is_it_replaced_if_it_is_an_export_itself(self, run: Path, here: Path) -> None:
        done("export", run, "--profile", "merged")
        kept = run / "recipe.yaml"
        lines = [f"  name: {run / 'merged'}" if "/encoder" in line else line for line in kept.read_text().splitlines()]
        kept.write_text("\n".join(lines))
        before = files(run)
        assert refused("export", run, "--profile", "merged") == (
            f"{run / 'merged'} is the base model of the run; choose another folder with --to"
        )
        assert files(run) == before

    def test_a_file_on_the_way(self, run: Path, here: Path) -> None:
        (here / "file").write_text("years of work", encoding="utf-8")
        expected = f"{here}/file/adapter: {here}/file is a file; choose another folder"
        assert refused("export", run, "--to", "file/adapter") == expected
        assert (here / "file").read_text(encoding="utf-8") == "years of work"

    def test_an_unknown_profile_meets_the_known(self, run: Path) -> None:
        result = loralloc("export", run, "--profile", "raged")
        assert result.code == 2
        assert all(word in result.err for word in ("'raged'", "ragged", "uniform", "merged"))
        assert "Traceback" not in result.err


class TestReport:
    def test_is_written_again(self, run: Path) -> None:
        page = run / "report.html"
        page.unlink()
        assert f"wrote {page}" in done("report", run)
        assert "<!doctype html>" in page.read_text(encoding="utf-8").lower()

    def test_of_a_run_that_trains_still(self, unfinished: Path) -> None:
        done("report", unfinished)
        assert "training has not finished" in (unfinished / "report.html").read_text(encoding="utf-8")

    def test_of_a_run_that_has_not_begun(self, unfinished: Path) -> None:
        (unfinished / "trace.jsonl").unlink()
        assert "neither ranks.json nor a trace.jsonl" in refused("report", unfinished)


@pytest.mark.parametrize("verb", ["evaluate", "export", "report"])
class TestWhatIsNoRun:
    def test_no_such_folder(self, verb: str, here: Path) -> None:
        assert "there is no folder nowhere" in refused(verb, "nowhere")

    def test_a_file(self, verb: str, here: Path) -> None:
        (here / "file").touch()
        assert "there is no folder file" in refused(verb, "file")

    def test_another_folder(self, verb: str, here: Path) -> None:
        (here / "own").mkdir()
        assert "own is not a run: it has no recipe.yaml" in refused(verb, "own")
        assert files(here / "own") == {}


@pytest.mark.parametrize("verb", ["evaluate", "export"])
def test_an_unfinished_run_has_no_adapter(verb: str, unfinished: Path) -> None:
    before = files(unfinished)
    message = refused(verb, unfinished)
    assert "has not finished" in message
    assert "--resume" in message
    assert files(unfinished) == before


class TestInit:
    def test_lists_the_recipes(self, here: Path) -> None:
        said = done("init")
        assert all(re.search(rf"^{name} +\w", said, re.M) for name in list_recipes())

    def test_copies_one(self, here: Path) -> None:
        assert "loralloc train adalora.yaml" in done("init", "causal-lm/adalora")
        assert (here / "adalora.yaml").read_text(encoding="utf-8") == recipe_text("causal-lm/adalora")
        assert load_recipe(here / "adalora.yaml").task == "causal-lm"
        done("init", "demo/lora", "--to", "new/mine.yaml")
        assert (here / "new/mine.yaml").read_text(encoding="utf-8") == recipe_text("demo/lora")

    def test_overwrites_nothing(self, here: Path) -> None:
        (here / "adalora.yaml").write_text("mine", encoding="utf-8")
        assert "adalora.yaml exists; nothing was overwritten" in refused("init", "demo/adalora")
        assert (here / "adalora.yaml").read_text(encoding="utf-8") == "mine"

    def test_an_unknown_name(self, here: Path) -> None:
        assert 'Did you mean "demo/lora"?' in refused("init", "demo/loar")
        assert files(here) == {}

    def test_a_file_on_the_way(self, here: Path) -> None:
        (here / "file").touch()
        expected = f"file/recipe.yaml: {here}/file is a file; choose another file with --to"
        assert refused("init", "demo/lora", "--to", "file/recipe.yaml") == expected


def test_env_shows_versions() -> None:
    said = done("env")
    assert re.search(rf"^loralloc +{re.escape(__version__)}$", said, re.M)
    assert re.search(rf"^torch +{re.escape(metadata.version('torch'))}$", said, re.M)
    assert re.search(r"^gpu +\S", said, re.M)


class TestProcess:
    """In a process of its own, as users run it."""

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        code = "from loralloc.cli.main import main; main()"
        return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)

    def test_help_shows_the_verbs(self) -> None:
        result = self.run("--help")
        assert result.returncode == 0
        verbs = ("demo", "init", "train", "evaluate", "export", "truncate", "report", "env")
        assert all(re.search(rf"\b{verb}\b", result.stdout) for verb in verbs)

    def test_a_mistake_ends_with_two_and_one_message(self, tmp_path: Path) -> None:
        result = self.run("train", str(tmp_path / "none.yaml"))
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr == (
            f"error: {tmp_path}/none.yaml: there is no such file. `loralloc init` lists recipes to start from\n"
        )

    def test_version(self) -> None:
        assert self.run("--version").stdout == f"loralloc {__version__}\n"


def test_verbs_have_help() -> None:
    for verb in ("demo", "init", "train", "evaluate", "export", "truncate", "report", "env"):
        assert f"loralloc {verb}" in done(verb, "--help")


def helps() -> dict[str, str]:
    """What the help says, of all verbs, of each, and of its arguments and options."""
    whole = typer.main.get_command(app)
    verbs = {"loralloc": whole, **whole.commands}  # type: ignore[attr-defined]
    told = {verb: command.help for verb, command in verbs.items()}
    told |= {f"{verb} {part.name}": part.help for verb, command in verbs.items() for part in command.params}
    return {name: text for name, text in told.items() if text}


def test_every_part_of_the_help_is_walked() -> None:
    assert {"compare", "compare recipe", "train resume", "truncate"} <= set(helps())


@pytest.mark.parametrize(("name", "text"), helps().items(), ids=helps())
def test_help_loses_nothing_to_markup(name: str, text: str) -> None:
    """Rich takes words in brackets for markup: an example with a list of names would show an empty one."""
    assert Text.from_markup(text).plain == text


def test_help_with_a_list_of_numbers_is_shown_as_it_is() -> None:
    assert '--methods ablora --budgets "[1, 8]"' in " ".join(done("compare", "--help").split())
    assert Text.from_markup("[adalora, ablora]").plain == ""  # which a list of names would not be


def test_no_verb_shows_the_verbs() -> None:
    result = loralloc()
    assert "train" in result.out + result.err
    unknown = loralloc("trian")
    assert unknown.code == 2
    assert "train" in unknown.err
