"""A run without a recipe keeps its folder: from a Trainer, and from a loop of one's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cli.command import done, read_json, read_rows, refused
from models import labelled_batch, tiny_peft
from report.dom import report, tile, words
from trainers import STEPS, sentences, train, train_until_killed
from trainers import build as build_trainer

from loralloc import AdaLoRA, Budget, RankAllocation, RankPlan, UserError, attach, export_adapter
from loralloc.training.run import AllocationRun

TWO_RANKS = AdaLoRA(Budget(average_rank=2))


def loop(steps: int = 12, *, told: bool = True) -> AllocationRun:
    """An own loop that has made all its steps."""
    model = tiny_peft("llama").train()
    run = attach(model, TWO_RANKS, total_steps=steps)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batch = labelled_batch("llama", 0)
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        run.before_step(optimizer)
        optimizer.step()
        run.after_step(optimizer)
        optimizer.zero_grad()
        if told:
            run.log(loss=loss.item(), learning_rate=1e-2)
    return run


class TestTrainer:
    def test_everything_is_there_at_the_end(self, tmp_path: Path) -> None:
        folder = tmp_path / "runs" / "x"
        evaluated = {"eval_strategy": "steps", "eval_steps": 12, "logging_steps": 4}
        trainer, allocation = train(tmp_path, "bert", folder=folder, extra={"eval_dataset": sentences(8)}, **evaluated)
        assert allocation.plan is not None
        assert RankPlan.load(folder / "ranks.json").modules == allocation.plan.modules
        rows = read_rows(folder / "log.jsonl")
        assert [row["step"] for row in rows if "loss" in row] == [4, 8, 12, 16, 20, 24]
        assert all("rank/total" in row for row in rows if "loss" in row)
        events = [row["event"] for row in read_rows(folder / "trace.jsonl")]
        assert (events[0], events[-1]) == ("start", "finish")
        metrics = read_json(folder / "metrics.json")
        last = [row for row in trainer.state.log_history if "eval_loss" in row][-1]
        assert metrics["validation"] == {"loss": last["eval_loss"]}
        assert (metrics["final_ranks"], metrics["total_steps"]) == (allocation.plan.total_rank, STEPS)
        page = report(folder)
        assert tile(page, "Loss").startswith(f"Loss{last['eval_loss']:.3f}on the validation data")
        headings = [figure.one("h3").text for figure in page.all("figure")]
        assert {"Budget", "Loss", "Learning rate", "Gradient norm"} <= set(headings)
        assert "recipe.yaml: the recipe of this run is not in the folder." in words(page.one("aside"))

    def test_what_is_not_known_is_said(self, tmp_path: Path) -> None:
        folder = tmp_path / "x"
        _, allocation = train(tmp_path, folder=folder, logging_strategy="no")
        page = report(folder)
        assert "No losses have been logged." in words(page.section("history"))
        assert "Not measured in this run." in tile(page, "Loss")
        assert "has not been compared" in tile(page, "Adapter check")
        assert f"{folder}/adapter is not there yet" in words(page.section("load"))
        export_adapter(allocation.run.model, folder / "adapter")  # type: ignore[arg-type]
        assert "is not there yet" not in words(report(folder).section("load"))

    def test_it_can_be_looked_at_while_it_trains(self, tmp_path: Path) -> None:
        folder = tmp_path / "x"
        train_until_killed(tmp_path, 10, folder=folder, logging_steps=2)
        assert not (folder / "ranks.json").exists()
        assert f"wrote {folder / 'report.html'}" in done("report", folder)
        assert "Training has not finished" in (folder / "report.html").read_text(encoding="utf-8")

    def test_a_resumed_run_keeps_the_folder_of_a_run_that_was_not(self, tmp_path: Path) -> None:
        """Its time is not known: the process that began has taken it along."""
        settings = {"save_strategy": "steps", "save_steps": 4, "logging_steps": 2}
        train(tmp_path / "a", folder=tmp_path / "whole", **settings)
        train_until_killed(tmp_path / "b", 11, folder=tmp_path / "x", **settings)
        trainer, _ = build_trainer(tmp_path / "b", folder=tmp_path / "x", **settings)
        trainer.train(resume_from_checkpoint=True)
        whole, resumed = (
            [(row["step"], row.get("loss")) for row in read_rows(tmp_path / name / "log.jsonl")]
            for name in ("whole", "x")
        )
        assert resumed == whole
        assert (tmp_path / "x" / "trace.jsonl").read_bytes() == (tmp_path / "whole" / "trace.jsonl").read_bytes()
        assert "train_seconds" in read_json(tmp_path / "whole" / "metrics.json")
        assert "train_seconds" not in read_json(tmp_path / "x" / "metrics.json")

    def test_a_trace_alone_is_a_trace_alone(self, tmp_path: Path) -> None:
        train(tmp_path / "out", trace=tmp_path / "there" / "trace.jsonl")
        assert [path.name for path in (tmp_path / "there").iterdir()] == ["trace.jsonl"]

    def test_what_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="give RankAllocation a trace or a folder, not both"):
            RankAllocation(TWO_RANKS, trace=tmp_path / "t", folder=tmp_path)
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match="file is a file; name a folder"):
            RankAllocation(TWO_RANKS, folder=tmp_path / "file")
        (tmp_path / "recipe.yaml").touch()
        with pytest.raises(UserError, match="holds a run of `loralloc train`, which would be overwritten"):
            RankAllocation(TWO_RANKS, folder=tmp_path)
        RankAllocation(TWO_RANKS, folder=tmp_path / "another")  # the cure


class TestOwnLoop:
    def test_the_page_shows_what_was_told(self, tmp_path: Path) -> None:
        run = loop()
        run.log(eval_loss=0.25, eval_accuracy=torch.tensor(0.75))  # type: ignore[arg-type]
        plan = run.finish()
        run.log(eval_loss=0.2)
        folder = tmp_path / "runs" / "x"
        assert run.write_report(folder) == folder / "report.html"
        assert RankPlan.load(folder / "ranks.json").modules == plan.modules
        rows = read_rows(folder / "log.jsonl")
        assert [row["step"] for row in rows if "loss" in row] == list(range(1, 13))
        assert rows[11]["rank/total"] == plan.total_rank
        assert rows[-2] == {"step": 12, "eval_loss": 0.25, "eval_accuracy": 0.75}
        metrics = read_json(folder / "metrics.json")
        assert metrics["validation"] == {"loss": 0.2}
        assert metrics["train_seconds"] >= 0
        assert [row["event"] for row in read_rows(folder / "trace.jsonl")][-2:] == ["freeze", "finish"]
        headings = [figure.one("h3").text for figure in report(folder).all("figure")]
        assert headings[-2:] == ["Loss", "Learning rate"]
        assert "wrote" in done("report", folder)

    def test_nothing_was_told(self, tmp_path: Path) -> None:
        run = loop(told=False)
        run.finish()
        run.write_report(tmp_path)
        page = report(tmp_path)
        assert "No losses have been logged." in words(page.section("history"))
        assert page.all("figure")[0].one("h3").text == "Budget"

    def test_a_run_that_was_resumed_writes_no_trace(self, tmp_path: Path) -> None:
        run = loop()
        tensors, numbers = run.state_dict()
        weights = {name: value.clone() for name, value in run.model.state_dict().items()}
        model = tiny_peft("llama").train()
        again = attach(model, TWO_RANKS, total_steps=12)
        model.load_state_dict(weights)
        again.load_state_dict(tensors, json.loads(json.dumps(numbers)))
        again.finish()
        again.write_report(tmp_path)
        assert "trace.jsonl: how the ranks developed is not known." in words(report(tmp_path).one("aside"))
        assert "train_seconds" not in read_json(tmp_path / "metrics.json")

    def test_what_is_refused(self, tmp_path: Path) -> None:
        run = loop(4)
        with pytest.raises(UserError, match=r"call finish\(\) before write_report\(\)"):
            run.write_report(tmp_path / "x")
        assert not (tmp_path / "x").exists()
        run.finish()
        (tmp_path / "recipe.yaml").touch()
        with pytest.raises(UserError, match="choose another folder"):
            run.write_report(tmp_path)
        assert run.write_report(tmp_path / "x").is_file()  # both cures


def test_a_folder_that_is_neither(tmp_path: Path) -> None:
    assert "is not a run" in refused("report", tmp_path)
