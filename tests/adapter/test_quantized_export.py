"""Exports from base models in few bits: compared on the numbers that these stand for, and never merged into them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from exports import corrupt_writes
from models import VOCABULARY, logits, lora_config, train_adapter
from peft import PeftModel, get_peft_model
from quantized_models import BITS, quantized_peft, saved_llama
from test_quantized import pack
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from loralloc import UserError, export_adapter
from loralloc.quantized import dequantized, quantized_layers
from loralloc.tasks.quantization import quantization_config

Profiles = pytest.mark.parametrize("profile", ["ragged", "uniform"])
Bits = pytest.mark.parametrize("bits", BITS)


@Bits
@Profiles
def test_the_check_is_as_narrow_as_the_dtype_of_the_rest(bits: str, profile: Any, tmp_path: Path) -> None:
    model = quantized_peft(bits, trained=True)
    before = logits(model)
    export = export_adapter(model, tmp_path / "adapter", profile)
    with dequantized(model):
        scale = float(logits(model).abs().max())
    assert export.difference <= export.allowed < 2e-5 * max(1.0, scale)
    assert torch.equal(logits(model), before), "the model is as it was"


@Bits
@Profiles
def test_files_that_hold_something_else_are_refused(
    bits: str, profile: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = quantized_peft(bits, trained=True)
    corrupt_writes(monkeypatch)
    with pytest.raises(RuntimeError, match="the reloaded export computes something else"):
        export_adapter(model, tmp_path / "adapter", profile)
    assert not (tmp_path / "adapter").exists()
    monkeypatch.undo()
    export_adapter(model, tmp_path / "adapter", profile)


@Bits
def test_files_without_an_effect_are_refused(bits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits are looked at here as well, not the updates alone."""
    model, stock = quantized_peft(bits, trained=True), PeftModel.from_pretrained

    def disabled(*args: Any, **kwargs: Any) -> PeftModel:
        found = stock(*args, **kwargs)
        found.base_model.disable_adapter_layers()
        return found

    monkeypatch.setattr(PeftModel, "from_pretrained", disabled)
    with pytest.raises(RuntimeError, match="the reloaded export has no effect: its logits are the base model's"):
        export_adapter(model, tmp_path / "adapter")
    monkeypatch.undo()
    export_adapter(model, tmp_path / "adapter")


def test_a_model_whose_weights_were_packed_for_inference_is_exported_too(tmp_path: Path) -> None:
    model = quantized_peft("4bit", trained=True)
    for _, layer in quantized_layers(model):
        pack(layer)
    assert export_adapter(model, tmp_path / "adapter").allowed < 1e-4


@Bits
def test_the_config_says_nothing_of_bits(bits: str, tmp_path: Path) -> None:
    export = export_adapter(quantized_peft(bits, trained=True), tmp_path / "adapter")
    text = (export.path / "adapter_config.json").read_text(encoding="utf-8")
    assert json.loads(text)["base_model_name_or_path"] == str(saved_llama())
    words = text.replace(str(saved_llama()), "").lower().replace("arbitrary", "")  # the folder's name is random
    assert not [word for word in ("quant", "bit", "bnb") if word in words]


@Bits
def test_the_card_loads_the_base_model_as_it_was_trained_on(
    bits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = quantized_peft(bits, trained=True)
    export = export_adapter(model, tmp_path / "adapter")
    text = (export.path / "README.md").read_text(encoding="utf-8")
    assert f"It was trained over the base model in {bits[0]} bits" in text
    snippet = text.split("```python\n")[1].split("```")[0]
    loaded: dict[str, Any] = {}
    monkeypatch.chdir(export.path)
    exec(snippet.rpartition("tokenizer =")[0], loaded)  # the tiny models have no tokenizer
    config = quantization_config(bits, ["lm_head"])
    assert loaded["base"].hf_quantizer.quantization_config.to_dict() == config.to_dict()
    with dequantized(model), dequantized(loaded["model"]):
        torch.testing.assert_close(logits(loaded["model"].eval()), logits(model), rtol=1e-5, atol=1e-5)


def test_the_card_of_others_says_nothing_of_it(tmp_path: Path) -> None:
    model = get_peft_model(LlamaForCausalLM.from_pretrained(saved_llama()), lora_config("llama"))
    train_adapter(model)
    text = (export_adapter(model.eval(), tmp_path / "adapter").path / "README.md").read_text(encoding="utf-8")
    assert "bits" not in text
    assert "BitsAndBytesConfig" not in text


class TestMerging:
    CURE = 'export_adapter(PeftModel.from_pretrained(base, "ADAPTER"), path, profile="merged")'

    @Bits
    def test_into_the_bits_is_refused_and_the_cure_works(
        self, bits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = quantized_peft(bits, trained=True)
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        with pytest.raises(UserError, match="all 6 adapted layers: the weights are quantised, and") as error:
            export_adapter(model, tmp_path / "merged", "merged")
        assert not (tmp_path / "merged").exists()
        assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
        monkeypatch.chdir(tmp_path)
        export_adapter(model, "ADAPTER")
        assert self.CURE in str(error.value)
        base, path = LlamaForCausalLM.from_pretrained(saved_llama()), Path("merged")
        exec(self.CURE, {"export_adapter": export_adapter, "PeftModel": PeftModel, "base": base, "path": path})
        expected = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(saved_llama()), "ADAPTER")
        torch.testing.assert_close(logits(LlamaForCausalLM.from_pretrained(path)), logits(expected), rtol=0, atol=1e-5)

    def test_a_layer_that_is_not_quantised_does_not_help(self, tmp_path: Path) -> None:
        model = quantized_peft("4bit", trained=True, target_modules=["q_proj", "lm_head"])
        with pytest.raises(UserError, match=r"2 layers whose names end in q_proj: the weights are quantised"):
            export_adapter(model, tmp_path / "merged", "merged")

    def test_what_it_would_lose(self) -> None:
        """Why it is never done: most of a small update is gone, and what is left is not the update."""
        model = quantized_peft("4bit", trained=True)
        train_adapter(model)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.data.mul_(0.05)
        with dequantized(model), torch.no_grad():
            trained = logits(model)
            with model.disable_adapter():
                base = logits(model)
        with pytest.warns(UserWarning, match="may get different generations"):
            merged = model.merge_and_unload()
        with dequantized(merged):
            error = (logits(merged) - trained).norm()
        assert error > 0.3 * (trained - base).norm()


@Bits
def test_layers_that_keep_their_weight_transposed(bits: str, tmp_path: Path) -> None:
    """GPT-2's: quantised, they are linear layers; the adapter fits the model in full precision all the same."""
    sizes = {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 192}
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, **sizes, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    few = quantization_config(bits, ["lm_head"])
    base = GPT2LMHeadModel.from_pretrained(tmp_path / "base", quantization_config=few, dtype=torch.float32)
    model = get_peft_model(base, lora_config("llama", target_modules=["c_attn", "c_proj"])).eval()
    train_adapter(model)
    export = export_adapter(model, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT notes that it transposes them
        full = PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(tmp_path / "base"), export.path)
    merged = export_adapter(full, tmp_path / "merged", "merged")
    assert merged.difference <= 1e-5 * max(1.0, float(logits(full.eval()).abs().max()))
