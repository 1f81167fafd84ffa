"""The kernel: what it computes, what it differentiates, what closed ranks and row scales do.

The naive twin adds the gated rank-one terms one by one and leaves every derivative to autograd. Orders of magnitude:
float64 comparisons are at rounding level; `relative` measures an error against the largest entry of the truth.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernels import BF16, IN, OUT, RANK, SCALE, Inputs, assert_all_close, bits, draw, gradients, layouts, like, relative
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from loralloc.kernel import gated_lora

pytestmark = pytest.mark.usefixtures("either_way")


def twin(x: Tensor, base_out: Tensor, A: Tensor, g: Tensor, B: Tensor, s: float | Tensor) -> Tensor:
    """base_out + Σ_k s_k g_k (x · A_k) B_k: the sum of gated rank-one terms."""
    y = base_out
    for k in range(A.shape[0]):
        s_k = s[k] if isinstance(s, Tensor) else s
        y = y + (s_k * g[..., k] * (x * A[k]).sum(-1)).unsqueeze(-1) * B[:, k]
    return y


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

    @pytest.mark.usefixtures("by_hand")
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
        torch.testing.assert_close(plain, scaled, rtol=0, atol=1e-14)
        dy = torch.randn_like(plain)
        unscaled, found = gradients(plain, inputs, dy), gradients(scaled, inputs, dy)
        for name in ("x", "base_out", "g"):
            torch.testing.assert_close(found[name], unscaled[name], rtol=0, atol=1e-13)
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
