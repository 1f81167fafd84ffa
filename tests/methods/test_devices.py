"""Methods on a model that is split over devices (`device_map`): fake tensors have a device and no values."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

from loralloc import ABLoRA, AdaLoRA, ALLoRA, Budget
from loralloc.methods.adalora.state import AdaLoRAState, stacks_of
from loralloc.methods.autolora.hypergradient import inner_product

SPLIT = ("cuda:0", "cuda:1")
RANK = 2
HALF = Budget(average_rank=RANK / 2)


@pytest.fixture(autouse=True)
def nothing_is_computed() -> Iterator[None]:
    with FakeTensorMode(), torch.no_grad():
        yield


class Layer:
    """What methods read of a site."""

    def __init__(self, device: str) -> None:
        self.rank = RANK
        self.gate = self.scale = torch.ones(RANK, device=device)
        self.A, self.B = torch.ones(RANK, 3, device=device), torch.ones(3, RANK, device=device)


def sites() -> list[Any]:
    """A layer on each device."""
    return [Layer(device) for device in SPLIT]


def test_tensors_of_two_devices_meet_nowhere_by_themselves() -> None:
    """The positive partner."""
    with pytest.raises(RuntimeError, match="device"):
        torch.cat([site.gate for site in sites()])


def test_adalora_scores_all_triplets_together() -> None:
    split = sites()
    state = AdaLoRAState(split, stacks_of(split), modules=None)  # type: ignore[arg-type]
    scores = AdaLoRA(HALF)._scores(state)
    assert (scores.shape, str(scores.device)) == ((len(SPLIT) * RANK,), SPLIT[0])


def test_allora_keeps_what_is_open() -> None:
    state: Any = SimpleNamespace(sites=sites())
    assert ALLoRA().finish(state, target=0).shape == (len(SPLIT) * RANK,)


def test_ablora_scores_by_gates() -> None:
    state: Any = SimpleNamespace(sites=sites(), open=torch.ones(len(SPLIT) * RANK, dtype=torch.bool))
    now: Any = None
    scores, _ = ABLoRA(HALF, [{}], score="gate")._scores(state, now, 0)
    assert (scores.shape, scores.device.type) == ((len(SPLIT) * RANK,), "cpu")


def test_autolora_multiplies_gradients_of_all_weights() -> None:
    of_weights = [site.A for site in sites()]
    assert str(inner_product(of_weights, of_weights).device) == SPLIT[0]
