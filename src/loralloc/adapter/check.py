"""The check of an export: stock PEFT loads the files onto the bare base model, and the two models are compared.

What a training loop wraps around a model (accelerate's autocast and its conversion of outputs to fp32) is removed for
both, so that both compute in the dtype of the weights. Layers in 4 or 8 bits compute with their dequantised weights, in
the dtype of the model. The files are loaded onto the base model without the trained adapter, so that a fault of the
trained model cannot hide itself. Three things have to hold:

* the keys of the file are those of the adapter that stock PEFT has loaded: none is missing, none is left over;
* every module's update s · B A is the trained one, up to the rounding of the stored dtype;
* the logits are the trained model's, up to the rounding of the model's dtype or the stored one, and differ from the
  base model's where the trained model's do. For a model that amplifies rounding, the effect of rounding is measured.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor, nn

from loralloc.errors import UserError
from loralloc.outputs import has_choices, logits_of
from loralloc.peft_layers import bare_base, evaluating
from loralloc.plain_lora import plain_sites
from loralloc.quantized import dequantized
from loralloc.sharding import callable_inside, sharded_parts

Batch = Mapping[str, Any]

AMPLIFIED, AMPLIFIED_NARROW = 8, 2
"""How many times the effect of other rounding a logit may differ by, in fp32 and in narrower dtypes."""
DRAWS = 4
"""Other roundings that are tried at most: where a model amplifies them, the effect of one may be twice another's."""
FP32 = torch.finfo(torch.float32).eps

_EXAMPLES: WeakKeyDictionary[nn.Module, Batch] = WeakKeyDictionary()


@dataclass(frozen=True)
class Factors:
    """A module's update with the scale folded in: ΔW = B A.

    Attributes:
        A: [rank, in].
        B: [out, rank].
    """

    A: Tensor
    B: Tensor

    @property
    def rank(self) -> int:
        """Number of ranks that are not closed."""
        return self.A.shape[0]


@dataclass(frozen=True)
class Checked:
    """The outcome of a check.

    Attributes:
        difference: Largest difference of a logit between the trained model and the files.
        allowed: The largest difference that rounding explains.
    """

    difference: float
    allowed: float


def remember_example(model: nn.Module, batch: Batch) -> None:
    """Keep inputs of a model for its export: a sample or two of the data that it was trained on."""
    _EXAMPLES[model] = batch


def check_batch(model: PeftModel, batch: Batch | None) -> Batch:
    """Return inputs for a check: the given batch, else the one from training, else random token ids.

    Raises:
        UserError: There is no batch, and the model takes no token ids.
    """
    batch = _EXAMPLES.get(model) if batch is None else batch
    return _made_up(model) if batch is None else batch


def check_adapter(model: PeftModel, folder: Path, factors: Mapping[str, Factors], batch: Batch) -> Checked:
    """Load an adapter's files with stock PEFT onto the bare base model and compare.

    Args:
        model: The trained model.
        folder: The files.
        factors: The trained updates by full module name.
        batch: Inputs, on any device.

    Raises:
        UserError: The model does not take the inputs.
        RuntimeError: The files do not reproduce the trained adapter.
    """
    stored = min((factor.A.dtype for factor in factors.values()), key=lambda dtype: dtype.itemsize)
    parts = sharded_parts(model)
    with computing_plainly(model):
        trained = logits(model, batch)
        # A forward pass of a sharded model takes all processes, whatever each of them finds. It is not the last one
        # here, after which FSDP2 would leave the root's weights whole.
        rounded: Callable[[int], Tensor] = partial(rounded_otherwise, model, batch, stored)
        if parts:
            rounded = [rounded(draw) for draw in range(DRAWS)].__getitem__
        with bare_base(model) as base:
            with callable_inside(parts, base), warnings.catch_warnings():
                without = logits(base, batch)
                warnings.simplefilter("ignore")  # about keys: they are compared below
                stock = PeftModel.from_pretrained(base, str(folder), autocast_adapter_dtype=stored.itemsize >= 4).eval()
            _compare_keys(folder, stock)
            _compare_updates(stock, factors)
            with callable_inside(parts, base):
                loaded = logits(stock, batch)
        if torch.equal(loaded, without) and not torch.equal(trained, without):
            raise RuntimeError(
                "the reloaded export has no effect: its logits are the base model's; nothing was written"
            )
        return compare(trained, loaded, rounded, stored=stored)


