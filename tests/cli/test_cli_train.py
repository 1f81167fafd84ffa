"""`loralloc train`: the run folder is complete and true, for every task and method."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from loralloc.recipe.schema import load_recipe

from .command import (
    LANGUAGE,
    PLAIN,
    RECIPE,
    done,
    examples,
    files,
    log_rows,
    ranks,
    read_json,
    read_rows,
    refused,
    write_rows,
)

Write = Callable[[str], Path]

CLASSIFIER_CASES = {
    "single": [],
    "pair": ["--data.text_pair", "second"],
    "regression": ["--data.label", "score", "--data.labels", "regression"],
    "accumulated": ["--batch_size", "2", "--accumulation", "4"],
}
MOVES = "{name: ablora, budget: {average_rank: 2}, rounds: 2, validation: 0.25}"
METHODS = {"adalora": [], "lora": ["--method", "{name: lora}"], "ablora": ["--method", MOVES]}
NO_TEXT = ("--data.text", "null")
LANGUAGE_CASES = {
    "text": [],
    "completion": [*NO_TEXT, "--data.prompt", "{prompt} ", "--data.completion", "completion", "--data.chat", "false"],
    "chat": [*NO_TEXT, "--data.messages", "messages"],
}


class TestRunFolder:
    """What every run leaves behind; the run is RECIPE with test data."""

    def test_is_complete(self, kept_run: Path) -> None:
        found = {name for name in files(kept_run) if not name.startswith(("figures/", "model/"))}
        assert found == {
            "recipe.yaml",
            "ranks.json",
            "trace.jsonl",
            "log.jsonl",
            "metrics.json",
            "losses.json",
            "report.html",
            "adapter/adapter_config.json",
            "adapter/adapter_model.safetensors",
            "adapter/README.md",
            "adapter/loralloc_export.json",
            "adapter/tokenizer.json",
            "adapter/tokenizer_config.json",
        }

    def test_the_card_tells_data_results_and_settings(self, kept_run: Path) -> None:
        card = (kept_run / "adapter" / "README.md").read_text(encoding="utf-8")
        metrics = read_json(kept_run / "metrics.json")
        assert "| source | train.jsonl |" in card
        assert "| test | 15 examples |" in card
        assert f"| accuracy | {metrics['test']['accuracy']:.4g} |" in card
        assert "| budget | average rank 2 |" in card
        assert "| learning rate | 0.01 |" in card
        assert str(kept_run) not in card

    def test_recipe_is_resolved_and_loads_back(self, kept_run: Path) -> None:
        resolved = load_recipe(kept_run / "recipe.yaml")
        given = load_recipe(kept_run.parent / "recipe.yaml")
        assert resolved.training == given.training
        assert resolved.data.test is not None
        assert "beta1: 0.85" in (kept_run / "recipe.yaml").read_text(encoding="utf-8"), "defaults are written out"

    def test_ranks_meet_the_budget_exactly(self, kept_run: Path) -> None:
        plan = read_json(kept_run / "ranks.json")
        assert sum(ranks(kept_run).values()) == 2 * len(ranks(kept_run)) == 26
        assert plan["budget"] == {"average_rank": 2}
        costs = {name: m["rank"] * (m["in"] + m["out"]) for name, m in plan["modules"].items()}
        assert plan["cost"]["final"] == {"ranks": 26, "parameters": sum(costs.values())}
        assert plan["cost"]["start"]["ranks"] == 4 * 13
        assert {m["scale"] for m in plan["modules"].values()} == {8 / 4}
        assert plan["provenance"]["total_steps"] == 16

    def test_adapter_has_the_ranks_of_the_plan(self, kept_run: Path) -> None:
        tensors = load_file(kept_run / "adapter" / "adapter_model.safetensors")
        stored = {name: len(tensor) for name, tensor in tensors.items() if ".lora_A." in name}
        planned = {f"base_model.model.{name}.lora_A.weight": rank for name, rank in ranks(kept_run).items() if rank}
        assert stored == planned
        assert not [name for name in tensors if "lora_gate" in name]

    def test_trace_tells_how_the_ranks_came_about(self, kept_run: Path) -> None:
        start, *changes, finish = read_rows(kept_run / "trace.jsonl")
        assert (start["event"], start["step"], start["total_steps"]) == ("start", 0, 16)
        assert start["schedule"] == {"warmup": 2, "fallen": 9, "interval": 1}
        assert (start["start_budget"], start["target_budget"]) == (52, 26)
        assert start["sites"] == list(ranks(kept_run))
        assert start["ranks"] == [4] * 13
        assert [change["event"] for change in changes] == ["allocate"] * (len(changes) - 1) + ["freeze"]
        for change in changes:
            assert sum(change["ranks"]) == change["budget"]
            sizes = zip(change["ranks"], start["in"], start["out"], strict=True)
            assert change["parameters"] == sum(rank * (i + o) for rank, i, o in sizes)
        assert changes[-1]["step"] == 10
        assert dict(zip(start["sites"], finish["ranks"], strict=True)) == ranks(kept_run)
        assert (finish["event"], finish["step"]) == ("finish", 16)

    def test_log_has_losses_learning_rates_and_ranks(self, kept_run: Path) -> None:
        rows = [row for row in log_rows(kept_run) if "loss" in row]
        assert [row["step"] for row in rows] == [4, 8, 12, 16]
        assert [row["rank/total"] for row in rows] == [row["budget"] for row in rows]
        assert rows[-1]["rank/total"] == 26
        assert rows[-1]["params/active"] == read_json(kept_run / "ranks.json")["cost"]["final"]["parameters"]
        assert rows[-1]["loss"] < rows[0]["loss"]
        assert all(row["grad_norm"] > 0 for row in rows)
        assert rows[-1]["learning_rate"] < rows[0]["learning_rate"]

    def test_metrics_are_those_of_the_adapter_under_stock_peft(self, kept_run: Path, encoder: Path, data: Path) -> None:
        metrics = read_json(kept_run / "metrics.json")
        model = _with_adapter(AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2), kept_run)
        for split in ("validation", "test"):
            rows = read_rows(data / f"{split}.jsonl")
            logits = _classify(model, encoder, [row["text"] for row in rows])
            target = torch.tensor([["bad", "good"].index(row["label"]) for row in rows])
            assert metrics[split]["loss"] == pytest.approx(cross_entropy(logits, target).item(), abs=1e-5)
            assert metrics[split]["accuracy"] == (logits.argmax(1) == target).double().mean().item()
        assert metrics["reference"]["majority"] == sum(row["label"] == "good" for row in rows) / len(rows)
        assert 0 <= metrics["reference"]["untrained"] <= 1

    def test_metrics_repeat_what_the_other_files_say(self, kept_run: Path) -> None:
        metrics = read_json(kept_run / "metrics.json")
        final = read_json(kept_run / "ranks.json")["cost"]["final"]
        assert (metrics["task"], metrics["metric"]) == ("sequence-classification", "accuracy")
        assert (metrics["final_ranks"], metrics["final_parameters"]) == (final["ranks"], final["parameters"])
        assert metrics["total_steps"] == 16
        assert metrics["classes"] == {"bad": 16, "good": 32}
        assert metrics["adapter_check"] <= metrics["adapter_check_allowed"] < 1e-4
        assert metrics["train_seconds"] >= 0

    def test_report_is_a_page(self, kept_run: Path) -> None:
        assert (kept_run / "report.html").read_text(encoding="utf-8").lstrip().lower().startswith("<!doctype html>")


def _with_adapter(base: Any, run: Path) -> PeftModel:
    return PeftModel.from_pretrained(base, str(run / "adapter")).eval()


@torch.no_grad()
def _classify(model: PeftModel, folder: Path, texts: list[str], pairs: list[str] | None = None) -> Tensor:
    """Logits of texts, one at a time: no padding."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    both = zip(texts, pairs or [None] * len(texts), strict=True)
    batches = (tokenizer(text, second, return_tensors="pt") for text, second in both)
    return torch.cat([model(**batch).logits for batch in batches])


