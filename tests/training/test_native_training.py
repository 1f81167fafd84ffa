"""Trainings with the kernel in C++ are those with the kernel in Python up to rounding, second derivatives included."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models import labelled_batch, lora_config, tiny_bert
from peft import get_peft_model
from torch import Tensor

from loralloc import ABLoRA, AdaLoRA, ALLoRA, AutoLoRA, Budget, attach
from loralloc.methods.base import Method

pytestmark = pytest.mark.slow

STEPS = 8
METHODS: dict[str, Callable[[], Method]] = {
    "adalora": lambda: AdaLoRA(Budget(average_rank=2), warmup=1, cooldown=2, interval=1),
    "ablora": lambda: ABLoRA(Budget(average_rank=2), [labelled_batch("bert")], rounds=2),
    "autolora": lambda: AutoLoRA(validation=[labelled_batch("bert")], mode="exact"),
    "allora": lambda: ALLoRA(mode="hybrid"),
}


def trained(method: Method) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Trained weights, and the rank of every module."""
    torch.manual_seed(0)
    alpha = 4 if isinstance(method, ALLoRA) else 8
    model = get_peft_model(tiny_bert(), lora_config("bert", r=4, lora_alpha=alpha))
    run = attach(model, method, total_steps=STEPS)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(STEPS):
        model(**labelled_batch("bert")).loss.backward()
        run.before_step(optimizer)
        optimizer.step()
        run.after_step(optimizer)
        optimizer.zero_grad()
    ranks = dict(run.finish().ranks)
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}, ranks


@pytest.mark.parametrize("name", METHODS)
def test_a_training_is_the_same_with_either_kernel(
    name: str, built_kernel: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def counted(*arguments: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return built_kernel(*arguments)

    in_python, ranks = trained(METHODS[name]())
    monkeypatch.setattr("loralloc.native.loaded", lambda: counted)
    in_cpp, same = trained(METHODS[name]())
    assert calls >= STEPS
    assert same == ranks
    torch.testing.assert_close(in_cpp, in_python, rtol=1e-4, atol=1e-6)
