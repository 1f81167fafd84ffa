"""The kernel: what it computes, what it differentiates, what it keeps, and in which dtype.

The naive twin adds the gated rank-one terms one by one and leaves every derivative to autograd. Orders of magnitude:
float64 comparisons are at rounding level; `relative` measures an error against the largest entry of the truth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from loralloc.kernel import gated_lora

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


def like(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The same values in another dtype, as fresh leaves."""
    return Inputs(*(t.detach().clone().to(dtype).requires_grad_(t.requires_grad) for t in inputs))


def twin(x: Tensor, base_out: Tensor, A: Tensor, g: Tensor, B: Tensor, s: float | Tensor) -> Tensor:
    """base_out + Σ_k s_k g_k (x · A_k) B_k: the sum of gated rank-one terms."""
    y = base_out
    for k in range(A.shape[0]):
        s_k = s[k] if isinstance(s, Tensor) else s
        y = y + (s_k * g[..., k] * (x * A[k]).sum(-1)).unsqueeze(-1) * B[:, k]
    return y


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


class Products(TorchDispatchMode):
    """Records the dtype of the operands of every matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            self.dtypes.append(args[-1].dtype)
        return func(*args, **(kwargs or {}))


def autocast(enabled: bool = True) -> torch.autocast:
    return torch.autocast("cpu", BF16, enabled=enabled)


class TestFormula:
    @layouts
    @pytest.mark.parametrize("s", [SCALE, torch.tensor([0.5, 2.0, -1.0]).double()], ids=["number", "per rank"])
    def test_value_and_gradients_are_those_of_the_sum_of_rank_one_terms(self, layout: str, s: float | Tensor) -> None:
        inputs = draw(layout)
        s = s[: inputs.A.shape[0]] if isinstance(s, Tensor) else s
        fast, slow = gated_lora(*inputs, s), twin(*inputs, s)
        torch.testing.assert_close(fast, slow)
        dy = torch.randn_like(fast)
        assert_all_close(gradients(fast, inputs, dy), gradients(slow, inputs, dy))

    @layouts
    def test_first_derivatives_agree_with_differences(self, layout: str) -> None:
        assert gradcheck(lambda *inputs: gated_lora(*inputs, SCALE), tuple(draw(layout)))

    def test_a_scale_per_rank_of_equal_numbers_is_that_number(self) -> None:
        inputs = draw(dtype=torch.float32)
        number, tensor = gated_lora(*inputs, SCALE), gated_lora(*inputs, torch.full((RANK,), SCALE))
        assert torch.equal(number, tensor)
        dy = torch.randn_like(number)
        assert_all_close(gradients(number, inputs, dy), gradients(tensor, inputs, dy))

    @pytest.mark.parametrize("layout", ["3-D, shared gate", "3-D, gate per sample"])
    def test_strides_do_not_matter(self, layout: str) -> None:
        inputs = draw(layout)
        swapped = Inputs(*(t.detach().mT.contiguous().mT.requires_grad_() for t in inputs[:2]), *inputs[2:])
        assert not swapped.x.is_contiguous()
        assert not swapped.base_out.is_contiguous()
        torch.testing.assert_close(gated_lora(*swapped, SCALE), gated_lora(*inputs, SCALE), rtol=0, atol=1e-12)
        dy = torch.randn(OUT, 1, 1, dtype=torch.float64).expand(OUT, 3, 2).mT.permute(1, 2, 0)  # no memory of its own
        found = gradients(gated_lora(*swapped, SCALE), swapped, dy)
        assert_all_close(found, gradients(gated_lora(*inputs, SCALE), inputs, dy.contiguous()))

    @pytest.mark.parametrize("lead", [(0, 3), (2, 0), (0,)])
    def test_an_empty_batch_gives_zero_gradients(self, lead: tuple[int, ...]) -> None:
        inputs = draw()._replace(x=torch.randn(*lead, IN).double(), base_out=torch.randn(*lead, OUT).double())
        y = gated_lora(*inputs, SCALE)
        assert y.shape == (*lead, OUT)
        for name, gradient in gradients(y, inputs, torch.ones_like(y)).items():
            assert torch.equal(gradient, torch.zeros_like(getattr(inputs, name)))

    @pytest.mark.parametrize("gate_shape", [(0, 1, RANK), (1, 1, RANK)])
    def test_an_empty_batch_with_gates_per_sample(self, gate_shape: tuple[int, ...]) -> None:
        inputs = draw()._replace(
            x=torch.randn(0, 3, IN).double(),
            base_out=torch.randn(0, 3, OUT).double(),
            g=torch.ones(gate_shape).double().requires_grad_(),
        )
        y = gated_lora(*inputs, SCALE)
        assert y.shape == (0, 3, OUT)
        assert gradients(y, inputs, torch.ones_like(y))["g"].shape == gate_shape


def second(function: Callable[..., Tensor], inputs: Inputs) -> dict[str, Tensor]:
    """Gradient of a fixed combination of first derivatives of a loss that is quadratic in y."""
    generator = torch.Generator().manual_seed(1)
    y = function(*inputs)
    first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
    parts = [
        (d * torch.randn(d.shape, generator=generator, dtype=d.dtype)).sum() for d in first
    ]  # one direction for each derivative
    return dict(zip(inputs._fields, torch.autograd.grad(torch.stack(parts).sum(), inputs), strict=True))


class TestSecondDerivatives:
    @layouts
    def test_agree_with_the_twin(self, layout: str) -> None:
        inputs = draw(layout)
        found = second(lambda *t: gated_lora(*t, SCALE), inputs)
        assert_all_close(found, second(lambda *t: twin(*t, SCALE), inputs))

    @pytest.mark.parametrize("row_scale", [None, "given"])
    @pytest.mark.parametrize("layout", ["2-D, shared gate", "2-D, gate per row", "3-D, gate per sample", "rank 1"])
    def test_agree_with_differences(self, layout: str, row_scale: str | None) -> None:
        scale = None if row_scale is None else torch.rand(OUT, dtype=torch.float64)
        assert gradgradcheck(lambda *inputs: gated_lora(*inputs, SCALE, scale), tuple(draw(layout)))

    def test_closed_ranks_stay_out(self) -> None:
        s = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)
        inputs = draw()
        found = second(lambda *t: gated_lora(*t, s), inputs)
        assert_all_close(found, second(lambda *t: twin(*t, s), inputs))
        assert not found["A"][1].any()
        assert not found["B"][:, 1].any()
        assert found["A"][0].any()

    def test_hang_on_the_activation_being_recomputed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The partner: with the saved activation as a constant, the second derivative of B would miss x and A."""
        inputs = draw()
        truth = second(lambda *t: twin(*t, SCALE), inputs)
        monkeypatch.setattr(torch, "is_grad_enabled", lambda: False)
        found = second(lambda *t: gated_lora(*t, SCALE), inputs)
        assert relative(found["x"], truth["x"]) > 1e-3


