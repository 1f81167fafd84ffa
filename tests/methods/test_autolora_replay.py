"""AutoLoRA computes a step again: what does not come back is refused, and the mode that needs no such thing works."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from autolora_loop import HELD_OUT, Loop, batch, net
from torch import Tensor, nn

from loralloc import AutoLoRA, UserError

REPLAYING = ("fast", "paper", "exact", "reference")
modes = pytest.mark.parametrize("mode", REPLAYING)

Term = Callable[[Loop], Any]


def weights(loop: Loop, part: str = "") -> list[Tensor]:
    return [p for n, p in loop.model.named_parameters() if p.requires_grad and "gate" not in n and part in n]


TERMS: dict[str, tuple[Term, int]] = {
    "weights": (lambda loop: 1e-2 * sum(w.square().sum() for w in weights(loop)), 1),
    "B, which is 0 at first": (lambda loop: sum(w.square().sum() for w in weights(loop, "lora_B")), 2),
    "warmed up": (lambda loop: loop.run.step * 1e-2 * sum(w.square().sum() for w in weights(loop)), 2),
    "late": (lambda loop: (loop.run.step > 2) * sum(w.square().sum() for w in weights(loop)), 4),
    "gates": (lambda loop: 1e-2 * sum(((site.gate * site.A.T) ** 2).sum() for site in loop.run.sites), 1),
    "another output": (lambda loop: loop.model.base_model.model.first(batch(loop.run.step)["x"]).square().mean(), 1),  # type: ignore[union-attr]
}
"""What a loop may add to the model's loss, and the step in which it shows."""


def backward(loop: Loop, term: Term, parts: int = 1) -> None:
    loop.optimizer.zero_grad()
    for _ in range(parts):
        (loop.model(**batch(loop.run.step)).loss / parts).backward()
    extra = term(loop)
    if isinstance(extra, Tensor):
        extra.backward()


def walk(loop: Loop, term: Term, steps: int) -> None:
    for _ in range(steps):
        backward(loop, term)
        loop.update()


@modes
@pytest.mark.parametrize("name", TERMS)
def test_a_loss_that_is_not_the_models_own_is_refused_as_soon_as_it_shows(mode: str, name: str) -> None:
    term, step = TERMS[name]
    loop = Loop(mode)
    walk(loop, term, step - 1)
    with pytest.raises(
        UserError, match=rf'mode="{mode}" .* off from the one .* by .* of its length.* mode="first_order"'
    ):
        walk(loop, term, 1)
    assert loop.run.step == loop.state.updates == step - 1


@pytest.mark.parametrize("name", TERMS)
def test_the_first_order_takes_any_loss(name: str) -> None:
    """The cure: the step is the loop's own, and the selection variables learn from validation data alone."""
    term, _ = TERMS[name]
    loop = Loop("first_order", logit_learning_rate=0.1)
    for _ in range(5):
        backward(loop, term)
        own = weights(loop)
        expected = [w.detach() - 0.1 * (0 if w.grad is None else w.grad) for w in own]
        loop.update()
        torch.testing.assert_close([w.detach() for w in own], expected)
    assert loop.state.updates == 5
    assert loop.state.logits.std() > 0.01


@modes
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("norm", [None, 0.05, 1e3])
def test_what_loops_do_to_the_models_own_loss_is_taken(mode: str, parts: int, norm: float | None) -> None:
    loop = Loop(mode, net(dropout=0.2))
    loop.run.max_grad_norm = norm
    for _ in range(4):
        backward(loop, lambda loop: None, parts)
        if norm is not None:
            nn.utils.clip_grad_norm_(loop.model.parameters(), norm)
        loop.update()
    assert loop.state.updates == 4


@modes
@pytest.mark.parametrize("told", [False, True])
def test_clipping_has_to_be_told_where_gradients_are_replaced(mode: str, told: bool) -> None:
    """What `fast` uses of the step is not clipped."""
    loop = Loop(mode)
    backward(loop, lambda loop: None)
    nn.utils.clip_grad_norm_(loop.model.parameters(), 0.05)
    loop.run.max_grad_norm = 0.05 if told else None
    if told or mode == "fast":
        loop.update()
        return
    with pytest.raises(
        UserError, match=r"has 0.\d+ times that gradient, where .*None would leave 1 times. Set run.max_gr"
    ):
        loop.update()


def test_a_norm_that_the_loop_does_not_clip_to_is_no_norm() -> None:
    loop = Loop("paper")
    loop.run.max_grad_norm = 0.05
    backward(loop, lambda loop: None)
    with pytest.raises(UserError, match=r"has 1 times that gradient, where max_grad_norm=0.05 would leave 0.\d+ times"):
        loop.update()


@modes
def test_random_numbers_that_torch_does_not_draw_are_refused(mode: str) -> None:
    """Their partner, dropout, is among what is taken."""
    loop, draws = Loop(mode), iter(range(99))
    loop.model.base_model.model.dropout.forward = lambda x: x * (1 + next(draws) % 2)  # type: ignore[union-attr]
    backward(loop, lambda loop: None)
    with pytest.raises(UserError, match="draws random numbers outside of torch"):
        loop.update()


@modes
def test_a_step_without_gradients_is_not_the_one_that_counts(mode: str) -> None:
    loop = Loop(mode)
    loop.optimizer.zero_grad()
    (0 * loop.model(**batch(0)).loss).backward()
    loop.update()
    assert loop.state.steps == 0
    with pytest.raises(UserError, match="off from the one that the training loop has"):
        walk(loop, TERMS["weights"][0], 1)


@modes
def test_a_resumed_run_looks_at_its_first_step(mode: str) -> None:
    first, second = Loop(mode).walk(5), Loop(mode)
    second.model.load_state_dict(first.model.state_dict())
    tensors, numbers = first.run.state_dict()
    second.run.load_state_dict(tensors, json.loads(json.dumps(numbers)))
    walk(first, TERMS["weights"][0], 1)  # its sixth step is none that is compared
    with pytest.raises(UserError, match="off from the one that the training loop has"):
        walk(second, TERMS["weights"][0], 1)


def test_a_settled_search_computes_nothing_again() -> None:
    loop = Loop(method=AutoLoRA(HELD_OUT, check_every=1, patience=1, logit_learning_rate=1e-12)).walk(2)
    assert loop.run.settled
    walk(loop, TERMS["weights"][0], 3)


def test_what_another_process_has_found_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process may go on alone."""
    monkeypatch.setattr("loralloc.methods.autolora.replay.any_process", lambda flag: True)
    with pytest.raises(UserError, match="on another process the gradient does not come back: see its message"):
        Loop().walk(1)
