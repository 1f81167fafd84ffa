"""Gates beside PEFT: what its own verbs do to a gated model, and what we rely on in its source.

When PEFT changes, the tests of the last part fail and say what to do.
"""

from __future__ import annotations

import ast
import copy
from functools import cache
from pathlib import Path
from typing import Any

import bitsandbytes
import peft
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from models import (
    BUILDERS,
    gated,
    inputs_of,
    logits,
    lora_config,
    lora_layers,
    naive_delta,
    naive_update,
    on_layer,
    shake,
    tiny_llama,
    tiny_peft,
    token_batch,
    train_adapter,
    two_adapters,
)
from peft import PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from safetensors.torch import load_file
from torch import Tensor, nn

from loralloc.gating import attach_gates, fold_gates, is_gated
from loralloc.peft_layers import MERGE_IGNORES_VARIANTS, MIXED_BATCHES_IGNORE_VARIANTS, NOT_GATED, NOT_LINEAR, SUPPORTED
from loralloc.quantized import keep_trainable

MODELS = list(BUILDERS)

# ---- PEFT's verbs on a gated model ----


def test_set_adapter_switches_gates_on_and_off_with_their_adapter() -> None:
    model, sites = two_adapters()
    ours = logits(model)
    model.set_adapter("plain")
    assert not any(site.gate.requires_grad or site.A.requires_grad for site in sites)
    stock = get_peft_model(tiny_llama(), lora_config("llama", r=2), adapter_name="plain").eval()
    wanted = {n: p for n, p in model.state_dict().items() if ".plain." in n}
    assert not stock.load_state_dict(wanted, strict=False).unexpected_keys
    assert torch.equal(logits(model), logits(stock))  # the ungated adapter is stock PEFT
    model.set_adapter("default")
    assert all(site.gate.requires_grad for site in sites)
    assert torch.equal(logits(model), ours)


def test_both_adapters_active_add_up() -> None:
    model, sites = two_adapters()
    model.base_model.set_adapter(["default", "plain"])
    for site in sites:
        x = inputs_of(site, 3, 5)
        A, B = site.layer.lora_A["plain"].weight, site.layer.lora_B["plain"].weight
        expected = site.layer.base_layer(x) + naive_update(site, x) + site.layer.scaling["plain"] * (x @ A.T @ B.T)
        torch.testing.assert_close(site.layer(x), expected)


def test_inputs_in_half_precision_reach_every_adapter_as_it_needs_them() -> None:
    """Gated ones take them as they are; beside a plain one, and for a plain one alone, PEFT's cast is back."""
    model, sites = two_adapters()
    for site in sites:
        site.layer.base_layer.to(torch.bfloat16)
    for active in (["default"], ["default", "plain"], ["plain"]):
        model.base_model.set_adapter(active)
        for site in sites:
            x = inputs_of(site, 3, 5).to(torch.bfloat16)
            A, B = site.layer.lora_A["plain"].weight, site.layer.lora_B["plain"].weight
            expected = site.layer.base_layer(x).float()
            expected = expected + (naive_update(site, x) if "default" in active else 0)
            expected = expected + (site.layer.scaling["plain"] * (x.float() @ A.T @ B.T) if "plain" in active else 0)
            torch.testing.assert_close(site.layer(x).float(), expected, rtol=2**-6, atol=2**-6)


def test_a_mixed_batch_gives_every_sample_its_own_adapter() -> None:
    model, _ = two_adapters()
    batch = token_batch()
    with torch.no_grad():
        mixed = model(**batch, adapter_names=["default", "plain", "__base__"]).logits
    single = []
    for i, adapter in enumerate(["default", "plain"]):
        model.set_adapter(adapter)
        single.append(logits(model, batch)[i])
    with model.disable_adapter():
        single.append(logits(model, batch)[2])
    torch.testing.assert_close(mixed, torch.stack(single), rtol=1e-5, atol=1e-5)


def test_deleting_the_other_adapter_leaves_the_gated_one_alone() -> None:
    model, sites = two_adapters()
    before = logits(model)
    model.delete_adapter("plain")
    assert torch.equal(logits(model), before)
    fold_gates(sites)
    assert not is_gated(model, "default")


def test_deleting_the_gated_adapter_deletes_its_gates() -> None:
    model, sites = two_adapters()
    model.set_adapter("plain")
    before = logits(model)
    model.delete_adapter("default")
    assert not [name for name, _ in model.named_parameters() if "lora_gate" in name]
    assert not any("default" in site.layer.lora_variant for site in sites)
    assert torch.equal(logits(model), before)


