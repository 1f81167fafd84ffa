"""`loralloc` on tagged words and on questions: trained, exported, judged again from the files, killed and resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import PeftModel
from transformers import AutoModelForQuestionAnswering, AutoModelForTokenClassification, AutoTokenizer

from loralloc.tasks.answer_search import worth

from .command import GOOD, RECIPE, done, examples, read_json, read_rows, refused, write_rows
from .deaths import differences, killed_at

pytestmark = pytest.mark.usefixtures("unreported")

Prepared = Callable[[str], Path]
COLUMNS = {
    "token-classification": "tokens: tokens\n  tags: tags",
    "question-answering": "question: question\n  context: text\n  answers: answers",
}
HEADS = {
    "token-classification": AutoModelForTokenClassification,
    "question-answering": AutoModelForQuestionAnswering,
}
METHODS = {
    "adalora": "{name: adalora, budget: {average_rank: 2}}",
    "ablora": "{name: ablora, budget: {average_rank: 2}, rounds: 2, validation: 0.25}",
    "autolora": "{name: autolora, budget: {average_rank: 2}, search: 8}",
}


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Texts whose last three words are good or bad; the question is for them."""
    found = []
    for row in examples(count, seed):
        tokens = row["text"].split()
        tags = [("B-good" if word in GOOD else "B-bad") if at >= 3 else "O" for at, word in enumerate(tokens)]
        answers = {"text": [tokens[3]], "answer_start": [len("the film was ")]}
        found.append({"text": row["text"], "tokens": tokens, "tags": tags, "question": "was film", "answers": answers})
    return found


@pytest.fixture
def prepared(here: Path, encoder: Path) -> Prepared:
    """Writes data and the recipe of a task into the current directory."""

    def make(task: str) -> Path:
        for seed, (name, count) in enumerate({"train": 48, "validation": 12, "test": 9}.items()):
            write_rows(here / f"{name}.jsonl", rows(count, seed))
        text = RECIPE.replace("sequence-classification", task).replace("text: text\n  label: label", COLUMNS[task])
        path = here / "recipe.yaml"
        path.write_text(text.format(encoder=encoder, data="."), encoding="utf-8")
        return path

    return make


@pytest.mark.parametrize("task", COLUMNS)
def test_a_run_is_judged_alike_from_its_files(prepared: Prepared, here: Path, task: str) -> None:
    done("train", prepared(task), "--data.test", "test.jsonl")
    metrics = read_json(here / "run" / "metrics.json")
    assert metrics["metric"] == "f1"
    assert metrics["test"]["f1"] > metrics["reference"]["untrained"]
    assert sum(module["rank"] for module in read_json(here / "run" / "ranks.json")["modules"].values()) == 2 * len(
        read_json(here / "run" / "ranks.json")["modules"]
    )
    said = done("evaluate", "run", "--data", "test.jsonl", "--predictions", "out.jsonl")
    assert f"{metrics['test']['f1']:.4f}" in said
    predicted = read_rows(here / "out.jsonl")
    assert len(predicted) == 9 == len(read_json(here / "run" / "losses.json")["losses"])
    if task == "token-classification":
        assert metrics["test"]["f1_good"] > 0
        right = [p == t for row in predicted for p, t in zip(row["predicted"], row["tags"], strict=True)]
        assert metrics["test"]["accuracy"] == pytest.approx(np.mean(right))
        assert "recall_bad" in said
    else:
        found = [worth(row["answer"], row["references"]) for row in predicted]
        assert [metrics["test"]["f1"], metrics["test"]["exact_match"]] == pytest.approx(np.mean(found, axis=0))
        assert predicted[0]["question"] == "was film"


@pytest.mark.parametrize("task", COLUMNS)
def test_stock_peft_loads_the_export(prepared: Prepared, here: Path, encoder: Path, task: str) -> None:
    done("train", prepared(task), "--data.test", "test.jsonl")
    labels = {"num_labels": 5} if task == "token-classification" else {}
    base = HEADS[task].from_pretrained(encoder, **labels)
    model = PeftModel.from_pretrained(base, str(here / "run" / "adapter")).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(here / "run" / "adapter")
    for row, expected in zip(rows(9, 2), _predicted(here), strict=True):
        if task == "token-classification":
            ids = tokenizer([row["tokens"]], is_split_into_words=True, return_tensors="pt")
            names = read_json(here / "run" / "model" / "config.json")["id2label"]
            chosen = model(**ids).logits[0, 1:-1].argmax(-1).tolist()
            assert [names[str(tag)] for tag in chosen] == expected["predicted"]
        else:
            output = model(**tokenizer(row["question"], row["text"], return_tensors="pt"))
            start = 4 + expected["answer_at"]
            score = output.start_logits[0, start] + output.end_logits[0, start + expected["words"] - 1]
            assert score.item() == pytest.approx(expected["score"], abs=1e-4)
            assert score >= (output.start_logits[0, 4:-1] + output.end_logits[0, 4:-1]).max() - 1e-4


def _predicted(here: Path) -> list[dict[str, Any]]:
    """What the run predicts of the test data; of an answer, also its place and size in words."""
    done("evaluate", "run", "--data", "test.jsonl", "--predictions", "out.jsonl")
    found = read_rows(here / "out.jsonl")
    for row, given in zip(found, rows(9, 2), strict=True):
        if "answer" in row:
            said, words = row["answer"].split(), given["text"].split()
            row["words"] = len(said)
            row["answer_at"] = next(i for i in range(len(words)) if words[i : i + len(said)] == said)
    return found


@pytest.mark.parametrize("task", COLUMNS)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(prepared: Prepared, here: Path, task: str) -> None:
    recipe = prepared(task)
    words = ["--save_every", "2", "--eval_every", "4"]
    done("train", recipe, *words, "--output", "whole")
    with killed_at(9):
        done("train", recipe, *words)
    done("train", recipe, *words, "--resume")
    assert [name for name in differences(here / "run", here / "whole") if name != "recipe.yaml"] == []


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ablora", "autolora"])
@pytest.mark.parametrize("task", COLUMNS)
def test_methods_that_look_at_data(prepared: Prepared, here: Path, task: str, method: str) -> None:
    done("train", prepared(task), "--method", METHODS[method])
    plan = read_json(here / "run" / "ranks.json")
    found = [module["rank"] for module in plan["modules"].values()]
    assert sum(found) == 2 * len(found)


@pytest.mark.parametrize(("task", "learned"), [("token-classification", "warm"), ("question-answering", "example 1")])
def test_a_rehearsal_shows_what_is_learned(prepared: Prepared, task: str, learned: str) -> None:
    said = done("train", prepared(task), "--dry-run")
    assert "[CLS]" in said
    assert learned in said


def test_a_metric_may_be_chosen(prepared: Prepared, here: Path) -> None:
    recipe = prepared("token-classification")
    done("train", recipe, "--evaluate.metric", "recall")
    assert read_json(here / "run" / "metrics.json")["metric"] == "recall"
    assert "this run has no metric macro_f1" in refused("train", recipe, "--replace", "--evaluate.metric", "macro_f1")
