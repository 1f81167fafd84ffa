"""What cannot be gated is refused: by name, with the reason and the cure, and before anything is changed."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import (
    HIDDEN,
    logits,
    lora_config,
    lora_layers,
    on_layer,
    tiny_llama,
    tiny_peft,
    token_batch,
    train_adapter,
    two_adapters,
)
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn

from loralloc import AdaLoRA, Budget, UserError, attach
from loralloc.gating import attach_gates, fold_gates, is_gated
from loralloc.peft_layers import (
    MERGE_IGNORES_VARIANTS,
    MIXED_BATCHES_IGNORE_VARIANTS,
    NOT_GATED,
    NOT_LINEAR,
    SUPPORTED,
    is_quantized,
)
from loralloc.plain_lora import plain_sites
from loralloc.training.run import AllocationRun

# ---- Refusals ----


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(HIDDEN, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.fc = nn.Linear(8, 8)


def test_what_has_no_lora_adapter_is_refused() -> None:
    with pytest.raises(UserError, match=r"expected a PeftModel, got LlamaForCausalLM: wrap it first, .*LoraConfig"):
        attach_gates(tiny_llama())
    others = {
        "IA3": IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
        "ADALORA": AdaLoraConfig(target_modules=["q_proj"], total_step=100, tinit=10, tfinal=10),
        "PROMPT_TUNING": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    }
    for kind, config in others.items():
        with pytest.raises(UserError, match=f'adapter "default" is of type {kind}; ranks are allocated for LoRA'):
            attach_gates(get_peft_model(tiny_llama(), config))


def test_the_adapter_must_be_one_and_exist() -> None:
    model, _ = two_adapters()
    with pytest.raises(
        UserError,
        match=r"no adapter \"defalt\" in the model, it has \['default', 'plain'\]\. Did you mean \"default\"\?",
    ):
        attach_gates(model, "defalt")
    model.base_model.set_adapter(["default", "plain"])
    with pytest.raises(
        UserError,
        match=r"at a time, but active are \['default', 'plain'\]; choose one, model.set_adapter\(\"default\"\)",
    ):
        attach_gates(model)
    with pytest.raises(UserError, match="one adapter at a time"):
        list(plain_sites(model))


REFUSALS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "embedding": (
        lambda: on_layer(tiny_llama(), "embed_tokens"),
        r"model.embed_tokens: LoRA on Embedding layers is not supported \(its update is a table look-up, .*"
        r'target_modules=\["q_proj", "k_proj", "v_proj", "o_proj"\]\)',
    ),
    "attention": (
        lambda: on_layer(Attention(), "attention"),
        r"attention: LoRA on MultiheadAttention layers is not supported \(query, key and value are packed .*; the "
        "model has no linear layers that LoRA could adapt",
    ),
    "convolution": (
        lambda: on_layer(Convolution(), "conv"),
        r"conv: LoRA on Conv2d layers is not supported \(its factors are convolution kernels\); name linear layers in "
        r'a new LoraConfig\(target_modules=\["fc"\]\)',
    ),
    "parameter": (
        lambda: get_peft_model(
            tiny_llama(), LoraConfig(r=2, target_modules=[], target_parameters=["mlp.down_proj.weight"])
        ),
        r"all 2 adapted layers: LoRA on ParamWrapper layers is not supported \(it adapts a parameter, such as all",
    ),
    "dora": (
        lambda: tiny_peft("llama", use_dora=True),
        "use_dora makes the update more, or other, than B·A; leave it out of LoraConfig",
    ),
    "lora_bias": (
        lambda: tiny_peft("bert", lora_bias=True),
        "lora_bias makes the update more, or other, than B·A; leave it out of LoraConfig",
    ),
    "mica": (
        lambda: tiny_peft("llama", init_lora_weights="mica"),
        "all 6 adapted layers: the adapter uses PEFT's MiCALinearVariant, which changes the update itself; use plain",
    ),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_layers_that_cannot_be_gated_are_refused_by_name_reason_and_cure(kind: str) -> None:
    build, message = REFUSALS[kind]
    model = build()
    with pytest.raises(UserError, match=message):
        attach_gates(model)
    assert not is_gated(model, "default")


def test_a_refused_type_beside_supported_ones_refuses_the_whole_model() -> None:
    model = get_peft_model(Convolution(), LoraConfig(r=2, target_modules=["fc", "conv"]))
    with pytest.raises(UserError, match=r"conv: LoRA on Conv2d .*LoraConfig\(exclude_modules=\[\"conv\"\]\)"):
        attach_gates(model)
    assert len(attach_gates(get_peft_model(Convolution(), LoraConfig(r=2, target_modules=["fc"])))) == 1


def test_merged_and_gated_adapters_are_refused_until_the_cure_is_applied() -> None:
    model = tiny_peft("llama", trained=True)
    model.merge_adapter()
    with pytest.raises(UserError, match=r"merged into the base weights; call model.unmerge_adapter\(\) first"):
        attach_gates(model)
    model.unmerge_adapter()
    sites = attach_gates(model)
    with pytest.raises(UserError, match=r"a rank allocation is attached already; finish\(\) it first"):
        attach_gates(model)
    fold_gates(sites)
    assert attach_gates(model)


def forge(layer: nn.Module, full_name: str) -> None:
    """Make a layer's class look like one of a package that is not installed."""
    module, name = full_name.rsplit(".", 1)
    layer.__class__ = type(name, (PeftLinear,), {"__module__": module, "__qualname__": name})


