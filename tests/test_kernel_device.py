"""The kernel on the device of `pytest --device`, against the sum of rank-one terms in float64 on the CPU.

On the CPU the other files say the same and more; this one is for GPUs, whose products are others.
"""

from __future__ import annotations

import pytest
import torch
from kernels import BF16, IN, OUT, RANK, SCALE, Inputs, draw, layouts, relative
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from loralloc.kernel import gated_linear, gated_lora

pytestmark = pytest.mark.usefixtures("either_way")

F32, F64, F16 = torch.float32, torch.float64, torch.float16
NAMES = ("x", "A", "g", "B")
ROUNDING = {F64: 1e-12, F32: 1e-5, F16: 1e-2, BF16: 5e-2}
ROWS = torch.linspace(0.2, 3.0, OUT, dtype=F64)
row_scales = pytest.mark.parametrize("rows", [None, ROWS], ids=["plain", "row_scale"])


def leaves(inputs: Inputs, device: str) -> Inputs:
    return Inputs(*(t.detach().to(device).requires_grad_() for t in inputs))


def gradients(y: Tensor, inputs: Inputs) -> dict[str, Tensor]:
    """Of Σ w · y with weights that depend on the shape alone."""
    weights = torch.linspace(-1, 1, y.numel(), dtype=F64).view(y.shape).to(y)
    found = torch.autograd.grad((y * weights).sum(), [getattr(inputs, name) for name in NAMES])
    return dict(zip(NAMES, found, strict=True))


def twin(inputs: Inputs, W: Tensor, rows: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Value and gradients by plain operations in float64, with a hook that scales ∂L/∂(ΔW) per row."""
    x, _, A, g, B = wide = Inputs(*(t.detach().to("cpu", F64).requires_grad_() for t in inputs))
    delta = (B * (SCALE * g).unsqueeze(-2)) @ A
    if rows is not None:
        delta.register_hook(lambda G: G * rows[:, None])
    y = linear(x, W.to("cpu", F64)) + (delta @ x.unsqueeze(-1)).squeeze(-1)
    found = gradients(y, wide)
    if rows is not None:  # what flows to the input and the gates is not scaled
        found |= {name: value for name, value in twin(inputs, W, None)[1].items() if name in ("x", "g")}
    return y.detach(), found


@layouts
@row_scales
@pytest.mark.parametrize("in_one", [False, True], ids=["behind a layer", "with its layer"])
@pytest.mark.parametrize(("dtype", "adapter"), [(F64, F64), (F32, F32), (BF16, F32), (BF16, BF16), (F16, F32)])
def test_value_and_gradients(
    layout: str, rows: Tensor | None, in_one: bool, dtype: torch.dtype, adapter: torch.dtype, device: str
) -> None:
    inputs = leaves(draw(layout, dtype=dtype, adapter=adapter), device)
    W = torch.randn(OUT, IN, dtype=dtype).to(device)
    s = None if rows is None else rows.to(device, torch.promote_types(dtype, F32))
    x, _, A, g, B = inputs
    y = gated_linear(x, W, None, A, g, B, SCALE, s) if in_one else gated_lora(x, linear(x, W), A, g, B, SCALE, s)
    assert y.device.type == device
    value, expected = twin(inputs, W, rows)
    assert relative(y.cpu(), value) < ROUNDING[dtype]
    for name, gradient in gradients(y, inputs).items():
        assert gradient.dtype == getattr(inputs, name).dtype
        assert relative(gradient.cpu(), expected[name]) < ROUNDING[dtype], name


@row_scales
def test_autocast_multiplies_in_half_precision(rows: Tensor | None, device: str) -> None:
    inputs = leaves(draw(dtype=F32), device)
    W, s = torch.randn(OUT, IN).to(device), None if rows is None else rows.to(device, F32)
    with torch.autocast(device, BF16):
        y = gated_linear(inputs.x, W, None, inputs.A, inputs.g, inputs.B, SCALE, s)
    value, expected = twin(inputs, W, rows)
    assert 1e-4 < relative(y.cpu(), value) < ROUNDING[BF16]
    for name, gradient in gradients(y, inputs).items():
        assert gradient.dtype is F32
        assert relative(gradient.cpu(), expected[name]) < ROUNDING[BF16], name


def test_closed_ranks_learn_nothing(device: str) -> None:
    inputs = leaves(draw(dtype=F32), device)
    s = torch.tensor([1.0, 0.0, 2.0]).to(device)
    found = gradients(gated_lora(*inputs, s), inputs)
    assert not any(t.any() for t in (found["A"][1], found["g"][1], found["B"][:, 1]))
    assert all(t.all() for t in (found["A"][0], found["g"][0], found["B"][:, 0]))


@row_scales
def test_recomputing_gives_the_same_gradients(rows: Tensor | None, device: str) -> None:
    inputs = leaves(draw(dtype=F32), device)
    s = None if rows is None else rows.to(device, F32)

    def block(*tensors: Tensor) -> Tensor:
        return gated_lora(*tensors, SCALE, s).square()  # type: ignore[arg-type]

    plain = gradients(block(*inputs), inputs)
    again = gradients(checkpoint(block, *inputs, use_reentrant=False), inputs)
    for name in NAMES:
        torch.testing.assert_close(again[name], plain[name])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@row_scales
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_compiled_layer_equals_the_eager_one(rows: Tensor | None, dtype: torch.dtype, device: str) -> None:
    torch._dynamo.reset()
    inputs = leaves(draw(dtype=dtype, adapter=F32), device)
    W, s = torch.randn(OUT, IN, dtype=dtype).to(device), None if rows is None else rows.to(device, F32)

    def layer(x: Tensor, A: Tensor, g: Tensor, B: Tensor) -> Tensor:
        return gated_linear(x, W, None, A, g, B, SCALE, s)

    wanted = (inputs.x, inputs.A, inputs.g, inputs.B)
    eager, compiled = layer(*wanted), torch.compile(layer, fullgraph=True)(*wanted)
    assert relative(compiled.cpu(), eager.cpu()) < ROUNDING[dtype]
    expected = gradients(eager, inputs)
    for name, gradient in gradients(compiled, inputs).items():
        assert relative(gradient.cpu(), expected[name].cpu()) < ROUNDING[dtype], name


def test_no_call_waits_for_the_device(device: str) -> None:
    """On a GPU `torch.cuda.set_sync_debug_mode` raises at a wait; on the CPU this holds for any work."""
    inputs = leaves(draw(dtype=F32), device)
    dy, on_gpu = torch.ones(2, 3, OUT).to(device), device == "cuda"
    wanted = [getattr(inputs, name) for name in NAMES]
    if on_gpu:
        torch.cuda.set_sync_debug_mode("error")
    try:
        found = torch.autograd.grad(gated_lora(*inputs, SCALE), wanted, dy)
    finally:
        if on_gpu:
            torch.cuda.set_sync_debug_mode("default")
    assert [len(t) for t in found] == [2, RANK, RANK, OUT]
