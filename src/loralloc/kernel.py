"""The one kernel every method runs on: a gated low-rank update, added to the base layer's output.

    y = base_out + s · ((x Aᵀ) ∘ g) Bᵀ        `gated_lora`: behind any layer
    y = x Wᵀ + b + s · ((x Aᵀ) ∘ g) Bᵀ        `gated_linear`: in one step with a frozen linear layer

There are two implementations, and `_composes` says which is used. In the plain case (one dtype of 32 bits or more, one
gate for all samples, no `row_scale`, no autocast) the update consists of ordinary operations, with less Python overhead
per layer than PEFT's own LoRA. Every other case uses the autograd function `_GatedLoRA`, whose backward pass is written
by hand. Where it has been built (`native/`), `gated_linear` with one gate for all samples is that function in C++. Its
notable choices:

* The add is part of the matrix product (`addmm`), and the scale is folded into the gate. Besides parameters, only the
  input, the r-wide activation and its factor s · g are saved for the backward pass: with a base model in half
  precision, no copy of the input in the adapter's dtype. On a CPU, products with r columns are computed transposed.
* `gated_linear` also computes the layer's own product, forward and backward, and adds to both in place. Compared with
  `gated_lora` behind a layer, this saves a copy and a sum of wide tensors, and one node of the autograd graph.
* `row_scale` multiplies the *weight* gradients of each output row (ALLoRA, arXiv 2410.09692): the input's gradient
  is untouched, and because the scale sits inside the contraction over rows, A's gradient is exact too. Both products
  with the output's gradient dy are one, dy [B | SB] with S = diag(row_scale): dy is read once and never rescaled.
* Second derivatives are exact. The saved r-wide activation is a constant to autograd, so it is recomputed from x and
  A when the backward pass is itself being differentiated.

| base_out or W, x     | A, B | autocast | products in | y    | gradients of A, B, g   |
|----------------------|------|----------|-------------|------|------------------------|
| fp32                 | fp32 | off      | fp32        | fp32 | fp32                   |
| bf16                 | bf16 | off      | bf16        | bf16 | bf16                   |
| bf16                 | fp32 | off      | fp32        | bf16 | fp32                   |
| any                  | any  | bf16     | bf16        | as base_out | dtype of the parameter |

Each gradient comes back in the dtype of its tensor; gates are fp32 or wider. The sum with base_out is formed in the
wider of the two dtypes. Autocast is read once, in forward: a backward pass by hand uses the same dtype, whatever
surrounds it; that of ordinary operations follows autocast around it, as anywhere in PyTorch. Scale and gate are
multiplied in fp32 or wider and rounded once, to the dtype of the products.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import linear
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from loralloc import native


def gated_lora(
    x: Tensor,
    base_out: Tensor,
    A: Tensor,
    g: Tensor,
    B: Tensor,
    s: float | Tensor,
    row_scale: Tensor | None = None,
) -> Tensor:
    """Return `base_out + s · ((x Aᵀ) ∘ g) Bᵀ`.

    Args:
        x: Input of the adapter, [..., in].
        base_out: Output of the frozen layer, [..., out], leading dimensions as in `x`.
        A: Down projection, [r, in].
        g: Gates, [r]; or per sample, broadcastable against [..., r] (for example [n, 1, r]).
        B: Up projection, [out, r].
        s: Fixed scale: a number, or [r] where ranks are shut off for good (a zero stops both the rank's
            contribution and every gradient through it). Never differentiated.
        row_scale: Factor of the weight gradients per output row, [out]; None means 1. Never differentiated.

    Returns:
        [..., out], in the dtype of `base_out`.
    """
    if _composes(x, base_out, A, g, row_scale):
        return _unflat(torch.addmm(_flat(base_out), linear(_flat(x), A) * _scaled(g, s), B.t()), x)
    return _GatedLoRA.apply(x, base_out, None, None, A, g, B, s, row_scale)  # type: ignore[no-any-return]


def gated_linear(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    A: Tensor,
    g: Tensor,
    B: Tensor,
    s: float | Tensor,
    row_scale: Tensor | None = None,
) -> Tensor:
    """Return `x Wᵀ + b + s · ((x Aᵀ) ∘ g) Bᵀ`.

    Args:
        x: Input of layer and adapter, [..., in].
        W: Weight of the frozen layer, [out, in]. Never differentiated.
        b: Its bias, [out], or None. Never differentiated.
        A: As in `gated_lora`.
        g: As in `gated_lora`.
        B: As in `gated_lora`.
        s: As in `gated_lora`.
        row_scale: As in `gated_lora`.

    Returns:
        [..., out], in the dtype that `torch.nn.functional.linear(x, W, b)` has.
    """
    if g.dim() == 1 and (compiled := _compiled()) is not None:
        return compiled(x, W, b, A, g, B, s if isinstance(s, Tensor) else g.new_tensor(s), row_scale)
    if _composes(x, W, A, g, row_scale):
        flat = _flat(x)
        out = linear(flat, W, b)
        add = out.addmm_ if _may_overwrite() else out.addmm
        return _unflat(add(linear(flat, A) * _scaled(g, s), B.t()), x)
    return _GatedLoRA.apply(x, None, W, b, A, g, B, s, row_scale)  # type: ignore[no-any-return]


def _compiled() -> Callable[..., Tensor] | None:
    """`gated_linear` in C++, if it has been built, and nothing is to look into it.

    Dispatch modes look at its operations, so they make no difference. A checkpoint recomputes what was saved for the
    backward pass, and may do so in another mode than that of the forward pass: both must have used the same function.
    """
    if torch.compiler.is_compiling() or (built := native.loaded()) is None:
        return None
    # A C++ function has neither forward-mode derivatives nor rules for transforms, and a trace would fix its sizes.
    traced = torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() is not None
    return None if traced or forward_ad._current_level >= 0 else built


def _may_overwrite() -> bool:
    """Whether sums may be formed in place: selective checkpointing keeps parts, FlopCounterMode counts no such sum.

    Nor may a transform: of `vmap`, the sum may have a dimension that the layer's own product has not.
    """
    return not (is_in_torch_dispatch_mode() or torch._C._are_functorch_transforms_active())


def _composes(x: Tensor, frozen: Tensor, A: Tensor, g: Tensor, row_scale: Tensor | None) -> bool:
    """Whether ordinary operations are exact, and save no wide tensor for backward that `_GatedLoRA` would not save."""
    return (
        row_scale is None
        and x.dtype is A.dtype
        and frozen.dtype is A.dtype
        and g.dtype is A.dtype
        and g.dim() == 1
        and A.dtype.itemsize >= 4
        and not _autocasts(x.device.type)
    )


def _scaled(g: Tensor, s: float | Tensor) -> Tensor:
    """Return s · g in the dtype of g: the model may have been cast, and s with its adapter only later."""
    gate = g * s
    return gate if gate.dtype is g.dtype else gate.to(g.dtype)


def _autocasts(device: str) -> bool:
    """Whether autocast is on for a kind of device; "meta" has none, and PyTorch refuses the question."""
    return device != "meta" and torch.is_autocast_enabled(device)


def _compute_dtype(x: Tensor, A: Tensor) -> torch.dtype:
    """Dtype of the matrix products: autocast's when it is on, else the wider of input and adapter."""
    device = x.device.type
    if _autocasts(device):
        return torch.get_autocast_dtype(device)
    return torch.promote_types(x.dtype, A.dtype)


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    """A context without autocast. If it is off already, entering one would cost as much as a small layer's product."""
    return torch.autocast(device, enabled=False) if _autocasts(device) else nullcontext()


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """`t.to(dtype)`, without the call where there is nothing to do: it is made ten times a layer."""
    return t if t.dtype == dtype else t.to(dtype)


