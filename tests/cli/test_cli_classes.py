"""`loralloc train` on classifiers with several labels a row, and with classes that count more than others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .command import PLAIN, RECIPE, done, examples, log_rows, read_json, read_rows, refused, write_rows
from .deaths import differences, killed_at

SMOOTH = ("--training.trainer.label_smoothing_factor", 0.1)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--data.class_weights", "balanced"), "would leave out data.class_weights; take one of the two out"),
        (("--data.labels", "regression", "--data.label", "number"), "has one class, and these have none; take it out"),
    ],
)
def test_smoothed_labels_where_there_are_none(words: tuple[str, ...], expected: str, recipe: Path, here: Path) -> None:
    write_rows(here / "numbers.jsonl", [{**row, "number": n} for n, row in enumerate(examples(16))])
    words = (*words, "--data.train", "numbers.jsonl", "--data.validation", "0.25")
    said = refused("train", recipe, *words, *SMOOTH)
    assert said.startswith("training.trainer.label_smoothing_factor: the Trainer ")
    assert expected in said
    done("train", recipe, *words, "--dry-run")


@pytest.mark.usefixtures("unreported")
def test_several_labels_a_row(write: Callable[[str], Path], here: Path) -> None:
    words = [("warm", "dull"), ("fine",), ("cold", "great"), ()]
    rows = [{"text": f"the film was {' '.join(words[n % 4])}", "label": list(words[n % 4])} for n in range(48)]
    write_rows(here / "rows.jsonl", rows)
    recipe = write(RECIPE.replace("{data}/train.jsonl", "rows.jsonl").replace("{data}/validation.jsonl", "rows.jsonl"))
    options = ("--learning_rate", 3e-2, "--steps", 60, "--save_every", 25)
    assert "reloaded by stock PEFT" in done("train", recipe, *options)
    metrics = read_json(here / "run" / "metrics.json")
    assert metrics["metric"] == "micro_f1"
    assert metrics["validation"]["micro_f1"] > metrics["reference"]["untrained"]
    assert metrics["classes"] == dict.fromkeys(["cold", "dull", "fine", "great", "warm"], 12)
    done("evaluate", "run", "--data", "rows.jsonl", "--predictions", "out.jsonl")
    assert [row["labels"] for row in read_rows(here / "out.jsonl")][:2] == [["dull", "warm"], ["fine"]]
    (here / "run").rename(here / "whole")
    with killed_at(40):
        done("train", recipe, *options)
    done("train", recipe, *options, "--resume")
    assert differences(here / "run", here / "whole") == []
    done("train", recipe, *options, "--replace", "--method", "{name: ablora, budget: {average_rank: 2}}", "--alpha", 4)


def test_a_rehearsal_shows_the_labels_of_a_row(write: Callable[[str], Path], here: Path) -> None:
    rows = [{"text": "the film was fine", "label": ["warm", "dull", "cold"][: n % 4]} for n in range(16)]
    write_rows(here / "rows.jsonl", rows)
    recipe = write(RECIPE.replace("{data}/train.jsonl", "rows.jsonl").replace("{data}/validation.jsonl", "rows.jsonl"))
    shown = done("train", recipe, "--dry-run")
    assert "the film was fine [SEP] → []" in shown
    assert "the film was fine [SEP] → [warm]" in shown


@pytest.mark.usefixtures("unreported")
def test_classes_that_count_more(write: Callable[[str], Path], here: Path) -> None:
    losses = {}
    for name, weights in {"plain": None, "even": "{good: 2, bad: 2}", "good": "{good: 5}"}.items():
        more = () if weights is None else ("--data.class_weights", weights)
        done("train", write(PLAIN), "--output", name, "--steps", 4, "--log_every", 1, *more)
        losses[name] = [row["loss"] for row in log_rows(here / name) if "loss" in row]
    assert losses["even"] == pytest.approx(losses["plain"], rel=1e-5)  # a weighted mean
    assert losses["good"] != pytest.approx(losses["plain"], rel=1e-3)
    said = refused("train", write(PLAIN), "--data.class_weights", "{god: 5}")
    assert 'data.class_weights: there is no class god; there are bad, good. Did you mean "good"?' in said
