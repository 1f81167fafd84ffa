"""`loralloc train` with AutoLoRA: search, threshold, training at the ranks found, in one run that can be resumed."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from datasets import Dataset
from torch import Tensor
from transformers import BertModel

from loralloc.recipe import run as pipeline
from loralloc.recipe import stages
from loralloc.recipe.schema import load_recipe
from loralloc.training.trainer import PlainTrainer

from .command import LANGUAGE, PLAIN, RECIPE, done, files, log_rows, ranks, read_json, read_rows, refused
from .deaths import differences, killed_at, killed_in

Write = Callable[[str], Path]

SEARCH = PLAIN.replace("name: lora", "name: autolora\n  logit_learning_rate: 0.05\n  check_every: 2")
SAVING = ["--save_every", 4]
SEARCH_STEPS, STEPS = 8, 16


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory, encoder: Path, data: Path) -> Path:
    """A run of SEARCH with test data that has finished; to be looked at only."""
    folder = tmp_path_factory.mktemp("searched")
    (folder / "recipe.yaml").write_text(SEARCH.format(encoder=encoder, data=data), encoding="utf-8")
    with chdir(folder):
        done("train", "recipe.yaml", "--data.test", data / "test.jsonl")
    return folder / "run"


class TestRun:
    def test_is_complete(self, searched: Path) -> None:
        found = {name for name in files(searched) if not name.startswith(("figures/", "model/"))}
        assert {name for name in found if name.startswith("search/")} == {
            "search/ranks.json",
            "search/trace.jsonl",
            "search/log.jsonl",
            "search/metrics.json",
            "search/depends_on.json",
        }
        assert {"recipe.yaml", "ranks.json", "trace.jsonl", "log.jsonl", "metrics.json", "report.html"} <= found
        assert "adapter/adapter_model.safetensors" in found

    def test_the_plan_is_that_of_the_search(self, searched: Path) -> None:
        plan, found = read_json(searched / "ranks.json"), read_json(searched / "search/ranks.json")
        assert plan["method"] == "autolora"
        assert plan["modules"] == found["modules"]
        assert all(1 <= m["rank"] <= m["start"] == 4 and m["scale"] == 2.0 for m in plan["modules"].values())
        assert sum(ranks(searched).values()) < 4 * 13
        assert len(set(ranks(searched).values())) > 1
        assert plan["provenance"]["steps"] == STEPS
        assert plan["provenance"]["search"] == {"total_steps": SEARCH_STEPS, "steps": SEARCH_STEPS, "bad_steps": 0}
        assert plan["provenance"]["settings"]["mode"] == "fast"

    def test_the_trace_tells_about_the_search(self, searched: Path) -> None:
        events = read_rows(searched / "trace.jsonl")
        assert events == read_rows(searched / "search/trace.jsonl")
        assert [event["event"] for event in events] == ["start", *["plan"] * 4, "finish"]
        assert dict(zip(events[0]["sites"], events[-1]["ranks"], strict=True)) == ranks(searched)

    def test_metrics_count_both_stages(self, searched: Path) -> None:
        metrics = read_json(searched / "metrics.json")
        assert metrics["total_steps"] == STEPS
        assert all(metrics["search"].pop(clock) >= 0 for clock in ("seconds", "processor_seconds"))
        assert metrics["search"] == {"examples": 34, "held_out": 14, "steps": SEARCH_STEPS}  # 30 % of 48 is 14.4
        assert metrics["adapter_check"] <= 1e-5

    def test_the_search_never_evaluates(self, searched: Path) -> None:
        assert all("eval_loss" not in row and "loss" in row for row in read_rows(searched / "search/log.jsonl")[:-1])
        assert [row["step"] for row in read_rows(searched / "log.jsonl") if "loss" in row] == [4, 8, 12, 16]

    def test_the_report_tells_learned_ranks_from_noise(self, searched: Path) -> None:
        page = (searched / "report.html").read_text(encoding="utf-8")
        assert "AutoLoRA" in page
        assert 'id="null-control"' in page
        assert "Steps 1 to 8 are the search" in page

    def test_what_is_trained_is_plain_lora_at_these_ranks(self, searched: Path, write: Write, data: Path) -> None:
        """Bit for bit what `--plan` gives with plain LoRA: fresh weights, no selection variables, all examples (41)."""
        plan = searched / "search" / "ranks.json"
        done("train", write(PLAIN), "--plan", plan, "--output", "again", "--data.test", data / "test.jsonl")
        name = "adapter/adapter_model.safetensors"
        assert (Path("again") / name).read_bytes() == (searched / name).read_bytes()
        assert b"lora_gate" not in (searched / name).read_bytes()


@pytest.mark.usefixtures("unreported")
def test_the_search_sees_disjoint_parts_of_the_training_data_and_nothing_else(
    write: Write, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spec, 39: an audit of every index that is read while the search goes on."""
    parts: dict[str, Dataset] = {}
    split = stages.method_data

    def audited(section: Any, loaded: Any, seed: int) -> Any:
        train, held = split(section, loaded, seed)
        parts.update(train=train, held=held, whole=loaded.train, validation=loaded.validation, test=loaded.test)
        return train, held

    read: set[tuple[int, ...]] = set()
    forward = BertModel.forward

    def spied(self: BertModel, input_ids: Tensor, attention_mask: Tensor, **kwargs: Any) -> Any:
        read.update(tuple(ids[mask.bool()].tolist()) for ids, mask in zip(input_ids, attention_mask, strict=True))
        return forward(self, input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    monkeypatch.setattr(stages, "method_data", audited)
    monkeypatch.setattr(BertModel, "forward", spied)
    evaluated: list[str] = []
    evaluate = PlainTrainer.evaluate

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        evaluated.append(kwargs["metric_key_prefix"])
        found = evaluate(self, *args, **kwargs)
        read.clear()  # the untrained model is evaluated before the search begins
        return found

    monkeypatch.setattr(PlainTrainer, "evaluate", noted)
    with killed_in(pipeline, "_with_fresh_model"):  # when the search is over
        done("train", write(SEARCH), "--data.test", data / "test.jsonl", "--eval_every", 2)
    assert Path("run/search/ranks.json").is_file()
    assert evaluated == ["untrained"]
    texts = {name: {tuple(ids) for ids in part["input_ids"]} for name, part in parts.items()}
    assert read == texts["train"] | texts["held"]
    for name in ("validation", "test"):
        assert texts[name] - read, "some texts are found there alone"

    def rows(name: str) -> list[str]:
        return [str(sorted(row.items())) for row in parts[name]]

    train, held, whole = (parts[name] for name in ("train", "held", "whole"))
    assert (len(train), len(held), len(whole)) == (34, 14, 48)
    assert sorted(rows("train") + rows("held")) == sorted(rows("whole"))
    train_at, held_at = (set(part._indices.column(0).to_pylist()) for part in (train, held))
    assert not train_at & held_at
    assert train_at | held_at == set(range(48))


@pytest.mark.usefixtures("unreported")
@pytest.mark.parametrize(
    "where", ["search", "training", *(pytest.param(place, marks=pytest.mark.slow) for place in ("between", "end"))]
)
def test_a_killed_run_goes_on_in_the_stage_it_was_in(write: Write, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write(SEARCH)
    words = [recipe, *SAVING, "--lora.dropout", 0.1]
    done("train", *words, "--output", "whole")
    deaths = {
        "search": lambda: killed_at(6),
        "between": lambda: killed_in(pipeline, "_with_fresh_model"),
        "training": lambda: killed_at(14),  # the search has no such step
        "end": lambda: killed_in(pipeline, "export_adapter"),
    }
    with deaths[where]():
        done("train", *words)
    assert Path("run/search/ranks.json").is_file() == (where != "search")
    plan = Path("run/search/ranks.json").stat().st_mtime_ns if where != "search" else None
    with monkeypatch.context() as patch:
        if plan is not None:  # nothing was searched: the model that was loaded is the fresh one
            patch.delattr(pipeline, "_with_fresh_model")
        done("train", *words, "--resume")
    if plan is not None:
        assert Path("run/search/ranks.json").stat().st_mtime_ns == plan, "the search was not repeated"
    apart = ("recipe.yaml", "search/log.jsonl", "search/metrics.json")  # these hold times, or the folder's name
    assert [name for name in differences(Path("run"), Path("whole")) if name not in apart] == []
    ours, theirs = (log_rows(Path(run) / "search") for run in ("run", "whole"))
    assert [row.get("loss") for row in ours] == [row.get("loss") for row in theirs]


@pytest.mark.usefixtures("unreported")
def test_a_finished_search_is_kept_also_without_checkpoints(write: Write) -> None:
    recipe = write(SEARCH)
    with killed_in(pipeline, "export_adapter"):
        done("train", recipe)
    done("train", recipe, "--resume")
    assert read_json(Path("run/metrics.json"))["total_steps"] == STEPS
    again = write(SEARCH)
    with killed_at(3):
        done("train", again, "--replace")
    assert "kept no checkpoints" in refused("train", again, "--resume")


@pytest.mark.usefixtures("unreported")
@pytest.mark.parametrize(
    ("length", "steps"),
    [(["--search", 5], 5), (["--search", 0.25], 4), (["--search", 1.0], 16), (["--steps", "null", "--epochs", 1], 3)],
)
def test_length_of_the_search(write: Write, length: list[Any], steps: int) -> None:
    recipe = load_recipe(write(SEARCH), [str(word) for word in length])
    assert stages.search_steps(recipe, 48) == steps


@pytest.mark.usefixtures("unreported")
def test_a_budget_instead_of_the_threshold(write: Write) -> None:
    said = done("train", write(SEARCH), "--average_rank", 1.5, "--target_modules", "[query, value]")
    assert sum(ranks(Path("run")).values()) == 6
    assert read_json(Path("run/ranks.json"))["budget"] == {"average_rank": 1.5}
    assert "6 over 4 modules (budget: average rank 1.5)" in said


@pytest.mark.usefixtures("unreported")
def test_patience_ends_the_search(write: Write) -> None:
    settings = ["--patience", 1, "--check_every", 1, "--logit_learning_rate", 1e-9, "--search", 1.0]
    done("train", write(SEARCH), *settings)
    plan = read_json(Path("run/search/ranks.json"))
    assert plan["provenance"]["steps"] < plan["provenance"]["total_steps"] == 16
    assert read_json(Path("run/metrics.json"))["total_steps"] == STEPS


@pytest.mark.slow
@pytest.mark.usefixtures("unreported")
@pytest.mark.parametrize("mode", ["paper", "exact", "first_order", "reference"])
@pytest.mark.parametrize("text", [RECIPE, LANGUAGE], ids=["classifier", "language"])
def test_every_mode_runs(write: Write, text: str, mode: str) -> None:
    method = "name: adalora\n  budget:\n    average_rank: 2"
    done("train", write(text.replace(method, "name: autolora")), "--steps", 6, "--mode", mode)
    assert read_json(Path("run/ranks.json"))["provenance"]["settings"]["mode"] == mode


def test_dry_run_shows_both_stages(write: Write, here: Path) -> None:
    before = files(here)
    path = write(SEARCH)
    said = done("train", path, "--dry-run")
    assert set(files(here)) - set(before) <= {"recipe.yaml"}
    assert "8 steps on 34 examples; ranks are learned on 14 others" in " ".join(said.split())
    assert "plain LoRA at the ranks found, 16 steps on all 48 examples" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--search", 1],
            "method.search must be a share of the training that follows, such as 0.5 or 1.0, or a number",
        ),
        (["--search", 1.5], "method.search must be a share"),
        (["--method.validation", 1.0], "method.validation must be below 1, got 1"),
        (["--validation", 0.2], "could mean --data.validation, --method.validation"),
        (["--mode", "papers"], '"fast", "paper"|must be fast, paper'),
        (["--average_rank", 5], "average_rank is 5, but no layer can exceed lora.r, which is 4"),
    ],
)
def test_mistakes(write: Write, words: list[Any], message: str) -> None:
    assert re.search(message, refused("train", write(SEARCH), *words))


