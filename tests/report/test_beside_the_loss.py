"""What the log says beside the losses, and what a model has written: charts where they are logged, answers escaped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loralloc.report.answers import samples, score_table
from loralloc.report.drawing import report_settings
from loralloc.report.figures import series_figure
from loralloc.report.run_record import read_run

from .dom import report, words
from .fabricate import Fabricated, bert, lines, llama


def headings(run: Path) -> list[str]:
    return [figure.one("h3").text for figure in report(run).all("figure")]


class TestCharts:
    def test_each_is_there_where_the_log_has_it(self, tmp_path: Path) -> None:
        made = Fabricated(bert(1))
        run = made.write(tmp_path / "run")
        assert headings(run)[-4:] == ["Learning rate", "Gradient norm", "Speed", "Memory"]
        rows = [{"step": row["step"], "loss": row["loss"]} for row in made.log() if "loss" in row]
        (run / "log.jsonl").write_text(lines(rows))
        assert headings(run)[-1] == "Loss"
        (run / "log.jsonl").write_text(lines([row | {"grad_norm": 0.5} for row in rows]))
        assert headings(run)[-2:] == ["Loss", "Gradient norm"]

    @pytest.mark.parametrize(("task", "unit"), [("causal-lm", "tokens/s"), ("sequence-classification", "examples/s")])
    def test_speed_is_in_what_the_task_counts(self, task: str, unit: str, tmp_path: Path) -> None:
        page = report(Fabricated(llama(1), task=task).write(tmp_path / "run"))
        (speed,) = (figure for figure in page.all("figure") if figure.one("h3").text == "Speed")
        assert unit in words(speed)

    def test_the_line_is_what_was_logged(self, tmp_path: Path) -> None:
        made = Fabricated(bert(1))
        rows = made.log()
        rows[3]["grad_norm"] = None
        run = made.write(tmp_path / "run")
        (run / "log.jsonl").write_text(lines(rows))
        with report_settings():
            figure = series_figure(read_run(run), "grad_norm", "norm", from_zero=True)
        drawn = figure.axes[0].lines[0]
        logged = [(row["step"], row["grad_norm"]) for row in rows if "loss" in row]
        found = [(x, None if y != y else y) for x, y in zip(drawn.get_xdata(), drawn.get_ydata(), strict=True)]
        assert found == logged
        assert figure.axes[0].get_ylim()[0] == 0

    def test_a_search_comes_before_the_training(self, tmp_path: Path) -> None:
        made = Fabricated(bert(1), method="autolora", steps=20)
        run = made.write(tmp_path / "run")
        (run / "search").mkdir()
        (run / "search" / "trace.jsonl").write_text(lines(made.trace()))
        (run / "search" / "log.jsonl").write_text(lines([{"step": 10, "loss": 1.0, "grad_norm": 9.0}]))
        (run / "log.jsonl").write_text(lines([{"step": 5, "loss": 1.0, "grad_norm": 3.0, "memory_mib": 1.0}]))
        assert read_run(run).series == {"grad_norm": ((10, 9.0), (25, 3.0)), "memory_mib": ((25, 1.0),)}


class TestAnswers:
    def test_are_shown_as_written_and_run_nothing(self, tmp_path: Path) -> None:
        made = Fabricated(llama(1), task="causal-lm")
        run = made.write(tmp_path / "run")
        (run / "metrics.json").write_text(json.dumps(made.metrics() | {"generation": made.generation()}))
        section = report(run).section("answers")
        (sample,) = section.all("dl")
        told = made.generation()["samples"][0]
        assert [part.text for part in sample.all("dt")] == ["prompt", "reference", "before", "after"]
        assert [part.text for part in sample.all("dd")] == [told["prompt"], told["reference"], "–", told["after"]]  # noqa: RUF001
        assert "exact match0.0000.250" in words(section)
        assert "bleu0.00031.20" in words(section)

    @pytest.mark.parametrize("found", [None, [], {}, {"samples": "none", "trained": None}, {"samples": [3, None]}])
    def test_a_run_without(self, found: Any, tmp_path: Path) -> None:
        made = Fabricated(llama(1), task="causal-lm")
        run = made.write(tmp_path / "run")
        (run / "metrics.json").write_text(json.dumps(made.metrics() | {"generation": found}))
        assert (samples(read_run(run)), score_table(read_run(run))) == ([], None)
        assert "Answers" not in [head.text for head in report(run).all("h2")]

    def test_other_evaluations_have_columns(self, tmp_path: Path) -> None:
        made = Fabricated(bert(1))
        run = made.write(tmp_path / "run")
        more = {"also": {"<hard>": {"accuracy": 0.4}}}
        (run / "metrics.json").write_text(json.dumps(made.metrics() | more))
        (table,) = (t for t in report(run).section("details").all("table") if "<hard>" in t.text)
        assert "0.400" in table.text
