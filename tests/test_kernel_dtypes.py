"""The kernel in use: what it computes and keeps, in which dtype, and that compiling or recomputing changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from kernels import (
    BF16,
    IN,
    OUT,
    RANK,
    SCALE,
    Inputs,
    assert_all_close,
    autocast,
    bits,
    draw,
    gradients,
    like,
    relative,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from loralloc.kernel import gated_lora

pytestmark = pytest.mark.usefixtures("by_hand")


class Products(TorchDispatchMode):
    """Records the dtype of the operands of every matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "bmm"):
            self.dtypes.append(args[-1].dtype)
        return func(*args, **(kwargs or {}))


EVERYTHING = "x base_out A g B"


class TestWork:
    """Nothing is computed or kept that nobody asked for."""

    @staticmethod
    def products(trained: str, row_scale: Tensor | None = None) -> int:
        y = gated_lora(*draw(dtype=torch.float32, trained=trained), SCALE, row_scale)
        with Products() as products:
            y.sum().backward()
        return len(products.dtypes)

    @pytest.mark.parametrize(
        ("trained", "count"), [("x", 2), ("g", 1), ("A", 2), ("A g", 2), ("A g B", 3), ("x A B", 4), (EVERYTHING, 4)]
    )
    def test_products_of_the_backward_pass(self, trained: str, count: int) -> None:
        assert self.products(trained) == count

    def test_row_scale_costs_no_further_product(self) -> None:
        """The gradients of the activation for the input and for A share one, with twice the columns."""
        assert self.products(EVERYTHING, torch.rand(OUT)) == 4
        assert self.products("x", torch.rand(OUT)) == 2

    @pytest.mark.parametrize(
        ("trained", "row_scale", "count"),
        [("base_out", None, 0), ("B", None, 1), ("A", torch.ones(OUT), 2), ("A B", torch.ones(OUT), 3)],
        ids=["base_out", "B", "A with row_scale", "A B with row_scale"],
    )
    def test_no_product_is_thrown_away(self, trained: str, row_scale: Tensor | None, count: int) -> None:
        assert self.products(trained, row_scale) == count

    def test_the_forward_pass_takes_two_products(self) -> None:
        with Products() as products:
            gated_lora(*draw(dtype=torch.float32), SCALE)
        assert len(products.dtypes) == 2

    def test_a_second_derivative_takes_one_more_product(self) -> None:
        y = gated_lora(*(inputs := draw()), SCALE)
        with Products() as products:
            torch.autograd.grad(y.sum(), inputs, create_graph=True)
        assert len(products.dtypes) == 5

    @pytest.mark.parametrize("trained", ["x", "base_out", "A", "g", "B", "A B", EVERYTHING])
    def test_gradients_exist_only_where_required(self, trained: str) -> None:
        inputs = draw(trained=trained)
        y = gated_lora(*inputs, SCALE)
        returned: list[Tensor | None] = []
        assert y.grad_fn is not None
        y.grad_fn.register_hook(lambda gradients, _: returned.extend(gradients))
        y.sum().backward()
        assert [g is not None for g in returned[:5]] == [t.requires_grad for t in inputs]

    @pytest.mark.parametrize("ranks", [1, 15, 16, 40])
    def test_products_that_are_turned_around_are_the_same_products(self, ranks: int) -> None:
        """On a CPU, below 16 ranks all narrow products are; from there on that of B's gradient alone."""
        x, base_out, dy = torch.randn(9, 5, 24), torch.randn(9, 5, 17), torch.randn(9, 5, 17)
        drawn = Inputs(x, base_out, torch.randn(ranks, 24), torch.randn(ranks), torch.randn(17, ranks))
        inputs = Inputs(*(t.requires_grad_() for t in drawn))
        exact = like(inputs, torch.float64)
        y, truth = gated_lora(*inputs, SCALE), exact.base_out + SCALE * ((exact.x @ exact.A.T) * exact.g) @ exact.B.T
        assert relative(y, truth) < 1e-5
        found, expected = gradients(y, inputs, dy), gradients(truth, exact, dy)
        for name in inputs._fields:
            assert found[name].shape == expected[name].shape
            assert relative(found[name], expected[name]) < 1e-5

    def test_nothing_is_kept_of_a_frozen_layer(self) -> None:
        with kept_tensors() as kept:
            y = gated_lora(*draw(trained=""), SCALE)
        assert not y.requires_grad
        assert not kept
        with kept_tensors() as kept, torch.no_grad():
            gated_lora(*draw(), SCALE)
        assert not kept

    @pytest.mark.parametrize("layout", ["3-D, shared gate", "3-D, gate per sample"])
    @pytest.mark.parametrize(
        ("x", "base", "adapter", "cast", "h"),
        [
            (torch.float32, torch.float32, torch.float32, False, torch.float32),
            (BF16, BF16, torch.float32, False, torch.float32),
            (BF16, BF16, BF16, False, BF16),
            (torch.float32, BF16, torch.float32, True, BF16),
        ],
    )
    def test_kept_are_the_inputs_one_narrow_activation_and_its_factor(
        self, layout: str, x: torch.dtype, base: torch.dtype, adapter: torch.dtype, cast: bool, h: torch.dtype
    ) -> None:
        inputs = draw(layout, dtype=x, base=base, adapter=adapter)
        with kept_tensors() as kept, autocast(cast):
            gated_lora(*inputs, SCALE)
        activation, factor = inputs.x[..., 0].numel() * RANK, inputs.g.numel()
        assert size(kept) == size([inputs.x, inputs.A, inputs.g, inputs.B]) + (activation + factor) * h.itemsize
        mine = {t.data_ptr() for t in kept}
        assert {inputs.x.data_ptr(), inputs.A.data_ptr(), inputs.B.data_ptr(), inputs.g.data_ptr()} <= mine
        assert inputs.base_out.data_ptr() not in mine

    def test_scales_are_kept_beside_them(self) -> None:
        inputs, s, row_scale = draw(), torch.ones(RANK), torch.ones(OUT)
        with kept_tensors() as bare:
            gated_lora(*inputs, SCALE)
        with kept_tensors() as kept:
            gated_lora(*inputs, s, row_scale)
        assert size(kept) == size(bare) + size([s, row_scale])

    def test_plain_autograd_keeps_more(self) -> None:
        """The partner of the two above."""
        inputs = draw()
        with kept_tensors() as ours:
            gated_lora(*inputs, SCALE)
        with kept_tensors() as plain:
            inputs.base_out + (((inputs.x @ inputs.A.T) * inputs.g) @ inputs.B.T) * SCALE
        assert size(plain) > size(ours)


