"""ALLoRA's row norms, scales and gradients, in the kernel alone.

The numbers in comments are those of the properties in the method's specification.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from adalora_loop import F64, close_to
from hypothesis import given
from hypothesis import strategies as st
from reference import allora as twin
from torch import Tensor
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from loralloc.kernel import gated_lora
from loralloc.methods.allora.rows import row_norms, row_scales

OUT, IN = 7, 9


def factors(r: int = 3, seed: int = 0, dtype=F64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    A, B = torch.randn(r, IN, generator=generator, dtype=F64), torch.randn(OUT, r, generator=generator, dtype=F64)
    return A.to(dtype).requires_grad_(), B.to(dtype).requires_grad_()


def through_kernel(x: Tensor, A: Tensor, B: Tensor, s: Tensor | None) -> Tensor:
    base_out = torch.zeros(*x.shape[:-1], len(B), dtype=x.dtype)
    return gated_lora(x, base_out, A, torch.ones(len(A), dtype=F64 if A.dtype == F64 else torch.float32), B, 1.0, s)


def scales_of(A: Tensor, B: Tensor, eta: float = 2.0) -> Tensor:
    return row_scales(row_norms(A.detach()[None], torch.ones(1, len(A), dtype=F64), B.detach()[None]), eta)[0]


# ---- Row norms and scales ----


@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**16), st.booleans())
def test_row_norms_are_those_of_the_matrix_that_is_never_formed(n, r, n1, n2, seed, zero):  # 8
    generator = torch.Generator().manual_seed(seed)
    A, g, B = (torch.randn(*shape, generator=generator, dtype=F64) for shape in ((n, r, n2), (n, r), (n, n1, r)))
    if zero:
        B[:, 0] = 0
        A[:, -1] = A[:, 0]  # rank-deficient
    found = row_norms(A, g, B)
    delta = (B * g[:, None]) @ A
    close_to(found, torch.linalg.vector_norm(delta, dim=2), 1e-7)
    R = torch.linalg.qr(A.mT, mode="r").R
    close_to(found, torch.linalg.vector_norm((B * g[:, None]) @ R.mT, dim=2), 1e-7)
    for k in range(n):
        close_to(found[k, 0].item(), twin.row_norm(delta[k], 0), 1e-7)
    assert not zero or not found[:, 0].any()


def test_row_norms_of_single_precision_are_as_exact_as_their_numbers():
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(1, 4, 64, generator=generator)
    A[0, 1] = A[0, 0] + 1e-3 * A[0, 1]  # nearly dependent: squared in single precision, the difference would drown
    B = torch.randn(1, 32, 4, generator=generator)
    B[0, :, 1] = -B[0, :, 0]
    B[0, :, 2:] = 0
    truth = torch.linalg.vector_norm(B[0].double() @ A[0].double(), dim=1)
    close_to(row_norms(A, torch.ones(1, 4), B)[0].double(), truth, 1e-6)
    gram = A @ A.mT
    drowned = ((B @ gram) * B).sum(2).clamp(min=0).sqrt()[0].double()
    assert ((drowned - truth).abs() / truth).max() > 1e-3


@pytest.mark.parametrize("eta", [0.5, 1.0, 2.0])
def test_the_scale_falls_from_eta(eta):  # 1, 7
    norms = torch.tensor([0, 1 / eta**2, 3 / eta**2], dtype=F64)
    close_to(row_scales(norms, eta), torch.tensor([eta, eta / math.sqrt(2), eta / 2], dtype=F64))
    many = row_scales(torch.linspace(0, 100, 1000, dtype=F64), eta)
    assert ((many > 0) & (many <= eta)).all()
    assert (many.diff() < 0).all()
    close_to(row_scales(torch.tensor([4.0], dtype=F64), 1e6), torch.tensor([0.5], dtype=F64))


def test_the_scale_depends_on_the_product_alone():  # 9
    A, B = factors()
    M = torch.randn(3, 3, dtype=F64)
    close_to(scales_of(M @ A, B @ torch.linalg.inv(M)), scales_of(A, B), 1e-9)
    order = torch.randperm(OUT)
    close_to(scales_of(A, B[order]), scales_of(A, B)[order])
    assert not torch.allclose(scales_of(A, B[order]), scales_of(A, B))


# ---- Gradients ----


@pytest.mark.usefixtures("by_hand")  # without rows the kernel would go another way, with other roundings
def test_gradients_are_those_of_the_hook_on_the_update():  # 3, 4
    A, B = factors()
    W, x = torch.randn(OUT, IN, dtype=F64), torch.randn(5, IN, dtype=F64, requires_grad=True)
    dy = torch.randn(5, OUT, dtype=F64)
    s = scales_of(A, B)
    assert torch.equal(through_kernel(x, A, B, s), through_kernel(x, A, B, None))  # 2
    found = torch.autograd.grad(through_kernel(x, A, B, s), (x, A, B), dy)
    close_to(found, torch.autograd.grad(twin.layer(x, 0 * W, A, B, 2.0), (x, A, B), dy))
    plain_x, plain_A, plain_B = torch.autograd.grad(through_kernel(x, A, B, None), (x, A, B), dy)
    assert torch.equal(found[0], plain_x)
    close_to(found[2], s[:, None] * plain_B)
    # The partner: no diagonal matrices on both sides make A's gradient from the plain one, for those keep every
    # ratio of 2×2 products.
    ratio = found[1] / plain_A
    assert (ratio[0, 0] * ratio[1, 1] / (ratio[0, 1] * ratio[1, 0]) - 1).abs() > 1e-2


def test_gradcheck_passes_for_the_input_and_fails_for_the_factors():  # 3
    A, B = factors()
    x, s = torch.randn(5, IN, dtype=F64), scales_of(A, B)
    assert gradcheck(lambda x: through_kernel(x, A.detach(), B.detach(), s), x.clone().requires_grad_())
    for check in (lambda A: through_kernel(x, A, B.detach(), s), lambda B: through_kernel(x, A.detach(), B, s)):
        leaf = (A if check.__code__.co_varnames[0] == "A" else B).detach().clone().requires_grad_()
        assert not gradcheck(check, leaf, raise_exception=False)


def test_equal_rows_give_a_multiple_of_loras_gradients():  # 5
    A, B = factors()
    with torch.no_grad():
        B /= torch.linalg.vector_norm(B @ A, dim=1, keepdim=True)
    x, dy, s = torch.randn(5, IN, dtype=F64), torch.randn(5, OUT, dtype=F64), scales_of(A, B)
    found = torch.autograd.grad(through_kernel(x, A, B, s), (A, B), dy)
    for ours, theirs in zip(found, torch.autograd.grad(through_kernel(x, A, B, None), (A, B), dy), strict=True):
        close_to(ours, theirs / math.sqrt(1.25))


def test_with_one_row_it_is_lora_at_another_rate():  # 5
    A, B = factors()
    B = B[:1].detach().requires_grad_()
    x, dy, s = torch.randn(5, IN, dtype=F64), torch.randn(5, 1, dtype=F64), scales_of(A, B)
    found = torch.autograd.grad(through_kernel(x, A, B, s), (A, B), dy)
    close_to(found, tuple(s * g for g in torch.autograd.grad(through_kernel(x, A, B, None), (A, B), dy)))
    assert s.item() < 1.9


def test_a_step_can_point_uphill():  # 14: as in the paper's formula, for which ours is no excuse
    A = torch.tensor([[1.0, 0.0]], dtype=F64, requires_grad=True)
    B = torch.tensor([[1.0], [4.0]], dtype=F64, requires_grad=True)
    x = torch.tensor([[0.0, 1.0]], dtype=F64)
    dy = torch.tensor([[-3.0, 1.0]], dtype=F64)  # g_1 = -3 v, g_2 = v, with v orthogonal to A
    grad_A, grad_B = torch.autograd.grad(through_kernel(x, A, B, scales_of(A, B)), (A, B), dy)
    assert not grad_B.any()
    assert grad_A[0, 1].item() == pytest.approx(-0.743, abs=1e-3)
    (true_A,) = torch.autograd.grad(through_kernel(x, A, B, None), A, dy)
    assert true_A[0, 1].item() == pytest.approx(1.0)


def test_loss_scale_and_clip_order():  # 16, 17
    A, B = factors()
    x, dy, s = torch.randn(5, IN, dtype=F64), torch.randn(5, OUT, dtype=F64), scales_of(A, B)
    found = torch.autograd.grad(through_kernel(x, A, B, s), (A, B), dy)
    close_to(torch.autograd.grad(through_kernel(x, A, B, s), (A, B), 1024 * dy), tuple(1024 * g for g in found))

    def clipped(gradient: Tensor, limit: float) -> Tensor:
        return gradient * min(1.0, limit / float(gradient.norm()))

    (plain_B,) = torch.autograd.grad(through_kernel(x, A, B, None), B, dy)
    for limit, same in ((1e-2, False), (1e6, True)):
        assert torch.allclose(clipped(found[1], limit), s[:, None] * clipped(plain_B, limit)) is same


def test_half_precision_is_within_two_percent():  # 17
    A, B = factors()
    x, dy, s = torch.randn(64, IN, dtype=F64), torch.randn(64, OUT, dtype=F64), scales_of(A, B)
    truth = torch.autograd.grad(through_kernel(x, A, B, s), (A, B), dy)
    short_A, short_B = (t.detach().bfloat16().requires_grad_() for t in (A, B))
    y = through_kernel(x.bfloat16(), short_A, short_B, scales_of(short_A, short_B).float())
    for ours, exact in zip(torch.autograd.grad(y, (short_A, short_B), dy.bfloat16()), truth, strict=True):
        assert (ours.double() - exact).norm() / exact.norm() < 0.02


def test_recomputing_activations_changes_nothing():  # 18
    A, B = factors()
    x, s = torch.randn(5, IN, dtype=F64, requires_grad=True), scales_of(A, B)
    kept = torch.autograd.grad(through_kernel(x, A, B, s).square().sum(), (A, B))
    y = checkpoint(through_kernel, x, A, B, s, use_reentrant=False)
    for ours, theirs in zip(kept, torch.autograd.grad(y.square().sum(), (A, B)), strict=True):
        assert torch.equal(ours, theirs)


class _Allocations(TorchDispatchMode):
    """Numbers in the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and not func.is_view:
                self.largest = max(self.largest, tensor.numel())
        return out