def _all_methods(cases: Iterable[str]) -> list[Any]:
    """Every case with AdaLoRA; with each other method the first one, and the others among the slow tests."""
    first, *others = cases
    rest = [name for name in METHODS if name != "adalora"]
    slow = [pytest.param(case, name, marks=pytest.mark.slow) for case in others for name in rest]
    return [*((case, "adalora") for case in cases), *((first, name) for name in rest), *slow]


@pytest.mark.parametrize(("case", "method"), _all_methods(CLASSIFIER_CASES))
def test_classifiers(case: str, method: str, write: Write, encoder: Path, data: Path) -> None:
    said = done("train", write(RECIPE), *METHODS[method], "--steps", 6, *CLASSIFIER_CASES[case])
    run = Path("run")
    rows = read_rows(data / "validation.jsonl")
    regression = case == "regression"
    base = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=1 if regression else 2)
    pairs = [row["second"] for row in rows] if case == "pair" else None
    logits = _classify(_with_adapter(base, run), encoder, [row["text"] for row in rows], pairs)
    found = read_json(run / "metrics.json")["validation"]
    if regression:
        score = torch.tensor([row["score"] for row in rows])
        assert found["mse"] == pytest.approx((logits[:, 0] - score).square().mean().item(), rel=1e-5)
        pearson = torch.corrcoef(torch.stack([logits[:, 0], score]))[0, 1].item()
        assert found["pearson"] == pytest.approx(pearson, abs=1e-4)
    else:
        target = torch.tensor([["bad", "good"].index(row["label"]) for row in rows])
        assert found["loss"] == pytest.approx(cross_entropy(logits, target).item(), abs=1e-5)
        assert found["accuracy"] == (logits.argmax(1) == target).double().mean().item()
    _check_ranks(run, method, said)


