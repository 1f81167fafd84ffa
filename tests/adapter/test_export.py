"""Exports: every profile, read back by stock PEFT and by the rules of the other consumers, is the trained model.

What an export never does to the model, to other files and to a user's trust: test_export_safety.py and
test_export_refusals.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exports import (
    ADAPTER_FILES,
    ADAPTER_PROFILES,
    AUTO,
    MODELS,
    adapted,
    check_round_trip,
    config_of,
    saved_base,
    stock_reload,
    stored,
)
from models import (
    BUILDERS,
    cycled_ranks,
    labelled_batch,
    logits,
    lora_config,
    lora_layers,
    set_ranks,
    tiny_bert,
    tiny_llama,
    tiny_peft,
    train_adapter,
)
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from loralloc import AdaLoRA, Budget, attach, export_adapter
from loralloc.adapter.export import PROFILES, Factors, Profile, ragged, uniform
from loralloc.adapter.folders import RECORD

# ---- Reload by stock PEFT ----


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_reloads_into_the_trained_model(tmp_path: Path, name: str, profile: Profile) -> None:
    model = adapted(name)
    ranks = cycled_ranks(model, 3, 0, 1, 4, 2)
    set_ranks(model, ranks)
    with model.disable_adapter():
        assert (logits(model) - logits(tiny_peft(name, trained=True))).abs().max() > 0.1  # the adapter matters
    export = check_round_trip(name, model, tmp_path / "adapter", profile)
    assert export.ranks == ranks
    assert export.max_rank == 4


SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "rslora": ("llama", {"use_rslora": True}),
    "rank and alpha patterns": (
        "llama",
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 6}, "alpha_pattern": {"v_proj": 3, "q_proj": 20}},
    ),
    "rslora with patterns": (
        "bert",
        {"use_rslora": True, "rank_pattern": {"output.dense": 2}, "alpha_pattern": {"attention.output.dense": 1}},
    ),
    "excluded list": ("llama", {"exclude_modules": ["layers.0.self_attn.q_proj", "layers.1.mlp.down_proj"]}),
    "excluded pattern": ("llama", {"exclude_modules": r".*layers\.0\.self_attn\..*"}),
    "excluded pattern in bert": ("bert", {"exclude_modules": r".*\.0\.attention\.output\.dense"}),
    "targets by pattern": ("bert", {"target_modules": r".*(query|output\.dense)"}),
    "all linear": ("bert", {"target_modules": "all-linear"}),
    "all linear, more than twenty": ("gpt2", {"target_modules": "all-linear"}),
    "some layers": ("llama", {"layers_to_transform": [1]}),
    "dropout": ("llama", {"lora_dropout": 0.5}),
    "saved modules": ("llama", {"modules_to_save": ["lm_head"]}),
    "gaussian": ("gpt2", {"init_lora_weights": "gaussian"}),
    "output layer": ("bert", {"target_modules": ["query", "pooler.dense"]}),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("profile", ADAPTER_PROFILES)
@pytest.mark.parametrize("ranks", [(4,), (2, 0, 1, 3), (0, 1)], ids=str)
def test_the_training_config_does_not_matter(
    tmp_path: Path, setting: str, profile: Profile, ranks: tuple[int, ...]
) -> None:
    name, settings = SETTINGS[setting]
    model = adapted(name, **settings)
    wanted = cycled_ranks(model, *ranks)
    set_ranks(model, wanted)
    export = check_round_trip(name, model, tmp_path / "adapter", profile)
    assert export.ranks == wanted
    left_out = profile == "ragged"
    assert set(stored(export.path)) == {module for module, rank in wanted.items() if rank or not left_out}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("profile", PROFILES)
def test_one_open_module_is_enough(tmp_path: Path, name: str, profile: Profile) -> None:
    model = adapted(name)
    for module in list(lora_layers(model))[:3]:
        model.load_state_dict(adapted(name).state_dict())
        ranks = {**dict.fromkeys(lora_layers(model), 0), module: 2}
        set_ranks(model, ranks)
        assert check_round_trip(name, model, tmp_path / "adapter", profile).ranks == ranks


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's own about output layers
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("profile", ADAPTER_PROFILES)
def test_an_output_layer_may_keep_no_rank(tmp_path: Path, profile: Profile, rank: int) -> None:
    model = tiny_peft("llama", trained=True, target_modules=["q_proj", "lm_head"])
    set_ranks(model, {name: rank if name == "lm_head" else 3 for name in lora_layers(model)})
    assert export_adapter(model, tmp_path / "adapter", profile).ranks["lm_head"] == rank


@pytest.mark.parametrize("profile", ADAPTER_PROFILES)
def test_names_that_end_alike_keep_their_own_ranks(tmp_path: Path, profile: Profile) -> None:
    model = adapted("bert", target_modules=["output.dense"])
    names = list(lora_layers(model))
    assert {"attention.output.dense" in name for name in names} == {True, False}
    for inner, outer in ((1, 3), (3, 1), (0, 2), (2, 0)):
        model.load_state_dict(adapted("bert", target_modules=["output.dense"]).state_dict())
        ranks = {name: inner if "attention" in name else outer for name in names}
        set_ranks(model, ranks)
        export = check_round_trip("bert", model, tmp_path / "adapter", profile)
        reloaded = lora_layers(stock_reload("bert", export))
        for name, rank in ranks.items():
            kept = rank if profile == "ragged" else export.max_rank
            assert (
                reloaded[name].lora_A["default"].weight.shape[0] if hasattr(reloaded.get(name), "lora_A") else 0
            ) == kept


@pytest.mark.parametrize("profile", ADAPTER_PROFILES)
def test_a_head_trained_beside_the_adapter_is_kept(tmp_path: Path, profile: Profile) -> None:
    model = adapted("bert")
    trained = model.base_model.model.classifier.modules_to_save["default"]
    assert not torch.equal(trained.weight, tiny_bert().classifier.weight)
    export_adapter(model, tmp_path / "adapter", profile)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert torch.equal(saved["base_model.model.classifier.weight"], trained.weight)
    assert torch.equal(saved["base_model.model.classifier.bias"], trained.bias)


@pytest.mark.parametrize("profile", PROFILES)
def test_the_active_adapter_is_the_one_exported(tmp_path: Path, profile: Profile) -> None:
    model = adapted("llama")
    model.add_adapter("second", lora_config("llama", r=2))
    train_adapter(model, 9, "second")
    model.set_adapter("second")
    export = check_round_trip("llama", model, tmp_path / "adapter", profile)
    assert set(export.ranks.values()) == {2}
    assert list(model.peft_config) == ["default", "second"]
    assert model.active_adapter == "second"


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", MODELS)
def test_a_bf16_base_stays_bf16_and_its_adapter_fp32(tmp_path: Path, name: str, profile: Profile) -> None:
    model = tiny_peft(name, trained=True, dtype=torch.bfloat16)
    set_ranks(model, cycled_ranks(model, 3, 0, 1))
    expected = logits(model)
    export = export_adapter(model, tmp_path / "adapter", profile)
    if profile == "merged":
        reloaded = AUTO[name].from_pretrained(export.path, dtype="auto")
        assert {p.dtype for p in reloaded.parameters()} == {torch.bfloat16}
    else:
        assert {t.dtype for pair in stored(export.path).values() for t in pair} == {torch.float32}
        reloaded = PeftModel.from_pretrained(BUILDERS[name](dtype=torch.bfloat16), export.path)
    torch.testing.assert_close(logits(reloaded), expected, rtol=0, atol=2**-4)


@pytest.mark.parametrize("profile", PROFILES)
def test_an_adapter_kept_in_bf16_stays_in_bf16(tmp_path: Path, profile: Profile) -> None:
    base = tiny_llama(dtype=torch.bfloat16)
    model = get_peft_model(base, lora_config("llama"), autocast_adapter_dtype=False).eval()
    train_adapter(model)
    export = export_adapter(model, tmp_path / "adapter", profile)
    if profile != "merged":
        assert {t.dtype for pair in stored(export.path).values() for t in pair} == {torch.bfloat16}


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", MODELS)
def test_a_finished_run_exports_what_it_trained(tmp_path: Path, name: str, profile: Profile) -> None:
    torch.manual_seed(1)
    model = get_peft_model(AUTO[name].from_pretrained(saved_base(name)), lora_config(name))
    run = attach(model, AdaLoRA(Budget(average_rank=1), warmup=1, cooldown=2, interval=1), total_steps=6)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    for seed in range(6):
        model(**labelled_batch(name, seed)).loss.backward()
        run.before_step()
        optimizer.step()
        run.after_step(optimizer)
        optimizer.zero_grad()
    model.eval()
    gated = logits(model)
    plan = run.finish()
    torch.testing.assert_close(logits(model), gated, rtol=1e-5, atol=1e-5)
    assert plan.total_rank == len(plan.ranks)
    assert max(plan.ranks.values()) > min(plan.ranks.values())
    assert check_round_trip(name, model, tmp_path / "adapter", profile).ranks == plan.ranks


@pytest.mark.parametrize("profile", ADAPTER_PROFILES)
def test_an_export_is_exported_again_to_the_same_tensors(tmp_path: Path, profile: Profile) -> None:
    model = adapted("llama")
    set_ranks(model, cycled_ranks(model, 3, 0, 1))
    first = export_adapter(model, tmp_path / "first", profile)
    again = export_adapter(stock_reload("llama", first), tmp_path / "second", profile)
    assert {k: v for k, v in first.ranks.items() if v} == {k: v for k, v in again.ranks.items() if v}
    for module, (A, B) in stored(first.path).items():
        torch.testing.assert_close(stored(again.path)[module], (A, B))


# ---- The other consumers ----

Delta = dict[str, Tensor]


def trained_deltas(model: PeftModel) -> Delta:
    """ΔW of the trained model, by PEFT's scaling."""
    return {
        name: layer.scaling["default"]
        * layer.lora_B["default"].weight.detach()
        @ layer.lora_A["default"].weight.detach()
        for name, layer in lora_layers(model).items()
    }


