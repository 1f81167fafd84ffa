"""Runs that are unfinished, incomplete or out of the ordinary: the page says what is missing and shows the rest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from .dom import pictures, report, tile, words
from .fabricate import Fabricated, bert, lines


class TestMissingPieces:
    def test_no_metrics(self, tmp_path: Path) -> None:
        page = report(Fabricated(bert(1)).write(tmp_path / "run", without=["metrics.json"]))
        assert "metrics.json: the final figures are written when training has finished." in words(page.one("aside"))
        assert "Measured when training has finished." in tile(page, "Metric")
        assert "has not been compared" in tile(page, "Adapter check")
        assert "300 steps planned" in tile(page, "Training time")

    def test_no_trace(self, tmp_path: Path) -> None:
        run = Fabricated(bert(1), bad_steps=(3,)).write(tmp_path / "run", without=["trace.jsonl"])
        page = report(run)
        assert "trace.jsonl: how the ranks developed is not known." in words(page.one("aside"))
        assert page.all("figure")[0].one("h3").text == "Loss"
        assert pictures(run) == {"ranks.png", "loss.png"}
        assert "1 step had gradients that were not finite. It was skipped" in words(page.section("bad-steps"))

    def test_no_log(self, tmp_path: Path) -> None:
        run = Fabricated(bert(1)).write(tmp_path / "run", without=["log.jsonl"])
        page = report(run)
        assert "No losses have been logged." in words(page.section("history"))
        assert pictures(run) == {"ranks.png", "budget.png"}

    def test_no_recipe(self, tmp_path: Path) -> None:
        page = report(Fabricated(bert(1)).write(tmp_path / "run", without=["recipe.yaml"]))
        assert "recipe.yaml: the recipe of this run is not in the folder." in words(page.one("aside"))
        assert 'from_pretrained("demo:minilm")' in page.section("load").text

    def test_the_plan_alone(self, tmp_path: Path) -> None:
        others = ["trace.jsonl", "log.jsonl", "metrics.json", "recipe.yaml"]
        run = Fabricated(bert(1)).write(tmp_path / "run", without=others)
        shutil.rmtree(run / "adapter")
        page = report(run)
        assert [li.text.split(":")[0] for li in page.one("aside").all("li")] == others
        assert page.one("title").text == "AdaLoRA, task unknown, demo:minilm"
        assert "is not there yet" in words(page.section("load"))
        assert page.all("figure") == []

    def test_a_run_under_way(self, tmp_path: Path) -> None:
        made = Fabricated(bert(1))
        run = made.write(tmp_path / "run", without=["ranks.json", "metrics.json"])
        (run / "trace.jsonl").write_text(lines([row for row in made.trace() if row["step"] <= 100]))
        (run / "log.jsonl").write_text(lines(made.log()[:20]))
        page = report(run)
        assert "Training has not finished" in words(page.one("header"))
        assert words(page.one("h1")).startswith("AdaLoRA on")
        assert "budget: 48 ranks" in tile(page, "Ranks so far")

    def test_a_run_that_ended_early_ends_where_it_did(self, tmp_path: Path) -> None:
        made = Fabricated(bert(1))
        run = made.write(tmp_path / "run")
        events = [row for row in made.trace() if row["step"] <= 200] + [made.event("finish", 200, made.ranks)]
        (run / "log.jsonl").write_text(lines(row for row in made.log() if row["step"] <= 200))
        (run / "trace.jsonl").write_text(lines(events))
        assert "in 200 steps." in words(report(run).one("header"))
        (run / "trace.jsonl").write_text(lines(events[:-1]))
        assert "in 300 steps." in words(report(run).one("header"))  # it goes on

    def test_no_evaluation(self, tmp_path: Path) -> None:
        made = Fabricated(bert(1))
        run = made.write(tmp_path / "run")
        (run / "log.jsonl").write_text(lines(row for row in made.log() if "loss" in row))
        assert "No evaluation has been logged during training." in words(report(run).section("history"))

    def test_one_log_row(self, tmp_path: Path) -> None:
        made = Fabricated(bert(1))
        run = made.write(tmp_path / "run")
        (run / "log.jsonl").write_text(lines(made.log()[:1]))
        page = report(run)
        assert "Only one training loss has been logged." in words(page.section("history"))
        (loss,) = (f for f in page.all("figure") if f.one("h3").text == "Loss")
        assert loss.all("use"), "a single point needs a marker"

    def test_losses_that_are_not_finite(self, tmp_path: Path) -> None:
        made = Fabricated(bert(1))
        run = made.write(tmp_path / "run")
        rows = made.log()
        rows[3]["loss"] = rows[4]["loss"] = float("nan")
        (run / "log.jsonl").write_text(lines(rows))
        assert "2 logged losses were not finite and are left out." in words(report(run).section("history"))
        (run / "log.jsonl").write_text(lines([{"step": 5, "loss": float("nan")}]))
        page = report(run)
        assert "1 logged loss was not finite and is left out." in words(page.section("history"))

    def test_plain_lora(self, tmp_path: Path) -> None:
        run = Fabricated(bert(1), method="lora", average=12).write(tmp_path / "run")
        page = report(run)
        assert page.one("h1").text == "Plain LoRA on sequence classification"
        assert "every module kept the rank it started with" in words(page.one("header"))
        assert "The ranks are constant" in words(page.section("history"))
        assert "budget: none" in tile(page, "Ranks")
        assert "as at the start" in tile(page, "LoRA parameters")
        assert pictures(run) == {"ranks.png", "loss.png"}

    def test_a_figure_that_no_longer_holds_is_removed(self, tmp_path: Path) -> None:
        run = Fabricated(bert(1)).write(tmp_path / "run")
        report(run)
        (run / "figures" / "mine.png").write_bytes(b"\x89PNG")
        (run / "log.jsonl").unlink()
        report(run)
        assert pictures(run) == {"ranks.png", "budget.png", "mine.png"}

    @pytest.mark.parametrize(
        ("change", "shown"),
        [
            ({"reference": None}, "0.620on the validation data; nothing to compare with"),
            ({"reference": {"majority": None, "untrained": 0.2}}, "0.620on the validation data; untrained 0.200"),
            ({"test": {"accuracy": 0.6}}, "0.600on the test data; majority class 0.125, untrained 0.120"),
            ({"validation": {"accuracy": None}}, "not finiteon the validation data"),
            ({"validation": None}, "Not measured in this run."),
        ],
    )
    def test_metrics_in_part(self, change: dict[str, Any], shown: str, tmp_path: Path) -> None:
        made = Fabricated({"layers.0.q": (8, 8)}, start=4, average=2)
        run = made.write(tmp_path / "run", without=["log.jsonl", "trace.jsonl"])
        (run / "metrics.json").write_text(json.dumps(made.metrics() | change))
        assert shown in tile(report(run), "Accuracy")

    @pytest.mark.parametrize(
        ("value", "allowed", "shown"),
        [
            (2e-3, 1e-5, "2.0e-03✗ above 1.0e-05"),
            (2e-3, None, "2.0e-03✗ no limit recorded"),
            (float("nan"), 1e-5, "not finite✗"),
            (1e-5, 1e-5, "1.0e-05✓"),
            (0.0, 1e-5, "0.0e+00✓"),
        ],
    )
    def test_an_adapter_check_that_fails_says_so(
        self, value: float, allowed: float | None, shown: str, tmp_path: Path
    ) -> None:
        made = Fabricated({"layers.0.q": (8, 8)}, start=4, average=2)
        run = made.write(tmp_path / "run", without=["log.jsonl", "trace.jsonl"])
        check = {"adapter_check": value, "adapter_check_allowed": allowed}
        (run / "metrics.json").write_text(json.dumps(made.metrics() | check))
        assert shown in tile(report(run), "Adapter check")