@contextmanager
def kept_tensors() -> Iterator[list[Tensor]]:
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield kept


def size(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.itemsize for t in tensors)


class Row(NamedTuple):
    """A row of the table in the module's docstring."""

    x: torch.dtype
    base_out: torch.dtype
    adapter: torch.dtype
    cast: bool
    products: torch.dtype


F32 = torch.float32
TABLE = [
    Row(F32, F32, F32, False, F32),
    Row(BF16, BF16, BF16, False, BF16),
    Row(BF16, BF16, F32, False, F32),
    Row(BF16, F32, BF16, False, BF16),
    Row(F32, BF16, F32, True, BF16),  # what autocast meets behind a layer norm
    Row(BF16, BF16, F32, True, BF16),
    Row(BF16, BF16, BF16, True, BF16),
    Row(F32, F32, F32, True, BF16),
]
TOLERANCE = {F32: 1e-5, BF16: 3e-2}  # of the largest entry: a few roundings (2⁻²⁴ or 2⁻⁹) in a row, and some air
table = pytest.mark.parametrize("row", TABLE, ids=lambda r: "-".join(str(v).removeprefix("torch.") for v in r))


def draw_row(row: Row, layout: str = "3-D, shared gate") -> Inputs:
    return draw(layout, dtype=row.x, base=row.base_out, adapter=row.adapter)


