"""Promises: every example is evaluated by itself, whatever shares a row with it, and a preference is learned against
the base model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from models import VOCABULARY, tiny_peft
from peft import PeftModel
from test_sft import phrases, word_tokenizer
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, SFTConfig, SFTTrainer

from loralloc.training.trl_trainers import RunDPOTrainer, RunSFTTrainer, sums_of_examples

QUIET: dict[str, Any] = {
    "bf16": False,
    "use_cpu": True,
    "report_to": [],
    "disable_tqdm": True,
    "save_strategy": "no",
    "activation_checkpointing": False,
    "per_device_eval_batch_size": 3,
}


def examples(count: int = 10) -> Dataset:
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(4, VOCABULARY, (3 + n,), generator=draw).tolist() for n in range(count)]
    labels = [[-100] * (1 + n % 2) + row[1 + n % 2 :] for n, row in enumerate(ids)]
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


def naive(model: Any, rows: Dataset) -> list[list[float]]:
    """Loss, learned tokens and hits, one example after the other."""
    found = []
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        with torch.no_grad():
            scores = model(input_ids=ids).logits[0, :-1]
        loss = cross_entropy(scores, labels, reduction="sum", ignore_index=-100)
        learned = labels != -100
        found.append([loss.item(), learned.sum().item(), (scores.argmax(-1) == labels)[learned].sum().item()])
    return found


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_every_example_counts_by_itself_and_in_its_place(packing: bool, strategy: str, tmp_path: Path) -> None:
    model, rows = tiny_peft("llama"), examples()
    settings: dict[str, Any] = {"packing": True, "packing_strategy": "bfd", "eval_packing": False} if packing else {}
    settings["train_sampling_strategy"] = strategy
    trainer = RunSFTTrainer(
        model=model,
        args=SFTConfig(str(tmp_path), max_length=32, **settings, **QUIET),
        train_dataset=rows,
        processing_class=word_tokenizer(),
        compute_metrics=lambda prediction: {"rows": len(prediction.predictions)},
        log=tmp_path / "log.jsonl",
    )
    assert trainer.padding_free is packing
    metrics = trainer.evaluate(rows)
    assert metrics["eval_rows"] == 10
    assert trainer.evaluated is not None
    expected = torch.tensor(naive(model.eval(), rows), dtype=torch.float64)
    torch.testing.assert_close(torch.tensor(trainer.evaluated.predictions), expected, rtol=1e-5, atol=1e-6)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the Hub is told of."""
    topics: list[str] = []
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda topic, **_: topics.append(topic))
    monkeypatch.delenv("CI", raising=False)  # where TRL tells nobody either
    return topics


@pytest.mark.parametrize("kind", [RunSFTTrainer, SFTTrainer])
def test_nobody_is_told_of_a_training(kind: type[SFTTrainer], told: list[str], tmp_path: Path) -> None:
    """A thread that tells it looks at the environment, which accelerate empties while a trainer is built."""
    kind(
        model=tiny_peft("llama"),
        args=SFTConfig(str(tmp_path), max_length=32, **QUIET),
        train_dataset=examples(),
        processing_class=word_tokenizer(),
        **({"log": tmp_path / "log.jsonl"} if kind is RunSFTTrainer else {}),
    )
    assert told == ([] if kind is RunSFTTrainer else ["trl/SFTTrainer"])


def test_nobody_is_told_of_preferences(pairs: Dataset, told: list[str], tmp_path: Path) -> None:
    dpo(tiny_peft("llama"), pairs, tmp_path, word_tokenizer())
    assert told == []


