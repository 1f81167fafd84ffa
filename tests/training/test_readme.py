"""The README's Python: the block for a Trainer as it stands, and the code that its other blocks are excerpts of."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from models import VOCABULARY, labelled_batch, tiny_bert
from peft import LoraConfig, PeftModel, get_peft_model
from trainers import class_batch, language_batch, sentences
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from loralloc import AdaLoRA, AutoLoRA, Budget, RankAllocation, attach, lora_config

README = Path(__file__).resolve().parents[2] / "README.md"


def wide_llama() -> LlamaForCausalLM:
    """As wide as the README's rank of 12 needs."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **sizes)).eval()


def examples(batch: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    """The samples of a batch, as a Trainer takes them."""
    return [{key: value[i] for key, value in batch.items()} for i in range(len(batch["labels"]))]


def arguments(**settings: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir="out", max_steps=8, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", **settings
    )


@pytest.fixture(autouse=True)
def one_precision_a_test() -> Iterator[None]:
    """accelerate keeps one precision a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("bf16", [True, False])
def test_the_trainer_block(bf16: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    section = README.read_text(encoding="utf-8").partition("\n## In a Trainer\n")[2]
    block = re.search(r"```python\n(.*?)```", section, re.S)
    assert block is not None
    data = examples(class_batch(sentences(24)))
    names: dict[str, Any] = {"base": tiny_bert(), "args": arguments(bf16=bf16), "data": data, "tokenizer": None}
    exec(block[1], names)
    model = names["model"].eval()
    inputs = labelled_batch("bert")
    reloaded = PeftModel.from_pretrained(tiny_bert(), "runs/quickstart/adapter").eval()
    expected = type(model).forward(model, **inputs).logits  # as the class computes it
    torch.testing.assert_close(reloaded(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
    assert sum(names["allocation"].plan.ranks.values()) == 8 * 13


def test_the_loop() -> None:
    model = get_peft_model(wide_llama(), LoraConfig(r=12, target_modules="all-linear")).train()
    batches = [labelled_batch("llama", seed) for seed in range(6)]

    run = attach(model, AdaLoRA(Budget(average_rank=8)), total_steps=len(batches))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)  # built after attaching
    for batch in batches:
        model(**batch).loss.backward()
        run.before_step(optimizer)
        optimizer.step()
        run.after_step(optimizer)
        optimizer.zero_grad()
    plan = run.finish()  # the model is plain LoRA from here on

    assert plan.total_rank == 8 * 14


def test_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    part_and_held_out = examples(language_batch(sentences(32)))
    part, held_out = part_and_held_out[:24], part_and_held_out[24:]
    args = arguments()
    model = get_peft_model(wide_llama(), LoraConfig(r=12, target_modules="all-linear", task_type="CAUSAL_LM"))

    search = RankAllocation(AutoLoRA(validation=held_out))  # examples in neither the training nor the test data
    Trainer(model=model, args=args, train_dataset=part, callbacks=[search]).train()

    base = wide_llama()
    model = get_peft_model(base, lora_config(search.plan, base, task_type="CAUSAL_LM"))  # base: loaded anew
    Trainer(model=model, args=args, train_dataset=part_and_held_out).train()

    ranks = {name: layer.r["default"] for name, layer in model.named_modules() if hasattr(layer, "lora_A")}
    assert sorted(ranks.values()) == sorted(rank for rank in search.plan.ranks.values() if rank)
    assert 0 < sum(ranks.values()) < 12 * 14
