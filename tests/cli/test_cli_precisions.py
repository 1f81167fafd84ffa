"""The command line ends with an adapter in every precision and with every method."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from .command import LANGUAGE, done, refused, save_decoder

pytestmark = pytest.mark.slow

HALF = "budget: {average_rank: 2}"
METHODS = {
    "lora": "{name: lora}",
    "adalora": f"{{name: adalora, {HALF}}}",
    "ablora": f"{{name: ablora, validation: 0.25, {HALF}}}",
    "autolora": f"{{name: autolora, validation: 0.25, {HALF}}}",
    "allora": "{name: allora, mode: hybrid}",
    "uniform": f"{{name: uniform, {HALF}}}",
    "random": f"{{name: random, {HALF}}}",
    "depth_linear": f"{{name: depth_linear, {HALF}}}",
    "truncate": f"{{name: truncate, {HALF}}}",
}
PRECISIONS = {
    "bf16 autocast": ("--training.bf16", "true"),
    "bf16 weights": ("--model.dtype", "bfloat16"),
    "bf16 weights and autocast": ("--model.dtype", "bfloat16", "--training.bf16", "true"),
    "fp16 weights": ("--model.dtype", "float16"),
}
WEIGHTS = {"bf16 weights": torch.bfloat16, "fp16 weights": torch.float16}


@pytest.fixture(autouse=True)
def one_precision_a_test() -> Iterator[None]:
    """accelerate keeps one precision a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("unreported")
@pytest.mark.parametrize(
    ("name", "precision"), [("adalora", one) for one in PRECISIONS] + [(one, "bf16 weights") for one in METHODS]
)
def test_a_run_ends_with_an_adapter(name: str, precision: str, recipe: Path, here: Path, encoder: Path) -> None:
    words = ("--method", METHODS[name], "--lora.alpha", 4, "--steps", 16, *PRECISIONS[precision])
    assert "reloaded by stock PEFT" in done("train", recipe, *words)
    for profile in ("uniform", "merged"):
        done("export", here / "run", "--profile", profile)
    dtype = next((dtype for start, dtype in WEIGHTS.items() if precision.startswith(start)), torch.float32)
    base = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2, dtype=dtype)
    adapter = PeftModel.from_pretrained(base, here / "run" / "adapter")
    assert adapter(input_ids=torch.tensor([[2, 5, 6, 3]])).logits.isfinite().all()


@pytest.mark.usefixtures("unreported")
@pytest.mark.parametrize("precision", [*PRECISIONS, "the checkpoint's, bf16", "the checkpoint's, fp16"])
@pytest.mark.parametrize("name", METHODS)
def test_a_language_model_trains_exports_and_evaluates(
    name: str, precision: str, write: Callable[[str], Path], here: Path, decoder: Path
) -> None:
    dtype = next((dtype for start, dtype in WEIGHTS.items() if precision.startswith(start)), torch.float32)
    if precision.startswith("the checkpoint's"):
        dtype = torch.bfloat16 if precision.endswith("bf16") else torch.float16
        decoder = save_decoder(here / "decoder", dtype=dtype)
    options = PRECISIONS.get(precision, ("--model.dtype", "auto"))
    words = ("--model.name", decoder, "--method", METHODS[name], "--lora.alpha", 4, "--steps", 16, *options)
    assert "reloaded by stock PEFT" in done("train", write(LANGUAGE), *words)
    for profile in ("uniform", "merged"):
        done("export", here / "run", "--profile", profile)
    done("evaluate", here / "run")
    ids = torch.tensor([[1, 5, 6, 3]])
    adapter = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(decoder, dtype=dtype), here / "run/adapter"
    )
    merged = AutoModelForCausalLM.from_pretrained(here / "run/merged")
    assert merged.dtype == dtype
    expected, found = adapter(ids).logits.float(), merged(ids).logits.float()
    rounding = 1e-5 if dtype == torch.float32 else 64 * torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected, rtol=0, atol=rounding * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", ["float16", "auto"])
def test_two_half_precisions_are_refused_and_one_is_not(dtype: str, write: Callable[[str], Path], here: Path) -> None:
    decoder = save_decoder(here / "decoder", dtype=torch.float16)
    words = ("--model.name", decoder, "--model.dtype", dtype, "--training.bf16", "true")
    said = refused("train", recipe := write(LANGUAGE), *words)
    assert said == (
        f"training.bf16: the weights of the model are in float16 (model.dtype: {dtype}), and torch does not mix them "
        "with bfloat16; set model.dtype to bfloat16 or float32, or training.bf16 to false"
    )
    assert not (here / "run").exists()
    done("train", recipe, *words, "--model.dtype", "bfloat16", "--dry-run")
    done("train", recipe, *words[:-1], "false", "--dry-run")
