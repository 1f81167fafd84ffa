"""`model.load_in`: a base model in 4 or 8 bits goes through every verb, and nothing is merged into it."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from loralloc.cli import checks
from loralloc.recipe import run as pipeline
from loralloc.recipe.schema import load_recipe

from .command import LANGUAGE, RECIPE, done, log_rows, ranks, read_json, refused, save_decoder
from .test_cli_precisions import METHODS, one_precision_a_test  # noqa: F401

Write = Callable[[str], Path]

BITS = ("4bit", "8bit")
IDS = torch.tensor([[1, 5, 6, 3]])


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder whose rows are whole blocks of 64 numbers."""
    return save_decoder(tmp_path_factory.mktemp("wide"), width=128)


@pytest.fixture(scope="session", params=BITS)
def kept(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, wide: Path, data: Path) -> Path:
    """A finished run of AdaLoRA on a quantised model; to be looked at only."""
    folder = tmp_path_factory.mktemp("kept")
    recipe = LANGUAGE.replace("{encoder}", f"{wide}\n  load_in: {request.param}").format(data=data)
    (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
    with chdir(folder), pytest.MonkeyPatch.context() as patched:
        patched.setattr(pipeline, "write_report", lambda folder: folder / "report.html")
        (folder / "said.txt").write_text(done("train", "recipe.yaml"), encoding="utf-8")
    (folder / "run" / "bits.txt").write_text(request.param, encoding="utf-8")
    return folder


@pytest.fixture
def run(kept: Path, here: Path) -> Path:
    """The same in ./run, to be worked with."""
    return Path(shutil.copytree(kept / "run", here / "run"))


@pytest.fixture
def without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))


class TestTrain:
    def test_says_in_what_the_model_is(self, kept: Path) -> None:
        bits = (kept / "run" / "bits.txt").read_text()
        said = (kept / "said.txt").read_text(encoding="utf-8")
        assert f"parameters in {bits})" in said.replace("\n", "")
        assert "reloaded by stock PEFT" in said
        assert f"load_in: {bits}" in (kept / "run" / "recipe.yaml").read_text()
        assert f"| base weights | {bits} |" in (kept / "run" / "adapter" / "README.md").read_text(encoding="utf-8")

    def test_learns_allocates_and_checks_narrowly(self, kept: Path) -> None:
        metrics = read_json(kept / "run" / "metrics.json")
        assert metrics["validation"]["perplexity"] < 0.5 * metrics["reference"]["untrained"]
        assert sum(ranks(kept / "run").values()) == 2 * 14
        assert metrics["adapter_check"] <= metrics["adapter_check_allowed"] < 1e-3

    def test_keeps_the_configuration_of_the_checkpoint(self, kept: Path, wide: Path) -> None:
        mine, theirs = (json.loads((folder / "config.json").read_text()) for folder in (kept / "run" / "model", wide))
        assert "quantization_config" not in mine
        trained = {"pad_token_id", "use_cache"}  # what any training sets
        assert all(mine[key] == value for key, value in theirs.items() if key not in trained)


class TestOtherVerbs:
    def test_evaluate_repeats_the_metrics(self, run: Path) -> None:
        perplexity = read_json(run / "metrics.json")["validation"]["perplexity"]
        names, values = (line.split() for line in done("evaluate", run).splitlines()[:2])
        # On a CPU with AVX-512 for bfloat16, bitsandbytes multiplies 4 bits in it where no gradient is asked for.
        found = dict(zip(names, values[1:], strict=True))
        assert float(found["perplexity"]) == pytest.approx(perplexity, rel=1e-3)

    @pytest.mark.parametrize("profile", ["ragged", "uniform"])
    def test_adapters_hold_what_the_run_trained(self, run: Path, profile: str) -> None:
        said = done("export", run, "--profile", profile)
        assert "reloaded by stock PEFT" in said
        assert "merged" not in said
        ours, theirs = (load_file(run / name / "adapter_model.safetensors") for name in ("adapter", profile))
        assert ours.keys() <= theirs.keys()
        kept = {name: rank for name, rank in ranks(run).items() if rank}
        assert read_json(run / profile / "loralloc_export.json")["ranks"] == kept

    def test_merged_is_the_full_model_with_the_adapter(self, run: Path, wide: Path) -> None:
        said = done("export", run, "--profile", "merged")
        assert f"merged into the weights of {wide} as they are, and trained over these in {_bits(run)}" in said
        expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(wide), run / "adapter").eval()
        merged = AutoModelForCausalLM.from_pretrained(run / "merged").eval()
        torch.testing.assert_close(merged(IDS).logits, expected(IDS).logits, rtol=0, atol=1e-4)
        assert "quantization_config" not in read_json(run / "merged" / "config.json")

    @pytest.mark.usefixtures("without_bitsandbytes")
    def test_merged_needs_no_bitsandbytes_and_the_others_do(self, run: Path) -> None:
        data = load_recipe(run / "recipe.yaml").data.train
        for words in (["export", run], ["evaluate", run], ["evaluate", run, "--data", data]):
            assert 'pip install "loralloc[quantized]"' in refused(*words)
        done("export", run, "--profile", "merged")

    def test_truncate_needs_no_base_model(self, run: Path) -> None:
        assert "wrote" in done("truncate", run / "adapter", "--average_rank", 1, "--output", "small")


def _bits(run: Path) -> str:
    return (run / "bits.txt").read_text()


