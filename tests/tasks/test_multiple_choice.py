"""Multiple choice by likelihood: the right answers are learned, all choices are compared, the ends of texts are not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

from loralloc.errors import UserError
from loralloc.tasks.base import Evaluated, TaskData
from loralloc.tasks.multiple_choice import choice_metrics, example_losses, predictions, prepare, prepare_evaluation
from loralloc.training.trl_trainers import RunSFTTrainer

ROWS: list[dict[str, Any]] = [
    {"prompt": "the film is", "choices": ["good", "bad film"], "answer": 0},
    {"prompt": "hello", "choices": ["a b c", "yes", "d"], "answer": "B"},
    {"prompt": "the film", "choices": ["is bad", "good"], "answer": "good"},
    {"prompt": "is the film good", "choices": ["yes", "no"], "answer": 1},
] * 2
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


@pytest.fixture
def task(
    decoder: str, write: Callable[..., str], model_section: Callable[..., Any], data_section: Callable[..., Any]
) -> Callable[..., TaskData]:
    def make(rows: list[dict[str, Any]] = ROWS, **given: Any) -> TaskData:
        names = {"prompt": "prompt", "choices": "choices", "answer": "answer", "max_length": 32, **given}
        return prepare(model_section(given.pop("model", decoder)), data_section(write(rows), **names), 0)

    return make


def learned(data: Any, tokenizer: Any) -> list[str]:
    """What is learned, or compared, of every example."""
    return [tokenizer.decode([label for label in labels if label != -100]) for labels in data["labels"]]


def test_right_answers_are_learned_with_their_ends_and_all_choices_are_compared_without(
    task: Callable[..., TaskData],
) -> None:
    data = task()
    assert len(data.train) == 6
    assert all(text.endswith("</s>") for text in learned(data.train, data.tokenizer))
    assert not any("</s>" in text for text in learned(data.validation, data.tokenizer))
    assert learned(data.validation, data.tokenizer) == list(data.validation["choice"])
    assert data.learned_validation is not None
    assert all(text.endswith("</s>") for text in learned(data.learned_validation, data.tokenizer))
    assert len(data.learned_validation) == 2
    questions = sorted(set(data.validation["question"]))
    assert questions == [0, 1]
    assert sum(data.validation["right"]) == 2


def test_turns_of_a_chat(tmp_path: Path, decoder: str, task: Callable[..., TaskData]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(decoder)
    tokenizer.chat_template = TEMPLATE
    AutoModelForCausalLM.from_pretrained(decoder).save_pretrained(tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    data = task(model=str(tmp_path / "chat"))
    assert "user : " in tokenizer.decode(data.train[0]["input_ids"])
    assert learned(data.validation, data.tokenizer) == list(data.validation["choice"])
    assert "user : " not in tokenizer.decode(task(model=str(tmp_path / "chat"), chat=False).train[0]["input_ids"])


def evaluated(data: TaskData, folder: Path) -> tuple[PeftModel, RunSFTTrainer, dict[str, float]]:
    adapted = get_peft_model(data.model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    assert isinstance(adapted, PeftModel)
    trainer = RunSFTTrainer(
        model=adapted,
        args=SFTConfig(
            str(folder), per_device_eval_batch_size=3, use_cpu=True, bf16=False, report_to=[], **data.arguments
        ),
        train_dataset=data.train,
        eval_dataset=data.validation,
        log=folder / "log.jsonl",
        **data.options,
    )
    return adapted, trainer, trainer.evaluate()


def test_the_likeliest_choice_is_that_of_log_probabilities_by_hand(
    task: Callable[..., TaskData], tmp_path: Path
) -> None:
    data = task(ROWS * 2)
    model, trainer, metrics = evaluated(data, tmp_path)
    sums: dict[int, list[tuple[float, int, int, bool]]] = {}
    for row in data.validation:
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        at = [n for n, label in enumerate(row["labels"]) if label != -100]
        total = sum(float(scores[n - 1, row["input_ids"][n]]) for n in at)
        sums.setdefault(row["question"], []).append((total, len(at), len(row["choice"]), row["right"]))

    def share(key: Callable[[tuple[float, int, int, bool]], float]) -> float:
        return float(np.mean([max(choices, key=key)[3] for choices in sums.values()]))

    assert metrics["eval_accuracy"] == share(lambda choice: choice[0])
    assert metrics["eval_accuracy_token"] == share(lambda choice: choice[0] / choice[1])
    assert metrics["eval_accuracy_character"] == share(lambda choice: choice[0] / choice[2])
    right = [choice for choices in sums.values() for choice in choices if choice[3]]
    expected = -sum(choice[0] for choice in right) / sum(choice[1] for choice in right)
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)  # of the right answers, not of the wrong ones
    assert trainer.evaluated is not None
    losses = [
        -next(choice[0] for choice in choices if choice[3]) + np.log(sum(np.exp(choice[0]) for choice in choices))
        for choices in sums.values()
    ]
    assert example_losses(trainer.evaluated) == pytest.approx(losses, rel=1e-4)
    told = predictions(trainer.evaluated)
    assert len(told) == len(sums)
    for one, choices in zip(told, sums.values(), strict=True):
        assert list(one["scores"].values()) == pytest.approx([choice[0] for choice in choices], rel=1e-4)
        assert one["prediction"] == max(one["scores"], key=one["scores"].__getitem__)


def test_long_answers_win_by_their_means_and_lose_by_their_sums() -> None:
    examples = {"question": [0, 0], "right": [True, False], "choice": ["a b c d", "e"], "prompt": ["x", "x"]}
    found = choice_metrics(Evaluated(np.array([[4.0, 4, 0], [2.0, 1, 0]]), None, examples))
    assert found == {"loss": 1.0, "accuracy": 0.0, "accuracy_token": 1.0, "accuracy_character": 1.0}
    broken = choice_metrics(Evaluated(np.array([[np.nan, 4, 0], [2.0, 1, 0]]), None, examples))
    assert broken["accuracy"] == 0.0


def test_guessing_is_the_reference(task: Callable[..., TaskData], write: Callable[..., str]) -> None:
    assert task(test=write(ROWS[1:2], "test.jsonl")).reference == {"chance": 1 / 3}


def test_choices_that_would_be_cut(task: Callable[..., TaskData], write: Callable[..., str]) -> None:
    long = write([ROWS[0], {**ROWS[0], "prompt": "a " * 9}], "long.jsonl")
    with pytest.raises(
        UserError, match=r"long\.jsonl:2: the question with its choice takes 13 tokens, and choices that"
    ):
        task(validation=long, max_length=12)
    assert len(task(validation=long, max_length=13).validation) == 4


def test_an_evaluation_alone(task: Callable[..., TaskData], write: Callable[..., str], data_section: Any) -> None:
    data = task()
    section = data_section("x", prompt="prompt", choices="choices", answer="answer", max_length=32)
    found = prepare_evaluation(data.model, data.tokenizer, section, write(ROWS[:3], "other.jsonl"))
    assert found.test is not None
    assert found.test["right"] == [True, False, False, True, False, False, True]
