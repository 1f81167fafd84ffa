"""Promises: `load_in` quantises the linear layers and nothing else, and refuses what bitsandbytes would get wrong."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from tiny_models import build_tokenizer, save_decoder, save_encoder
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertForMaskedLM,
    BertForSequenceClassification,
    BitsAndBytesConfig,
    LlamaForCausalLM,
)

from loralloc.errors import UserError
from loralloc.quantized import is_packed, quantized_layers
from loralloc.tasks.pretrained import load_config, load_model, load_tokenizer, locate
from loralloc.tasks.quantization import compute_dtype, heads, stored_config

Section = Callable[..., Any]

LAYERS: Mapping[str, type[nn.Module]] = {"4bit": Linear4bit, "8bit": Linear8bitLt}
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a decoder whose rows bitsandbytes can cut into blocks."""
    folder = tmp_path_factory.mktemp("wide")
    tokenizer = build_tokenizer("<s> $A", None, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    save_decoder(folder, tokenizer, width=64)
    return folder


@pytest.fixture(scope="module")
def encoder_for(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], Path]:
    """Saves an encoder as one of transformers' classes has it."""

    def make(kind: Any) -> Path:
        folder = tmp_path_factory.mktemp("encoder")
        save_encoder(folder, build_tokenizer("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", **SPECIAL), width=64)
        torch.manual_seed(1)
        kind.from_pretrained(folder).save_pretrained(folder)
        return folder

    return make


def load(task: str, section: Any, **options: Any) -> Any:
    checkpoint = locate(section)
    return load_model(task, checkpoint, load_tokenizer(checkpoint), 3, **options)


def kinds(model: nn.Module) -> dict[str, str]:
    return {name: type(module).__name__ for name, module in model.named_modules() if isinstance(module, nn.Linear)}