class TestRefusals:
    @pytest.mark.usefixtures("without_bitsandbytes")
    def test_a_missing_package_before_the_model_is_looked_for(
        self, recipe: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(checks, "model_folder", lambda name: None)
        monkeypatch.setattr(pipeline, "task_data", lambda recipe: pytest.fail("the model is loaded"))
        said = refused("train", recipe, "--model.load_in", "4bit")
        assert said == 'model.load_in: 4bit needs an optional package: pip install "loralloc[quantized]"'

    def test_other_numbers_of_bits(self, recipe: Path) -> None:
        said = refused("train", recipe, "--model.load_in", "5bit")
        assert said.endswith('model.load_in must be 4bit or 8bit, got "5bit"')

    def test_rows_that_are_read_wrong_on_a_cpu(self, recipe: Path) -> None:
        """The tiny models of the other tests are 16 wide."""
        assert "does not work in 4 bits on a CPU" in refused("train", recipe, "--model.load_in", "4bit")

    @pytest.mark.parametrize("bits", BITS)
    def test_modules_to_train_in_full_that_are_quantised(self, bits: str, write: Write, wide: Path) -> None:
        recipe = write(LANGUAGE)
        words = ("--model.name", wide, "--model.load_in", bits, "--lora.target_modules", "[q_proj]", "--dry-run")
        for entry in ("down_proj", "mlp"):
            said = refused("train", recipe, *words, "--lora.modules_to_save", f"[{entry}]")
            assert said.startswith("lora.modules_to_save: model.layers.0.mlp.")
            assert said.endswith(
                f"is quantised (model.load_in), and what is quantised cannot be trained in full; take "
                f'"{entry}" out, or load the model without model.load_in'
            )
        done("train", recipe, *words, "--lora.modules_to_save", "[lm_head]")


@pytest.mark.slow
@pytest.mark.usefixtures("unreported")
class TestMethods:
    @pytest.mark.parametrize("bits", BITS)
    @pytest.mark.parametrize("name", METHODS)
    def test_a_run_ends_with_an_adapter(self, name: str, bits: str, write: Write, here: Path, wide: Path) -> None:
        words = ("--model.name", wide, "--model.load_in", bits, "--method", METHODS[name], "--lora.alpha", 4)
        assert "reloaded by stock PEFT" in done("train", write(LANGUAGE), *words)
        for profile in ("uniform", "merged"):
            done("export", here / "run", "--profile", profile)
        done("evaluate", here / "run")

    @pytest.mark.parametrize("options", [("--training.bf16", "true"), ("--model.dtype", "bfloat16")])
    @pytest.mark.parametrize("bits", BITS)
    def test_also_in_other_precisions(
        self, bits: str, options: tuple[str, str], write: Write, here: Path, wide: Path
    ) -> None:
        words = ("--model.name", wide, "--model.load_in", bits, *options)
        assert "reloaded by stock PEFT" in done("train", write(LANGUAGE), *words)
        done("export", here / "run", "--profile", "merged")
        done("evaluate", here / "run")

    @pytest.mark.parametrize("bits", BITS)
    def test_a_classifier(self, bits: str, write: Write, here: Path, wide: Path) -> None:
        """Its head is new, trained in full, and not quantised."""
        done("train", write(RECIPE), "--model.name", wide, "--model.load_in", bits)
        tensors = load_file(here / "run" / "adapter" / "adapter_model.safetensors")
        assert tensors["base_model.model.score.weight"].dtype == torch.float32
        for profile in ("uniform", "merged"):
            done("export", here / "run", "--profile", profile)
        accuracy = read_json(here / "run" / "metrics.json")["validation"]["accuracy"]
        assert f"{accuracy:.4f}" in done("evaluate", here / "run")

    @pytest.mark.parametrize("bits", BITS)
    def test_a_resumed_run_is_the_same_run(self, bits: str, write: Write, here: Path, wide: Path) -> None:
        words = ("--model.name", wide, "--model.load_in", bits, "--save_every", 8)
        done("train", recipe := write(LANGUAGE), *words)
        adapter = here / "run" / "adapter" / "adapter_model.safetensors"
        whole, rows = load_file(adapter), log_rows(here / "run")
        (here / "run" / "metrics.json").unlink()  # as if it had been killed after its last but one checkpoint
        shutil.rmtree(here / "run" / "checkpoints" / "checkpoint-16")
        adapter.unlink()
        done("train", recipe, *words, "--resume")
        assert log_rows(here / "run") == rows
        resumed = load_file(adapter)
        assert whole.keys() == resumed.keys()
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)

    @pytest.mark.parametrize("bits", BITS)
    def test_gradient_checkpointing_changes_nothing(self, bits: str, write: Write, here: Path, wide: Path) -> None:
        words = ("--model.name", wide, "--model.load_in", bits)
        done("train", recipe := write(LANGUAGE), *words)
        done("train", recipe, *words, "--gradient_checkpointing", "true", "--output", "again")
        first, second = (load_file(here / run / "adapter" / "adapter_model.safetensors") for run in ("run", "again"))
        assert all(torch.equal(first[name], second[name]) for name in first)

    @pytest.mark.parametrize("bits", BITS)
    def test_a_plan_is_trained_anew(self, bits: str, write: Write, here: Path, wide: Path) -> None:
        words = ("--model.name", wide, "--model.load_in", bits)
        done("train", recipe := write(LANGUAGE), *words)
        plain = ("--method", "{name: lora}", "--plan", "run/ranks.json", "--output", "again")
        done("train", recipe, *words, *plain)
        assert {name: rank for name, rank in ranks(here / "run").items() if rank} == ranks(here / "again")
