"""Trainers with a loss of their own: what learns ranks from the model's loss says that it is the loss that differs."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from models import labelled_batch, tiny_llama, tiny_peft
from peft import LoraConfig, get_peft_model
from test_sft import DATA, phrases, quiet_datasets, word_tokenizer  # noqa: F401
from torch import Tensor
from torch.nn.functional import cross_entropy
from trainers import arguments, build, language_batch, sentences
from transformers import LlamaForSequenceClassification, Trainer
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from loralloc import ABLoRA, AdaLoRA, AutoLoRA, Budget, RankAllocation, UserError, attach
from loralloc.methods.base import Method

HALF = Budget(average_rank=2)
QUIET: dict[str, Any] = {
    "bf16": False,
    "use_cpu": True,
    "report_to": [],
    "disable_tqdm": True,
    "save_strategy": "no",
    "max_steps": 4,
    "per_device_train_batch_size": 4,
}
ROWS = phrases(12)
TOKENS = [{"input_ids": [5, 9, 14, 20, 6], "labels": [5, 9, 14, 20, 6]}] * 8


def options(allocation: RankAllocation, rows: Mapping[str, Any]) -> dict[str, Any]:
    data = Dataset.from_dict({"prompt": ROWS, **rows})
    return {"train_dataset": data, "processing_class": word_tokenizer(), "callbacks": [allocation]}


def dpo(folder: str, allocation: RankAllocation) -> Trainer:
    rows = options(allocation, {"chosen": [" w1 w2"] * 12, "rejected": [" w3"] * 12})
    return DPOTrainer(tiny_peft("llama"), args=DPOConfig(folder, **QUIET), **rows)


def kto(folder: str, allocation: RankAllocation) -> Trainer:
    rows = options(allocation, {"completion": [" w1 w2"] * 12, "label": [True, False] * 6})
    return KTOTrainer(tiny_peft("llama"), args=KTOConfig(folder, **QUIET), **rows)


def reward(folder: str, allocation: RankAllocation) -> Trainer:
    rows = options(allocation, {"chosen": [" w1 w2"] * 12, "rejected": [" w3"] * 12})
    config = tiny_llama().config
    config.num_labels, config.pad_token_id = 1, rows["processing_class"].pad_token_id
    lora = LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS")
    model = get_peft_model(LlamaForSequenceClassification(config), lora)
    return RewardTrainer(model, args=RewardConfig(folder, **QUIET), **rows)


def lengths(completions: list[str], **_: Any) -> list[float | None]:
    return [float(len(completion) % 3) for completion in completions]


def grpo(folder: str, allocation: RankAllocation) -> Trainer:
    arguments = GRPOConfig(folder, num_generations=2, max_completion_length=5, **QUIET)
    return GRPOTrainer(tiny_peft("llama"), reward_funcs=lengths, args=arguments, **options(allocation, {}))


TRAINERS: dict[str, tuple[Callable[[str, RankAllocation], Trainer], str]] = {
    "dpo": (dpo, "hold input_ids, attention_mask, completion_mask, and no labels, without which LlamaForCausalLM"),
    "kto": (kto, r"hold input_ids, .*, label, and no labels, without which LlamaForCausalLM"),
    "reward": (reward, "hold input_ids, attention_mask, and no labels, without which LlamaForSequenceClassification"),
    "grpo": (grpo, "are lists, and no labels, without which LlamaForCausalLM"),
}
LOOKING: dict[str, Callable[[], Method]] = {
    "ablora": lambda: ABLoRA(HALF, validation=TOKENS, warmup=1, interval=1, rounds=1),
    "autolora": lambda: AutoLoRA(validation=TOKENS),
    "first order": lambda: AutoLoRA(validation=TOKENS, mode="first_order"),
}
CURES: dict[str, Callable[[], Method]] = {
    "adalora": lambda: AdaLoRA(HALF),
    "sensitivity": lambda: ABLoRA(HALF, warmup=1, interval=1, rounds=1, score="sensitivity"),
    "gate": lambda: ABLoRA(HALF, warmup=1, interval=1, rounds=1, score="gate"),
}


@pytest.mark.parametrize("method", LOOKING)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_it_is_said_that_the_loss_cannot_serve(trainer: str, method: str, tmp_path: Path) -> None:
    """The validation data were blamed, and no others would have been right."""
    build_trainer, words = TRAINERS[trainer]
    text = (
        "returns no loss that ranks could be learned from; where the trainer computes a loss of its own, as TRL's do "
        'for preferences, rewards and generated answers, use AdaLoRA, ALLoRA, or ABLoRA with score="sensitivity" or '
        '"gate", which look at the training alone; elsewhere give its data labels'
    )
    with pytest.raises(UserError, match=rf"^the trainer's batches {words} {re.escape(text)}$"):
        build_trainer(str(tmp_path), RankAllocation(LOOKING[method]())).train()


@pytest.mark.parametrize("cure", CURES)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_cures_train(trainer: str, cure: str, tmp_path: Path) -> None:
    allocation = RankAllocation(CURES[cure]())
    TRAINERS[trainer][0](str(tmp_path), allocation).train()
    assert allocation.plan is not None
    assert allocation.plan.provenance["steps"] == 4


def test_validation_data_of_another_form_are_still_what_is_wrong(tmp_path: Path) -> None:
    """Where the trainer's own batches have labels."""
    trainer, _ = build(tmp_path, method=ABLoRA(HALF, validation=[{"text": "w1 w2"}] * 8))
    with pytest.raises(
        UserError, match=r"^the validation data of the method cannot be made into a batch \(KeyError: 'ids'"
    ):
        trainer.train()