def vllm(folder: Path, name: str, rank: int) -> float:
    """VLLM 0.32 and newer: full names in rank_pattern and alpha_pattern, first match."""
    config = config_of(folder)
    patterns = config["rank_pattern"], config["alpha_pattern"]
    r = patterns[0].get(name, config["r"])
    assert r == rank
    return patterns[1].get(name, config["lora_alpha"]) / r


def global_alpha(folder: Path, name: str, rank: int) -> float:
    """SGLang, TGI, LoRAX and older vLLM: one alpha and one r for all."""
    config = config_of(folder)
    return config["lora_alpha"] / config["r"]


def llama_cpp(folder: Path, name: str, rank: int) -> float:
    """Read no patterns: the global alpha over the rank of the B tensor."""
    return config_of(folder)["lora_alpha"] / rank


RULES: dict[str, Callable[[Path, str, int], float]] = {
    "vllm": vllm,
    "global alpha": global_alpha,
    "llama.cpp": llama_cpp,
}


def consumed(folder: Path, rule: Callable[[Path, str, int], float], like: Delta) -> Delta:
    """ΔW as a consumer computes it, zero for a module that is not in the file."""
    found = {name: rule(folder, name, B.shape[1]) * B @ A for name, (A, B) in stored(folder).items()}
    assert set(found) <= set(like)
    return {name: found.get(name, torch.zeros_like(delta)) for name, delta in like.items()}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("profile", ADAPTER_PROFILES)
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "alpha_pattern": {"query": 5, "q_proj": 5}}], ids=str)
@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match")
def test_consumers_compute_the_trained_update_exactly_where_the_table_says_so(
    tmp_path: Path, name: str, rule: str, profile: Profile, settings: dict[str, Any]
) -> None:
    model = adapted(name, **settings)
    set_ranks(model, cycled_ranks(model, 3, 0, 1, 4, 2))
    trained = trained_deltas(model)
    folder = export_adapter(model, tmp_path / "adapter", profile).path
    actual = consumed(folder, RULES[rule], trained)
    error = max(float((actual[module] - delta).abs().max()) for module, delta in trained.items())
    wrong = (profile, rule) == ("ragged", "global alpha")  # why that profile names its readers
    assert (error > 0.05) if wrong else (error < 1e-6)


