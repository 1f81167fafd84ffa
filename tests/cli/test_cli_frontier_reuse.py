"""What a frontier scores terms on, and what it takes from an earlier call: nothing that belongs to something else."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from loralloc.errors import UserError
from loralloc.frontier.orders import score_terms
from loralloc.plan import RankPlan
from loralloc.recipe.lock import locked
from loralloc.training.step_data import ObservedData

from .command import done, read_json, refused

CUTS = ("--recover", 0)


def losses(folder: Path) -> list[float]:
    return [point["cut"]["metrics"]["loss"] for point in read_json(folder / "frontier.json")["points"]]


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The orders by which terms have been scored."""
    orders: list[str] = []

    def counted(*args: Any) -> torch.Tensor:
        orders.append(args[0])
        return score_terms(*args)

    monkeypatch.setattr("loralloc.frontier.scoring.score_terms", counted)
    return orders


def edit_recipe(run: Path, old: str, new: str) -> None:
    text = (run / "recipe.yaml").read_text(encoding="utf-8")
    assert old in text
    (run / "recipe.yaml").write_text(text.replace(old, new, 1), encoding="utf-8")


class TestScores:
    def test_terms_are_ordered_by_ablation_and_scored_once(self, run: Path, scored: list[str]) -> None:
        done("frontier", run, *CUTS, "--ranks", "2,1")
        done("frontier", run, *CUTS, "--ranks", "0.5")
        done("frontier", run, "--export", 0.5)
        assert read_json(run / "frontier" / "frontier.json")["order"] == "ablation"
        page = (run / "frontier" / "frontier.html").read_text(encoding="utf-8")
        assert "those whose AB-LoRA score on training examples is the lowest are dropped first" in page
        assert scored == ["ablation"]
        (run / "frontier" / "scores.json").write_text("{", encoding="utf-8")
        done("frontier", run, *CUTS, "--ranks", "0.5")
        assert scored == ["ablation"] * 2, "a damaged file is made again"

    def test_they_look_at_training_examples_alone(self, run: Path, data: Path) -> None:
        """Sizes are judged by validation examples, which must not have chosen the terms."""

        def scores() -> list[float]:
            done("frontier", run, *CUTS, "--ranks", "1")
            return read_json(run / "frontier" / "scores.json")["scores"]

        first = scores()
        edit_recipe(run, "validation.jsonl", "test.jsonl")
        assert scores() == pytest.approx(first)
        half = (data / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:24]
        Path("half.jsonl").write_text("".join(half), encoding="utf-8")
        edit_recipe(run, str(data / "train.jsonl"), str(Path("half.jsonl").resolve()))
        assert scores() != pytest.approx(first)

    def test_singular_values_where_the_loss_of_an_example_is_not_known(
        self, run: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def unknown(self: ObservedData) -> None:
            raise UserError("the model has a loss of its own")

        monkeypatch.setattr(ObservedData, "check_scoring", unknown)
        refusal = refused("frontier", run, *CUTS, "--ranks", "1", "--order", "ablation")
        assert refusal.startswith("the model has a loss of its own")
        said = done("frontier", run, *CUTS, "--ranks", "1")
        assert "the model has a loss of its own; so the terms with the smallest singular values are dropped" in said
        assert read_json(run / "frontier" / "frontier.json")["order"] == "singular_value"
        page = (run / "frontier" / "frontier.html").read_text(encoding="utf-8")
        assert "those with the smallest singular values are dropped first" in page

    @pytest.mark.parametrize("order", ["ablation", "sensitivity", "singular_value"])
    def test_ranks_that_do_nothing_are_dropped_first(self, run: Path, recipe: Path, order: str) -> None:
        """The profile for servers pads ranks with zeros, whose scores are higher than those of harmful terms."""
        done("export", run, "--profile", "uniform", "--to", "padded")
        words = ("frontier", "padded", "--recipe", recipe, "--output", "curve", "--order", order, *CUTS)
        done(*words)
        ranks = {name: module.rank for name, module in RankPlan.load(run / "ranks.json").modules.items() if module.rank}
        (largest, *_), total = read_json(Path("curve/frontier.json"))["points"], sum(ranks.values())
        assert largest["ranks"] == total
        found = RankPlan.load(Path("curve") / "points" / f"{total}-ranks" / "ranks.json")
        assert {name: module.rank for name, module in found.modules.items() if module.rank} == ranks


class TestOfAnotherAdapter:
    def test_its_sizes_are_not_exported(self, run: Path, recipe: Path) -> None:
        done("truncate", run / "adapter", "--total_rank", 4, "--output", "small")
        curve = ("--recipe", recipe, "--output", "curve")
        done("frontier", run / "adapter", *curve, *CUTS, "--ranks", "2,1")
        message = refused("frontier", "small", *curve, *CUTS, "--export", 1)
        assert message.startswith("this adapter has an average rank of 0.3077 in 13 modules")
        assert "curve/adapter (3 ranks, " in done("frontier", "small", *curve, *CUTS, "--export", 3 / 13)

    def test_another_scale_is_another_adapter(self, run: Path, recipe: Path) -> None:
        shutil.copytree(run / "adapter", "alone")
        words = ("frontier", "alone", "--recipe", recipe, "--output", "curve", *CUTS, "--ranks", "1")
        done(*words)
        first = losses(Path("curve"))
        config = read_json(Path("alone/adapter_config.json"))
        scales = {name: 8 * alpha for name, alpha in config["alpha_pattern"].items()}
        config |= {"lora_alpha": 8 * config["lora_alpha"], "alpha_pattern": scales}
        Path("alone/adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        done(*words)
        assert losses(Path("curve")) != pytest.approx(first, abs=1e-4)

    def test_other_base_weights_make_sizes_anew(self, run: Path, encoder: Path) -> None:
        base = Path(shutil.copytree(encoder, "base"))
        edit_recipe(run, str(encoder), str(base.resolve()))
        done("frontier", run, *CUTS, "--ranks", "1")
        first = losses(run / "frontier")
        from safetensors.torch import load_file, save_file

        weights = load_file(base / "model.safetensors")
        save_file({name: 0.5 * w for name, w in weights.items()}, base / "model.safetensors", metadata={"format": "pt"})
        done("frontier", run, *CUTS, "--ranks", "1")
        assert losses(run / "frontier") != pytest.approx(first, abs=1e-4)


def test_two_processes_do_not_write_into_one_folder(run: Path) -> None:
    with locked(run / "frontier"):
        message = refused("frontier", run, *CUTS)
    assert message.startswith(f"{run}/frontier is in use: process {os.getpid()} on ")
    done("frontier", run, *CUTS, "--ranks", "1")
