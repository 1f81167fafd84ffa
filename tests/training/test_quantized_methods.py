"""Every method trains over a base model in 4 and 8 bits, and what it trained is exported for stock PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import labelled_batch, logits
from peft import PeftModel
from quantized_models import BITS, ROUNDING, quantized_llama, quantized_peft
from safetensors.torch import load_file
from test_export_matrix import METHODS, in_a_loop, in_sft_trainer, in_trainer, one_precision_a_test  # noqa: F401
from test_sft import quiet_datasets  # noqa: F401
from torch import Tensor, nn

from loralloc import UserError, attach, export_adapter
from loralloc.quantized import dequantized
from loralloc.testing.loop import same

pytestmark = pytest.mark.filterwarnings("ignore:ALLoRA.*AdamW")


def exact(model: nn.Module) -> Tensor:
    """Logits without the rounding of layers in few bits."""
    with dequantized(model):
        return logits(model)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", METHODS)
def test_attaching_changes_no_output(name: str, bits: str) -> None:
    """Bit for bit, in evaluation and in training."""
    model = quantized_peft(bits, lora_alpha=4)
    without = [logits(model), logits(model.train())]
    attach(model.eval(), METHODS[name]([labelled_batch("llama", 8)]), total_steps=6)
    assert torch.equal(logits(model), without[0])
    assert torch.equal(logits(model.train()), without[1])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", METHODS)
def test_what_was_trained_computes_the_same_on_a_base_that_is_loaded_anew(name: str, bits: str, tmp_path: Path) -> None:
    model = quantized_peft(bits, lora_alpha=4)
    frozen = {key: value.clone() for key, value in quantized_llama(bits).state_dict().items()}
    before = logits(model)
    in_trainer(model, METHODS[name], "fp32", tmp_path / "run")
    trained, numbers = logits(model.eval()), exact(model)
    assert (trained - before).abs().max() > 0.1
    scale = float(trained.abs().max())
    for profile in ("ragged", "uniform"):
        export = export_adapter(model, tmp_path / profile, profile)
        assert export.difference <= export.allowed < 1e-4
        stock = PeftModel.from_pretrained(quantized_llama(bits), export.path).eval()
        torch.testing.assert_close(exact(stock), numbers, rtol=0, atol=1e-5 * scale)
        torch.testing.assert_close(logits(stock), trained, rtol=0, atol=4 * ROUNDING[bits] * scale)
    with pytest.raises(UserError, match="the weights are quantised, and merging would round the update to their steps"):
        export_adapter(model, tmp_path / "merged", "merged")
    assert same(dict(model.unload().state_dict()), frozen), "the base model is as it was loaded"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "precision"),
    [
        pytest.param(torch.float32, "bf16 autocast", id="fp32-bf16"),
        pytest.param(torch.float32, "fp16 autocast", id="fp32-fp16"),
        pytest.param(torch.bfloat16, "bf16 autocast", id="bf16-bf16"),
        pytest.param(torch.bfloat16, "none", id="bf16"),
        pytest.param(torch.float16, "none", id="fp16"),
    ],
)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", METHODS)
def test_and_in_other_precisions(name: str, bits: str, dtype: torch.dtype, precision: str, tmp_path: Path) -> None:
    model = quantized_peft(bits, lora_alpha=4, dtype=dtype)
    in_a_loop(model, METHODS[name], precision, tmp_path)
    export = export_adapter(model, tmp_path / "adapter")
    assert export.difference <= export.allowed
    stock = PeftModel.from_pretrained(quantized_llama(bits, dtype=dtype), export.path).eval()
    plain: Any = type(model)
    with torch.no_grad(), dequantized(model), dequantized(stock):
        expected = plain.forward(model.eval(), **labelled_batch("llama")).logits.float()
        found = stock(**labelled_batch("llama")).logits.float()
    rounding = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected, rtol=0, atol=rounding * float(expected.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "precision"), [("4bit", "bf16 autocast"), ("8bit", "fp32")])
@pytest.mark.parametrize("name", METHODS)
def test_and_under_trl_which_makes_the_adapter_narrow(name: str, bits: str, precision: str, tmp_path: Path) -> None:
    model = quantized_peft(bits, lora_alpha=4)
    in_sft_trainer(model, METHODS[name], precision, tmp_path / "run")
    assert {p.dtype for key, p in model.named_parameters() if "lora_" in key} == {torch.bfloat16}
    export = export_adapter(model, tmp_path / "adapter")
    assert {tensor.dtype for tensor in load_file(export.path / "adapter_model.safetensors").values()} == {
        torch.bfloat16
    }
    assert export.difference <= export.allowed
