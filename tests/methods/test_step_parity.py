"""One learning rate serves every method: with its defaults, its first steps go as far as plain LoRA's.

A new method is a new row of `DEFAULTS`. ALLoRA's modes for Adam are none: their first step is η times LoRA's by
definition. tests/methods/test_adalora_parity.py has the same for AdaLoRA layer by layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from parity import first_steps
from torch import Tensor

from loralloc import ABLoRA, AdaLoRA, ALLoRA, AutoLoRA, Budget, DepthLinear, Random, Truncate, Uniform
from loralloc.methods.base import Method

pytestmark = pytest.mark.filterwarnings("ignore:ALLoRA.*AdamW")

PARITY_LAYERS = [(32, 32), (48, 96), (96, 48)]
UNSEEN = [{}]  # stands for batches of the draw, see parity.py
DEFAULTS: Mapping[str, Method] = {
    "adalora": AdaLoRA(Budget(fraction=0.5)),
    "ablora": ABLoRA(Budget(fraction=0.5), score="sensitivity"),  # no score matters before the first round
    "allora": ALLoRA(),
    "allora-adalora": ALLoRA(allocate=AdaLoRA(Budget(fraction=0.5))),
    "autolora": AutoLoRA(UNSEEN),
    "uniform": Uniform(Budget(fraction=0.5)),
    "random": Random(Budget(fraction=0.5)),
    "depth_linear": DepthLinear(Budget(fraction=0.5)),
    "truncate": Truncate(Budget(fraction=0.5)),
}


def small_adam(parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-4)


def distance(method: Method | None) -> Tensor:
    """‖ΔW‖ of all layers together after 1, 3 and 10 steps of Adam, in the root mean square over draws."""
    draws = [first_steps(PARITY_LAYERS, 8, method, small_adam, (1, 3, 10), seed, scaling=1.0) for seed in range(3)]
    return torch.stack(draws).square().sum(-1).mean(0).sqrt()


@pytest.mark.parametrize("name", DEFAULTS)
def test_the_first_steps_go_as_far_as_loras_at_its_learning_rate(name):
    ratio = distance(DEFAULTS[name]) / distance(None)
    assert ratio.min() > 0.5
    assert ratio.max() < 2.0


@pytest.mark.parametrize(
    "method", [AdaLoRA.as_published(Budget(fraction=0.5)), AutoLoRA.as_published(UNSEEN)], ids=lambda method: method.id
)
def test_as_published_they_do_not(method):
    """The partner: the measure tells a method that stays behind."""
    assert (distance(method) / distance(None)).max() < 0.2
