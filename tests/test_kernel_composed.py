"""The kernel as ordinary operations: where it is chosen, that it is the same function, and what it keeps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernels import BF16, IN, OUT, RANK, SCALE, autocast, draw, relative
from torch import Tensor

from loralloc import kernel
from loralloc.kernel import gated_linear, gated_lora

F32, F64 = torch.float32, torch.float64
CALLS: dict[str, Callable[..., Tensor]] = {
    "behind a layer": lambda inputs, W, *rest: gated_lora(*inputs, *rest),
    "with its layer": lambda inputs, W, *rest: gated_linear(inputs.x, W, None, inputs.A, inputs.g, inputs.B, *rest),
}
calls = pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))


def nodes(y: Tensor) -> set[str]:
    rest, seen = [y.grad_fn], set()
    while rest:
        node = rest.pop()
        if node is not None and type(node).__name__ not in seen:
            seen.add(type(node).__name__)
            rest += [child for child, _ in node.next_functions]
    return seen


@calls
@pytest.mark.parametrize(
    ("layout", "x", "adapter", "cast", "rows", "chosen"),
    [
        ("3-D, shared gate", F32, F32, False, False, True),
        ("3-D, shared gate", F64, F64, False, False, True),
        ("3-D, gate per sample", F32, F32, False, False, False),
        ("3-D, shared gate", BF16, F32, False, False, False),  # would keep a wide copy of x
        ("3-D, shared gate", BF16, BF16, False, False, False),  # would sum the gate's gradient in half precision
        ("3-D, shared gate", F32, F32, True, False, False),
        ("3-D, shared gate", F32, F32, False, True, False),
    ],
)
def test_chosen_where_all_is_of_one_precision(
    call: Callable[..., Tensor], layout: str, x: torch.dtype, adapter: torch.dtype, cast: bool, rows: bool, chosen: bool
) -> None:
    inputs, W = draw(layout, dtype=x, base=x, adapter=adapter), torch.randn(OUT, IN, dtype=x)
    with autocast(cast):
        y = call(inputs, W, SCALE, torch.rand(OUT) if rows else None)
    assert ("_GatedLoRABackward" not in nodes(y)) is chosen


@calls
@pytest.mark.parametrize("s", [SCALE, torch.tensor([0.5, 0.0, 2.0], dtype=F64)], ids=["one scale", "a closed rank"])
@pytest.mark.parametrize("layout", ["3-D, shared gate", "2-D, shared gate"])
def test_it_is_the_function_by_hand(
    call: Callable[..., Tensor], layout: str, s: float | Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, W = draw(layout), torch.randn(OUT, IN, dtype=F64)
    wanted = [inputs.x, inputs.A, inputs.g, inputs.B]

    def both_passes() -> list[Tensor]:
        y = call(inputs, W, s)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), wanted)]

    composed = both_passes()
    monkeypatch.setattr(kernel, "_composes", lambda *_: False)
    for one, other in zip(composed, both_passes(), strict=True):
        assert one.shape == other.shape
        assert relative(one, other) < 1e-14


@calls
def test_the_input_is_all_that_is_wide_of_what_it_keeps(call: Callable[..., Tensor]) -> None:
    inputs, W = draw(), torch.randn(OUT, IN, dtype=F64)
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call(inputs, W, SCALE)
    of_others = {t.data_ptr() for t in (*inputs, W)}
    own = [t.numel() for address, t in kept.items() if address not in of_others]
    rows = inputs.x[..., 0].numel()
    assert sorted(own) == [RANK, rows * RANK, rows * RANK]  # scale · gate, and the activation before and after it


@calls
def test_one_layer_with_a_stack_of_updates(call: Callable[..., Tensor]) -> None:
    """`vmap` over B: the update has a dimension that the layer's own output has not, so it is added out of place."""
    inputs, W = draw(dtype=F64, trained=""), torch.randn(OUT, IN, dtype=F64)
    stack = torch.randn(4, OUT, RANK, dtype=F64)
    found = torch.vmap(lambda B: call(inputs._replace(B=B), W, SCALE))(stack)
    torch.testing.assert_close(found, torch.stack([call(inputs._replace(B=B), W, SCALE) for B in stack]))


@calls
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_shapes_alone_can_be_computed(call: Callable[..., Tensor], dtype: torch.dtype) -> None:
    inputs = draw(dtype=dtype, adapter=F32, base=dtype, trained="")
    abstract = inputs._make(tensor.to("meta") for tensor in inputs)
    y = call(abstract, torch.empty(OUT, IN, dtype=dtype, device="meta"), SCALE)
    assert (y.shape, y.dtype) == (inputs.base_out.shape, dtype)
