"""`loralloc train` on multiple choice: by likelihood and with a head; each resumed, exported and evaluated anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForMultipleChoice, BartConfig

from .command import BAD, GOOD, RECIPE, done, ranks, read_json, read_rows, refused, write_rows
from .deaths import differences, killed_at

Write = Callable[[str], Path]

COLUMNS = "  prompt: prompt\n  choices: choices\n  answer: answer\n"
CHOICE = RECIPE.replace("  text: text\n  label: label\n", COLUMNS).replace("{data}/", "")
KINDS: Mapping[str, tuple[str, int]] = {"multiple-choice": ("decoder", 14), "multiple-choice-head": ("encoder", 13)}
"""By task: the model, and how many layers it has."""


@pytest.fixture
def prepared(here: Path, request: pytest.FixtureRequest) -> Callable[[str], Path]:
    """Writes a task's recipe, and questions whose right choice is the kinder word."""

    def make(task: str) -> Path:
        for name, count in {"train": 48, "validation": 12, "other": 6}.items():
            pairs = [(GOOD[n % 4], BAD[(n // 4) % 4]) for n in range(count)]
            rows = [
                {"prompt": "the film was", "choices": list(pair[:: 1 - 2 * (n % 2)]), "answer": n % 2}
                for n, pair in enumerate(pairs)
            ]
            write_rows(here / f"{name}.jsonl", rows)
        model = request.getfixturevalue(KINDS[task][0])
        text = CHOICE.format(encoder=model).replace("sequence-classification", task)
        path = here / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return make


@pytest.mark.usefixtures("unreported")
@pytest.mark.parametrize("task", KINDS)
def test_learns_to_choose_and_a_killed_run_goes_on(task: str, prepared: Callable[[str], Path], here: Path) -> None:
    recipe = prepared(task)
    said = done("train", recipe, "--save_every", 4, "--training.learning_rate", 3e-2)
    assert sum(ranks(here / "run").values()) == 2 * KINDS[task][1]
    assert "reloaded by stock PEFT" in said
    metrics = read_json(here / "run" / "metrics.json")
    assert metrics["metric"] == "accuracy"
    assert metrics["validation"]["accuracy"] > max(0.9, metrics["reference"]["untrained"])
    assert metrics["reference"]["chance"] == 0.5
    assert len(read_json(here / "run" / "losses.json")["losses"]) == 12
    (here / "run").rename(here / "whole")
    with killed_at(10):
        done("train", recipe, "--save_every", 4, "--training.learning_rate", 3e-2)
    done("train", recipe, "--save_every", 4, "--training.learning_rate", 3e-2, "--resume")
    assert differences(here / "run", here / "whole") == []


@pytest.mark.parametrize("task", KINDS)
def test_predictions_are_choices(task: str, prepared: Callable[[str], Path], here: Path) -> None:
    done("train", prepared(task), "--training.learning_rate", 3e-2)
    page = (here / "run" / "report.html").read_text(encoding="utf-8")
    assert "multiple choice" in page
    assert "chance" in page
    told = done("evaluate", "run", "--data", "other.jsonl", "--predictions", "out.jsonl")
    assert "accuracy" in told
    rows = read_rows(here / "out.jsonl")
    assert len(rows) == 6
    for row, question in zip(rows, read_rows(here / "other.jsonl"), strict=True):
        assert row["label"] == question["choices"][question["answer"]]
        assert list(row["scores"]) == question["choices"]
        assert row["prediction"] == max(row["scores"], key=row["scores"].__getitem__)


@pytest.mark.usefixtures("unreported")
def test_the_exported_head_is_stock_pefts(prepared: Callable[[str], Path], here: Path, encoder: Path) -> None:
    done("train", prepared("multiple-choice-head"), "--training.learning_rate", 3e-2)
    logits = []
    for seed in range(2):  # the head is in the adapter: what the base model starts with does not matter
        torch.manual_seed(seed)
        model = PeftModel.from_pretrained(AutoModelForMultipleChoice.from_pretrained(encoder), here / "run/adapter")
        ids = torch.tensor([[[2, 5, 6, 3], [2, 9, 8, 3]]])
        logits.append(model.eval()(input_ids=ids).logits)
    torch.testing.assert_close(logits[0], logits[1])


@pytest.mark.usefixtures("unreported")
def test_an_adapter_with_a_head_of_choices_is_exported_anew(prepared: Callable[[str], Path], here: Path) -> None:
    done("train", prepared("multiple-choice-head"), "--steps", 4)
    for profile in ("ragged", "uniform", "merged"):
        done("export", "run", "--profile", profile, "--to", f"run/{profile}")
        assert list((here / "run" / profile).glob("*.safetensors"))


@pytest.mark.usefixtures("unreported")
@pytest.mark.parametrize("method", ["ablora", "autolora"])
@pytest.mark.parametrize("task", KINDS)
def test_methods_that_look_at_data(task: str, method: str, prepared: Callable[[str], Path], here: Path) -> None:
    looks = ", validation: validation" if method == "ablora" else ""
    section = f"{{name: {method}, budget: {{average_rank: 2}}{looks}}}"
    done("train", prepared(task), "--method", section, "--lora.alpha", 4)
    assert sum(ranks(here / "run").values()) == 2 * KINDS[task][1]


@pytest.mark.parametrize("task", KINDS)
def test_a_rehearsal_shows_what_is_learned_and_an_estimate_counts_it(
    task: str, prepared: Callable[[str], Path]
) -> None:
    recipe = prepared(task)
    said = done("train", recipe, "--dry-run")
    assert "the film was" in said
    texts = {"multiple-choice": 1, "multiple-choice-head": 2}[task]
    assert f"8 examples, {8 * texts * 16} tokens at most" in said
    assert ("fine" in said, "dull" in said) == (True, task == "multiple-choice-head")
    tokens = {"multiple-choice": 10, "multiple-choice-head": 2 * 7}[task]  # turns of a chat; two pairs
    assert f"48 examples, {48 * tokens} tokens" in done("estimate", recipe)


def test_keys_of_other_tasks(prepared: Callable[[str], Path]) -> None:
    said = refused("train", prepared("multiple-choice-head"), "--data.chat", "true")
    assert (
        "data.chat is for task causal-lm, preference or multiple-choice, but the task is multiple-choice-head" in said
    )
    said = refused("train", prepared("multiple-choice"), "--data.answer", "null")
    assert "data.answer" in said


def test_a_model_with_two_stacks(prepared: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = prepared("multiple-choice")
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    BartConfig(vocab_size=40, **sizes).save_pretrained(tmp_path / "bart")
    said = refused("train", recipe, "--model.name", tmp_path / "bart")
    assert "Task multiple-choice needs a decoder alone" in said


def test_choices_of_an_odd_kind(prepared: Callable[[str], Path]) -> None:
    said = refused("train", prepared("multiple-choice"), "--data.choices", "[one]")
    assert "data.choices must be a column, or a list of at least two columns or texts" in said


def test_an_adapter_on_the_output_layer_is_refused(prepared: Callable[[str], Path]) -> None:
    words = ("--lora.target_modules", "[q_proj, lm_head]", "--dry-run")
    expected = "lm_head has an adapter, and TRL, which trains task multiple-choice, computes the logits from the weight"
    assert expected in refused("train", prepared("multiple-choice"), *words)