def test_no_matrix_of_the_weights_size_is_made():  # 19
    n1, n2, r, tokens = 300, 200, 4, 5
    A = torch.randn(r, n2, requires_grad=True)
    B, W, x = torch.randn(n1, r, requires_grad=True), torch.randn(n1, n2), torch.randn(tokens, n2, requires_grad=True)
    with _Allocations() as ours:
        norms = row_norms(A.detach()[None], torch.ones(1, r), B.detach()[None])
        through_kernel(x, A, B, row_scales(norms, 2.0)[0]).sum().backward()
    assert ours.largest < n1 * n2 / 10
    with _Allocations() as formed:
        twin.layer(x, W, A, B, 2.0).sum().backward()
    assert formed.largest == n1 * n2


def test_a_row_that_is_pulled_grows_as_the_closed_form_says():  # 13
    """(u + 1/η²)^1.5 = η⁻³ + 1.5 p ‖A‖² t for one row, A frozen, constant pull p along A."""
    eta, pull, lr, steps = 2.0, 0.7, 4e-3, 1250
    A, B = torch.tensor([[0.6, 0.8, 1.0]], dtype=F64), torch.zeros(1, 1, dtype=F64, requires_grad=True)
    direction = A / A.norm()
    for _ in range(steps):
        y = through_kernel(direction, A, B, scales_of(A, B, eta))
        (gradient,) = torch.autograd.grad(-pull * y.sum(), B)
        B = (B.detach() - lr * gradient).requires_grad_()
    size = float(A.norm())
    u = float(B.detach().abs()) * size
    # The gradient of B is -pull ‖A‖, so u grows by lr · s · pull ‖A‖² a step.
    expected = eta**-3 + 1.5 * pull * size**2 * lr * steps
    assert (u + eta**-2) ** 1.5 == pytest.approx(expected, rel=0.01)
    assert u < 0.9 * eta * pull * size**2 * lr * steps  # the partner: LoRA at η · lr goes on straight
