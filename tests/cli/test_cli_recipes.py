"""Every packaged recipe, copied by `init` and trained as it is on another model and other data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from loralloc.recipe.schema import load_recipe
from loralloc.recipes import list_recipes

from .command import done, ranks

MODELS = {
    "causal-lm": AutoModelForCausalLM,
    "seq2seq": AutoModelForSeq2SeqLM,
    "sequence-classification": AutoModelForSequenceClassification,
}
NAMES = [name for name in list_recipes() if name.partition("/")[0] in MODELS]
WORDS = {
    "causal-lm": ("--data.max_length", 32, "--lora.target_modules", "[q_proj, up_proj]"),  # others are below rank 12
    "seq2seq": ("--data.source", "text", "--data.target", "completion"),
    "sequence-classification": ("--data.text", "text", "--data.max_length", 16),
}


@pytest.mark.slow
@pytest.mark.usefixtures("unreported")
@pytest.mark.filterwarnings("ignore:ALLoRA:UserWarning")
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_ends_in_an_adapter_that_stock_peft_loads(
    name: str, encoder: Path, decoder: Path, encoder_decoder: Path, data: Path, here: Path
) -> None:
    task, _, method = name.partition("/")
    model = {"causal-lm": decoder, "seq2seq": encoder_decoder}.get(task, encoder)
    done("init", name)
    done("train", f"{method}.yaml", "--model.name", model, "--data.train", data / "train.jsonl", *WORDS[task],
         "--training.steps", 20, "--output", "run")  # fmt: skip
    found = ranks(here / "run")
    budget = getattr(load_recipe(here / f"{method}.yaml").method, "budget", None)
    if budget is not None:
        assert sum(found.values()) == budget.average_rank * len(found)
    else:
        assert method in ("allora", "autolora", "lora")
    adapter = here / "run" / "adapter"
    stored = load_file(adapter / "adapter_model.safetensors")
    assert {key: len(tensor) for key, tensor in stored.items() if ".lora_A." in key} == {
        f"base_model.model.{module}.lora_A.weight": rank for module, rank in found.items() if rank
    }
    assert json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["peft_type"] == "LORA"
    base = MODELS[task].from_pretrained(model, **({"num_labels": 2} if model == encoder else {}))
    loaded = PeftModel.from_pretrained(base, adapter)
    with torch.no_grad():
        batch = {"input_ids": torch.tensor([[3, 4, 5, 6]])}
        batch |= {"decoder_input_ids": batch["input_ids"]} if task == "seq2seq" else {}
        changed = loaded(**batch).logits
        with loaded.disable_adapter():
            assert not torch.equal(changed, loaded(**batch).logits)
