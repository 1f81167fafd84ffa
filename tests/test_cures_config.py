"""Every cure that names settings of LoraConfig is applied as it stands, and the next attempt gets further."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from cures import config_in
from models import HIDDEN, LABELS, VOCABULARY, labelled_batch, tiny_bert, tiny_llama
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from torch import nn
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification, LlamaConfig, LlamaForCausalLM

from loralloc import ABLoRA, AdaLoRA, ALLoRA, AutoLoRA, Budget, UserError, attach
from loralloc.methods.base import Method
from loralloc.methods.controls import Uniform
from loralloc.methods.truncate import Truncate
from loralloc.plain_lora import VARIANTS

TWO = Budget(average_rank=2)
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
EXPERTS = {"moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}


def experts(kind: str, **settings: Any) -> nn.Module:
    """A causal language model whose experts are one parameter."""
    config = getattr(transformers, f"{kind}Config")(**SMALL, **{**EXPERTS, **settings}, pad_token_id=0, eos_token_id=0)
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def deberta(share_att_key: bool) -> nn.Module:
    """A classifier some of whose projections see positions, not samples."""
    positions = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
    config = DebertaV2Config(**SMALL, **positions, share_att_key=share_att_key, num_labels=LABELS)
    return DebertaV2ForSequenceClassification(config)


def tied() -> nn.Module:
    """A causal language model with one weight for embeddings and head."""
    return LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2, pad_token_id=0, tie_word_embeddings=True))


class Picture(nn.Module):
    """A convolution whose name is the end of a linear layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Conv2d(3, 8, 3)
        self.block = nn.ModuleDict({"fc": nn.Linear(8, 8), "up": nn.Linear(8, 8)})


@dataclass(frozen=True)
class Case:
    """A configuration that is refused.

    Attributes:
        base: The base model.
        settings: Of LoraConfig, beside r=4 and lora_alpha=6.
        says: Parts of the message.
        method: What is attached.
        without: What the cure says to leave out, besides what it says to set.
    """

    base: Callable[[], nn.Module]
    settings: dict[str, Any]
    says: tuple[str, ...]
    method: Callable[[], Method] = lambda: AdaLoRA(TWO)
    without: tuple[str, ...] = ()


def attached(case: Case, settings: dict[str, Any]) -> list[str]:
    """Attach, and take a step; return the names of the adapted layers."""
    torch.manual_seed(0)
    model = get_peft_model(case.base(), LoraConfig(**{"r": 4, "lora_alpha": 6, **settings}))
    run = attach(model, case.method(), total_steps=20)
    if getattr(case.method(), "validation", None) is not None:
        optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
        (batch,) = case.method().validation  # type: ignore[attr-defined]
        model(**batch).loss.backward()
        run.before_step(optimizer)
        optimizer.step()
        run.after_step(optimizer)
    return [site.name for site in run.sites]


def scored() -> ABLoRA:
    return ABLoRA(TWO, validation=[labelled_batch("bert")], rounds=2)


ATTENTION = 'name linear layers in a new LoraConfig(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])'
LINEAR = {"target_modules": ["q_proj", "v_proj"]}
FRESH = "use LoraConfig(init_lora_weights=True)"
VARIANT_SETTINGS: dict[str, Any] = {
    "use_dora": True,
    "velora_config": VeloraConfig(),
    "alora_invocation_tokens": [1, 2],
    "monteclora_config": MontecloraConfig(),
    "use_bdlora": BdLoraConfig(target_modules_bd_a=["q_proj"], target_modules_bd_b=["v_proj"], nblocks=2),
    "kasa_config": KasaConfig(),
}

