"""What a run asks of the optimizer. That it must hold the gates is tested in loops (test_callback_refusals.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from models import labelled_batch, tiny_peft

from loralloc import ABLoRA, AdaLoRA, ALLoRA, Budget, Truncate, UserError, attach
from loralloc.gating import attach_gates
from loralloc.training.optimizer import learning_rate


@pytest.mark.parametrize(("frozen", "expected"), [(None, 0.1), ("A", 0.2), ("B", 0.1)])
def test_the_rate_is_that_of_a_or_where_it_is_frozen_of_b(frozen: str | None, expected: float) -> None:
    """Groups may differ, as with LoRA+, and stand in any order."""
    sites = attach_gates(tiny_peft("llama"))
    groups = [
        {"params": [getattr(site, factor) for site in sites], "lr": rate}
        for factor, rate in (("B", 0.2), ("A", 0.1))
        if factor != frozen
    ]
    assert learning_rate(torch.optim.SGD(groups, lr=1.0), sites) == expected
    assert learning_rate(None, sites) is None
    assert learning_rate(torch.optim.SGD([torch.ones(1)], lr=1.0), sites) is None


# ---- Optimizers whose memory of ranks cannot be cleared or started anew ----


class Custom(torch.optim.Optimizer):
    """An optimizer of another library: what it remembers is named by its tests."""

    def __init__(self, parameters: Any, lr: float, remembers: Callable[[torch.Tensor, int], dict[str, Any]]) -> None:
        super().__init__(parameters, {"lr": lr, "betas": (0.9, 0.99), "k": 7})
        self.remembers, self.counts, self.calls = remembers, False, 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.calls += 1
        for group in self.param_groups:
            group["k"] += self.counts
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.state[parameter].update(self.remembers(parameter, self.calls))
                    parameter -= group["lr"] * parameter.grad.sign()


class MyAdamW(torch.optim.AdamW):
    """A subclass may do anything."""


Made = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]


def custom(remembers: Callable[[torch.Tensor, int], dict[str, Any]], counts: bool = False) -> Made:
    def build(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        made = Custom(parameters, 0.01, remembers)
        made.counts = counts
        return made

    return build


UNFIT: dict[str, tuple[Made, str]] = {
    "ASGD": (lambda p: torch.optim.ASGD(p), "its update of a new rank is not known"),
    "Rprop": (lambda p: torch.optim.Rprop(p), "its update of a new rank is not known"),
    "Adafactor": (lambda p: torch.optim.Adafactor(p), "its update of a new rank is not known"),
    "SGD": (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, dampening=0.5), "dampening=0.5 is skipped for a parameter"),
    "Adagrad": (lambda p: torch.optim.Adagrad(p, lr_decay=0.1), "lr_decay=0.1 follows the steps of a whole parameter"),
    "Adagrad, filled": (
        lambda p: torch.optim.Adagrad(p, initial_accumulator_value=0.1),
        "initial_accumulator_value=0.1, but a new rank's sum starts at 0",
    ),
}
UNFIT_BY_STATE: dict[str, tuple[Made, str]] = {
    "Adafactor": (
        lambda p: transformers.Adafactor(p, lr=1e-3, relative_step=False),
        r'Adafactor does not fit .* "(step|RMS)" in its state is one number for all ranks of a layer',
    ),
    "MyAdamW": (lambda p: MyAdamW(p), 'MyAdamW does not fit .* "step" in its state is one number for all ranks'),
    "factored": (
        custom(lambda p, _: {"row": torch.ones(*p.shape[:-1], 1, 1)}),
        '"row" in its state is shared by ranks',
    ),
    "counting": (custom(lambda p, _: {"m": torch.ones_like(p)}, counts=True), '"k" in its groups counts steps'),
    "8 bit": (
        custom(lambda p, _: {"m": torch.ones_like(p, dtype=torch.uint8)}),
        "Custom keeps its moments in torch.uint8, where those of closed ranks cannot be cleared; use an optimizer in",
    ),
}
FIT: dict[str, Made] = {
    "AdamW": lambda p: torch.optim.AdamW(p),
    "SGD": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "Adagrad": lambda p: torch.optim.Adagrad(p),
    "like Lion": custom(lambda p, _: {"exp_avg": torch.ones_like(p)}),
    "without a state": custom(lambda p, _: {}),
}
GROWING = ABLoRA(Budget(average_rank=2), score="sensitivity", warmup=3, interval=1, rounds=1)
PRUNING = AdaLoRA(Budget(average_rank=2), warmup=2, cooldown=4)


def loop(build: Made, method: Any, steps: int) -> torch.optim.Optimizer:
    """Steps of a loop in which ranks come or go after the last."""
    model = tiny_peft("llama").train()
    run = attach(model, method, 12)
    optimizer = build([p for p in model.parameters() if p.requires_grad])
    for step in range(steps):
        model(**labelled_batch("llama", step)).loss.backward()
        run.before_step(optimizer)
        optimizer.step()
        run.after_step(optimizer)
        optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("name", UNFIT)
@pytest.mark.parametrize("around", [False, True], ids=["", "in ALLoRA"])
def test_torchs_own_are_refused_before_the_first_step(name: str, around: bool) -> None:
    build, message = UNFIT[name]
    method = ALLoRA(mode="post", allocate=GROWING) if around else GROWING
    model = tiny_peft("llama", lora_alpha=2)
    run = attach(model, method, 12)
    optimizer = build([p for p in model.parameters() if p.requires_grad])
    kind = type(optimizer).__name__
    cure = r'use torch.optim.AdamW \(optim="adamw_torch" in a Trainer\) or .*: Adadelta, .*SGD; or a method .* AdaLoRA'
    with pytest.raises(UserError, match=f"{kind} does not fit a method that opens ranks .*: {message}.*; {cure}"):
        run.check_optimizer(optimizer)


@pytest.mark.parametrize("name", UNFIT_BY_STATE)
def test_others_are_refused_as_soon_as_they_show_what_they_remember(name: str) -> None:
    build, message = UNFIT_BY_STATE[name]
    loop(build, GROWING, 0)
    with pytest.raises(UserError, match=message):
        loop(build, GROWING, 2)


@pytest.mark.parametrize("name", FIT)
def test_the_cures_and_what_shows_nothing_amiss_go_on_to_the_round(name: str) -> None:
    loop(FIT[name], GROWING, 4)


@pytest.mark.parametrize("name", [name for name in UNFIT_BY_STATE if name != "8 bit"])
def test_a_method_that_opens_no_ranks_takes_them_all(name: str) -> None:
    """The other cure."""
    loop(UNFIT_BY_STATE[name][0], PRUNING, 9)


def test_a_method_that_closes_ranks_cannot_do_with_moments_in_eight_bits_and_says_so_at_once() -> None:
    with pytest.raises(UserError, match=r'torch.uint8.*in full precision, such as torch.optim.AdamW \(optim="adamw'):
        loop(UNFIT_BY_STATE["8 bit"][0], PRUNING, 1)
    loop(UNFIT_BY_STATE["8 bit"][0], Truncate(Budget(average_rank=2)), 2)  # nothing is closed while it trains
