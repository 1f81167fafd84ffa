"""The kernel with a frozen linear layer in it: what `gated_lora` computes behind that layer, with less work.

The twin is `gated_lora` on `torch.nn.functional.linear`, which other files hold against naive sums.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from kernels import BF16, IN, OUT, RANK, SCALE, Inputs, assert_all_close, autocast, bits, draw, layouts, relative
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from loralloc.kernel import gated_linear, gated_lora

pytestmark = pytest.mark.usefixtures("either_way")

F32 = torch.float32
NAMES = ("x", "A", "g", "B")
biases = pytest.mark.parametrize("biased", [False, True], ids=["no bias", "bias"])
row_scales = pytest.mark.parametrize("row_scale", [None, torch.linspace(0.2, 3.0, OUT)], ids=["plain", "row_scale"])


def layer(dtype: torch.dtype = torch.float64, biased: bool = True) -> tuple[Tensor, Tensor | None]:
    return torch.randn(OUT, IN, dtype=dtype), torch.randn(OUT, dtype=dtype) if biased else None


def in_one_step(inputs: Inputs, W: Tensor, b: Tensor | None, *rest: object) -> Tensor:
    return gated_linear(inputs.x, W, b, inputs.A, inputs.g, inputs.B, *rest)  # type: ignore[arg-type]


def behind_the_layer(inputs: Inputs, W: Tensor, b: Tensor | None, *rest: object) -> Tensor:
    return gated_lora(inputs.x, linear(inputs.x, W, b), inputs.A, inputs.g, inputs.B, *rest)  # type: ignore[arg-type]


def gradients(y: Tensor, inputs: Inputs, dy: Tensor) -> dict[str, Tensor]:
    wanted = [getattr(inputs, name) for name in NAMES]
    return dict(zip(NAMES, torch.autograd.grad(y, wanted, dy.to(y.dtype)), strict=True))


@layouts
@biases
@row_scales
def test_value_and_gradients_are_those_behind_the_layer(layout: str, biased: bool, row_scale: Tensor | None) -> None:
    inputs, (W, b) = draw(layout), layer(biased=biased)
    scale = None if row_scale is None else row_scale.double()
    fast, slow = (f(inputs, W, b, SCALE, scale) for f in (in_one_step, behind_the_layer))
    assert_all_close({"y": fast}, {"y": slow})
    dy = torch.randn_like(fast)
    assert_all_close(gradients(fast, inputs, dy), gradients(slow, inputs, dy))


@layouts
@biases
def test_derivatives_agree_with_differences(layout: str, biased: bool) -> None:
    inputs, (W, b) = draw(layout), layer(biased=biased)

    def of(x: Tensor, A: Tensor, g: Tensor, B: Tensor) -> Tensor:
        return gated_linear(x, W, b, A, g, B, SCALE)

    leaves = tuple(getattr(inputs, name) for name in NAMES)
    assert gradcheck(of, leaves)
    assert gradgradcheck(of, leaves)


@pytest.mark.parametrize(
    ("x", "W", "adapter", "cast"),
    [
        (F32, F32, F32, False),
        (BF16, BF16, F32, False),
        (BF16, BF16, BF16, False),
        (F32, F32, BF16, False),
        (F32, F32, F32, True),
        (F32, BF16, F32, True),
        (BF16, BF16, F32, True),
    ],
)
@row_scales
def test_dtypes_and_precision_are_those_behind_the_layer(
    x: torch.dtype, W: torch.dtype, adapter: torch.dtype, cast: bool, row_scale: Tensor | None
) -> None:
    inputs, (weight, b) = draw(dtype=x, adapter=adapter), layer(W)
    with autocast(cast):
        fast, slow = (f(inputs, weight, b, SCALE, row_scale) for f in (in_one_step, behind_the_layer))
    assert fast.dtype == slow.dtype
    assert torch.equal(bits(fast), bits(slow))
    dy = torch.randn_like(fast)
    found, expected = gradients(fast, inputs, dy), gradients(slow, inputs, dy)
    for name in ("A", "g", "B"):
        assert relative(found[name], expected[name]) < 1e-6, name
    assert found["x"].dtype == x
    assert relative(found["x"], expected["x"]) < (1e-5 if x == F32 and not cast else 2e-2)


def test_what_it_was_given_stays_as_it_was() -> None:
    """It adds in place, but only to what is its own."""
    inputs, (W, b) = draw(), layer()
    given = [*inputs, W, b]
    before = [bits(t).clone() for t in given if t is not None]
    y = in_one_step(inputs, W, b, SCALE)
    dy = torch.randn_like(y)
    copy = dy.clone()
    gradients(y, inputs, dy)
    assert all(torch.equal(bits(t), was) for t, was in zip(given, before, strict=True) if t is not None)
    assert torch.equal(dy, copy)


def test_the_backward_pass_can_be_repeated() -> None:
    inputs, (W, b) = draw(), layer()
    y = in_one_step(inputs, W, b, SCALE)
    wanted = [getattr(inputs, name) for name in NAMES]
    first, again = (torch.autograd.grad(y.sum(), wanted, retain_graph=True) for _ in range(2))
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))


@pytest.mark.usefixtures("by_hand")
def test_weight_and_bias_stay_frozen() -> None:
    inputs, (W, b) = draw(), layer()
    y = in_one_step(inputs, W, b, SCALE)
    returned: list[Tensor | None] = []
    assert y.grad_fn is not None
    y.grad_fn.register_hook(lambda gradients, _: returned.extend(gradients))
    y.sum().backward()
    assert sum(gradient is not None for gradient in returned) == 4  # those of x, A, g and B


@pytest.mark.parametrize("trained", [NAMES, ("A", "g", "B"), ("A",), ("x",)])
def test_closed_ranks_and_missing_gradients_are_as_behind_the_layer(trained: tuple[str, ...]) -> None:
    s = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)
    results = []
    for function in (in_one_step, behind_the_layer):
        torch.manual_seed(3)
        inputs, (W, b) = draw(trained=" ".join(trained)), layer()
        y = function(inputs, W, b, s)
        results.append(torch.autograd.grad(y.square().sum(), [getattr(inputs, name) for name in trained]))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("lead", [(0, 3), (0,)])
def test_an_empty_batch_gives_zero_gradients(lead: tuple[int, ...]) -> None:
    inputs, (W, b) = draw()._replace(x=torch.randn(*lead, IN).double().requires_grad_()), layer()
    y = in_one_step(inputs, W, b, SCALE)
    assert y.shape == (*lead, OUT)
    for name, gradient in gradients(y, inputs, torch.ones_like(y)).items():
        assert torch.equal(gradient, torch.zeros_like(getattr(inputs, name)))


def _graph(y: Tensor) -> int:
    """Nodes of a graph, accumulators of leaves aside."""
    seen, rest = set(), [y.grad_fn]
    while rest:
        node = rest.pop()
        if node is None or node in seen or type(node).__name__ == "AccumulateGrad":
            continue
        seen.add(node)
        rest += [child for child, _ in node.next_functions]
    return len(seen)


@pytest.mark.usefixtures("by_hand")
def test_it_is_one_node_of_the_graph_and_keeps_no_more() -> None:
    s = torch.full((RANK,), SCALE, dtype=torch.float64)
    kept: dict[Callable[..., Tensor], int] = {}
    nodes: dict[Callable[..., Tensor], int] = {}
    for function in (in_one_step, behind_the_layer):
        inputs, (W, b) = draw(), layer()
        tensors: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=tensors: kept.append(t) or t, lambda t: t):
            nodes[function] = _graph(function(inputs, W, b, s))
        of_others = {t.data_ptr() for t in (*inputs, W, s)}
        kept[function] = sum(t.numel() for t in tensors if t.data_ptr() not in of_others)
    assert nodes[in_one_step] == 1 < nodes[behind_the_layer]
    assert kept[in_one_step] == kept[behind_the_layer] == 2 * 3 * RANK + RANK


def test_the_weight_is_kept_only_where_the_input_needs_a_gradient() -> None:
    W, b = layer()
    for trained, kept in (("A g B", False), ("x", True)):
        tensors: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, all=tensors: all.append(t) or t, lambda t: t):
            in_one_step(draw(trained=trained), W, b, SCALE)
        assert (W.data_ptr() in {t.data_ptr() for t in tensors}) is kept


@biases
def test_checkpoints_that_keep_products_get_them_unchanged(biased: bool) -> None:
    """Selective checkpointing keeps the layer's product, to which nothing may then be added in place."""
    inputs, (W, b) = draw(), layer(biased=biased)
    products = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]

    def of(*leaves: Tensor) -> Tensor:
        return in_one_step(Inputs(*leaves), W, b, SCALE).square()

    keeping = functools.partial(create_selective_checkpoint_contexts, products)
    recomputed = checkpoint(of, *inputs, use_reentrant=False, context_fn=keeping)
    plain = of(*inputs)
    assert torch.equal(plain, recomputed)
    expected = torch.autograd.grad(plain.sum(), [inputs.x, inputs.A, inputs.g, inputs.B])
    found = torch.autograd.grad(recomputed.sum(), [inputs.x, inputs.A, inputs.g, inputs.B])
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


