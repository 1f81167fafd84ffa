"""The best state and early stopping: only among states whose ranks are final, also in a run that was resumed.

Accuracy does not rise here after the first evaluation that counts: the first checkpoint with final ranks is the best.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from loralloc.recipe import run as pipeline

from .command import PLAIN, RECIPE, done, log_rows, ranks, read_json, refused
from .deaths import differences, killed_at, killed_in

Write = Callable[[str], Path]

EVERY = ("--eval_every", 2, "--save_every", 2, "--learning_rate", 0.3)
KEEP = (*EVERY, "--keep_best", "true")
STOP = (*KEEP, "--early_stopping", 2, "--steps", 30)
"""Ranks are final after step 19 of 30; evaluations at 22 and 24 are no better than that at 20."""
SEARCH = PLAIN.replace("name: lora", "name: autolora\n  check_every: 2")

pytestmark = pytest.mark.usefixtures("unreported")


def evaluated(run: Path) -> list[int]:
    """The steps of evaluations within the training; the last row is of the one after it."""
    return [row["step"] for row in log_rows(run) if "eval_loss" in row][:-1]


def logits(encoder: Path, adapter: Path) -> Tensor:
    """What stock PEFT computes with an adapter."""
    torch.manual_seed(0)  # of the head that is not in the base model's files
    base = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2)
    return PeftModel.from_pretrained(base, adapter).eval()(input_ids=torch.tensor([[2, 5, 6, 3]])).logits


def uninterrupted(recipe: Path, here: Path) -> Path:
    """A run that ended early, out of the way of another one in ./run: checkpoints hold the path of the best."""
    done("train", recipe, *STOP)
    return (here / "run").rename(here / "whole")


class TestBest:
    @pytest.mark.parametrize("compact", ["false", "true"])
    def test_is_exported_with_the_ranks_of_the_plan(
        self, compact: str, recipe: Path, here: Path, encoder: Path
    ) -> None:
        said = done("train", recipe, *KEEP, "--compact", compact)
        assert "evaluations begin at step 11, when the ranks are final: earlier states cannot be the best" in said
        assert "the best evaluation was that of step 12: this state is exported" in said
        assert "reloaded by stock PEFT" in said
        run = here / "run"
        assert read_json(run / "metrics.json")["best_step"] == 12
        assert evaluated(run) == [12, 14, 16]
        exported = logits(encoder, run / "adapter")
        torch.testing.assert_close(exported, logits(encoder, run / "checkpoints/checkpoint-12"), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(exported, logits(encoder, run / "checkpoints/checkpoint-16"), atol=1e-3)
        tensors = load_file(run / "adapter" / "adapter_model.safetensors")
        for name, rank in ranks(run).items():
            found = tensors.get(f"base_model.model.{name}.lora_A.weight")
            assert (0 if found is None else len(found)) == rank, name
        assert sum(ranks(run).values()) == 26

    def test_the_last_state_is_exported_otherwise(self, recipe: Path, here: Path, encoder: Path) -> None:
        said = done("train", recipe, *EVERY)
        assert "best evaluation" not in said
        assert evaluated(here / "run") == [2, 4, 6, 8, 10, 12, 14, 16]
        last = logits(encoder, here / "run/checkpoints/checkpoint-16")
        torch.testing.assert_close(logits(encoder, here / "run/adapter"), last, atol=1e-5, rtol=1e-5)

    def test_of_plain_lora_every_state_counts(self, write: Write, here: Path) -> None:
        assert "evaluations begin" not in done("train", write(PLAIN), *KEEP)
        assert evaluated(here / "run")[0] == 2
        assert read_json(here / "run" / "metrics.json")["best_step"] < 16

    def test_other_verbs_are_not_concerned(self, recipe: Path, here: Path) -> None:
        done("train", recipe, *STOP)
        found = read_json(here / "run" / "metrics.json")["validation"]
        assert f"{found['accuracy']:.4f}" in done("evaluate", here / "run")
        assert "reloaded by stock PEFT" in done("export", here / "run", "--profile", "uniform")
        assert "report.html" in done("report", here / "run")
        assert "evaluations begin at step 19" in done("train", recipe, *STOP, "--dry-run", "--output", "another")

    def test_by_a_metric_of_the_recipes_choice(self, write: Write, here: Path) -> None:
        recipe = write(PLAIN + "evaluate: {{metric: matthews}}\n")
        done("train", recipe, *KEEP)
        values = {row["step"]: row["eval_matthews"] for row in log_rows(here / "run") if "eval_matthews" in row}
        found = read_json(here / "run" / "metrics.json")
        assert found["metric"] == "matthews"
        assert found["validation"]["matthews"] == max(values.values())
        assert found["reference"].keys() == {"untrained"}  # the majority class is a reference of the accuracy
        said = refused("train", recipe, "--evaluate.metric", "pearson", "--replace")
        assert "evaluate.metric: this run has no metric pearson; it has loss, accuracy, macro_f1, matthews, f1." in said
        said = refused("train", recipe, "--evaluate.metric", "macro", "--replace")
        assert "evaluate.metric must be accuracy, f1, macro_f1, micro_f1, matthews, pearson, spearman or mse, " in said

    def test_by_another_metric(self, write: Write, here: Path) -> None:
        done("train", write(PLAIN), *KEEP, "--metric_for_best_model", "loss")
        losses = {row["step"]: row["eval_loss"] for row in log_rows(here / "run") if "eval_loss" in row}
        found = read_json(here / "run" / "metrics.json")
        assert found["validation"]["loss"] == pytest.approx(min(losses.values()))
        said = refused("train", write(PLAIN), *KEEP, "--metric_for_best_model", "acuracy", "--replace")
        assert (
            'a run has no metric acuracy; it has loss, accuracy, macro_f1, matthews, f1. Did you mean "accuracy"?'
            in said
        )

    def test_after_a_search(self, write: Write, here: Path) -> None:
        done("train", write(SEARCH), *KEEP)
        assert read_json(here / "run" / "metrics.json")["best_step"] < 16
        assert not (here / "run/search/checkpoints").exists() or not [
            row for row in log_rows(here / "run" / "search") if "eval_loss" in row
        ]

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (
                ("--keep_best", "true"),
                "keep_best judges by evaluations within the training; set training.eval_every",
            ),
            (
                ("--early_stopping", 2),
                "early_stopping judges by evaluations within the training; set training.eval_every",
            ),
            (("--keep_best", "true", "--eval_every", 2), "set training.save_every to 2, as training.eval_every"),
            (
                (*KEEP, "--load_best_model_at_end", "true"),
                "keep_best is training.trainer.load_best_model_at_end, and more",
            ),
            ((*KEEP, "--early_stopping", 0), "training.early_stopping must be at least 1, got 0"),
        ],
    )
    def test_what_it_needs(self, words: tuple[object, ...], message: str, recipe: Path) -> None:
        assert message in refused("train", recipe, *words)

    def test_ranks_that_are_chosen_at_the_end(self, write: Write) -> None:
        path = write(RECIPE.replace("name: adalora", "name: truncate\n  recover: 0"))
        told = "truncate chooses the ranks when the run ends, and no earlier state has them; leave it out"
        assert refused("train", path, *KEEP) == f"training.keep_best: {told}"
        both = refused("train", path, *STOP)
        assert both == f"training.keep_best and training.early_stopping: {told}"
        assert "reloaded by stock PEFT" in done("train", path, *EVERY)  # the cure


class TestEarlyStopping:
    def test_ends_the_run_after_evaluations_without_a_better_one(self, recipe: Path, here: Path) -> None:
        said = done("train", recipe, *STOP)
        assert "stopped after 24 of 30 steps: no better evaluation" in said
        assert evaluated(here / "run") == [20, 22, 24]
        metrics = read_json(here / "run" / "metrics.json")
        assert (metrics["total_steps"], metrics["planned_steps"], metrics["best_step"]) == (24, 30, 20)
        assert sum(ranks(here / "run").values()) == 26
        assert "| steps | 24 |" in (here / "run/adapter/README.md").read_text(encoding="utf-8")

    def test_never_before_the_ranks_are_final(self, recipe: Path, here: Path) -> None:
        done("train", recipe, *EVERY, "--early_stopping", 1, "--steps", 30)
        assert evaluated(here / "run")[:2] == [20, 22]
        assert read_json(here / "run" / "metrics.json")["total_steps"] == 22

    def test_without_it_the_run_goes_on(self, recipe: Path, here: Path) -> None:
        done("train", recipe, *KEEP, "--steps", 30)
        metrics = read_json(here / "run" / "metrics.json")
        assert metrics["total_steps"] == 30
        assert "planned_steps" not in metrics

    @pytest.mark.parametrize("at", [19, 23])
    def test_a_resumed_run_counts_on(self, at: int, recipe: Path, here: Path) -> None:
        whole = uninterrupted(recipe, here)
        with killed_at(at):
            done("train", recipe, *STOP)
        done("train", recipe, *STOP, "--resume")
        assert differences(here / "run", whole) == []

    def test_a_run_that_had_ended_ends_there_again(self, recipe: Path, here: Path) -> None:
        whole = uninterrupted(recipe, here)
        with killed_in(pipeline, "export_adapter"):
            done("train", recipe, *STOP)
        done("train", recipe, *STOP, "--resume")
        assert differences(here / "run", whole) == []