def _down(x: Tensor, A: Tensor) -> Tensor:
    """Return x Aᵀ, [N, r]."""
    return torch.mm(A, x.t()).t() if _turned(x, A.shape[0]) else torch.mm(x, A.t())


def _times(dy: Tensor, B: Tensor) -> Tensor:
    """Return dy B, [N, r]."""
    return torch.mm(B.t(), dy.t()).t() if _turned(dy, B.shape[1]) else torch.mm(dy, B)


def _between(dy: Tensor, h: Tensor) -> Tensor:
    """Return dyᵀ h, [out, r]; on a CPU as (hᵀ dy)ᵀ, which is faster at any number of ranks."""
    return torch.mm(h.t(), dy).t() if dy.is_cpu else torch.mm(dy.t(), h)


def _turned(t: Tensor, columns: int) -> bool:
    """Whether a product with so many columns is computed transposed, with so many rows.

    MKL computes products with fewer than 16 columns at a half to a tenth of the speed of those with as few rows
    (benchmarks/LOG.md).
    """
    return columns < 16 and t.is_cpu


def _flat(t: Tensor) -> Tensor:
    """[..., d] -> [N, d]."""
    return t if t.dim() == 2 else t.reshape(-1, t.shape[-1])


def _unflat(t: Tensor, like: Tensor) -> Tensor:
    """[N, d] -> [..., d], leading dimensions as in `like`."""
    if like.dim() == 2:
        return t
    shape = (*like.shape[:-1], t.shape[1])
    if torch.is_grad_enabled():
        return t.view(shape)
    # Code after the layer may change its output in place. Autograd refuses that for a view that was made in no-grad
    # mode, as inside an autograd function or a reentrant checkpoint; elsewhere `view` is the cheaper call.
    return torch.ops.aten._unsafe_view.default(t, shape)  # type: ignore[no-any-return]


