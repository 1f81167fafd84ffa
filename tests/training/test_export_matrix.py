"""Whatever trained can be exported: every method, in every precision, in every loop, in every profile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset
from models import labelled_batch, tiny_llama, tiny_peft, token_batch
from peft import PeftModel
from test_sft import DATA, phrases, quiet_datasets, word_tokenizer  # noqa: F401
from torch import Tensor, nn
from trainers import build, sentences
from transformers import LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from loralloc import (
    ABLoRA,
    AdaLoRA,
    ALLoRA,
    AutoLoRA,
    Budget,
    DepthLinear,
    Random,
    RankAllocation,
    Truncate,
    Uniform,
    attach,
    export_adapter,
)
from loralloc.adapter.export import PROFILES
from loralloc.methods.base import Method

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:ALLoRA.*AdamW")]

STEPS = 6
HALF = Budget(average_rank=2)
METHODS: Mapping[str, Callable[[Any], Method]] = {
    "adalora": lambda held: AdaLoRA(HALF),
    "ablora": lambda held: ABLoRA(HALF, held, warmup=2, interval=1, rounds=2),
    "autolora": lambda held: AutoLoRA(held, budget=HALF),
    "autolora, paper": lambda held: AutoLoRA(held, budget=HALF, mode="paper"),
    "allora": lambda held: ALLoRA(),
    "allora with adalora": lambda held: ALLoRA(mode="hybrid", allocate=AdaLoRA(HALF)),
    "uniform": lambda held: Uniform(HALF),
    "random": lambda held: Random(HALF),
    "depth_linear": lambda held: DepthLinear(HALF),
    "truncate": lambda held: Truncate(HALF),
}
PRECISIONS = ("fp32", "bf16 autocast", "fp16 autocast", "bf16 weights", "bf16 weights, bf16 autocast", "fp16 weights")
DTYPES = {"bf16 weights": torch.bfloat16, "bf16 weights, bf16 autocast": torch.bfloat16, "fp16 weights": torch.float16}


@pytest.fixture(autouse=True)
def one_precision_a_test() -> Iterator[None]:
    """accelerate keeps one precision a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def in_trainer(model: PeftModel, make: Callable[[Any], Method], precision: str, folder: Path) -> None:
    method = make(sentences(16, seed=7))
    build(folder, model=model, method=method, max_steps=STEPS, bf16=precision.endswith("bf16 autocast"))[0].train()


def in_sft_trainer(model: PeftModel, make: Callable[[Any], Method], precision: str, folder: Path) -> None:
    tokenizer = word_tokenizer()
    held = Dataset.from_list([dict(tokenizer(text, return_token_type_ids=False)) for text in phrases(16, seed=5)])
    SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(folder),
            use_cpu=True,
            bf16=precision.endswith("bf16 autocast"),
            report_to=[],
            max_steps=STEPS,
            learning_rate=1e-2,
            max_length=32,
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=DATA["text"](),
        processing_class=tokenizer,
        callbacks=[RankAllocation(make(held))],
    ).train()


def in_a_loop(model: PeftModel, make: Callable[[Any], Method], precision: str, folder: Path) -> None:
    """accelerate's loop; it has no fp16 on CPUs, torch's autocast has."""
    del folder
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if precision.endswith("bf16 autocast") else "no")
    run = attach(model.train(), make([labelled_batch("llama", seed) for seed in (8, 9)]), total_steps=STEPS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    for step in range(STEPS):
        half = precision == "fp16 autocast"
        with torch.autocast("cpu", dtype=torch.float16) if half else nullcontext():
            loss = prepared(**labelled_batch("llama", step)).loss
        accelerator.backward(loss)
        run.before_step(optimizer)
        optimizer.step()
        run.after_step(optimizer)
        optimizer.zero_grad()
    run.finish()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return type(model.eval()).forward(model, **token_batch()).logits.float()


@pytest.mark.parametrize("train", [in_trainer, in_sft_trainer, in_a_loop])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", METHODS)
def test_a_run_ends_with_an_adapter(name: str, precision: str, train: Any, tmp_path: Path) -> None:
    if precision == "fp16 autocast" and train is not in_a_loop:
        pytest.skip("transformers and accelerate have no fp16 on CPUs")
    dtype = DTYPES.get(precision, torch.float32)
    model = tiny_peft("llama", lora_alpha=4, dtype=dtype)
    before = logits(model)
    train(model, METHODS[name], precision, tmp_path / "run")
    trained = logits(model)  # as the class computes it, without what was put around it
    assert (trained - before).abs().max() > 1e-2
    rounding = 1e-5 if dtype == torch.float32 else 0.05
    for profile in PROFILES:
        export = export_adapter(model, tmp_path / profile, profile)
        if profile == "merged":
            stock: nn.Module = LlamaForCausalLM.from_pretrained(export.path, dtype=dtype)
        else:
            stock = PeftModel.from_pretrained(tiny_llama(dtype=dtype), export.path)
        torch.testing.assert_close(logits(stock), trained, rtol=0, atol=rounding * float(trained.abs().max()))