class TestClosedRanks:
    """A zero in `s` shuts a rank off for good."""

    OPEN = torch.tensor([True, False, True])

    @pytest.mark.parametrize("layout", ["3-D, shared gate", "3-D, gate per sample", "3-D, gate per token"])
    @pytest.mark.parametrize("row_scale", [None, torch.linspace(0.2, 3.0, OUT).double()], ids=["plain", "row_scale"])
    def test_are_as_if_they_were_not_there(self, layout: str, row_scale: Tensor | None) -> None:
        inputs, keep = draw(layout), self.OPEN
        y = gated_lora(*inputs, SCALE * keep.double(), row_scale)
        dy = torch.randn_like(y)
        found = gradients(y, inputs, dy)

        x, base_out, A, g, B = (t.detach() for t in inputs)
        small = Inputs(*(t.clone().requires_grad_() for t in (x, base_out, A[keep], g[..., keep], B[:, keep])))
        y_small = gated_lora(*small, SCALE, row_scale)
        torch.testing.assert_close(y, y_small)
        truth = gradients(y_small, small, dy)
        opened = {**found, "A": found["A"][keep], "g": found["g"][..., keep], "B": found["B"][:, keep]}
        assert_all_close(opened, truth)

        for closed in (found["A"][~keep], found["g"][..., ~keep], found["B"][:, ~keep]):
            assert closed.numel() > 0
            assert not closed.any(), "exactly zero, not nearly"
        for name in ("A", "g", "B"):
            assert truth[name].all(), "the partner: open ranks do learn"

    def test_leave_no_trace_of_their_values(self) -> None:
        inputs, s = draw(dtype=torch.float32), self.OPEN.float()
        y = gated_lora(*inputs, s)
        with torch.no_grad():
            inputs.A[1], inputs.B[:, 1], inputs.g[1] = 1e3, -1e3, 1e3
        assert torch.equal(bits(y), bits(gated_lora(*inputs, s)))
        assert not torch.equal(y, gated_lora(*inputs, torch.ones(RANK)))

    @pytest.mark.parametrize("adapter", [torch.float32, BF16])
    def test_hold_in_half_precision(self, adapter: torch.dtype) -> None:
        inputs, keep = draw(dtype=BF16, adapter=adapter), self.OPEN
        y = gated_lora(*inputs, SCALE * keep.float())
        found = gradients(y, inputs, torch.randn_like(y))
        for closed in (found["A"][~keep], found["g"][~keep], found["B"][:, ~keep]):
            assert not closed.any()
        assert found["A"][keep].all()


