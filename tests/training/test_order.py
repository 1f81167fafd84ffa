"""A loop whose calls are missing or in the wrong order is refused, with the right order; an interrupted one goes on."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import labelled_batch, tiny_peft
from torch import nn
from trainers import build
from transformers import TrainerCallback

from loralloc import AdaLoRA, Budget, UserError, attach
from loralloc.training.run import AllocationRun

Step = Callable[[AllocationRun, torch.optim.Optimizer], object]

TWO_RANKS = AdaLoRA(Budget(average_rank=2))
STEPS = 4
ORDER = "backward(), run.before_step(optimizer), optimizer.step(), run.after_step(optimizer), optimizer.zero_grad()"
WITHOUT_BEFORE = (
    "after_step() was called without before_step(): the method would not see the gradients of the step; call in every "
    f"step: {ORDER}"
)
WITHOUT_AFTER = (
    "before_step() was called again, without after_step() in between: the ranks would never be allocated; call in "
    f"every step, skipped ones too: {ORDER}; if the step was interrupted, end it with run.after_step(optimizer) first"
)
NO_GRADIENTS = (
    "nothing that is trained has a gradient in before_step(): the ranks would be allocated without them; call in every "
    f"step: {ORDER}"
)
NO_STEP = (
    "after_step() has not been called after before_step(), so the run has made no step; call in every step: "
    f"{ORDER}; if the step was interrupted, end it with run.after_step(optimizer) first"
)


def backward(model: nn.Module, seed: int = 0) -> None:
    model(**labelled_batch("llama", seed)).loss.backward()


def begun() -> tuple[nn.Module, AllocationRun, torch.optim.Optimizer]:
    model = tiny_peft("llama").train()
    run = attach(model, TWO_RANKS, total_steps=STEPS)
    return model, run, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def in_order(run: AllocationRun, optimizer: torch.optim.Optimizer) -> None:
    run.before_step(optimizer)
    optimizer.step()
    run.after_step(optimizer)
    optimizer.zero_grad()


def zeroed(optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad(set_to_none=False)


LOOPS: dict[str, tuple[Step, str]] = {
    "no before_step": (lambda run, optimizer: (optimizer.step(), run.after_step(optimizer)), WITHOUT_BEFORE),
    "no after_step": (lambda run, optimizer: (run.before_step(optimizer), optimizer.step()), WITHOUT_AFTER),
    "before_step twice": (lambda run, optimizer: [run.before_step(optimizer) for _ in range(2)], WITHOUT_AFTER),
    "after_step twice": (lambda run, optimizer: (in_order(run, optimizer), run.after_step(optimizer)), WITHOUT_BEFORE),
    "cleared first": (lambda run, optimizer: (optimizer.zero_grad(), in_order(run, optimizer)), NO_GRADIENTS),
    "zeroed first": (lambda run, optimizer: (zeroed(optimizer), in_order(run, optimizer)), NO_GRADIENTS),
}


@pytest.mark.parametrize(("step", "words"), LOOPS.values(), ids=LOOPS)
def test_a_call_that_is_missing_or_out_of_order_is_refused_by_the_second_step(step: Step, words: str) -> None:
    model, run, optimizer = begun()

    def two_steps() -> None:
        for seed in range(2):
            backward(model, seed)
            step(run, optimizer)

    with pytest.raises(UserError, match=f"^{re.escape(words)}$"):
        two_steps()
    assert run.step <= 1


def test_a_run_is_not_finished_in_its_first_step() -> None:
    model, run, optimizer = begun()
    backward(model)
    run.before_step(optimizer)
    optimizer.step()
    with pytest.raises(UserError, match=f"^{re.escape(NO_STEP)}$"):
        run.finish()
    run.after_step(optimizer)  # the cure
    assert run.finish().provenance["steps"] == 1


def test_a_later_step_may_be_interrupted() -> None:
    model, run, optimizer = begun()
    backward(model)
    in_order(run, optimizer)
    backward(model)
    run.before_step(optimizer)
    assert run.finish().provenance["steps"] == 1


def test_an_interrupted_step_can_be_ended() -> None:
    model, run, optimizer = begun()
    backward(model)
    run.before_step(optimizer)
    run.after_step(optimizer)
    backward(model)
    in_order(run, optimizer)
    assert run.step == 2


def test_a_later_batch_may_reach_no_adapter() -> None:
    """As one without an image, where a vision tower is adapted."""
    model, run, optimizer = begun()
    backward(model)
    in_order(run, optimizer)
    in_order(run, optimizer)
    assert run.step == 2


def test_a_first_batch_may_reach_a_head_alone() -> None:
    model = tiny_peft("bert", modules_to_save=["classifier"]).train()
    run = attach(model, TWO_RANKS, total_steps=STEPS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(**labelled_batch("bert")).loss.backward()
    for name, parameter in model.named_parameters():
        parameter.grad = None if "lora_" in name else parameter.grad
    in_order(run, optimizer)
    assert run.step == 1


def test_a_run_that_goes_back_forgets_the_step_that_was_interrupted() -> None:
    model, run, optimizer = begun()
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), run.state_dict()))
    backward(model)
    run.before_step(optimizer)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    run.load_state_dict(*saved[2])
    in_order(run, optimizer)
    assert run.step == 1


class Interrupt(TrainerCallback):
    """Ctrl-C between the allocation's two calls, once."""

    def __init__(self) -> None:
        self.left = 1

    def on_pre_optimizer_step(self, *args: object, **kwargs: object) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def test_a_trainer_that_is_interrupted_in_its_first_step_can_be_finished_or_started_again(tmp_path: Path) -> None:
    for again in (False, True):
        trainer, allocation = build(tmp_path / str(again), callbacks=[Interrupt()], max_steps=STEPS)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        if again:
            trainer.train()
            assert allocation.plan is not None
            assert allocation.plan.provenance["steps"] == STEPS
        else:
            assert allocation.run.finish().provenance["steps"] == 0