@pytest.mark.parametrize("bits", LAYERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_linear_layers_are_quantised_and_the_rest_is_in_the_dtype(
    wide: Path, model_section: Section, bits: str, dtype: str
) -> None:
    model = load("causal-lm", model_section(str(wide), dtype, bits))
    inside = {name for name, _ in model.model.named_modules(prefix="model") if name.endswith("_proj")}
    assert {name for name, module in model.named_modules() if type(module) is LAYERS[bits]} == inside
    assert len(inside) == 14
    assert type(model.lm_head) is nn.Linear
    rest = {p.dtype for name, p in model.named_parameters() if name.removesuffix(".weight") not in inside}
    assert rest == {getattr(torch, dtype)}


def test_4_bits_are_nf4_with_double_quantisation(wide: Path, model_section: Section) -> None:
    layer = load("causal-lm", model_section(str(wide), load_in="4bit")).model.layers[0].mlp.up_proj
    state = layer.weight.quant_state
    assert (state.quant_type, state.nested, state.blocksize) == ("nf4", True, 64)
    assert layer.compute_dtype == compute_dtype()


@pytest.mark.parametrize(
    ("gpu", "native", "expected"),
    [(True, True, torch.bfloat16), (True, False, torch.float16), (False, False, torch.bfloat16)],
)
def test_the_device_decides_what_4_bits_are_multiplied_in(
    gpu: bool, native: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native or including_emulation)
    assert compute_dtype() == expected


def test_an_evaluation_leaves_the_weights_as_they_are(wide: Path, model_section: Section) -> None:
    model = load("causal-lm", model_section(str(wide), load_in="4bit")).eval()
    with torch.no_grad():
        model(torch.tensor([[1, 5, 6]]))
    assert not any(is_packed(layer) for _, layer in quantized_layers(model))


def test_a_model_that_does_not_name_its_base_is_quantised_as_transformers_thinks_best(
    wide: Path, model_section: Section, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(locate(model_section(str(wide))))
    assert heads(AutoModelForCausalLM, config, False) == ["lm_head"]
    monkeypatch.setattr(LlamaForCausalLM, "base_model_prefix", "nothing")
    assert heads(AutoModelForCausalLM, config, False) == []
    model = load("causal-lm", model_section(str(wide), load_in="8bit"))
    assert sorted(set(kinds(model).values())) == ["Linear", "Linear8bitLt"]
    assert kinds(model)["lm_head"] == "Linear"


@pytest.mark.parametrize("bits", LAYERS)
class TestHeads:
    def test_a_trained_head_stays_as_it_is(self, bits: str, encoder_for: Any, model_section: Section) -> None:
        folder = encoder_for(BertForSequenceClassification)
        model = load("sequence-classification", model_section(str(folder), load_in=bits))
        assert kinds(model)["classifier"] == "Linear"
        stored = BertForSequenceClassification.from_pretrained(folder).classifier.weight
        assert torch.equal(model.classifier.weight, stored)
        assert set(kinds(model).values()) == {"Linear", LAYERS[bits].__name__}

    def test_what_is_new_is_new_as_without_it(self, bits: str, encoder_for: Any, model_section: Section) -> None:
        """A checkpoint of masked words has no pooler either: with the head, it depends on the seed alone."""
        folder = encoder_for(BertForMaskedLM)
        model = load("sequence-classification", model_section(str(folder), load_in=bits))
        full = load("sequence-classification", model_section(str(folder)))
        for name in ("bert.pooler.dense", "classifier"):
            assert kinds(model)[name] == "Linear"
            assert torch.equal(model.get_submodule(name).weight, full.get_submodule(name).weight)
        assert kinds(model)["bert.encoder.layer.0.output.dense"] == LAYERS[bits].__name__
        assert model(torch.tensor([[2, 5, 3]])).logits.isfinite().all()


class TestRefusals:
    def test_the_package_is_missing(self, wide: Path, model_section: Section, monkeypatch: pytest.MonkeyPatch) -> None:
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
        with pytest.raises(
            UserError, match=r'model.load_in: 8bit needs an optional package: pip install "loralloc\[quantized\]"'
        ):
            locate(model_section(str(wide), load_in="8bit"))
        assert locate(model_section(str(wide))).load_in is None

    def test_rows_that_bitsandbytes_reads_wrong(self, tmp_path: Path, model_section: Section) -> None:
        tokenizer = build_tokenizer("<s> $A", None, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
        folder = save_decoder(tmp_path, tokenizer, width=96)
        with pytest.raises(
            UserError,
            match=r"does not work in 4 bits on a CPU: .* no multiple of 64, as in q_proj, k_proj, v_proj, "
            r"o_proj, gate_proj, up_proj \(96 inputs\); set model.load_in: 8bit, or train on a GPU",
        ):
            load("causal-lm", model_section(folder, load_in="4bit"))
        model = load("causal-lm", model_section(folder, load_in="8bit"))
        full = load("causal-lm", model_section(folder))
        ids = torch.tensor([[1, 5, 6, 7]])
        torch.testing.assert_close(model.eval()(ids).logits, full.eval()(ids).logits, rtol=0, atol=1e-2)

    @pytest.mark.parametrize("bits", LAYERS)
    def test_weights_that_are_stored_quantised(
        self, wide: Path, tmp_path: Path, bits: str, model_section: Section
    ) -> None:
        stored = tmp_path / "stored"
        config = BitsAndBytesConfig(load_in_8bit=True)
        AutoModelForCausalLM.from_pretrained(wide, quantization_config=config).save_pretrained(stored)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(wide / name, stored)
        with pytest.raises(
            UserError,
            match=rf"model.load_in is {bits}, but the weights of model .* are stored quantised already "
            r"\(bitsandbytes\); remove model.load_in, or name the model in full precision",
        ):
            load_config(locate(model_section(str(stored), load_in=bits)))
        model = load("causal-lm", model_section(str(stored)))
        assert type(model.model.layers[0].mlp.up_proj) is Linear8bitLt
        assert stored_config(model).quantization_config is not None


@pytest.mark.parametrize("bits", LAYERS)
def test_the_configuration_that_is_kept_is_the_checkpoints(wide: Path, model_section: Section, bits: str) -> None:
    """Otherwise transformers would take the full weights for quantised ones."""
    model = load("causal-lm", model_section(str(wide), load_in=bits))
    kept, full = stored_config(model), load("causal-lm", model_section(str(wide))).config
    assert kept.to_dict() == full.to_dict()
    assert hasattr(model.config, "quantization_config")
