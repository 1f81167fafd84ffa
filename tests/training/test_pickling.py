"""A model with an allocation attached can be pickled and copied, and its copy is a model of its own."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import labelled_batch, logits, tiny_peft

from loralloc import ABLoRA, AdaLoRA, ALLoRA, AutoLoRA, Budget, Truncate, attach
from loralloc.adapter import check
from loralloc.methods.base import Method

STEPS = 8
TWO = Budget(average_rank=2)
BATCHES = [labelled_batch("llama", seed) for seed in (7, 8)]
METHODS: dict[str, Method] = {
    "adalora": AdaLoRA(TWO),
    "ablora": ABLoRA(TWO, BATCHES, warmup=2, interval=2, rounds=2, samples=4),
    "autolora": AutoLoRA(BATCHES),
    "allora": ALLoRA(mode="hybrid", allocate=AdaLoRA(TWO)),
    "truncate": Truncate(TWO),
}


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [pickled, copy.deepcopy])
@pytest.mark.parametrize("name", METHODS)
def test_a_copy_computes_what_the_model_does(name: str, copied: Callable[[Any], Any]) -> None:
    model = tiny_peft("llama", lora_alpha=4).train()
    run = attach(model, METHODS[name], STEPS, compact=name == "adalora")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for step in range(STEPS):
        if step % 3 == 0:
            assert torch.equal(logits(copied(model)), logits(model))
        model.train()(**labelled_batch("llama", step)).loss.backward()
        run.before_step(optimizer)
        optimizer.step()
        run.after_step(optimizer)
        optimizer.zero_grad()
    run.finish()
    assert torch.equal(logits(copied(model)), logits(model))


@pytest.mark.parametrize("copied", [pickled, copy.deepcopy])
def test_a_copy_keeps_an_example_of_its_own(copied: Callable[[Any], Any]) -> None:
    model = tiny_peft("llama").train()
    attach(model, AdaLoRA(TWO), STEPS)
    other = copied(model)
    waiting = len(model._forward_pre_hooks)
    other(**labelled_batch("llama", 0))
    assert len(other._forward_pre_hooks) < waiting == len(model._forward_pre_hooks)
    assert other in check._EXAMPLES
    assert model not in check._EXAMPLES