class TestRowScale:
    """ALLoRA: the weights' gradients are scaled per output row; nothing else is."""

    @staticmethod
    def oracle(inputs: Inputs, scale: Tensor) -> Tensor:
        """ΔW per sample, with a hook that scales dL/d(ΔW) and nothing else."""
        x, base_out, A, g, B = inputs
        dW = (B * (SCALE * g).unsqueeze(-2)) @ A  # [..., out, in]
        dW.register_hook(lambda G: G * scale[:, None])
        return base_out + (dW @ x.unsqueeze(-1)).squeeze(-1)

    @pytest.mark.parametrize("layout", ["2-D, shared gate", "3-D, shared gate", "3-D, gate per sample", "rank 1"])
    def test_scales_the_gradient_of_the_update_matrix(self, layout: str) -> None:
        inputs, scale = draw(layout), torch.rand(OUT, dtype=torch.float64) + 0.1
        y, truth = gated_lora(*inputs, SCALE, scale), self.oracle(inputs, scale)
        torch.testing.assert_close(y, truth)
        dy = torch.randn_like(y)
        found, expected = gradients(y, inputs, dy), gradients(truth, inputs, dy)
        for name in ("A", "B", "x", "base_out"):
            torch.testing.assert_close(found[name], expected[name])

    def test_leaves_value_input_base_and_gate_alone(self) -> None:
        inputs, scale = draw(), torch.rand(OUT, dtype=torch.float64) + 0.1
        plain, scaled = gated_lora(*inputs, SCALE), gated_lora(*inputs, SCALE, scale)
        assert torch.equal(plain, scaled)
        dy = torch.randn_like(plain)
        unscaled, found = gradients(plain, inputs, dy), gradients(scaled, inputs, dy)
        for name in ("x", "base_out", "g"):
            assert torch.equal(found[name], unscaled[name])
        torch.testing.assert_close(found["B"], scale[:, None] * unscaled["B"])
        assert not torch.allclose(found["B"], unscaled["B"])
        ratio = found["A"] / unscaled["A"]  # the partner: for A no factor per row would do
        assert ((ratio.amax(1) - ratio.amin(1)) > 1e-3).all()

    def test_of_ones_changes_nothing(self) -> None:
        inputs = draw()
        y = gated_lora(*inputs, SCALE, torch.ones(OUT, dtype=torch.float64))
        dy = torch.randn_like(y)
        assert_all_close(gradients(y, inputs, dy), gradients(gated_lora(*inputs, SCALE), inputs, dy))

    def test_is_applied_in_the_parameters_precision(self) -> None:
        inputs, scale = draw(dtype=BF16, adapter=torch.float32), torch.rand(OUT) + 0.1
        y = gated_lora(*inputs, SCALE, scale)
        dy = torch.randn_like(y)
        exact = like(inputs, torch.float64)
        truth = gradients(self.oracle(exact, scale.double()), exact, dy)
        found = gradients(y, inputs, dy)
        assert found["A"].dtype == found["B"].dtype == torch.float32
        assert relative(found["A"], truth["A"]) < 1e-5
        assert relative(found["B"], truth["B"]) < 1e-5


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

    def test_row_scale_costs_one_more_product(self) -> None:
        assert self.products(EVERYTHING, torch.rand(OUT)) == 5
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
    def test_kept_are_the_inputs_and_one_narrow_activation(
        self, layout: str, x: torch.dtype, base: torch.dtype, adapter: torch.dtype, cast: bool, h: torch.dtype
    ) -> None:
        inputs = draw(layout, dtype=x, base=base, adapter=adapter)
        with kept_tensors() as kept, autocast(cast):
            gated_lora(*inputs, SCALE)
        activation = inputs.x[..., 0].numel() * RANK * h.itemsize
        assert size(kept) == size([inputs.x, inputs.A, inputs.g, inputs.B]) + activation
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