@pytest.mark.usefixtures("unreported")
def test_a_metric_that_the_run_lacks_is_refused_before_the_search(write: Write, run: Path) -> None:
    before = files(run)
    with patch.object(PlainTrainer, "train", side_effect=AssertionError("searched")):
        said = refused("train", write(SEARCH), "--replace", "--evaluate.metric", "pearson")
    assert "evaluate.metric: this run has no metric pearson; it has loss, accuracy, macro_f1, matthews, f1." in said
    assert files(run) == before


@pytest.mark.usefixtures("unreported")
def test_what_has_changed_since_the_search_is_refused_unless_it_is_allowed(write: Write, data: Path) -> None:
    recipe = write(SEARCH)
    with killed_in(pipeline, "_with_fresh_model"):  # when the search is over, and before the first checkpoint
        done("train", recipe)
    known = Path("run/search/depends_on.json")
    unknown = known.rename("elsewhere.json")
    assert "run/search belongs to a different run: it has no record of its data" in refused("train", recipe, "--resume")
    unknown.rename(known)
    rows = (data / "train.jsonl").read_text(encoding="utf-8")
    (data / "train.jsonl").write_text(rows + rows.splitlines()[0] + "\n", encoding="utf-8")
    try:
        said = refused("train", recipe, "--resume")
        assert said.startswith("run/search belongs to a different run: data.train has ")
        assert "--allow-changed data" in said
        assert "as --allow-changed says it may" in done("train", recipe, "--resume", "--allow-changed", "data")
    finally:
        (data / "train.jsonl").write_text(rows, encoding="utf-8")
    assert Path("run/metrics.json").is_file()
