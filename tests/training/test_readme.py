"""The README's first two examples, run as they stand."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from models import VOCABULARY, labelled_batch
from peft import LoraConfig, PeftModel, get_peft_model
from trainers import language_batch, sentences
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

README = Path(__file__).resolve().parents[2] / "README.md"
TRAINER, LOOP = "## In a Trainer", "## In a loop of your own"


def wide_llama() -> LlamaForCausalLM:
    """As wide as the README's rank of 12 needs."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **sizes)).eval()


def block(heading: str) -> str:
    """The first Python block under a heading."""
    section = README.read_text(encoding="utf-8").partition(f"\n{heading}\n")[2]
    found = re.search(r"```python\n(.*?)```", section, re.S)
    assert found is not None
    return found[1]


@pytest.fixture(autouse=True)
def one_precision_a_test() -> Iterator[None]:
    """accelerate keeps one precision a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("bf16", [True, False])
def test_the_trainer_block(bf16: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = language_batch(sentences(24))
    args = TrainingArguments(
        output_dir="out", max_steps=8, bf16=bf16, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no"
    )
    data = [{key: value[i] for key, value in rows.items()} for i in range(24)]
    names: dict[str, Any] = {"base": wide_llama(), "args": args, "data": data}
    exec(block(TRAINER), names)
    model = names["model"].eval()
    inputs = labelled_batch("llama")
    reloaded = PeftModel.from_pretrained(wide_llama(), "adapter").eval()
    expected = type(model).forward(model, **inputs).logits  # as the class computes it
    torch.testing.assert_close(reloaded(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
    assert sum(names["allocation"].plan.ranks.values()) == 8 * 14


def test_the_loop_block() -> None:
    code = block(LOOP).replace("total_steps=1000", "total_steps=6")
    code = code.replace("for batch", "optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)\nfor batch")
    names: dict[str, Any] = {
        "model": get_peft_model(wide_llama(), LoraConfig(r=12, target_modules="all-linear")).train(),
        "batches": [labelled_batch("llama", seed) for seed in range(6)],
        "torch": torch,
    }
    exec(code, names)
    assert names["plan"].total_rank == 8 * 14