# ---- A loss of one's own for batches with labels ----


def doubled(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return 2 * cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


class Doubling(Trainer):
    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs)
        loss = doubled(outputs, inputs["labels"])
        return (loss, outputs) if return_outputs else loss


def ablations() -> ABLoRA:
    return ABLoRA(HALF, validation=sentences(16, seed=5), rounds=2, interval=2, warmup=2)


def with_a_function(folder: Path) -> Trainer:
    return build(folder, method=ablations(), max_steps=8, extra={"compute_loss_func": doubled})[0]


def with_smoothed_labels(folder: Path) -> Trainer:
    return build(folder, method=ablations(), max_steps=8, label_smoothing_factor=0.2)[0]


def with_a_class(folder: Path) -> Trainer:
    settings: dict[str, Any] = {"train_dataset": sentences(), "data_collator": language_batch}
    return Doubling(
        tiny_peft("llama"), arguments(folder, max_steps=8), callbacks=[RankAllocation(ablations())], **settings
    )


def with_weighted_tokens(folder: Path) -> Trainer:
    settings = SFTConfig(str(folder), loss_type="dft", max_length=32, **{**QUIET, "max_steps": 8})
    method = ABLoRA(HALF, validation=TOKENS, rounds=2, interval=2, warmup=2)
    return SFTTrainer(
        tiny_peft("llama"),
        args=settings,
        train_dataset=DATA["text"](),
        processing_class=word_tokenizer(),
        callbacks=[RankAllocation(method)],
    )


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if "loss of its own" in record.message]


@pytest.mark.parametrize("make", [with_a_function, with_smoothed_labels, with_a_class, with_weighted_tokens])
def test_ablations_by_another_loss_than_the_trainings_are_told_once(
    make: Callable[[Path], Trainer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make(tmp_path)
    with caplog.at_level(logging.WARNING, "loralloc"):
        trainer.train()
    assert told(caplog) == [
        "the training has a loss of its own (compute_loss_func, label smoothing, weights of tokens, or a loop that "
        "does not use the model's), and ranks are scored by the loss that the model returns for validation data; "
        'ABLoRA with score="sensitivity" scores them by the gradients of the training\'s own'
    ]


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_nothing_is_told_of_the_models_own_loss(scale: float, caplog: pytest.LogCaptureFixture) -> None:
    """Scaled or not, and whatever else is evaluated in a step."""
    model = tiny_peft("llama").train()
    method = ABLoRA(HALF, validation=[labelled_batch("llama", 90)], warmup=1, interval=1, rounds=1)
    run = attach(model, method, total_steps=3)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    for step in range(3):
        (scale * model(**labelled_batch("llama", step)).loss).backward()
        model(**labelled_batch("llama", 50))
        run.before_step(optimizer)
        optimizer.step()
        run.after_step(optimizer)
        optimizer.zero_grad()
    assert told(caplog) == []