@pytest.mark.parametrize("layout", ["2-D, shared gate", "3-D, shared gate", "3-D, gate per sample"])
@pytest.mark.parametrize("counted", ["forward", "backward"])
def test_checkpoints_may_be_recomputed_in_another_mode(layout: str, counted: str) -> None:
    """What is saved for the backward pass is the same, whether a dispatch mode is on or not."""
    inputs, (W, b) = draw(layout), layer()

    def gradients_with(forward: AbstractContextManager[Any], backward: AbstractContextManager[Any]) -> list[Tensor]:
        with forward:
            y = checkpoint(lambda *t: in_one_step(Inputs(*t), W, b, SCALE), *inputs, use_reentrant=False)
        with backward:
            return list(torch.autograd.grad(y.square().sum(), [getattr(inputs, name) for name in NAMES]))

    mode, expected = FlopCounterMode(display=False), gradients_with(nullcontext(), nullcontext())
    found = gradients_with(*((mode, nullcontext()) if counted == "forward" else (nullcontext(), mode)))
    assert mode.get_total_flops() > 0
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


@pytest.mark.parametrize("layout", ["2-D, shared gate", "3-D, shared gate", "3-D, gate per sample"])
@pytest.mark.parametrize(("dtype", "adapter"), [(F32, F32), (BF16, BF16), (BF16, F32)])
@pytest.mark.parametrize("in_one", [False, True], ids=["behind a layer", "with its layer"])
def test_every_product_is_counted(layout: str, dtype: torch.dtype, adapter: torch.dtype, in_one: bool) -> None:
    """Each of the three, of layer and factors, once forward; backward those of the factors twice, the layer's once."""
    inputs, (W, b) = draw(layout, dtype, adapter), layer(dtype)
    with FlopCounterMode(display=False) as forward:
        y = (in_one_step if in_one else behind_the_layer)(inputs, W, b, SCALE)
    with FlopCounterMode(display=False) as backward:
        gradients(y, inputs, torch.randn_like(y))
    rows = inputs.x[..., 0].numel()
    frozen, factors = 2 * rows * IN * OUT, 2 * rows * RANK * (IN + OUT)
    assert forward.get_total_flops() == frozen + factors
    assert backward.get_total_flops() == frozen + 2 * factors


@pytest.mark.parametrize("cast", [False, True], ids=["fp32", "autocast"])
@biases
def test_a_compiled_layer_equals_the_eager_one(cast: bool, biased: bool) -> None:
    torch._dynamo.reset()
    inputs, (W, b) = draw(dtype=F32), layer(F32, biased)

    def of(*tensors: Tensor) -> Tensor:
        return in_one_step(Inputs(*tensors), W, b, SCALE)

    with autocast(cast):
        eager, compiled = of(*inputs), torch.compile(of, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(compiled, eager)
    dy = torch.randn_like(eager)
    assert_all_close(gradients(compiled, inputs, dy), gradients(eager, inputs, dy))