CASES: dict[str, Case] = {
    "embedding": Case(
        tiny_llama,
        {"target_modules": ["embed_tokens", "q_proj"], "exclude_modules": ["1.self_attn.q_proj"]},
        ("model.embed_tokens: LoRA on Embedding", 'exclude_modules=["1.self_attn.q_proj", "model.embed_tokens"]'),
    ),
    "embedding, by pattern": Case(
        tiny_llama,
        {"target_modules": ["embed_tokens", "q_proj"], "exclude_modules": r".*\.1\..*q_proj"},
        ("model.embed_tokens: LoRA on Embedding",),
    ),
    "embedding alone": Case(tiny_llama, {"target_modules": ["embed_tokens"]}, ("LoRA on Embedding", ATTENTION)),
    "embedding, tied": Case(
        tied,
        {"target_modules": ["lm_head", "q_proj"], "ensure_weight_tying": True},
        (
            "model.embed_tokens: LoRA on Embedding",
            'LoraConfig(ensure_weight_tying=False, exclude_modules=["model.embed_tokens"])',
        ),
    ),
    "convolution": Case(
        Picture, {"target_modules": ["fc", "up"]}, ("fc: LoRA on Conv2d", 'LoraConfig(exclude_modules="fc")')
    ),
    "convolution alone": Case(
        Picture,
        {"target_modules": "fc"},
        ("fc: LoRA on Conv2d", 'new LoraConfig(target_modules=["block.fc", "up"])'),
    ),
    "a parameter": Case(
        tiny_llama,
        {"target_modules": [], "target_parameters": ["mlp.down_proj.weight"]},
        ("all 2 adapted layers: LoRA on ParamWrapper", ATTENTION),
        without=("target_parameters",),
    ),
    "experts of Qwen3": Case(
        lambda: experts("Qwen3Moe", head_dim=4),
        {"target_modules": "all-linear"},
        ("4 layers whose names end in experts, gate: LoRA on ParamWrapper layers is not supported", ATTENTION),
    ),
    "experts of OLMoE": Case(
        lambda: experts("Olmoe"),
        {"target_modules": ["q_proj", "down_proj"]},
        ("2 layers whose names end in experts: LoRA on ParamWrapper layers", ATTENTION),
    ),
    "experts of Qwen2": Case(
        lambda: experts("Qwen2Moe", shared_expert_intermediate_size=8),
        {"target_modules": "all-linear"},
        (
            "2 layers whose names end in shared_expert_gate: rank 4 is above the smaller dimension (1)",
            'LoraConfig(exclude_modules=["shared_expert_gate"]) (lora.exclude_modules in a recipe), or lower',
        ),
    ),
    "the same, truncated": Case(
        lambda: experts("Qwen2Moe", shared_expert_intermediate_size=8),
        {"target_modules": "all-linear", "exclude_modules": ["o_proj"]},
        ("there are no more singular values than that", 'exclude_modules=["o_proj", "shared_expert_gate"]'),
        method=lambda: Truncate(TWO),
    ),
    "positions of DeBERTa v3": Case(
        lambda: deberta(share_att_key=True),
        {"target_modules": "all-linear", "task_type": "SEQ_CLS"},
        (
            "4 layers whose names end in query_proj, key_proj: ranks cannot be switched per sample where a layer sees "
            "1 rows for 3 samples",
            'leave out what does, LoraConfig(exclude_modules=["query_proj", "key_proj"])',
        ),
        method=scored,
    ),
    "positions of DeBERTa v2": Case(
        lambda: deberta(share_att_key=False),
        {"target_modules": "all-linear", "task_type": "SEQ_CLS"},
        ("4 layers whose names end in pos_key_proj, pos_query_proj",),
        method=scored,
    ),
    **{
        name: Case(
            tiny_llama,
            {**LINEAR, name: value, **({"task_type": "CAUSAL_LM"} if "alora" in name else {})},
            (f"{name} makes the update more, or other, than B·A; leave it out of LoraConfig",),
            without=(name,),
        )
        for name, value in VARIANT_SETTINGS.items()
    },
    "lora_bias": Case(
        tiny_bert, {"target_modules": ["query"], "lora_bias": True}, ("lora_bias makes",), without=("lora_bias",)
    ),
    "use_qalora": Case(tiny_llama, {**LINEAR, "use_qalora": True}, ("use_qalora makes",), without=("use_qalora",)),
    "layer_replication": Case(
        tiny_llama,
        {**LINEAR, "layer_replication": [(0, 2), (0, 2)]},
        ("layer_replication builds another model", "leave it out of LoraConfig"),
        without=("layer_replication",),
    ),
    **{
        f"bias {bias}": Case(
            tiny_bert,
            {"target_modules": ["query"], "bias": bias},
            (f'bias="{bias}" trains biases of the base model', 'set LoraConfig(bias="none")'),
        )
        for bias in ("all", "lora_only")
    },
    **{
        f"start {start}": Case(
            tiny_llama,
            {**LINEAR, "init_lora_weights": start},
            (f'init_lora_weights="{start}" changes the base weights', "train with LoraConfig(init_lora_weights=True)"),
        )
        for start in ("pissa", "pissa_niter_2", "olora", "OLoRA", "lora_ga")
    },
    "start mica": Case(
        tiny_llama,
        {**LINEAR, "init_lora_weights": "mica"},
        ("all 4 adapted layers: the adapter uses PEFT's MiCALinearVariant", "with init_lora_weights=True"),
        without=("init_lora_weights",),
    ),
    "start at random": Case(
        tiny_llama,
        {**LINEAR, "init_lora_weights": False},
        ("all 4 adapted layers: B is not zero with init_lora_weights=False", "AdaLoRA would draw it anew", FRESH),
    ),
    "start orthogonal": Case(
        tiny_llama,
        {**LINEAR, "init_lora_weights": "orthogonal"},
        ('B is not zero with init_lora_weights="orthogonal"', "ABLoRA would close a part of it", FRESH),
        method=lambda: ABLoRA(TWO, score="sensitivity", rounds=2),
    ),
    "start of a search": Case(
        tiny_llama,
        {**LINEAR, "init_lora_weights": False},
        ("B is not zero with init_lora_weights=False", "AutoLoRA searches from the start", FRESH),
        method=lambda: AutoLoRA(validation=[labelled_batch("llama")]),
    ),
    "start of a control": Case(
        tiny_llama,
        {**LINEAR, "init_lora_weights": False},
        ("B is not zero with init_lora_weights=False", "closing ranks would change what it computes", FRESH),
        method=lambda: Uniform(TWO),
    ),
    "scale": Case(
        tiny_llama,
        {**LINEAR, "rank_pattern": {"q_proj": 2}},
        (
            "all 4 adapted layers: the adapter is scaled by 3, but ALLoRA",
            '(lora_alpha=2, use_rslora=False, alpha_pattern={"v_proj": 4})',
        ),
        method=ALLoRA,
    ),
    "scale of some": Case(
        tiny_llama,
        {**LINEAR, "lora_alpha": 4, "alpha_pattern": {"v_proj": 8}},
        ("2 layers whose names end in v_proj: the adapter is scaled by 2", "alpha_pattern={})"),
        method=ALLoRA,
    ),
    "dropout": Case(
        tiny_llama,
        {**LINEAR, "lora_alpha": 4, "lora_dropout": 0.1},
        ("all 4 adapted layers: lora_dropout is 0.1", "set LoraConfig(lora_dropout=0.0)"),
        method=ALLoRA,
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")  # PEFT's own about these settings
def test_the_settings_that_a_message_names_are_taken(name: str) -> None:
    case = CASES[name]
    with pytest.raises(UserError) as refused:
        attached(case, case.settings)
    message = str(refused.value)
    for part in case.says:
        assert part in message
    cure = {} if "leave it out of LoraConfig" in message or "no variant" in message else config_in(message)
    settings = {key: value for key, value in {**case.settings, **cure}.items() if key not in case.without}
    assert settings != case.settings
    names = attached(case, settings)
    if "exclude_modules" in cure:  # what was not at fault is still there
        before = get_peft_model(case.base(), LoraConfig(**{"r": 4, **case.settings})).targeted_module_names
        at_fault = {name for name in before if name not in names}
        assert 0 < len(names) < len(before)
        assert not at_fault & set(names)


def test_every_variant_of_peft_is_among_the_cases() -> None:
    between_trained_adapters = {"arrow_config"}  # no LoraConfig of a fresh adapter has it
    assert set(VARIANTS) - between_trained_adapters == set(VARIANT_SETTINGS)


def test_a_start_that_is_zero_is_taken() -> None:
    for start in (True, "gaussian"):
        case = Case(tiny_llama, {**LINEAR, "init_lora_weights": start}, ())
        assert len(attached(case, case.settings)) == 4


@pytest.mark.parametrize("start", [False, "orthogonal"])
@pytest.mark.parametrize("method", [lambda: Truncate(TWO), ALLoRA])
def test_a_start_that_is_not_zero_is_taken_where_no_fresh_one_is_needed(
    start: Any, method: Callable[[], Method]
) -> None:
    case = Case(tiny_llama, {**LINEAR, "lora_alpha": 4, "init_lora_weights": start}, (), method=method)
    assert len(attached(case, case.settings)) == 4


def test_a_rank_at_the_dimension_is_taken_as_the_message_says() -> None:
    case = CASES["experts of Qwen2"]
    with pytest.raises(UserError, match=r"or lower LoraConfig.r \(lora.r in a recipe\) to 1$"):
        attached(case, case.settings)
    names = attached(Case(case.base, {}, (), method=lambda: AdaLoRA(Budget(total_rank=8))), {**case.settings, "r": 1})
    assert any("shared_expert_gate" in name for name in names)