def test_a_script_of_ones_own_can_keep_it_too() -> None:
    """As docs/faq.md says: from the environment that Python starts with."""
    program = "from huggingface_hub import constants; print(constants.HF_HUB_DISABLE_TELEMETRY)"
    environment = {**os.environ, "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_packed_examples_do_not_see_each_other(tmp_path: Path) -> None:
    """The training loss of packed rows is that of the same examples, padded: on the CPU with the default attention."""
    losses = []
    for packing in (False, True):
        settings: dict[str, Any] = {"packing": True, "packing_strategy": "bfd"} if packing else {}
        trainer = RunSFTTrainer(
            model=tiny_peft("llama"),
            args=SFTConfig(
                str(tmp_path),
                max_length=32,
                max_steps=1,
                logging_steps=1,
                per_device_train_batch_size=10,
                **settings,
                **QUIET,
            ),
            train_dataset=examples(),
            processing_class=word_tokenizer(),
            log=tmp_path / "log.jsonl",
        )
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_sums_of_one_example_a_row() -> None:
    output = SimpleNamespace(
        log_probs=-torch.tensor([[1.0, 2.0], [3.0, 0.0]]),
        label_mask=torch.tensor([[True, True], [True, False]]),
        is_top1=torch.tensor([[1.0, 0.0], [0.0, 0.0]]),
    )
    assert sums_of_examples(output, None).tolist() == [[3, 2, 1], [3, 1, 0]]


@pytest.fixture
def pairs() -> Dataset:
    words = phrases(12)
    return Dataset.from_dict({"prompt": words, "chosen": [" w1 w2"] * 12, "rejected": [" w3"] * 12})


def dpo(model: PeftModel, rows: Dataset, folder: Path, tokenizer: PreTrainedTokenizerFast) -> RunDPOTrainer:
    arguments = DPOConfig(str(folder), max_steps=8, learning_rate=0.01, per_device_train_batch_size=4, **QUIET)
    options: dict[str, Any] = {"train_dataset": rows, "processing_class": tokenizer, "log": folder / "log.jsonl"}
    return RunDPOTrainer(model, args=arguments, **options)


def test_the_reference_is_the_base_model(pairs: Dataset, tmp_path: Path) -> None:
    trainer = dpo(tiny_peft("llama"), pairs, tmp_path, word_tokenizer())
    model: Any = trainer.model
    assert list(model.peft_config) == ["default"]
    fresh = trainer.evaluate(pairs)
    assert fresh["eval_loss"] == pytest.approx(0.693147, rel=1e-5)
    assert fresh["eval_reward_margin"] == 0
    trainer.train()
    trained = trainer.evaluate(pairs)
    assert trained["eval_reward_accuracy"] == 1
    assert trained["eval_loss"] < 0.65
    assert set(trained) == {"eval_loss", "eval_reward_accuracy", "eval_reward_margin"}
    again = dpo(model, pairs, tmp_path / "again", word_tokenizer())  # a trained adapter is compared with the base too
    assert again.evaluate(pairs) == pytest.approx(trained, rel=1e-5)


def uneven(pairs: Dataset, folder: Path) -> RunDPOTrainer:
    """A trainer of an adapter that is not the base model, and so prefers some answers and not others."""
    model = tiny_peft("llama")
    draw = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data = torch.randn(weight.shape, generator=draw)
    return dpo(model, pairs, folder, word_tokenizer())


@pytest.mark.parametrize("count", [5, 7])
def test_rewards_are_means_over_examples_whatever_the_batches(count: int, pairs: Dataset, tmp_path: Path) -> None:
    trainer, found = uneven(pairs, tmp_path), []
    for size in (1, 2, 4, count):
        trainer.args.per_device_eval_batch_size = size
        found.append(trainer.evaluate(pairs.select(range(count))))
        told = trainer.state.log_history[-1]
        assert told["eval_rewards/accuracies"] == found[-1]["eval_reward_accuracy"], "the log says the same"
    assert 0 < found[0]["eval_reward_accuracy"] < 1
    for again in found[1:]:
        assert again == pytest.approx(found[0], rel=1e-4)


def test_every_example_is_evaluated_where_training_drops_the_last_batch(pairs: Dataset, tmp_path: Path) -> None:
    trainer = uneven(pairs, tmp_path)
    found = trainer.evaluate(pairs.select(range(5)))
    trainer.args.dataloader_drop_last = True
    assert trainer.evaluate(pairs.select(range(5))) == found
    assert trainer.args.dataloader_drop_last


def test_what_fills_the_last_batch_of_several_processes_up_counts_for_nothing(
    pairs: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes with two examples each, and three examples left: one of four is a copy."""
    trainer = uneven(pairs, tmp_path)
    state = SimpleNamespace(end_of_dataloader=False, remainder=3)
    monkeypatch.setattr("loralloc.training.trl_trainers.gather", lambda values: torch.cat([values, 10 * values]))
    monkeypatch.setattr(trainer.accelerator, "gradient_state", state)
    rewards = torch.tensor([1.0, 2.0])
    with trainer._examples_once() as sizes:
        assert trainer.accelerator.gather(rewards).tolist() == [1, 2, 10, 20]
        state.end_of_dataloader = True
        assert trainer.accelerator.gather(rewards).tolist() == [1, 2, 10]
    assert sizes == [4, 3]
    assert "gather" not in vars(trainer.accelerator)