class TestDtypes:
    @table
    @pytest.mark.parametrize("layout", ["3-D, shared gate", "3-D, gate per sample"])
    def test_outputs_and_gradients_have_the_dtype_of_the_table(self, row: Row, layout: str) -> None:
        inputs = draw_row(row, layout)
        with autocast(row.cast):
            y = gated_lora(*inputs, SCALE)
        assert y.dtype == row.base_out
        for name, gradient in gradients(y, inputs, torch.randn_like(y)).items():
            assert gradient.dtype == getattr(inputs, name).dtype, name

    @table
    @pytest.mark.parametrize("row_scale", [None, torch.linspace(0.2, 3.0, OUT)], ids=["plain", "row_scale"])
    def test_forward_and_backward_agree_with_float64(self, row: Row, row_scale: Tensor | None) -> None:
        inputs = draw_row(row)
        exact = like(inputs, torch.float64)
        with autocast(row.cast):
            y = gated_lora(*inputs, SCALE, row_scale)
        truth = gated_lora(*exact, SCALE, None if row_scale is None else row_scale.double())
        assert relative(y, truth) < TOLERANCE[BF16 if BF16 in row else F32]
        dy = torch.randn_like(y)
        found, expected = gradients(y, inputs, dy), gradients(truth, exact, dy)
        for name in ("A", "g", "B"):
            assert relative(found[name], expected[name]) < TOLERANCE[row.products], name
        assert relative(found["x"], expected["x"]) < TOLERANCE[BF16 if BF16 in (row.x, row.products) else F32]
        assert torch.equal(found["base_out"], dy)

    @table
    def test_products_run_in_the_dtype_of_the_table(self, row: Row) -> None:
        inputs = draw_row(row)
        with Products() as forward, autocast(row.cast):
            y = gated_lora(*inputs, SCALE)
        with Products() as backward:
            y.float().sum().backward()
        # The add happens in the wider of product and base output, and so does the product it is fused with.
        assert forward.dtypes == [row.products, torch.promote_types(row.products, row.base_out)]
        assert backward.dtypes == [row.products] * 4

    def test_fp32_adapters_over_a_bf16_base_lose_nothing_to_bf16(self) -> None:
        """PEFT's default. The tolerance tells the rows apart: bf16 adapters do not meet it."""

        def error(adapter: torch.dtype) -> float:
            inputs = draw(dtype=BF16, adapter=adapter)
            exact = like(inputs, torch.float64)
            y, truth = gated_lora(*inputs, SCALE), gated_lora(*exact, SCALE)
            dy = torch.randn_like(y)
            return relative(gradients(y, inputs, dy)["A"], gradients(truth, exact, dy)["A"])

        assert error(F32) < 1e-6
        assert error(BF16) > 1e-4

    def test_the_sum_is_rounded_once(self) -> None:
        inputs = draw(dtype=BF16, adapter=F32)
        y = gated_lora(*inputs, SCALE)
        assert torch.equal(y, gated_lora(*like(inputs, torch.float64), SCALE).to(BF16))

    @pytest.mark.parametrize("layout", ["3-D, shared gate", "3-D, gate per sample"])
    def test_scale_and_gate_are_rounded_once_and_together(self, layout: str) -> None:
        differ = []
        for _ in range(10):
            inputs, s = draw(layout, dtype=BF16), torch.rand(RANK) + 0.5
            y, once, twice = gated_lora(*inputs, s), (inputs.g * s).to(BF16), inputs.g.to(BF16) * s.to(BF16)
            assert torch.equal(y, gated_lora(*inputs._replace(g=once), 1.0))
            differ.append(not torch.equal(y, gated_lora(*inputs._replace(g=twice), 1.0)))
        assert any(differ)

    def test_backward_outside_autocast_uses_the_dtype_of_forward(self) -> None:
        inputs = draw(dtype=F32)
        with autocast():
            y = gated_lora(*inputs, SCALE)
            inside = gradients(y, inputs, torch.ones_like(y))
            y = gated_lora(*inputs, SCALE)
        outside = gradients(y, inputs, torch.ones_like(y))
        for name in inside:
            assert torch.equal(inside[name], outside[name])

    @pytest.mark.parametrize("adapter_and_base", [(F32, F32), (F32, BF16)], ids=["fp32", "bf16 base"])
    def test_backward_inside_autocast_uses_the_dtype_of_forward(
        self, adapter_and_base: tuple[torch.dtype, torch.dtype]
    ) -> None:
        adapter, base = adapter_and_base
        inputs = draw(dtype=base, adapter=adapter)
        y = gated_lora(*inputs, SCALE)
        with Products() as products, autocast():
            y.float().sum().backward()
        assert products.dtypes == [F32] * 4