def test_a_model_whose_gated_adapter_was_deleted_is_not_gated() -> None:
    model, _ = two_adapters()
    model.set_adapter("plain")
    model.delete_adapter("default")
    assert not is_gated(model, "default")


def test_two_gated_adapters_are_folded_one_by_one() -> None:
    model, first = gated("llama")
    model.add_adapter("other", lora_config("llama", r=2))
    train_adapter(model, 9, "other")
    model.set_adapter("other")
    second = attach_gates(model)
    shake(second)
    expected = logits(model)
    assert is_gated(model, "default")
    assert is_gated(model, "other")
    fold_gates(first)
    assert not is_gated(model, "default")
    assert is_gated(model, "other")
    assert torch.equal(logits(model), expected)
    fold_gates(second)
    assert not is_gated(model, "other")
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("safe", [False, True])
def test_merging_is_the_forward_pass_and_unmerging_undoes_it(name: str, safe: bool) -> None:
    model, sites = gated(name)
    before = logits(model)
    weights = [site.layer.base_layer.weight.clone() for site in sites]
    model.merge_adapter(safe_merge=safe)
    for site, weight in zip(sites, weights, strict=True):
        torch.testing.assert_close(site.layer.base_layer.weight, weight + naive_delta(site))
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    for site, weight in zip(sites, weights, strict=True):
        torch.testing.assert_close(site.layer.base_layer.weight, weight)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_merge_and_unload_keeps_the_function_and_leaves_a_plain_model(name: str) -> None:
    model, _ = gated(name)
    expected = logits(model)
    merged = copy.deepcopy(model).merge_and_unload()
    assert not any(isinstance(module, LoraLayer) for module in merged.modules())
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(model), expected)  # the deep copy shares nothing


