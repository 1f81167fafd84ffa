// The kernel's `gated_linear` with its backward pass, in C++: the same operations as `_GatedLoRA` in kernel.py, without
// Python between them. In a small layer, and wherever a GPU waits for the host, that is most of a layer's time.

#include <ATen/autocast_mode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/extension.h>

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// As `to`, without the call where there is nothing to do: it is made a dozen times a layer.
Tensor cast(const Tensor& t, at::ScalarType dtype) {
  return t.scalar_type() == dtype ? t : t.to(dtype);
}

// Dtype of the matrix products: autocast's when it is on, else the wider of input and adapter.
at::ScalarType compute_dtype(const Tensor& x, const Tensor& A) {
  const auto device = x.device().type();
  return !x.is_meta() && at::autocast::is_autocast_enabled(device) ? at::autocast::get_autocast_dtype(device)
                                                   : at::promote_types(x.scalar_type(), A.scalar_type());
}

// [..., d] -> [N, d].
Tensor flat(const Tensor& t) {
  return t.dim() == 2 ? t : t.reshape_symint({-1, t.sym_size(-1)});
}

// [N, d] -> [..., d], leading dimensions as in `like`. Code after the layer may change the result in place, which
// autograd refuses for a view that was made inside a function.
Tensor unflat(const Tensor& t, const Tensor& like) {
  if (like.dim() == 2) {
    return t;
  }
  auto shape = like.sym_sizes().vec();
  shape.back() = t.sym_size(1);
  return at::_unsafe_view_symint(t, shape);
}

// total + a b, in the wider of the two dtypes. `total` is ours, so it is overwritten, but not in a dispatch mode: it may
// keep the sum's first part, as selective checkpointing does, and counts no operation in place, as FlopCounterMode.
Tensor plus(const Tensor& total, const Tensor& a, const Tensor& b) {
  const auto wide = at::promote_types(total.scalar_type(), a.scalar_type());
  const Tensor mine = cast(total, wide), a_ = cast(a, wide), b_ = cast(b, wide);
  return c10::impl::dispatch_mode_enabled() ? at::addmm(mine, a_, b_) : mine.addmm_(a_, b_);
}

struct GatedLinear : public torch::autograd::Function<GatedLinear> {
  // Positions of the arguments that may need a gradient.
  enum : size_t { X, A_, G, B_ };

  static Tensor forward(
      AutogradContext* ctx, const Tensor& x, const Tensor& A, const Tensor& g, const Tensor& B, const Tensor& W,
      const std::optional<Tensor>& b, const Tensor& s, const std::optional<Tensor>& row_scale) {
    const auto dtype = compute_dtype(x, A);
    const Tensor x_ = flat(x), out = at::linear(x_, W, b);
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const Tensor h = at::mm(cast(x_, dtype), cast(A, dtype).t());
    const Tensor gate = cast(g * s, dtype);
    const Tensor y = plus(out, h * gate, cast(B, dtype).t());
    ctx->save_for_backward(
        {x, A, g, B, x.requires_grad() ? W : Tensor(), h, gate, s, row_scale.value_or(Tensor())});
    ctx->saved_data["dtype"] = static_cast<int64_t>(dtype);
    return unflat(cast(y, out.scalar_type()), x);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &A = saved[1], &g = saved[2], &B = saved[3], &W = saved[4];
    const Tensor &s = saved[7], &row_scale = saved[8];
    const auto dtype = static_cast<at::ScalarType>(ctx->saved_data["dtype"].toInt());
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);

    Tensor h = saved[5], gate = saved[6];
    if (at::GradMode::is_enabled()) {  // a second derivative is wanted: both must depend on x, A and g again
      h = at::mm(cast(flat(x), dtype), cast(A, dtype).t());
      gate = cast(g * s, dtype);
    }
    const Tensor dy = flat(grad_outputs[0]), dy_ = cast(dy, dtype);
    const bool need_x = ctx->needs_input_grad(X), need_A = ctx->needs_input_grad(A_);
    const bool need_g = ctx->needs_input_grad(G), need_B = ctx->needs_input_grad(B_);
    variable_list gradients(8);

    const Tensor t = at::mm(dy_, cast(B, dtype));
    const Tensor t_gated = t * gate;
    if (need_x) {
      const Tensor dx = plus(at::mm(dy, cast(W, dy.scalar_type())), t_gated, cast(A, dtype));
      gradients[X] = cast(dx, x.scalar_type()).view_symint(x.sym_sizes());
    }
    if (need_A) {  // ALLoRA's rows are scaled inside the contraction over them
      const Tensor rows = row_scale.defined() ? at::mm(dy_, cast(row_scale.unsqueeze(1) * B, dtype)) * gate : t_gated;
      gradients[A_] = cast(at::mm(rows.t(), cast(flat(x), dtype)), A.scalar_type());
    }
    if (need_g) {
      const auto wide = at::promote_types(t.scalar_type(), at::kFloat);
      gradients[G] = cast(cast(t * h, wide).sum(0) * s, g.scalar_type());
    }
    if (need_B) {
      const Tensor dB = at::mm((h * gate).t(), dy_).t();
      gradients[B_] = cast(row_scale.defined() ? row_scale.unsqueeze(1) * dB : dB, B.scalar_type());
    }
    return gradients;
  }
};

Tensor gated_linear(
    const Tensor& x, const Tensor& W, const std::optional<Tensor>& b, const Tensor& A, const Tensor& g, const Tensor& B,
    const Tensor& s, const std::optional<Tensor>& row_scale) {
  return GatedLinear::apply(x, A, g, B, W, b, s, row_scale);
}

}  // namespace

// A name of its own: PyTorch's would have a number in it from the second build of a process on.
PYBIND11_MODULE(loralloc_kernel, module) {
  // Other threads of Python go on meanwhile, as they do in operations of PyTorch.
  module.def("gated_linear", &gated_linear, pybind11::call_guard<pybind11::gil_scoped_release>());
}