def _activation(x: Tensor, A: Tensor, g: Tensor, s: float | Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return h = x Aᵀ, [N, r], and the factor s · g of it, in the dtype of the products."""
    return _down(_cast(_flat(x), dtype), _cast(A, dtype)), _cast(g * s, dtype)


class _GatedLoRA(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base_out: Tensor | None,
        W: Tensor | None,
        b: Tensor | None,
        A: Tensor,
        g: Tensor,
        B: Tensor,
        s: float | Tensor,
        row_scale: Tensor | None,
    ) -> Tensor:
        dtype = _compute_dtype(x, A)
        out = _flat(base_out) if W is None else linear(_flat(x), W, b)  # type: ignore[arg-type]
        with _without_autocast(x.device.type):
            h, gate = _activation(x, A, g, s, dtype)
            y = _plus(out, _gate(h, gate, x.shape), _cast(B, dtype).t(), owned=W is not None)
        ctx.dtype = dtype
        ctx.s = None if isinstance(s, Tensor) else s
        W = W if ctx.needs_input_grad[0] else None
        ctx.save_for_backward(x, W, A, g, B, h, gate, s if isinstance(s, Tensor) else None, row_scale)
        return _unflat(_cast(y, out.dtype), x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grad_outputs
        with _without_autocast(dy.device.type):
            return _gradients(ctx, dy)


def _plus(total: Tensor, a: Tensor, b: Tensor, owned: bool) -> Tensor:
    """Return total + a b, in the wider of the two dtypes; in place where `total` is ours, or was cast anyway."""
    wide = torch.promote_types(total.dtype, a.dtype)
    mine = _cast(total, wide)
    add = mine.addmm_ if (owned or mine is not total) and _may_overwrite() else mine.addmm
    return add(_cast(a, wide), _cast(b, wide))


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of the nine arguments, None for those not needed."""
    x, W, A, g, B, h, gate, s, row_scale = ctx.saved_tensors
    s = ctx.s if s is None else s
    need_x, need_base, _, _, need_A, need_g, need_B, *_ = ctx.needs_input_grad
    dtype, shape = ctx.dtype, x.shape
    if torch.is_grad_enabled():  # a second derivative is wanted: both must depend on x, A and g again
        h, gate = _activation(x, A, g, s, dtype)
    dy_ = _cast(_flat(dy), dtype)

    t_gated: Any
    dx = dA = dg = dB = None
    t, t_rows = _activation_gradients(dy_, B, row_scale, need_x or need_g, need_A)
    t_gated = _gate(t, gate, shape) if need_x or (need_A and t_rows is t) else None
    if need_x:
        dx = _cast(_input_gradient(dy, W, t_gated, _cast(A, dtype)), x.dtype).view(shape)
    if need_g:
        dg = _gate_gradient(t, h, s, g, shape)
    if need_A:
        rows = t_gated if t_rows is t else _gate(t_rows, gate, shape)
        dA = _cast(torch.mm(rows.t(), _cast(_flat(x), dtype)), A.dtype)
    if need_B:
        dB = _between(dy_, _gate(h, gate, shape))
        dB = _cast(dB if row_scale is None else row_scale[:, None] * dB, B.dtype)
    return dx, dy if need_base else None, None, None, dA, dg, dB, None, None


def _input_gradient(dy: Tensor, W: Tensor | None, t_gated: Tensor, A: Tensor) -> Tensor:
    """Gradient of x, [N, in]: through the adapter, and through the layer where it is part of the product."""
    if W is None:
        return torch.mm(t_gated, A)
    return _plus(torch.mm(_flat(dy), _cast(W, dy.dtype)), t_gated, A, owned=True)


def _activation_gradients(
    dy: Tensor, B: Tensor, row_scale: Tensor | None, plain: bool, scaled: bool
) -> tuple[Any, Any]:
    """Gradient of the gated activation, [N, r]: (dy B for input and gates, dy S B for A), None where not needed."""
    if row_scale is None:
        t = _times(dy, _cast(B, dy.dtype)) if plain or scaled else None
        return t, t
    scaled_B = _cast(row_scale[:, None] * B, dy.dtype) if scaled else None  # in the parameters' precision, then rounded
    if plain and scaled_B is not None:
        both, rank = _times(dy, torch.cat((_cast(B, dy.dtype), scaled_B), dim=1)), B.shape[1]
        return both.narrow(1, 0, rank), both.narrow(1, rank, rank)
    return (_times(dy, _cast(B, dy.dtype)) if plain else None), (None if scaled_B is None else _times(dy, scaled_B))


def _gate(h: Tensor, gate: Tensor, shape: torch.Size) -> Tensor:
    """Scale the r-wide activation [N, r] by a gate that is [r] or broadcasts against [..., r]."""
    if gate.dim() == 1:
        return h * gate
    return (h.view(*shape[:-1], h.shape[-1]) * gate).reshape(h.shape)


def _gate_gradient(t: Tensor, h: Tensor, s: float | Tensor, g: Tensor, shape: torch.Size) -> Tensor:
    """Gradient of the gate: s · Σ t ∘ h over every dimension along which the gate was broadcast."""
    product = _cast(t * h, torch.promote_types(t.dtype, torch.float32))
    total = product.sum(0) if g.dim() == 1 else product.view(*shape[:-1], h.shape[-1]).sum_to_size(g.shape)
    return _cast(total * s, g.dtype)