def test_a_safe_merge_refuses_a_gate_that_is_not_finite() -> None:
    model, sites = gated("llama")
    sites[0].gate.data[0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_adapter(safe_merge=True)


def test_peft_refuses_to_convert_a_gated_adapter() -> None:
    model, _ = gated("llama")
    assert not model.base_model.supports_lora_conversion()
    assert tiny_peft("llama").base_model.supports_lora_conversion()


def test_a_saved_gated_adapter_carries_its_gates_and_a_gated_model_takes_them_back(tmp_path: Path) -> None:
    model, sites = gated("llama")
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    for site in sites:
        assert torch.equal(saved[f"base_model.model.{site.name}.lora_gate"], site.gate)
    other = tiny_peft("llama")
    fresh = attach_gates(other)
    other.load_adapter(str(tmp_path), "default", is_trainable=True)
    for site, twin in zip(sites, fresh, strict=True):
        assert torch.equal(twin.gate, site.gate)
        assert torch.equal(twin.B, site.B)


# ---- What we rely on in PEFT ----


@cache
def peft_classes() -> dict[str, ast.ClassDef]:
    """Every class in PEFT's LoRA files by `file.Class`, read without importing an optional package."""
    folder = Path(peft.__file__).parent / "tuners" / "lora"
    return {
        f"{file.stem}.{node.name}": node
        for file in sorted(folder.glob("*.py"))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    }


def is_lora_layer(name: str) -> bool:
    bases = [base.id for base in peft_classes()[name].bases if isinstance(base, ast.Name)]
    return any(base == "LoraLayer" or base in ("Linear", "_ConvNd") for base in bases)


def method_source(name: str, method: str) -> str | None:
    for node in peft_classes()[name].body:
        if isinstance(node, ast.FunctionDef) and node.name == method:
            return ast.unparse(node)
    return None


SHORT = sorted(name.removeprefix("peft.tuners.lora.") for name in SUPPORTED)


def test_peft_has_the_layer_classes_that_we_know_and_no_others() -> None:
    known = {*SHORT, *NOT_LINEAR, *NOT_GATED}
    layers = {name for name in peft_classes() if is_lora_layer(name)} - {"layer._ConvNd"}
    assert known - layers == set(), "PEFT renamed or dropped LoRA layer classes; update the tables in peft_layers"
    assert layers - known == set(), "PEFT has new LoRA layer classes; read them, then add to the tables in peft_layers"


@pytest.mark.parametrize("name", SHORT)
def test_pefts_supported_layers_hand_their_forward_pass_to_the_variant(name: str) -> None:
    source = method_source(name, "forward") or method_source("layer.Linear", "forward") or ""
    call = "self.lora_variant[active_adapter].forward(self, active_adapter=active_adapter, x=x, result=result"
    assert call in source, f"PEFT's {name}.forward no longer calls its variant as {call}...: gates would be ignored"


@pytest.mark.parametrize("name", SHORT)
def test_pefts_supported_layers_merge_through_the_variant_or_are_listed(name: str) -> None:
    merge = method_source(name, "merge")
    listed = f"peft.tuners.lora.{name}" in MERGE_IGNORES_VARIANTS
    if merge is None:  # inherited: BaseTunerLayer's raises NotImplementedError
        assert not listed
    else:
        assert ("lora_variant" in merge) != listed, (
            f"PEFT changed whether {name}.merge asks the variant; update the list"
        )


@pytest.mark.parametrize("name", ["awq.AwqLoraLinear", "aqlm.AqlmLoraLinear", "eetq.EetqLoraLinear"])
def test_the_layers_refused_for_ignoring_variants_still_do(name: str) -> None:
    forward = method_source(name, "forward")
    assert forward is not None
    assert "lora_variant" not in forward, f"PEFT's {name} now asks its variant: it could be supported"


@pytest.mark.parametrize("name", SHORT)
def test_the_layers_whose_mixed_batches_are_blocked_are_those_that_drop_the_gates(name: str) -> None:
    source = method_source(name, "_mixed_batch_forward")
    asks = source is None or "lora_variant" in source
    listed = f"peft.tuners.lora.{name}" in MIXED_BATCHES_IGNORE_VARIANTS
    assert asks != listed, f"PEFT changed whether {name}._mixed_batch_forward asks the variant; update the list"


def test_peft_calls_a_variant_with_the_arguments_we_take() -> None:
    model = tiny_peft("llama", trained=True)
    layer = next(iter(lora_layers(model).values()))
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    class Spy(LoraVariant):
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
            calls.append((args, kwargs))
            return kwargs["result"]

    layer.lora_variant["default"] = Spy()
    logits(model)
    (args, kwargs), *more = calls
    changed = "PEFT changed how it calls a LoraVariant: adapt _GatedVariant.forward"
    assert not more, changed
    assert args == (layer,), changed
    assert {"active_adapter", "x", "result"} <= set(kwargs), changed
    assert kwargs["active_adapter"] == "default", changed


def test_peft_moves_every_dictionary_named_in_adapter_layer_names() -> None:
    model = tiny_peft("llama")
    model.add_adapter("other", lora_config("llama"))
    layer = next(iter(lora_layers(model).values()))
    layer.extra = nn.ParameterDict({name: nn.Parameter(torch.ones(1)) for name in ("default", "other")})
    layer.adapter_layer_names = (*layer.adapter_layer_names, "extra")
    model.set_adapter("other")
    assert [p.requires_grad for p in layer.extra.values()] == [False, True], "set_adapter ignores adapter_layer_names"
    model.delete_adapter("default")
    assert list(layer.extra) == ["other"], "delete_adapter ignores adapter_layer_names"
    assert "extra" not in LoraLayer.adapter_layer_names


# ---- bitsandbytes, for real ----


def quantised() -> PeftModel:
    class Quantised(nn.Module):
        is_loaded_in_4bit = True

        def __init__(self) -> None:
            super().__init__()
            self.fc = bitsandbytes.nn.Linear4bit(64, 32, compute_dtype=torch.float32)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    model = on_layer(Quantised().to("cpu"), "fc")
    keep_trainable(model)  # it is evaluated before gates are attached
    train_adapter(model)
    return model.eval()


def test_a_4_bit_layer_is_gated_and_folded() -> None:
    model = quantised()
    x = torch.randn(3, 5, 64)
    plain = model(x)
    (site,) = attach_gates(model)
    assert type(site.layer).__name__ == "Linear4bit"
    torch.testing.assert_close(model(x), plain)
    shake([site])
    expected = site.layer.base_layer(x) + naive_update(site, x)
    torch.testing.assert_close(model(x), expected)
    model(x).sum().backward()
    assert site.gate.grad[1:-1].all()
    with model.disable_adapter():
        torch.testing.assert_close(model(x), site.layer.base_layer(x))
    fold_gates([site])
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*to 4-bit linear may get different generations")
def test_merging_into_a_4_bit_layer_quantises_the_sum() -> None:
    model = quantised()
    (site,) = attach_gates(model)
    shake([site])
    base = site.layer.base_layer.weight
    wanted = dequantize_4bit(base.data, base.quant_state) + naive_delta(site)
    twin = type(base)(wanted, quant_type=base.quant_type, requires_grad=False).to("cpu")
    model.merge_adapter()
    merged = site.layer.base_layer.weight
    assert torch.equal(dequantize_4bit(merged.data, merged.quant_state), dequantize_4bit(twin.data, twin.quant_state))