class TestFirstForward:
    @table
    @pytest.mark.parametrize("layout", ["3-D, shared gate", "3-D, gate per sample"])
    def test_zero_gates_return_the_base_output_bit_for_bit(self, row: Row, layout: str) -> None:
        inputs = draw_row(row, layout)
        with autocast(row.cast):
            learned = gated_lora(*inputs, SCALE)
            with torch.no_grad():
                inputs.g.zero_()
            y = gated_lora(*inputs, SCALE)
        assert torch.equal(bits(y), bits(inputs.base_out))
        assert not torch.equal(learned, inputs.base_out), "the partner: gates that are not zero act"

    def test_zero_gates_learn_and_the_factors_do_not_yet(self) -> None:
        inputs = draw()
        with torch.no_grad():
            inputs.g.zero_()
        y = gated_lora(*inputs, SCALE)
        found = gradients(y, inputs, torch.randn_like(y))
        assert not found["A"].any()
        assert not found["B"].any()
        assert not found["x"].any()
        assert found["g"].all()

    def test_a_zero_up_projection_returns_the_base_output_too(self) -> None:
        inputs = draw(dtype=BF16, adapter=F32)
        with torch.no_grad():
            inputs.B.zero_()
        assert torch.equal(bits(gated_lora(*inputs, SCALE)), bits(inputs.base_out))


class TestCompile:
    @pytest.mark.parametrize(
        ("layout", "s", "rows", "cast"),
        [
            ("3-D, shared gate", SCALE, False, False),
            ("3-D, shared gate", torch.tensor([2.0, 0.0, 1.0]), False, True),
            ("3-D, gate per sample", SCALE, True, False),
            ("3-D, gate per sample", SCALE, True, True),
            ("2-D, shared gate", SCALE, False, True),
        ],
    )
    def test_full_graph_equals_eager(self, layout: str, s: float | Tensor, rows: bool, cast: bool) -> None:
        torch._dynamo.reset()
        inputs, row_scale = draw(layout, dtype=F32), torch.rand(OUT) if rows else None

        def layer(*tensors: Tensor) -> Tensor:
            return gated_lora(*tensors, s, row_scale)

        with autocast(cast):
            eager, compiled = layer(*inputs), torch.compile(layer, fullgraph=True, backend="aot_eager")(*inputs)
        torch.testing.assert_close(compiled, eager)
        dy = torch.randn_like(eager)
        assert_all_close(gradients(compiled, inputs, dy), gradients(eager, inputs, dy))
        if cast:  # the partner: autocast did reach the compiled graph
            assert relative(compiled, layer(*inputs)) > 1e-4

    def test_one_graph_serves_every_batch_size(self) -> None:
        torch._dynamo.reset()
        inputs = draw(dtype=F32)
        graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(lambda *t: gated_lora(*t, SCALE), fullgraph=True, backend=graphs, dynamic=True)
        for n in (2, 5, 7):
            batch = inputs._replace(
                x=torch.randn(n, 3, IN, requires_grad=True), base_out=torch.randn(n, 3, OUT, requires_grad=True)
            )
            y, eager = compiled(*batch), gated_lora(*batch, SCALE)
            torch.testing.assert_close(y, eager)
            assert_all_close(gradients(y, batch, torch.ones_like(y)), gradients(eager, batch, torch.ones_like(y)))
        assert graphs.frame_count == 1


class TestCheckpointing:
    @pytest.mark.parametrize("use_reentrant", [False, True])
    @pytest.mark.parametrize("cast", [False, True], ids=["fp32", "autocast"])
    def test_recomputing_gives_the_same_gradients(self, use_reentrant: bool, cast: bool) -> None:
        inputs, row_scale = draw(dtype=F32), torch.rand(OUT)
        weight = torch.randn(OUT, IN, requires_grad=True)

        def block(x: Tensor, A: Tensor, g: Tensor, B: Tensor) -> Tensor:
            base_out = torch.nn.functional.linear(x, weight)
            return gated_lora(torch.tanh(x), base_out, A, g, B, SCALE, row_scale).square()

        tensors = (inputs.x, inputs.A, inputs.g, inputs.B)
        runs = []
        for recompute in (False, True):
            with autocast(cast):
                y = checkpoint(block, *tensors, use_reentrant=use_reentrant) if recompute else block(*tensors)
            for t in (*tensors, weight):
                t.grad = None
            y.float().square().sum().backward()
            runs.append([y.detach(), *(t.grad for t in (*tensors, weight))])
        for plain, recomputed in zip(*runs, strict=True):
            assert plain is not None
            assert torch.equal(bits(plain), bits(recomputed))