@pytest.mark.parametrize(("case", "method"), _all_methods(LANGUAGE_CASES))
def test_language_models(case: str, method: str, write: Write, decoder: Path, data: Path) -> None:
    said = done("train", write(LANGUAGE), *METHODS[method], "--steps", 6, *LANGUAGE_CASES[case])
    run = Path("run")
    metrics = read_json(run / "metrics.json")
    base = AutoModelForCausalLM.from_pretrained(decoder).eval()
    rows = read_rows(data / "validation.jsonl")
    assert metrics["reference"]["untrained"] == pytest.approx(_perplexity(base, decoder, case, rows), rel=1e-5)
    trained = _perplexity(_with_adapter(base, run), decoder, case, rows)
    assert metrics["validation"]["perplexity"] == pytest.approx(trained, rel=1e-5)
    assert metrics["greater_is_better"] is False
    _check_ranks(run, method, said)


@torch.no_grad()
def _perplexity(model: Any, folder: Path, case: str, rows: list[dict[str, Any]]) -> float:
    """Exponential of the mean loss over the learned tokens, one sequence at a time."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sequences: list[tuple[list[int], int]] = []  # ids, and how many at the end are learned
    if case == "text":
        ids = [i for row in rows for i in [*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]]
        blocks = [ids[at : at + 16] for at in range(0, len(ids), 16)]
        sequences = [(block, len(block)) for block in blocks if len(block) > 1 or len(blocks) == 1]
    for row in rows if case != "text" else []:
        prompt = row["prompt"] if case == "completion" else f"user : {row['text']} </s> assistant :"
        ids = tokenizer(prompt, add_special_tokens=case == "completion")["input_ids"]
        answer = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        sequences.append((ids + answer, len(answer)))
    losses = []
    for ids, learned in sequences:
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
        losses.append(cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")[-learned:])
    return math.exp(torch.cat(losses).mean().item())


def _check_ranks(run: Path, method: str, said: str) -> None:
    """The budget is met, or else every rank is as it started; the trace agrees, and the user is told."""
    found = ranks(run)
    total = (4 if method == "lora" else 2) * len(found)
    assert sum(found.values()) == total
    assert read_json(run / "ranks.json")["method"] == method
    events = read_rows(run / "trace.jsonl")
    assert events[0]["event"] == "start"
    assert dict(zip(events[0]["sites"], events[-1]["ranks"], strict=True)) == found
    if method == "lora":
        assert [event["event"] for event in events] == ["start", "finish"]
        assert set(found.values()) == {4}
    if method == "ablora":
        assert [event["event"] for event in events] == ["start", "allocate", "freeze", "finish"]
        assert all(sum(event["pruned"]) == sum(event["grown"]) > 0 for event in events[1:3])
        assert "moved to another module" in (run / "report.html").read_text(encoding="utf-8")
    assert f"{total} over {len(found)} modules" in said
    assert str(run / "adapter") in said
    assert read_json(run / "metrics.json")["adapter_check"] <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["--model.dtype", "bfloat16"],
        ["--model.dtype", "auto"],
        ["--gradient_checkpointing", "true"],
        ["--modules_to_save", "[word_embeddings]"],
        ["--exclude_modules", "[dense]"],
        ["--target_modules", ".*layer.1.*(query|value)"],
        ["--fraction", 1],
        ["--total_rank", 1],
        ["--steps", 3],
        ["--schedule", "cosine", "--weight_decay", 0.1, "--max_grad_norm", 0],
        ["--data.labels", "[bad, good, neither]"],
        ["--data.validation", 0.25],
    ],
    ids=lambda words: " ".join(map(str, words)),
)
def test_settings_that_must_run(recipe: Path, words: list[Any]) -> None:
    done("train", recipe, "--steps", 6, *words)
    metrics = read_json(Path("run/metrics.json"))
    shown = done("evaluate", "run")
    assert f"{metrics['validation']['loss']:.4f}" in shown
    assert metrics["final_ranks"] == sum(ranks(Path("run")).values())
    done("export", "run", "--profile", "merged")


@pytest.mark.slow
def test_a_decoder_as_a_classifier(recipe: Path, decoder: Path) -> None:
    done("train", recipe, "--steps", 6, "--model.name", decoder)
    done("export", "run", "--profile", "uniform")
    assert sum(ranks(Path("run")).values()) == 28


@pytest.mark.usefixtures("unreported")
@pytest.mark.parametrize(
    ("flag", "value", "unit", "bound"),
    [
        ("--total_rank", 17, "ranks", 17),
        ("--parameters", 700, "parameters", 700),
        ("--fraction", 0.3, "parameters", 576),
        ("--adapter_bytes", 3000, "parameters", 750),
    ],
)
def test_budgets_in_every_unit(recipe: Path, flag: str, value: float, unit: str, bound: int) -> None:
    assert f"(budget: {flag[2:].replace('_', ' ')} {value:,})" in done("train", recipe, "--steps", 6, flag, value)
    plan = read_json(Path("run/ranks.json"))
    final = plan["cost"]["final"][unit]
    cheapest = min(m["in"] + m["out"] for m in plan["modules"].values() if m["rank"] < m["start"])
    assert final == bound if unit == "ranks" else bound - cheapest < final <= bound
    assert plan["budget"] == {flag.removeprefix("--"): value}


@pytest.mark.usefixtures("unreported")
def test_flags_override_the_file(recipe: Path) -> None:
    said = done(
        "train", recipe, "--training.steps=4", "--seed", 7, "--target_modules", "[query, value]", "--output", "b"
    )
    resolved = load_recipe(Path("b/recipe.yaml"))
    assert (resolved.training.steps, resolved.training.batch_size) == (4, 8)
    assert {name.rpartition(".")[2] for name in ranks(Path("b"))} == {"query", "value"}
    assert "8 over 4 modules (budget: average rank 2)" in said
    assert not Path("run").exists()


@pytest.mark.usefixtures("unreported")
def test_the_same_recipe_gives_the_same_adapter(recipe: Path) -> None:
    for output in ("a", "b"):
        done("train", recipe, "--steps", 5, "--lora.dropout", 0.1, "--output", output)
    name = "adapter/adapter_model.safetensors"
    assert Path("a", name).read_bytes() == Path("b", name).read_bytes()
    assert log_rows(Path("a")) == log_rows(Path("b"))


@pytest.mark.usefixtures("unreported")
@pytest.mark.parametrize("more", [["--eval_every", 2], ["--save_every", 2], ["--log_every", 1]])
@pytest.mark.parametrize("text", [RECIPE, PLAIN], ids=["adalora", "lora"])
def test_looking_more_often_changes_nothing(write: Write, text: str, more: list[object]) -> None:
    words = ["train", write(text), "--steps", 8, "--lora.dropout", 0.1]
    done(*words, "--output", "a")
    done(*words, "--output", "b", *more)
    assert ranks(Path("a")) == ranks(Path("b"))
    name = "adapter/adapter_model.safetensors"
    assert Path("a", name).read_bytes() == Path("b", name).read_bytes()


@pytest.mark.usefixtures("unreported")
def test_a_plan_is_where_a_run_starts(run: Path, recipe: Path, write: Write) -> None:
    done("train", write(PLAIN), "--plan", run / "ranks.json", "--steps", 4, "--output", "again", "--lora.alpha", 99)
    planned = {name: rank for name, rank in ranks(run).items() if rank}
    assert ranks(Path("again")) == planned
    assert {m["scale"] for m in read_json(Path("again/ranks.json"))["modules"].values()} == {8 / 4}, "the plan's scale"


@pytest.mark.parametrize("text", [RECIPE, PLAIN])
@pytest.mark.parametrize("length", [["--steps", "10"], ["--epochs", "2"]])
def test_dry_run_shows_the_run_and_writes_nothing(write: Write, here: Path, text: str, length: list[str]) -> None:
    path = write(text)
    before = files(here)
    said = done("train", path, *length, "--dry-run")
    assert files(here) == before
    assert {entry.name for entry in here.iterdir()} == {"recipe.yaml"}
    assert "48 train, 21 validation" in said
    assert 'classes   2 in the training data: "good" 32, "bad" 16\n' in said
    assert "warning" not in said
    assert "13 modules" in said
    if text == RECIPE:
        last = {"10": 9, "2": 11}[length[1]]  # counted from 0; 6 steps an epoch
        assert re.search(rf"final ranks +\d+ to {last} +26", said)


def test_dry_run_warns_of_classes_that_are_spelt_alike(recipe: Path, here: Path) -> None:
    rows = [*examples(12), {"text": "the film was fine", "label": " Good"}]
    write_rows(here / "own.jsonl", rows)
    said = done("train", recipe, "--data.train", "own.jsonl", "--dry-run")
    assert 'classes   3 in the training data: "good" 8, "bad" 4, " Good" 1\n' in said
    assert (
        'warning   "good" (8), " Good" (1) are 2 classes, though they differ in spelling only (training examples in '
        "brackets). If they mean the same, write them alike in the data; with data.labels: "
        '["bad", "good"] the first row spelt otherwise is named.\n'
    ) in said
    message = refused("train", recipe, "--data.train", "own.jsonl", "--dry-run", "--data.labels", '["bad", "good"]')
    assert re.search('own.jsonl:13: label " Good" is not among data.labels .*Did you mean "good"', message)


def test_dry_run_counts_the_steps_of_the_run(recipe: Path) -> None:
    schedule = re.compile(r"warm-up.*\n.*\n.*")
    shown = schedule.search(done("train", recipe, "--epochs", "1.4", "--dry-run"))
    real = schedule.search(done("train", recipe, "--epochs", "1.4"))
    assert shown is not None
    assert real is not None
    assert shown[0] == real[0]
    assert read_json(Path("run/metrics.json"))["total_steps"] == 9


@pytest.mark.usefixtures("unreported")
class TestFolderRules:
    def test_what_is_not_a_run_is_left_alone(self, recipe: Path, here: Path) -> None:
        (here / "run").mkdir()
        (here / "run" / "thesis.txt").write_text("years of work", encoding="utf-8")
        for words in ([], ["--replace"]):
            assert "run exists and is not a run; nothing was overwritten" in refused("train", recipe, *words)
        assert "is not a run" in refused("train", recipe, "--resume")
        assert (here / "run" / "thesis.txt").read_text(encoding="utf-8") == "years of work"

    def test_a_file_in_the_way(self, recipe: Path, here: Path) -> None:
        (here / "run").write_text("years of work", encoding="utf-8")
        for words in ([], ["--replace"]):
            assert "run is a file" in refused("train", recipe, *words)
        assert (here / "run").read_text(encoding="utf-8") == "years of work"

    def test_an_empty_folder_will_do(self, recipe: Path, here: Path) -> None:
        (here / "run").mkdir()
        done("train", recipe, "--steps", 3)

    def test_a_run_needs_a_decision(self, run: Path, recipe: Path) -> None:
        before = files(run)
        message = refused("train", recipe)
        assert "--resume" in message
        assert "--replace" in message
        assert files(run) == before

    def test_replace_starts_over(self, run: Path, recipe: Path) -> None:
        (run / "thesis.txt").write_text("years of work", encoding="utf-8")
        (run / "merged").mkdir()
        assert (run / "figures").is_dir()
        done("train", recipe, "--steps", 3, "--replace")
        assert read_json(run / "metrics.json")["total_steps"] == 3
        assert read_json(run / "metrics.json")["test"] is None
        left = {path.name for path in run.iterdir()}
        assert not left & {"merged", "figures", "report.html", "checkpoints"}, "what the earlier run wrote is gone"
        assert (run / "thesis.txt").read_text(encoding="utf-8") == "years of work"

    def test_a_finished_run_is_not_resumed(self, run: Path) -> None:
        before = files(run)
        assert "has finished" in refused("train", run / "recipe.yaml", "--resume")
        assert files(run) == before

    def test_resume_wants_the_same_recipe(self, run: Path, recipe: Path) -> None:
        before = files(run)
        assert "differs from the recipe given" in refused("train", recipe, "--resume", "--steps", 99)
        assert files(run) == before

    def test_resume_of_nothing(self, recipe: Path) -> None:
        assert "there is no folder run" in refused("train", recipe, "--resume")