@contextmanager
def computing_plainly(model: nn.Module) -> Iterator[None]:
    """Inside, the model evaluates in its own dtype: no dropout, no autocast, no wrapper of accelerate's.

    Layers in 4 or 8 bits do not round their inputs either: rounding could turn a difference in the last bit into one of
    a percent.
    """
    wrapped = [m for m in model.modules() if "_original_forward" in vars(m) and "forward" in vars(m)]
    forwards = [module.forward for module in wrapped]
    device = next(model.parameters()).device.type
    used = {parameter.device.index for parameter in model.parameters() if parameter.device.type not in ("cpu", "meta")}
    for module in wrapped:
        module.forward = vars(module)["_original_forward"]
    try:
        with (
            evaluating(model),
            dequantized(model),
            torch.random.fork_rng(used),  # all devices, without a list, and each would get a context of this process
            torch.autocast(device, enabled=False),
            torch.no_grad(),
        ):
            yield
    finally:
        for module, forward in zip(wrapped, forwards, strict=True):
            module.forward = forward


def logits(model: nn.Module, batch: Batch) -> Tensor:
    """The logits of a model, or its first output.

    Raises:
        UserError: The model does not take the inputs.
    """
    device = next(model.parameters()).device
    inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    try:
        return logits_of(model(**inputs))
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else "no reason given"
        raise UserError(
            "the export was not checked, so nothing was written: the model does not take the inputs of the check "
            f"({type(error).__name__}: {reason}). The trained model is as it was; export it again with batch={{...}}: "
            "a few of your data as the model's forward takes them"
        ) from error


