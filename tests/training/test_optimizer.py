"""What a run asks of the optimizer. That it must hold the gates is tested in loops (test_callback_refusals.py)."""

from __future__ import annotations

import pytest
import torch
from models import tiny_peft

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
