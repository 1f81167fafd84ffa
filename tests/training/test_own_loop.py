"""A loop of one's own: which optimizer it has, what counts as a step, and where it ends."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState
from models import labelled_batch, tiny_peft
from peft import PeftModel
from torch import Tensor, nn

from loralloc import ABLoRA, AdaLoRA, AutoLoRA, Budget, UserError, attach, export_adapter
from loralloc.methods.base import Method
from loralloc.training.run import AllocationRun

TWO_RANKS = AdaLoRA(Budget(average_rank=2))
DATA = [labelled_batch("llama", seed) for seed in range(2)]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def step(model: nn.Module, run: AllocationRun, optimizer: torch.optim.Optimizer, shown: bool = True) -> None:
    model(**DATA[0]).loss.backward()
    run.before_step(*([optimizer] if shown else []))
    optimizer.step()
    run.after_step(*([optimizer] if shown else []))
    optimizer.zero_grad()


def test_an_optimizer_built_before_attach_is_refused_as_soon_as_it_is_shown() -> None:
    model = tiny_peft("llama").train()
    early = optimizer_of(model)
    run = attach(model, TWO_RANKS, total_steps=5)
    with pytest.raises(UserError, match=r"does not hold the gates of 6 modules .*build it after attach\(\)"):
        step(model, run, early)
    model.zero_grad()
    step(model, run, optimizer_of(model))  # the cure


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", [TWO_RANKS, AdaLoRA(TWO_RANKS.budget, importance="sensitivity")])
def test_a_model_may_be_cast_after_attach(method: Method, dtype: torch.dtype) -> None:
    """A Trainer does so with bf16_full_eval, where it evaluates before it trains."""
    model = tiny_peft("llama").train()
    run = attach(model, method, total_steps=8)
    optimizer = optimizer_of(model.to(dtype))
    for _ in range(8):
        step(model, run, optimizer)
    assert run.finish().total_rank == 12


@pytest.mark.parametrize("steps", [4, 30])
def test_an_optimizer_that_is_never_shown_is_noticed_by_what_it_does(steps: int) -> None:
    model = tiny_peft("llama").train()
    early = optimizer_of(model)
    run = attach(model, TWO_RANKS, total_steps=steps)

    def whole_run() -> None:
        for _ in range(steps):
            step(model, run, early, shown=False)
        run.finish()

    with pytest.raises(UserError, match="the gates do not move although they have gradients"):
        whole_run()
    assert run.step <= 10


def test_one_that_is_built_after_attach_needs_not_be_shown() -> None:
    model = tiny_peft("llama").train()
    run = attach(model, TWO_RANKS, total_steps=4)
    optimizer = optimizer_of(model)
    for _ in range(4):
        step(model, run, optimizer, shown=False)
    assert run.finish().total_rank == 12


def test_the_run_ends_where_it_was_planned_to() -> None:
    model = tiny_peft("llama").train()
    run = attach(model, TWO_RANKS, total_steps=4)
    optimizer = optimizer_of(model)
    for _ in range(4):
        step(model, run, optimizer)
    with pytest.raises(UserError, match=r"planned for 4 optimizer steps, and they have been made: finish\(\) it"):
        step(model, run, optimizer)
    assert run.finish().total_rank == 12


# ---- accelerate ----


def accelerated(method: Method, mixed_precision: str = "no") -> tuple[PeftModel, AllocationRun]:
    """The README's loop under accelerate: 16 micro-batches, 4 of them a step."""
    _forget_accelerate()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4, mixed_precision=mixed_precision)
    model = tiny_peft("llama").train()
    run = attach(model, method, total_steps=4)
    prepared, optimizer = accelerator.prepare(model, optimizer_of(model))
    stepped = []
    for index in range(16):
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(**DATA[index % 2]).loss)
            run.before_step(optimizer)
            optimizer.step()
            run.after_step(optimizer)
            optimizer.zero_grad()
        stepped.append(run.step)
    assert stepped == [index // 4 for index in range(1, 17)]
    _forget_accelerate()
    return model, run


def _forget_accelerate() -> None:
    """Drop the one precision of the process, and the data loader in which an interrupted training has stopped."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


METHODS: dict[str, Method] = {
    "adalora": TWO_RANKS,
    "ablora": ABLoRA(Budget(average_rank=2), DATA, warmup=2, interval=1, rounds=1),
    "autolora": AutoLoRA(DATA, budget=Budget(average_rank=2)),
}


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
@pytest.mark.parametrize("name", METHODS)
def test_micro_batches_are_no_steps(name: str, mixed_precision: str, tmp_path: Path) -> None:
    model, run = accelerated(METHODS[name], mixed_precision)
    assert run.finish().total_rank == 12
    assert export_adapter(model, tmp_path / "adapter").difference < 1e-4


def test_accumulated_gradients_are_those_of_one_batch() -> None:
    """The mean over four micro-batches, two of each kind, is the mean over both kinds."""
    torch.manual_seed(0)
    _, run = accelerated(TWO_RANKS)
    torch.manual_seed(0)
    model = tiny_peft("llama").train()
    whole = attach(model, TWO_RANKS, total_steps=4)
    optimizer = optimizer_of(model)
    for _ in range(4):
        (sum(model(**batch).loss for batch in DATA) / 2).backward()
        whole.before_step(optimizer)
        optimizer.step()
        whole.after_step(optimizer)
        optimizer.zero_grad()
    for mine, theirs in zip(run.sites, whole.sites, strict=True):
        torch.testing.assert_close(mine.B, theirs.B, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(mine.gate, theirs.gate, rtol=1e-4, atol=1e-6)


class Scaled(AcceleratedOptimizer):
    """accelerate's optimizer with a loss scaler, which it makes on GPUs only."""

    def __init__(self, optimizer: torch.optim.Optimizer, scaler: Any) -> None:
        Accelerator(cpu=True)
        super().__init__(optimizer, device_placement=False, scaler=scaler)


def test_gradients_that_are_still_scaled_are_refused() -> None:
    model = tiny_peft("llama").train()
    run = attach(model, TWO_RANKS, total_steps=4)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    inner = optimizer_of(model)
    optimizer = Scaled(inner, scaler)
    scaler.scale(model(**DATA[0]).loss).backward()
    with pytest.raises(UserError, match=r"the factor of the fp16 loss scaler; call accelerator.unscale_gradients"):
        run.before_step(optimizer)
    scaler.unscale_(inner)  # what accelerator.unscale_gradients() does
    assert run.before_step(optimizer)


def test_a_merged_adapter_is_unmerged_before_the_run_is_finished() -> None:
    """The gates would be folded, and another update subtracted from the base weights than was added."""
    model = tiny_peft("llama").train()
    run, base = attach(model, TWO_RANKS, total_steps=8), base_weights(model)
    optimizer = optimizer_of(model)
    for _ in range(5):
        step(model, run, optimizer)
    model.merge_adapter()
    words = "the adapter is merged into the base weights; call model.unmerge_adapter() before finish()"
    with pytest.raises(UserError, match=f"^{re.escape(words)}$"):
        run.finish()
    model.unmerge_adapter()
    run.finish()
    for name, weight in base_weights(model).items():
        torch.testing.assert_close(weight, base[name], rtol=1e-5, atol=1e-6)


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in model.state_dict().items() if "base_layer" in name}