def test_uniform_modules_all_have_one_shape_per_type_as_stacking_servers_need(tmp_path: Path) -> None:
    model = adapted("llama")
    set_ranks(model, cycled_ranks(model, 3, 0, 1))
    folder = export_adapter(model, tmp_path / "adapter", "uniform").path
    factors = stored(folder)
    assert set(factors) == set(lora_layers(model))  # rank 0 included: they drop a whole type when a layer is missing
    assert {A.shape[0] for A, _ in factors.values()} == {B.shape[1] for _, B in factors.values()} == {3}
    assert not factors["model.layers.0.self_attn.v_proj"][1].any()


@pytest.mark.parametrize("profile", ADAPTER_PROFILES)
def test_the_config_says_plain_lora(tmp_path: Path, profile: Profile) -> None:
    settings = {
        "use_rslora": True,
        "alpha_pattern": {"q_proj": 9},
        "init_lora_weights": "gaussian",
        "lora_dropout": 0.1,
    }
    model = adapted("llama", **settings)
    set_ranks(model, cycled_ranks(model, 3, 0, 1))
    folder = export_adapter(model, tmp_path / "adapter", profile).path
    config = config_of(folder)
    plain = {
        "peft_type": "LORA",
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "lora_bias": False,
        "bias": "none",
        "alpha_pattern": {},
        "inference_mode": True,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(saved_base("llama")),
        "r": 3,
        "lora_alpha": 3,
    }
    assert {key: config[key] for key in plain} == plain
    assert config["init_lora_weights"] is True
    pattern = config["rank_pattern"]
    if profile == "uniform":
        assert pattern == {}
    else:
        assert pattern == {module: A.shape[0] for module, (A, _) in stored(folder).items()}
        assert all(type(rank) is int and rank > 0 for rank in pattern.values())
        assert config["r"] == max(pattern.values())
    assert model.peft_config["default"].use_rslora  # ours is a copy: the model's own config still says how it trained
    assert {path.name for path in folder.iterdir()} == ADAPTER_FILES
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    assert record["profile"] == profile
    assert record["ranks"] == cycled_ranks(model, 3, 0, 1)


def test_the_profiles_keep_the_product_of_random_factors() -> None:
    generator = torch.Generator().manual_seed(0)
    factors = {
        str(r): Factors(torch.randn(r, 5, generator=generator), torch.randn(7, r, generator=generator))
        for r in range(5)
    }
    for profile in (ragged, uniform):
        fields, kept = profile(factors)
        for name, factor in factors.items():
            rank = fields["rank_pattern"].get(name, fields["r"])
            product = kept[name].B @ kept[name].A * fields["lora_alpha"] / rank if name in kept else torch.zeros(7, 5)
            torch.testing.assert_close(product, factor.B @ factor.A)
