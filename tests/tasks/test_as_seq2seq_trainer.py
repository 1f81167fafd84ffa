"""A recipe for plain LoRA trains what a hand-written Seq2SeqTrainer trains, and writes what `generate` does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from loralloc.recipe import stages
from loralloc.recipe.from_recipe import task_data
from loralloc.recipe.run_folder import RunFolder
from loralloc.recipe.schema import load_recipe
from loralloc.recipe.screen import Screen
from loralloc.tasks.generation import Generation, score
from loralloc.tasks.token_sums import example_losses
from loralloc.training.seq2seq_trainer import sums_of_targets

WORDS = "abcde"


def text(n: int) -> str:
    return " ".join(WORDS[(n + 2 * i) % 5] for i in range(2 + n % 4))


ROWS = [{"source": text(n), "target": text(n + 1)} for n in range(24)]
GENERATE: Mapping[str, Mapping[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3, "length_penalty": 2.0},
    "long": {"min_new_tokens": 6, "no_repeat_ngram_size": 2},
}


def stage_of(model: str, folder: Path, **evaluate: Any) -> stages.Stage:
    """The stage that a recipe makes."""
    folder.mkdir(exist_ok=True)
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    recipe = {
        "task": "seq2seq",
        "model": {"name": model},
        "data": {"train": str(path), "validation": str(path), "source": "source", "target": "target"},
        "method": {"name": "lora"},
        "lora": {"r": 4, "alpha": 8},
        "training": {"steps": 6, "batch_size": 4, "learning_rate": 0.01, "log_every": 1, "seed": 3, "eval_every": 3},
        "evaluate": evaluate,
        "output": str(folder / "run"),
    }
    recipe["data"] |= {"max_length": 32, "target_length": 16}
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    loaded = load_recipe(folder / "recipe.yaml")
    run = RunFolder(folder / "run")
    return stages.prepare_training(loaded, task_data(loaded), run, Screen(), after_search=False)


def by_hand(model: str, folder: Path) -> Seq2SeqTrainer:
    """What somebody writes who uses transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="SEQ_2_SEQ_LM")
    torch.manual_seed(3)
    adapted: Any = get_peft_model(AutoModelForSeq2SeqLM.from_pretrained(model), config)
    rows = [{**tokenizer(row["source"]), "labels": tokenizer(text_target=row["target"])["input_ids"]} for row in ROWS]
    arguments = Seq2SeqTrainingArguments(
        str(folder / "theirs"),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=0.01,
        warmup_steps=0.1,
        logging_steps=1,
        seed=3,
        data_seed=3,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    )
    return Seq2SeqTrainer(adapted, arguments, DataCollatorForSeq2Seq(tokenizer, model=adapted), Dataset.from_list(rows))


def losses(trainer: Any) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_the_same_losses(encoder_decoder: str, tmp_path: Path) -> None:
    trainers = stage_of(encoder_decoder, tmp_path).trainer, by_hand(encoder_decoder, tmp_path)
    for trainer in trainers:
        trainer.train()
    found = [losses(trainer) for trainer in trainers]
    assert len(found[0]) == 6
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0][-1] < found[0][0]


def test_an_evaluation_counts_every_token(encoder_decoder: str, tmp_path: Path) -> None:
    stage = stage_of(encoder_decoder, tmp_path)
    found, model = stage.evaluate("eval"), stage.model.eval()
    tokenizer = stage.data.tokenizer
    expected = []
    for row in ROWS:
        batch = {**tokenizer(row["source"], return_tensors="pt")}
        batch["labels"] = tokenizer(row["target"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            output = model(**batch)
        hits = int((output.logits.argmax(-1) == batch["labels"]).sum())
        expected.append((float(output.loss), batch["labels"].numel(), hits))
    loss, tokens, hits = np.array(expected).T
    assert found["perplexity"] == pytest.approx(np.exp((loss * tokens).sum() / tokens.sum()), rel=1e-5)
    assert found["token_accuracy"] == pytest.approx(hits.sum() / tokens.sum())
    assert stage.trainer.evaluated is not None
    assert example_losses(stage.trainer.evaluated) == pytest.approx(loss, rel=1e-4)
    assert stage.trainer.written is None


def test_padding_adds_nothing_to_a_sum() -> None:
    logits = torch.randn(2, 3, 5)
    labels = torch.tensor([[1, 4, -100], [2, 0, 3]])
    sums = sums_of_targets(logits, labels)
    chosen = logits.log_softmax(-1)
    assert sums[:, 1].tolist() == [2, 3]
    assert float(sums[0, 0]) == pytest.approx(-float(chosen[0, 0, 1] + chosen[0, 1, 4]), rel=1e-6)


@pytest.mark.parametrize("way", GENERATE)
def test_answers_are_those_of_generate(way: str, encoder_decoder: str, tmp_path: Path) -> None:
    """One prompt at a time, with the model's own `generate`; the model's own settings are as they were."""
    settings = {"max_new_tokens": 8, "samples": 7, "metrics": ["rouge"], **GENERATE[way]}
    stage = stage_of(encoder_decoder, tmp_path, generate=settings)
    base: Any = stage.model.get_base_model()
    own = base.generation_config.to_dict()
    found = stage.evaluate("eval")
    assert base.generation_config.to_dict() == own
    written = stage.generate()
    assert isinstance(written, Generation)
    assert [prompt.text for prompt in written.prompts] == list(dict.fromkeys(row["source"] for row in ROWS))[:7]
    assert written.metrics == score(written.answers, written.prompts, ["rouge"], None)
    assert {f"rouge{kind}" for kind in ("1", "2", "L", "Lsum")} == written.metrics.keys() <= found.keys()
    tokenizer, answers = stage.data.tokenizer, []
    for prompt in written.prompts:
        ids = tokenizer(prompt.text, return_tensors="pt")["input_ids"]
        (answer,) = stage.model.generate(input_ids=ids, max_new_tokens=8, **GENERATE[way])
        answers.append(tokenizer.decode(answer, skip_special_tokens=True).strip())
    assert answers == written.answers
    assert len(set(answers)) > 1


def test_chance_has_the_seed_of_the_run_and_leaves_no_trace(t5: str, tmp_path: Path) -> None:
    answers, states = [], []
    for temperature in (None, 0.0, 1.5, 1.5):
        settings = {} if temperature is None else {"generate": {"max_new_tokens": 8, "temperature": temperature}}
        stage = stage_of(t5, tmp_path, **settings)
        stage.evaluate("eval")
        states.append(torch.get_rng_state())
        answers.append(stage.trainer.written and stage.trainer.written.answers)
    assert answers[0] is None
    assert answers[1] != answers[2] == answers[3]
    assert all(torch.equal(states[0], state) for state in states)


def test_training_does_not_notice_that_evaluations_write(encoder_decoder: str, tmp_path: Path) -> None:
    warm = {"max_new_tokens": 4, "metrics": ["exact_match"], "temperature": 1.0}
    stages_ = stage_of(encoder_decoder, tmp_path / "a"), stage_of(encoder_decoder, tmp_path / "b", generate=warm)
    for stage in stages_:
        stage.train()
    assert losses(stages_[0].trainer) == losses(stages_[1].trainer)
    told = [row for row in stages_[1].trainer.state.log_history if "eval_exact_match" in row]
    assert [row["step"] for row in told] == [3, 6]