@pytest.mark.parametrize("full_name", sorted(SUPPORTED - {"peft.tuners.lora.layer.Linear"}))
def test_quantised_layers_are_accepted_by_their_full_name(full_name: str) -> None:
    model = tiny_peft("llama", trained=True)
    forge(next(iter(lora_layers(model).values())), full_name)
    expected = logits(model)
    sites = attach_gates(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    if full_name in MERGE_IGNORES_VARIANTS:
        with pytest.raises(UserError, match=r"this layer's merge ignores gates; call finish\(\).* first, then merge"):
            model.merge_adapter()
    fold_gates(sites)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


def test_which_layers_have_quantised_weights() -> None:
    """All that are supported but one, and of those that are not, the ones whose weights are small."""
    known = [*SUPPORTED, *(f"peft.tuners.lora.{name}" for name in (*NOT_GATED, *NOT_LINEAR))]
    layer = next(iter(lora_layers(tiny_peft("llama")).values()))
    whole = set()
    for full_name in known:
        forge(layer, full_name)
        if not is_quantized(layer):
            whole.add(full_name.removeprefix("peft.tuners.lora."))
    assert whole == {"layer.Linear", "te.TeLinear", "tp_layer.LoraParallelLinear", *NOT_LINEAR}


@pytest.mark.parametrize("full_name", sorted(MIXED_BATCHES_IGNORE_VARIANTS))
def test_mixed_batches_are_refused_where_they_would_drop_the_gates(full_name: str) -> None:
    mixed: dict[str, Any] = {**token_batch(), "adapter_names": ["default"] * 3}
    model, finished = (tiny_peft("llama", trained=True) for _ in range(2))
    for one in (model, finished):
        forge(next(iter(lora_layers(one).values())), full_name)
    attach_gates(model)
    with pytest.raises(UserError, match=r"with adapter_names this layer ignores gates; call finish\(\)"):
        model(**mixed)
    fold_gates(attach_gates(finished))
    torch.testing.assert_close(logits(finished, mixed), logits(finished), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", sorted(NOT_LINEAR | NOT_GATED))
def test_known_layers_are_refused_with_their_reason(name: str) -> None:
    model = tiny_peft("llama")
    forge(next(iter(lora_layers(model).values())), f"peft.tuners.lora.{name}")
    kind = name.split(".")[1]
    with pytest.raises(UserError) as refusal:
        attach_gates(model)
    what = f"LoRA on {kind} layers is not supported ({NOT_LINEAR.get(name)}); "
    if name in NOT_GATED:
        what = f"ranks cannot be allocated in {kind} layers ({NOT_GATED[name]}); "
    assert str(refusal.value).startswith(f"model.layers.0.self_attn.q_proj: {what}")
    assert ("16 bit or with bitsandbytes" in str(refusal.value)) == (name in NOT_GATED)
    left_out = name in NOT_LINEAR and name != "layer.ParamWrapper"
    assert ('exclude_modules=["model.layers.0.self_attn.q_proj"]' in str(refusal.value)) == left_out


def test_a_subclass_of_pefts_linear_is_refused_as_unknown() -> None:
    model = tiny_peft("llama")
    forge(next(iter(lora_layers(model).values())), "somewhere.else.Linear")
    with pytest.raises(UserError, match=r"q_proj: .* in Linear layers \(the class is not known to loralloc\)"):
        attach_gates(model)


# ---- A failed attach ----


def failed_attach(model: PeftModel, kind: str) -> None:
    impossible = AdaLoRA(Budget(average_rank=99))
    crowded = AdaLoRA(Budget(average_rank=2), warmup=0.9, cooldown=0.9)
    if kind == "budget":
        with pytest.raises(UserError, match="asks for 594 ranks, but the 6 adapted modules start with 24"):
            AllocationRun(model, impossible)
    elif kind == "trained":
        train_adapter(model)
        with pytest.raises(UserError, match=r"trained already \(B is not zero\), and AdaLoRA would draw it anew"):
            AllocationRun(model, AdaLoRA(Budget(average_rank=2)))
    else:
        with pytest.raises(UserError, match="no step is left in which the budget could fall"):
            attach(model, crowded, total_steps=10)


@pytest.mark.parametrize("kind", ["budget", "trained", "schedule"])
def test_a_failed_attach_leaves_the_model_plain_and_attachable(kind: str) -> None:
    model = tiny_peft("llama")
    keys = list(model.state_dict())
    failed_attach(model, kind)
    assert not is_gated(model, "default")
    assert list(model.state_dict()) == keys
    attach_gates(model)


def test_a_refused_layer_leaves_no_gate_on_the_layers_before_it() -> None:
    model = tiny_peft("llama")
    last = list(lora_layers(model).values())[-1]
    last.scaling["default"] = 0.0
    keys = list(model.state_dict())
    with pytest.raises(
        UserError, match=r"^model\.layers\.1\.mlp\.down_proj: the scale lora_alpha / r is 0.0; it must be"
    ):
        attach_gates(model)
    assert list(model.state_dict()) == keys
    last.scaling["default"] = 1.5
    assert len(attach_gates(model)) == 6


def test_a_failed_attach_spares_an_adapter_with_lora_alpha_0() -> None:
    model = tiny_peft("llama", lora_alpha=0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    text = r"^all 6 adapted layers: the scale lora_alpha / r is 0\.0; it must be positive; set LoraConfig\(lora_alpha="
    with pytest.raises(UserError, match=text):
        AllocationRun(model, AdaLoRA(Budget(average_rank=99)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", ["inactive", "frozen"])
def test_an_adapter_that_would_not_train_is_refused(kind: str) -> None:
    if kind == "inactive":
        model = tiny_peft("llama")
        model.add_adapter("other", lora_config("llama"))
    else:
        model = get_peft_model(tiny_llama(), lora_config("llama", inference_mode=True), adapter_name="other")
    text = (
        'all 6 adapted layers: adapter "other" is not being trained (inactive, or frozen as loaded for '
        'inference); call model.set_adapter("other"), or load it with is_trainable=True'
    )
    with pytest.raises(UserError, match=f"^{re.escape(text)}$"):
        attach_gates(model, "other")
    assert not is_gated(model, "other")
