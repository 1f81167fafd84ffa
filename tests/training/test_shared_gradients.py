"""Whether an adapter is shared is decided when its model is first trained, not when it is attached."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import labelled_batch, tiny_peft
from torch import Tensor

from loralloc import AdaLoRA, Budget, attach
from loralloc.training import shared_gradients


@pytest.fixture
def agreed(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What has been agreed on with the other processes, of which there are none."""
    found: list[Tensor] = []
    monkeypatch.setattr(shared_gradients, "agree", lambda tensor: found.append(tensor) or tensor)
    monkeypatch.setattr(shared_gradients, "check_sharding", lambda model: None)
    return found


def now_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second process joins, and the base model is sharded."""
    monkeypatch.setattr(shared_gradients, "world_size", lambda: 2)
    monkeypatch.setattr(shared_gradients, "is_sharded", lambda model: True)


def attached() -> Any:
    model = tiny_peft("llama").train()
    attach(model, AdaLoRA(Budget(average_rank=2)), total_steps=8)
    return model


def test_processes_may_join_after_attaching(agreed: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    model = attached()
    now_sharded(monkeypatch)
    for _ in range(2):
        model(**labelled_batch("llama", 0))
    assert len(agreed) == len([p for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("several", [False, True])
def test_looking_at_data_before_is_no_training(
    several: bool, agreed: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = attached()
    if several:
        monkeypatch.setattr(shared_gradients, "world_size", lambda: 2)
    model.eval()
    model(**labelled_batch("llama", 0))
    with torch.no_grad():
        model.train()(**labelled_batch("llama", 0))
    now_sharded(monkeypatch)
    model(**labelled_batch("llama", 0))
    assert agreed


@pytest.mark.parametrize("several", [False, True])
def test_a_model_that_is_trained_as_it_is_is_looked_at_once(several: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = attached()
    if several:
        monkeypatch.setattr(shared_gradients, "world_size", lambda: 2)
    before = len(model._forward_pre_hooks)
    model(**labelled_batch("llama", 0))
    assert len(model._forward_pre_hooks) == before - 2, "the hook that keeps an example has ended too"
