"""`loralloc frontier`: from a run, or from any adapter, to a curve, a recommendation and an adapter of any size."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from loralloc.adapter.folders import RECORD
from loralloc.adapter.truncation import truncate_adapter
from loralloc.budget import Budget
from loralloc.frontier.source import Source
from loralloc.plan import RankPlan
from loralloc.recipe.from_recipe import task_data

from .command import LANGUAGE, done, files, read_json, refused

Write = Callable[[str], Path]

SLOW = pytest.mark.slow


def points(folder: Path) -> list[dict]:
    return read_json(folder / "frontier.json")["points"]


def updates(adapter: Path) -> dict[str, torch.Tensor]:
    """B A of every module as stock PEFT computes it, from the files."""
    config, tensors = (
        json.loads((adapter / "adapter_config.json").read_text()),
        load_file(adapter / "adapter_model.safetensors"),
    )
    found = {}
    for key in [key for key in tensors if ".lora_A." in key]:
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        A, B = tensors[key], tensors[key.replace("lora_A", "lora_B")]
        alpha = next((v for k, v in config["alpha_pattern"].items() if name.endswith(k)), config["lora_alpha"])
        found[name] = alpha / len(A) * B @ A
    return found


def rank_of(update: torch.Tensor) -> int:
    return int(torch.linalg.matrix_rank(update.double(), rtol=1e-5))


class TestOfARun:
    def test_cuts_at_every_size_and_writes_what_it_found(self, run: Path) -> None:
        said = done("frontier", run, "--recover", 0, "--ranks", "2,1,0.5")
        record, folder = read_json(run / "frontier" / "frontier.json"), run / "frontier"
        modules = record["modules"]
        assert [point["ranks"] for point in record["points"]] == [2 * modules, modules, modules // 2]
        assert record["verdict"] in said
        page = (folder / "frontier.html").read_text()
        assert record["verdict"] in page
        assert page.count("<tr>") == 4
        assert (folder / "frontier.png").read_bytes()[:4] == b"\x89PNG"
        whole, validation = record["points"][0]["cut"]["metrics"], read_json(run / "metrics.json")["validation"]
        assert whole == pytest.approx(validation, abs=1e-5)  # the run itself: it was trained at rank 2 on average
        for point in record["points"]:
            plan = RankPlan.load(folder / "points" / f"{point['ranks']}-ranks" / "ranks.json")
            assert (plan.total_rank, plan.parameters) == (point["ranks"], point["parameters"])
            assert max(plan.ranks.values()) == point["largest_rank"]
            assert point["bytes"] == 4 * point["parameters"]

    def test_the_order_of_singular_values_is_truncation(self, run: Path) -> None:
        done("frontier", run, "--recover", 0, "--ranks", "1", "--order", "singular_value")
        (point,) = points(run / "frontier")
        truncate_adapter(run / "adapter", run.parent / "small", Budget(total_rank=point["ranks"]))
        expected = updates(run.parent / "small")
        done("frontier", run, "--export", 1)
        found = updates(run / "frontier" / "adapter")
        assert found.keys() == expected.keys()
        for name, update in found.items():
            torch.testing.assert_close(update, expected[name], rtol=0, atol=1e-6)

    def test_a_size_is_not_measured_twice(self, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        done("frontier", run, "--recover", 0, "--ranks", "2,1")
        first = points(run / "frontier")
        evaluated = []
        original = np.mean
        monkeypatch.setattr(
            "loralloc.recipe.evaluations.evaluate", lambda *args: evaluated.append(args) or original([])
        )
        done("frontier", run, "--recover", 0, "--ranks", "2,1")
        assert points(run / "frontier") == first
        assert not evaluated

    def test_exports_the_size_that_was_measured(self, run: Path) -> None:
        """Average ranks are shown rounded, and no multiple of 1 / 13 is one of those."""
        modules = len(RankPlan.load(run / "ranks.json").modules)
        done("frontier", run, "--recover", 0, "--ranks", ",".join(str(ranks / modules) for ranks in (26, 15, 6, 2)))
        for point in points(run / "frontier"):
            done("frontier", run, "--export", f"{point['average_rank']:.3g}")
            assert sum(map(rank_of, updates(run / "frontier" / "adapter").values())) == point["ranks"]

    def test_a_size_that_was_kept_is_of_the_same_order_recipe_and_data(self, run: Path) -> None:
        done("frontier", run, "--recover", 0, "--ranks", "1")
        first = points(run / "frontier")
        done("frontier", run, "--recover", 0, "--ranks", "1", "--order", "sensitivity")
        assert points(run / "frontier")[0]["cut"]["metrics"] != first[0]["cut"]["metrics"]
        done("frontier", run, "--recover", 0, "--ranks", "1")
        assert points(run / "frontier")[0]["cut"]["metrics"] == first[0]["cut"]["metrics"]
        text = (run / "recipe.yaml").read_text()
        (run / "recipe.yaml").write_text(text.replace("validation.jsonl", "test.jsonl", 1))
        done("frontier", run, "--recover", 0, "--ranks", "2,1")
        assert read_json(run / "frontier" / "frontier.json")["examples"] == 15

    @SLOW
    def test_a_size_that_has_recovered_is_of_the_same_training_data(self, run: Path, data: Path) -> None:
        def trained() -> bool:
            return "step 1/" in done("frontier", run, "--recover", 0.5, "--ranks", "1")

        assert [trained(), trained()] == [True, False]
        train = data / "train.jsonl"
        text = train.read_text()
        try:
            train.write_text("".join(reversed(text.splitlines(keepends=True))))
            assert trained()
        finally:
            train.write_text(text)

    def test_what_a_size_is_stored_as_is_as_large_as_it_says(self, run: Path) -> None:
        done("frontier", run, "--recover", 0, "--ranks", "1")
        (point,) = points(run / "frontier")
        tensors = load_file(next(run.glob("frontier/points/*/adapter")) / "adapter_model.safetensors")
        assert sum(value.nbytes for key, value in tensors.items() if ".lora_" in key) == point["bytes"]

    @SLOW
    def test_lets_every_size_recover_and_exports_one(self, run: Path) -> None:
        said = done("frontier", run, "--recover", 0.5, "--ranks", "2,1", "--order", "ablation")
        folder = run / "frontier"
        record = read_json(folder / "frontier.json")
        assert record["recovery"]["steps"] > 1
        for point in record["points"]:
            assert point["cut"]["metrics"] != point["recovered"]["metrics"]
        again = done("frontier", run, "--recover", 0.5, "--ranks", "2,1", "--order", "ablation")
        assert read_json(folder / "frontier.json")["points"] == record["points"]
        assert "step 1/" in said
        assert "step 1/" not in again
        exported = done("frontier", run, "--export", 1)  # as it was measured
        assert "largest difference of a logit" in exported
        small = RankPlan.load(folder / "points" / f"{record['points'][1]['ranks']}-ranks" / "ranks.json")
        ranks = {name: len(update) for name, update in updates(folder / "adapter").items()}
        assert ranks.keys() == {name for name, rank in small.ranks.items() if rank}

    @SLOW
    def test_a_recovery_is_a_training_from_the_cut_on(self, run: Path) -> None:
        """Two frontiers of the same run are the same, to the bit."""
        other = Path(shutil.copytree(run, run.parent / "other"))
        for folder in (run, other):
            done("frontier", folder, "--recover", 0.5, "--ranks", "1")
        one, two = (updates(next(folder.glob("frontier/points/*/adapter"))) for folder in (run, other))
        assert all(torch.equal(update, two[name]) for name, update in one.items())

    @SLOW
    def test_every_size_begins_at_the_next_larger_one(self, run: Path) -> None:
        words = ("--recover", 0.5, "--recover_rate", 1)
        alone = Path(shutil.copytree(run, run.parent / "alone"))
        done("frontier", run, *words, "--ranks", "2,1,0.5")
        done("frontier", alone, *words, "--ranks", "0.5")
        (lonely,), chained = points(alone / "frontier"), points(run / "frontier")
        assert lonely["cut"]["metrics"] == chained[2]["cut"]["metrics"]
        assert lonely["recovered"]["metrics"] != chained[2]["recovered"]["metrics"]
        said = done("frontier", run, "--export", 0.5)
        assert "step 1/" not in said, "as it was measured"
        small = updates(run / "frontier/points" / f"{chained[2]['ranks']}-ranks/adapter")
        assert all(torch.equal(update, small[name]) for name, update in updates(run / "frontier/adapter").items())

    @SLOW
    def test_an_interrupted_chain_goes_on_to_the_bit(self, run: Path) -> None:
        words = ("frontier", run, "--recover", 0.5, "--recover_rate", 1, "--ranks", "2,1,0.5")
        done(*words)
        last = run / "frontier/points" / f"{points(run / 'frontier')[2]['ranks']}-ranks"
        before = updates(last / "adapter")
        (last / "point.json").unlink()
        said = done(*words)
        assert "step 1/" in said
        assert all(torch.equal(update, before[name]) for name, update in updates(last / "adapter").items())

    @SLOW
    def test_its_learning_rate_is_a_share_of_the_runs(self, run: Path) -> None:
        """At next to none the cut stays what it is; what is exported was trained at the rate it was measured at."""
        done("frontier", run, "--recover", 0.5, "--recover_rate", 1e-6, "--ranks", "1")
        record = read_json(run / "frontier" / "frontier.json")
        assert record["recovery"]["rate"] == 1e-6
        (still,) = record["points"]
        assert still["recovered"]["loss_per_example"] == pytest.approx(still["cut"]["loss_per_example"], abs=1e-4)
        said = done("frontier", run, "--export", 1)
        assert "step 1/" not in said
        done("frontier", run, "--recover", 0.5, "--recover_rate", 1, "--ranks", "1")
        (moved,) = points(run / "frontier")
        assert moved["cut"]["metrics"] == still["cut"]["metrics"]
        assert abs(moved["recovered"]["loss_per_example"] - still["cut"]["loss_per_example"]) > 1e-3


@SLOW
def test_of_any_adapter_with_its_recipe(run: Path, recipe: Path) -> None:
    shutil.copytree(run / "adapter", "alone")
    done("frontier", "alone", "--recipe", recipe, "--output", "curve", "--recover", 0.5, "--ranks", "2,1")
    record = read_json(Path("curve/frontier.json"))
    assert [point["average_rank"] for point in record["points"]] == [2, 1]
    assert record["recovery"]["steps"] > 1
    # A folder called as that of a run beside the adapter does not make it a run.
    said = done("frontier", "alone", "--recipe", recipe, "--output", "frontier", "--recover", 0, "--ranks", "1")
    assert f"loralloc frontier alone --recipe {recipe} --output frontier --export 1" in said


class TestRefusals:
    def test_what_it_takes_to_make_one(self, run: Path, recipe: Path) -> None:
        shutil.copytree(run / "adapter", "alone")
        assert "alone is an adapter without a run: name the recipe that says" in refused("frontier", "alone")
        assert "name a folder to write, --output FOLDER" in refused("frontier", "alone", "--recipe", recipe)
        assert f"--recipe: the run {run} has its own recipe; leave it out" in refused(
            "frontier", run, "--recipe", recipe
        )
        assert "there is no folder nowhere" in refused("frontier", "nowhere")
        assert "--recover is a share of the run's steps, from 0 to below 1, got 1" in refused(
            "frontier", run, "--recover", 1
        )
        for rate in (0, 11):
            assert (
                f"--recover_rate is a share of the run's learning rate, above 0 and at most 10, got {rate}"
                in refused("frontier", run, "--recover_rate", rate)
            )
        assert "--recover_rate is for a recovery, and --recover 0 leaves it out" in refused(
            "frontier", run, "--recover_rate", 0.5, "--recover", 0
        )
        assert "--ranks: give average ranks such as 8,4,2,1; 'few' are none" in refused(
            "frontier", run, "--ranks", "few"
        )
        assert "--to is where --export writes" in refused("frontier", run, "--to", "there")
        for average in ("nan", "inf", "0", "-1"):
            assert f"--export is an average rank, above 0, got {average}" in refused(
                "frontier", run, f"--export={average}"
            )

    def test_sizes_that_it_does_not_have(self, run: Path) -> None:
        message = refused("frontier", run, "--recover", 0, "--ranks", "2,99")
        assert "this adapter has an average rank of 2 in" in message
        assert message.rstrip().endswith("got 99")

    def test_data_by_which_sizes_cannot_be_compared(self, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def without(**changes: object) -> str:
            monkeypatch.setattr(
                "loralloc.frontier.run.task_data",
                lambda recipe: replace(data := task_data(recipe), **{k: v(data) for k, v in changes.items()}),
            )
            return refused("frontier", run)

        assert without(example_losses=lambda data: None) == (
            "task sequence-classification has no loss per example, which is needed to compare sizes; "
            "loralloc truncate cuts its adapters"
        )
        assert without(validation=lambda data: data.validation.select([0])) == (
            "data.validation: sizes are compared by the losses of validation examples; give more than one"
        )

    def test_sizes_that_are_none(self, run: Path) -> None:
        assert "--ranks: give average ranks such as 8,4,2,1; ',' are none" in refused("frontier", run, "--ranks", ",")
        assert "leave one of the two out" in refused("frontier", run, "--ranks", "2", "--export", 2)

    def test_an_adapter_that_is_more_than_plain_lora(self, run: Path, recipe: Path) -> None:
        shutil.copytree(run / "adapter", "alone")
        config = read_json(Path("alone/adapter_config.json"))
        Path("alone/adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": "pissa"}))
        message = refused("frontier", "alone", "--recipe", recipe, "--output", "curve")
        assert "changes the base weights at the start" in message

    @pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's own: it saves the base weight along
    def test_an_adapter_on_the_output_layer(self, decoder: Path, write: Write) -> None:
        config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
        get_peft_model(AutoModelForCausalLM.from_pretrained(decoder), config).save_pretrained("alone")
        assert refused("frontier", "alone", "--recipe", write(LANGUAGE), "--output", "curve") == (
            "the adapter: lm_head has an adapter, and TRL, which trains task causal-lm, computes the logits from the "
            "weight of lm_head without it; loralloc truncate cuts it all the same"
        )
        done("truncate", "alone", "--total_rank", 2, "--output", "small")

    @SLOW
    def test_a_recovery_that_would_lose_what_was_trained(self, run: Path, recipe: Path, here: Path) -> None:
        saved = ("--lora.modules_to_save", "[pooler.dense]", "--lora.exclude_modules", "[pooler.dense]")
        done("train", recipe, *saved, "--output", "saved")
        shutil.copytree(here / "saved" / "adapter", "alone")
        message = refused("frontier", "alone", "--recipe", recipe, "--output", "curve", "--ranks", "1")
        assert "the adapter has trained more than the recipe would (" in message
        assert "add its module to lora.modules_to_save, or leave the recovery out with --recover 0" in message
        done("frontier", "alone", "--recipe", recipe, "--output", "other", "--ranks", "1", "--recover", 0)

    def test_an_adapter_of_an_export_counts_the_modules_without_ranks(self, run: Path, recipe: Path) -> None:
        shutil.copytree(run / "adapter", "alone")
        record = Path("alone") / RECORD
        ranks = read_json(record)["ranks"]
        record.write_text(json.dumps(read_json(record) | {"ranks": ranks | {"closed": 0}}))
        source = Source.of(Path("alone"), recipe, Path("curve"))
        assert (source.modules, source.named) == (len(ranks) + 1, f"alone --recipe {recipe} --output curve")
        record.unlink()
        assert Source.of(Path("alone"), recipe, Path("curve")).modules is None

    def test_an_export_over_something_else(self, run: Path) -> None:
        Path("mine").mkdir()
        Path("mine/file").touch()
        message = refused("frontier", run, "--export", 1, "--to", "mine")
        assert "mine exists and is no export of loralloc; nothing was overwritten" in message

    @pytest.mark.parametrize("words", [["--to", "run/adapter"], ["--output", "run"]])
    def test_an_export_over_its_own_source(self, words: list[str], run: Path) -> None:
        before = files(run)
        message = refused("frontier", run, "--export", 1, *words)
        assert message.endswith("run/adapter is the adapter that is to be cut; choose another folder with --to")
        assert files(run) == before


class TestInEveryRun:
    def test_smaller_sizes_are_evaluated_and_drawn(self, run: Path) -> None:
        metrics, total = read_json(run / "metrics.json"), RankPlan.load(run / "ranks.json").total_rank
        assert [cut["ranks"] for cut in metrics["cuts"]] == [total // 2, total // 4, total // 8, total // 16]
        modules = len(RankPlan.load(run / "ranks.json").modules)
        half = metrics["cuts"][0]
        assert half["average_rank"] == pytest.approx(half["ranks"] / modules, abs=1e-4)
        assert "Smaller adapters" in (run / "report.html").read_text()
        done("frontier", run, "--recover", 0, "--ranks", half["ranks"] / modules, "--order", "singular_value")
        (point,) = points(run / "frontier")
        assert point["ranks"] == half["ranks"]
        assert point["cut"]["metrics"] == pytest.approx(half["metrics"], abs=1e-5)

    def test_unless_the_recipe_says_otherwise(self, recipe: Path, unreported: None) -> None:
        done("train", recipe, "--evaluate.cuts", 0, "--training.steps", 4)
        assert read_json(Path("run/metrics.json"))["cuts"] == []