def rounded_otherwise(model: nn.Module, batch: Batch, stored: torch.dtype, draw: int = 0) -> Tensor:
    """The logits of a model if the outputs of its adapted layers are rounded otherwise.

    Every number changes by one unit in the last place, of its own dtype or of `stored` if that is narrower. Which go up
    and which down differs from `draw` to `draw`.
    """
    generator = torch.Generator().manual_seed(draw)

    def rounded(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        eps = max(torch.finfo(dtype).eps for dtype in (output.dtype, stored))
        signs = 2 * torch.randint(2, output.shape, generator=generator) - 1
        return output + output * (eps * signs).to(output)

    hooks = [site.layer.register_forward_hook(rounded) for site in plain_sites(model)]
    try:
        with torch.compiler.set_stance("force_eager"):  # what has been compiled does not see new hooks
            return logits(model, batch)
    finally:
        for hook in hooks:
            hook.remove()


def compare(
    expected: Tensor,
    actual: Tensor,
    rounded: Callable[[int], Tensor],
    ulps: int = 4,
    stored: torch.dtype = torch.float32,
) -> Checked:
    """Return the largest difference of a logit, and what is allowed.

    Allowed are 1e-5 in fp32 and a few units in the last place of a narrower dtype, relative to the largest logit, or to
    1 if that is larger; or, if this is more, a multiple of the most that other roundings in the adapted layers change:
    `AMPLIFIED` in fp32, `AMPLIFIED_NARROW` in a narrower dtype.

    Args:
        expected: The expected logits.
        actual: The logits to check.
        rounded: Computes the logits of the trained model with other rounding, by the number of the draw; called only
            while the difference is larger than what is allowed otherwise, `DRAWS` times at most.
        ulps: Units in the last place.
        stored: The dtype in which the weights were stored, if it is narrower than that of the logits.

    Raises:
        RuntimeError: The difference is more than rounding.
    """
    eps = max(torch.finfo(dtype).eps for dtype in (expected.dtype, stored))
    tolerance = max(1e-5, ulps * eps) * max(1.0, float(expected.abs().max()))
    difference = _largest(expected, actual)
    for draw in range(DRAWS):
        if difference <= tolerance or not math.isfinite(difference):
            break
        change = _largest(expected, rounded(draw))
        if math.isfinite(change):
            tolerance = max(tolerance, change * (AMPLIFIED if eps <= FP32 else AMPLIFIED_NARROW))
    if not difference <= tolerance:
        raise RuntimeError(
            f"the reloaded export computes something else: logits differ by {difference:.3g} "
            f"(allowed {tolerance:.3g}); nothing was written"
        )
    return Checked(difference, tolerance)


def _largest(expected: Tensor, actual: Tensor) -> float:
    return float((expected.float() - actual.float()).abs().max())


def compare_weights(model: nn.Module, reloaded: nn.Module) -> None:
    """Refuse a model that was reloaded with other weights.

    Raises:
        RuntimeError: A weight is missing, or differs by more than a conversion to the dtype in which it was loaded.
    """
    loaded = reloaded.state_dict()
    for name, weight in model.state_dict().items():
        if name not in loaded or not torch.equal(weight.to(loaded[name].dtype), loaded[name]):
            raise RuntimeError(f"the reloaded export computes something else: {name} differs; nothing was written")


def _compare_keys(folder: Path, stock: PeftModel) -> None:
    """Refuse a file whose keys are not those of the adapter that stock PEFT has loaded."""
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        written = set(file.keys())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about embeddings that are saved along
        lost = sorted(written ^ set(get_peft_model_state_dict(stock)))
    if lost:
        raise RuntimeError(f"stock PEFT does not load all of the export: {lost[:3]}; nothing was written")


def _compare_updates(stock: PeftModel, factors: Mapping[str, Factors]) -> None:
    """Every module's update on random inputs; rounding is bounded entry by entry, so that nothing cancels."""
    generator = torch.Generator().manual_seed(0)
    for site in plain_sites(stock):
        name = site.name
        A, B = factors[name].A.cpu().double(), factors[name].B.cpu().double()
        C, D = site.A.cpu().double(), site.B.cpu().double()
        x = torch.randn(A.shape[1], 4, generator=generator, dtype=torch.float64)
        rounding = 8 * torch.finfo(factors[name].A.dtype).eps * (B.abs() @ (A.abs() @ x.abs()))
        difference = (B @ (A @ x) - site.scaling * (D @ (C @ x))).abs()
        if not (difference <= rounding).all():
            raise RuntimeError(
                f"the reloaded export computes something else: the update of {name} differs; nothing was written"
            )


def _made_up(model: PeftModel) -> dict[str, Tensor]:
    """Random token ids, an end of sequence last: two samples, or one without padding; no longer than the positions."""
    inner: Any = model.get_base_model()
    if getattr(inner, "main_input_name", None) != "input_ids":
        raise UserError(
            f"{type(inner).__name__} does not take token ids: pass batch={{...}}, inputs for the check of the export"
        )
    config = inner.config.get_text_config()
    samples = 1 if getattr(config, "pad_token_id", None) is None else 2
    length = min(16, getattr(config, "max_position_embeddings", None) or 16)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (samples, length), generator=generator)
    end = getattr(config, "eos_token_id", None)
    if isinstance(end, int) and end < config.vocab_size:
        ids[ids == end] = (end + 1) % config.vocab_size  # classifiers need the same number of ends in every sample
        ids[:, -1] = end
    if has_choices(inner):
        ids = torch.stack([ids, ids.flip(1)], dim=1)  # two choices
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {**batch, "decoder_input_ids": ids} if inner.config.is_encoder_decoder else batch
