"""PEFT's own optimizers, which look at the names and shapes of an adapter's parameters: gates are among them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import labelled_batch, tiny_peft
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer

from loralloc import ABLoRA, AdaLoRA, ALLoRA, Budget, RankPlan, Truncate, Uniform, UserError, attach
from loralloc.methods.base import Method

HALF = Budget(average_rank=2)
STEPS = 8
GROWING = ABLoRA(HALF, warmup=2, interval=1, rounds=1, score="sensitivity")
CURE = re.escape(
    "use torch.optim.AdamW; to train B alone, as LoRA-FA does, freeze A after attaching: "
    "[site.A.requires_grad_(False) for site in run.sites]"
)


def lora_fa(model: Any) -> torch.optim.Optimizer:
    return create_lorafa_optimizer(model, r=4, lora_alpha=4, lr=0.01)


def train(method: Method, build: Callable[[Any], Any] | None = None) -> RankPlan:
    """A run with LoRA-FA's optimizer, built before attaching, or with what `build` makes of the attached model."""
    model = tiny_peft("llama", lora_alpha=4).train()
    early = [lora_fa(model)] if build is None else []
    run = attach(model, method, total_steps=STEPS)
    optimizer = early[0] if build is None else build(model)
    for step in range(STEPS):
        model(**labelled_batch("llama", step)).loss.backward()
        run.before_step(optimizer)
        optimizer.step()
        run.after_step(optimizer)
        optimizer.zero_grad()
    return run.finish()


@pytest.mark.parametrize("method", [AdaLoRA(HALF), Uniform(HALF), Truncate(HALF)], ids=lambda method: method.id)
def test_lora_fa_is_refused_where_it_would_pair_a_gate_with_a_factor(method: Method) -> None:
    """It ended with a TypeError of its own."""
    with pytest.raises(UserError, match=rf"^LoraFAOptimizer of PEFT takes .* two at a time, .* are a third; {CURE}$"):
        train(method, lora_fa)


def test_lora_fa_is_refused_at_once_where_gates_are_trained() -> None:
    with pytest.raises(UserError, match=r"^LoraFAOptimizer of PEFT takes .* are a third;"):
        train(AdaLoRA(HALF))


@pytest.mark.parametrize("method", [Truncate(HALF), GROWING], ids=lambda method: method.id)
def test_lora_fa_is_refused_where_ranks_start_anew(method: Method) -> None:
    """Their moments were kept: it has them under names, where nobody looked."""
    with pytest.raises(UserError, match=rf"^LoraFAOptimizer keeps its state by names .* would not be found; {CURE}$"):
        train(method)


@pytest.mark.parametrize("method", [Uniform(HALF), ALLoRA(mode="hybrid")], ids=lambda method: method.id)
def test_lora_fa_trains_ranks_that_stay_as_they_are(method: Method) -> None:
    assert train(method).provenance["steps"] == STEPS


@pytest.mark.parametrize(
    "method", [AdaLoRA(HALF), Uniform(HALF), Truncate(HALF), GROWING], ids=lambda method: method.id
)
def test_b_alone_is_trained_as_the_messages_say(method: Method) -> None:
    def adamw(model: Any) -> torch.optim.Optimizer:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and "lora_A" not in name)
        return torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.01)

    assert train(method, adamw).total_rank == 12


def test_lora_plus_trains_gates_at_the_rate_of_b() -> None:
    """As docs/faq.md says; with methods that take the adapter's rate, that of A counts."""
    rates: dict[str, set[float]] = {}

    def plus(model: Any) -> torch.optim.Optimizer:
        optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=0.001, loraplus_lr_ratio=16)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                kind = re.search(r"lora_(A|B|gate)", names[id(parameter)])
                assert kind is not None
                rates.setdefault(kind[1], set()).add(group["lr"])
        return optimizer

    assert train(AdaLoRA(HALF), plus).total_rank == 12
    assert rates == {"A": {0.001}, "B": {0.016}, "gate": {0.016}}
