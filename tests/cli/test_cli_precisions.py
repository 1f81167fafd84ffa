"""The command line ends with an adapter in every precision and with every method."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from .command import done

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
PRECISIONS = {"bf16 autocast": ("--training.bf16", "true"), "bf16 weights": ("--model.dtype", "bfloat16")}


@pytest.fixture(autouse=True)
def one_precision_a_test() -> Iterator[None]:
    """accelerate keeps one precision a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("unreported")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", METHODS)
def test_a_run_ends_with_an_adapter(name: str, precision: str, recipe: Path, here: Path, encoder: Path) -> None:
    words = ("--method", METHODS[name], "--lora.alpha", 4, "--steps", 16, *PRECISIONS[precision])
    assert "reloaded by stock PEFT" in done("train", recipe, *words)
    for profile in ("uniform", "merged"):
        done("export", here / "run", "--profile", profile)
    dtype = torch.bfloat16 if precision == "bf16 weights" else torch.float32
    base = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2, dtype=dtype)
    adapter = PeftModel.from_pretrained(base, here / "run" / "adapter")
    assert adapter(input_ids=torch.tensor([[2, 5, 6, 3]])).logits.isfinite().all()
