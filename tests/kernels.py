"""Inputs of the kernel in every layout, and how their gradients are compared: what the tests of the kernel share."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

IN, OUT, RANK = 5, 6, 3
SCALE = 1.7
BF16 = torch.bfloat16


class Inputs(NamedTuple):
    x: Tensor
    base_out: Tensor
    A: Tensor
    g: Tensor
    B: Tensor


# Leading dimensions of x, shape of the gate.
LAYOUTS = {
    "2-D, shared gate": ((4,), (RANK,)),
    "2-D, gate per row": ((4,), (4, RANK)),
    "3-D, shared gate": ((2, 3), (RANK,)),
    "3-D, gate per sample": ((2, 3), (2, 1, RANK)),
    "3-D, gate per token": ((2, 3), (2, 3, RANK)),
    "3-D, gate per position": ((2, 3), (3, RANK)),
    "3-D, one gate in three dimensions": ((2, 3), (1, 1, RANK)),
    "4-D, gate per sample": ((2, 1, 2), (2, 1, 1, RANK)),
    "a single vector": ((), (RANK,)),
    "rank 1": ((2, 3), (1,)),
    "rank 1, gate per sample": ((2, 3), (2, 1, 1)),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def draw(
    layout: str = "3-D, shared gate",
    dtype: torch.dtype = torch.float64,
    adapter: torch.dtype | None = None,
    base: torch.dtype | None = None,
    trained: str = "x base_out A g B",
) -> Inputs:
    """Leaves of one layout; gates are never below fp32, as `attach_gates` makes them."""
    lead, gate_shape = LAYOUTS[layout]
    adapter, rank = adapter or dtype, gate_shape[-1]
    gate_dtype = torch.promote_types(adapter, torch.float32)
    drawn = Inputs(
        torch.randn(*lead, IN, dtype=dtype),
        torch.randn(*lead, OUT, dtype=base or dtype),
        torch.randn(rank, IN, dtype=adapter),
        torch.randn(gate_shape, dtype=gate_dtype),
        torch.randn(OUT, rank, dtype=adapter),
    )
    for name, tensor in drawn._asdict().items():
        tensor.requires_grad_(name in trained.split())
    return drawn


def autocast(enabled: bool = True) -> torch.autocast:
    return torch.autocast("cpu", BF16, enabled=enabled)


def like(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The same values in another dtype, as fresh leaves."""
    return Inputs(*(t.detach().clone().to(dtype).requires_grad_(t.requires_grad) for t in inputs))


def gradients(y: Tensor, inputs: Inputs, dy: Tensor) -> dict[str, Tensor]:
    """Gradients of <y, dy>, by name, of the inputs that require one."""
    wanted = {name: t for name, t in inputs._asdict().items() if t.requires_grad}
    return dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), dy.to(y.dtype)), strict=True))


def relative(value: Tensor, truth: Tensor) -> float:
    value, truth = value.detach().double(), truth.detach().double()
    return float((value - truth).abs().max() / truth.abs().max())


def bits(t: Tensor) -> Tensor:
    return t.detach().contiguous().view(torch.uint8)


def assert_all_close(found: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    assert found.keys() == truth.keys()
    for name in truth:
        torch.testing.assert_close(found[name], truth[name], msg=lambda text, name=name: f"{name}: {text}")
