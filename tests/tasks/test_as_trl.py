"""Promise: a recipe for plain LoRA trains what TRL's SFTTrainer trains on the same rows: the same tokens, with the same
losses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from tiny_models import build_tokenizer, save_decoder
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from loralloc.recipe import stages
from loralloc.recipe.from_recipe import task_data
from loralloc.recipe.run_folder import RunFolder
from loralloc.recipe.schema import load_recipe
from loralloc.recipe.screen import Screen

MARKED = (
    "{% for m in messages %}{{ m['role'] }} : {% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }} </s>{% endgeneration %}{% else %}{{ m['content'] }} </s>{% endif %} "
    "{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
WORDS = "abcde"


def text(n: int) -> str:
    return " ".join(WORDS[(n + 2 * i) % 5] for i in range(2 + n % 4))


def chat(n: int) -> list[dict[str, str]]:
    turns = [{"role": "user", "content": text(n)}, {"role": "assistant", "content": text(n + 1)}]
    return turns * (1 + n % 2)


KINDS: Mapping[str, tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]] = {
    # rows, the recipe's data section, TRL's arguments
    "text": ([{"text": text(n)} for n in range(24)], {"packing": "none"}, {}),
    "wrapped": (
        [{"text": text(n)} for n in range(60)],
        {"packing": "wrapped", "max_length": 8},
        {"packing": True, "packing_strategy": "wrapped", "max_length": 8},
    ),
    "pair": ([{"prompt": text(n) + " ", "completion": text(n + 2)} for n in range(24)], {"chat": False}, {}),
    "chat": ([{"messages": chat(n)} for n in range(24)], {}, {"assistant_only_loss": True}),
    "turns": (
        [{"prompt": chat(n)[:1], "completion": chat(n)[1:2]} for n in range(24)],
        {},
        {"completion_only_loss": True},
    ),
    "bfd": (
        [{"messages": chat(n)} for n in range(24)],
        {"packing": "bfd", "max_length": 32},
        {"packing": True, "packing_strategy": "bfd", "assistant_only_loss": True, "max_length": 32},
    ),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    disable_progress_bars()
    tokenizer = build_tokenizer("<s> $A", None, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = MARKED
    return save_decoder(tmp_path_factory.mktemp("decoder"), tokenizer)


def ours(model: str, kind: str, folder: Path) -> Any:
    """The trainer that a recipe makes."""
    rows, data, _ = KINDS[kind]
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = {
        "task": "causal-lm",
        "model": {"name": model},
        "data": {"train": str(path), "validation": str(path), "max_length": 64, **data},
        "method": {"name": "lora"},
        "lora": {"r": 4, "alpha": 8},
        "training": {"steps": 6, "batch_size": 4, "learning_rate": 0.01, "log_every": 1, "seed": 3},
        "output": str(folder / "run"),
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    loaded = load_recipe(folder / "recipe.yaml")
    run = RunFolder(folder / "run")
    return stages.prepare_training(loaded, task_data(loaded), run, Screen(), after_search=False).trainer


def theirs(model: str, kind: str, folder: Path) -> SFTTrainer:
    """What somebody writes who uses TRL."""
    rows, _, arguments = KINDS[kind]
    settings: dict[str, Any] = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "warmup_steps": 0.1,
        "lr_scheduler_type": "linear",
        "logging_steps": 1,
        "max_length": 64,
        "seed": 3,
        "data_seed": 3,
        "bf16": False,
        "activation_checkpointing": False,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    return SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model),
        args=SFTConfig(str(folder / "theirs"), **{**settings, **arguments}),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_tokens_are_learned_with_the_same_losses(kind: str, model: str, tmp_path: Path) -> None:
    trainers = ours(model, kind, tmp_path), theirs(model, kind, tmp_path)
    examples = [
        [(row["input_ids"], row["labels"]) for row in trainer.train_dataset if len(row["input_ids"]) > 1]
        for trainer in trainers
    ]
    assert examples[0] == examples[1]
    losses = []
    for trainer in trainers:
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert len(losses[0]) == 6
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][-1] < losses[0][0]
