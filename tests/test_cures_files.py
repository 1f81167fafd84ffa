"""The cures of what is refused about exports, truncations, plans and budgets are applied as they stand."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cures import config_in
from exports import check_round_trip, saved_base
from models import HIDDEN, VOCABULARY, logits, lora_config, on_layer, tiny_llama, tiny_peft, train_adapter
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from loralloc import AdaLoRA, Budget, RankPlan, UserError, attach, export_adapter
from loralloc import lora_config as planned_config
from loralloc.adapter.model_card import Profile
from loralloc.adapter.truncation import truncate_adapter
from loralloc.budget import AMOUNTS
from loralloc.gating import attach_gates
from loralloc.plain_lora import stored_apart


def refusal(words: str, attempt: Callable[[], Any]) -> str:
    """Expect a refusal with these words, taken literally; return all of it."""
    with pytest.raises(UserError) as refused:
        attempt()
    assert words in str(refused.value)
    return str(refused.value)


# ---- Exports ----


def tied(**settings: Any) -> PeftModel:
    """A trained adapter on a model with one weight for embeddings and head."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **settings}))
    train_adapter(model)
    return model.eval()


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's own about tied weights
def test_an_adapter_of_a_tied_head_is_exported_unmerged_or_left_out(tmp_path: Path) -> None:
    settings = {"target_modules": ["q_proj", "lm_head"]}
    message = refusal(
        "lm_head is tied to model.embed_tokens (they share one weight), so merging the adapter of one would change "
        "both",
        lambda: export_adapter(tied(**settings), tmp_path / "merged", "merged"),
    )
    assert not (tmp_path / "merged").exists()
    for profile in re.findall(r'"(ragged|uniform)"', message):
        assert export_adapter(tied(**settings), tmp_path / profile, profile).difference < 1e-5
    without = tied(**settings, **config_in(message))
    assert export_adapter(without, tmp_path / "merged", "merged").difference < 1e-5


def test_a_head_with_a_weight_of_its_own_is_merged(tmp_path: Path) -> None:
    model = tiny_peft("llama", trained=True, target_modules=["q_proj", "lm_head"])
    assert export_adapter(model, tmp_path / "merged", "merged").difference < 1e-5


def test_a_tied_layer_anywhere_is_found(tmp_path: Path) -> None:
    model = tiny_peft("llama", trained=True, target_modules=["q_proj"])
    layers = model.get_base_model().model.layers
    layers[1].self_attn.q_proj.base_layer.weight = layers[0].self_attn.q_proj.base_layer.weight
    refusal(
        "model.layers.0.self_attn.q_proj is tied to model.layers.1.self_attn.q_proj",
        lambda: export_adapter(model, tmp_path / "merged", "merged"),
    )


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's own about tied weights
@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_modules_that_are_saved_and_tied_are_attached_to_and_loaded_by_stock_peft(tmp_path: Path, module: str) -> None:
    settings = {"modules_to_save": [module], "ensure_weight_tying": True}
    attach_gates(tied(**settings))
    model = tied(**settings)
    model.peft_config["default"].save_pretrained(str(tmp_path))
    save_file(stored_apart(get_peft_model_state_dict(model)), tmp_path / "adapter_model.safetensors")
    torch.manual_seed(0)
    stock = PeftModel.from_pretrained(LlamaForCausalLM(model.get_base_model().config), tmp_path).eval()
    torch.testing.assert_close(logits(stock), logits(model), rtol=1e-5, atol=1e-5)
    assert (logits(model) - logits(tied())).abs().max() > 1e-2  # the saved module counts
    merged = export_adapter(model, tmp_path / "merged", "merged")
    reloaded = AutoModelForCausalLM.from_pretrained(merged.path).eval()
    torch.testing.assert_close(logits(reloaded), logits(model), rtol=1e-5, atol=1e-5)


def test_tensors_of_a_file_share_no_memory() -> None:
    whole = torch.arange(6.0).view(2, 3)
    stored = stored_apart({"whole": whole, "again": whole, "turned": whole.T})
    assert len({tensor.untyped_storage().data_ptr() for tensor in [whole, *stored.values()]}) == 4
    assert all(tensor.is_contiguous() for tensor in stored.values())
    assert torch.equal(stored["turned"], whole.T)


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's own about two adapters while it converts
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_that_changed_the_base_is_converted_by_peft(tmp_path: Path, start: str) -> None:
    base = AutoModelForCausalLM.from_pretrained(saved_base("llama"))
    model = get_peft_model(base, lora_config("llama", init_lora_weights=start)).eval()
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(str(tmp_path / "start"))
    model.peft_config["default"].init_lora_weights = start
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    message = refusal("changes the base weights at the start", lambda: export_adapter(model, tmp_path / "adapter"))
    assert "where its start was saved: save_pretrained(path, path_initial_model_for_weight_conversion=...)" in message
    expected = logits(model)
    model.save_pretrained(str(tmp_path / "plain"), path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved_base("llama")), tmp_path / "plain")
    torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-4)
    check_round_trip("llama", plain, tmp_path / "adapter", "ragged")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda model: model.merge_adapter(), "the adapter is merged, so there is nothing to compare with; call "),
        (lambda model: model.base_model.disable_adapter_layers(), "the adapter is disabled, so there is nothing to"),
    ],
)
def test_the_call_that_brings_an_adapter_back_is_named(tmp_path: Path, spoil: Any, words: str) -> None:
    model = tiny_peft("llama", trained=True)
    spoil(model)
    message = refusal(words, lambda: export_adapter(model, tmp_path / "adapter"))
    (call,) = re.findall(r"call (\w+)\(\) first", message)
    getattr(model, call)()
    assert export_adapter(model, tmp_path / "adapter").difference < 1e-5


def test_a_compiled_model_is_exported(tmp_path: Path) -> None:
    model = torch.compile(tiny_peft("llama", trained=True))
    assert export_adapter(model, tmp_path / "adapter").difference < 1e-5  # type: ignore[arg-type]


# ---- Truncations ----


def test_an_adapter_of_another_update_is_not_truncated_and_a_plain_one_is(tmp_path: Path) -> None:
    tiny_peft("llama", trained=True, use_dora=True).save_pretrained(str(tmp_path / "dora"))
    tiny_peft("llama", trained=True).save_pretrained(str(tmp_path / "plain"))
    message = refusal(
        "dora is no plain LoRA, which alone can be truncated: use_dora makes the update more, or other, than B·A",
        lambda: truncate_adapter(tmp_path / "dora", tmp_path / "small", Budget(average_rank=2)),
    )
    assert message.endswith("leave it out of LoraConfig")
    assert truncate_adapter(tmp_path / "plain", tmp_path / "small", Budget(average_rank=2)).plan.total_rank == 12


# ---- Plans ----


def found() -> RankPlan:
    run = attach(tiny_peft("llama"), AdaLoRA(Budget(average_rank=2)), total_steps=10)
    return run.finish()


def test_what_the_plan_decides_is_left_out() -> None:
    words = "r, lora_alpha: the plan decides that; leave it out of lora_config(plan, model, ...)"
    refusal(words, lambda: planned_config(found(), tiny_llama(), r=8, lora_alpha=16, lora_dropout=0.1))
    assert planned_config(found(), tiny_llama(), lora_dropout=0.1).lora_dropout == 0.1


@pytest.mark.parametrize("model", [tiny_peft("llama"), tiny_peft("llama").get_base_model()], ids=["PEFT", "base"])
def test_a_model_that_has_an_adapter_is_loaded_anew(model: Any) -> None:
    message = refusal("has an adapter already, and the plan is for one", lambda: planned_config(found(), model))
    assert message.endswith("load the base model anew, without an adapter")
    base = tiny_llama()
    assert attach(get_peft_model(base, planned_config(found(), base)), AdaLoRA(Budget(average_rank=1)), 30)


def test_a_plan_is_for_a_compiled_model_too() -> None:
    assert planned_config(found(), torch.compile(tiny_llama())) == planned_config(found(), tiny_llama())  # type: ignore[arg-type]


def test_a_plan_of_another_model_names_the_nearest_module() -> None:
    plan = found()
    plan = replace(plan, modules={name.replace("q_proj", "q_prj"): module for name, module in plan.modules.items()})
    message = refusal("the plan belongs to another model: ", lambda: planned_config(plan, tiny_llama()))
    (name,) = re.findall(r'there is no such module. Did you mean "(.*)"\?$', message)
    assert name in dict(tiny_llama().named_modules())


# ---- Budgets ----


@pytest.mark.parametrize("name", [*AMOUNTS, "max_rank"])
@pytest.mark.parametrize("value", ["8", True, np.True_, [8], 8j, torch.tensor(8)], ids=str)
def test_a_budget_that_is_no_number_is_refused_with_one_that_is(name: str, value: Any) -> None:
    text = f"the budget must be a number, such as Budget(average_rank=8), got {name}={value!r}"
    with pytest.raises(UserError, match=f"^{re.escape(text)}$"):
        Budget(**{name: value})
    assert Budget(average_rank=8).to_dict() == {"average_rank": 8}


@pytest.mark.parametrize("number", [np.int64(8), np.int32(8), np.uint8(8)])
@pytest.mark.parametrize("name", ["average_rank", "total_rank", "parameters", "adapter_bytes", "max_rank"])
def test_whole_numbers_of_numpy_are_taken_as_pythons(name: str, number: Any) -> None:
    budget = Budget(**{name: number})
    assert budget == Budget(**{name: 8})
    assert type(getattr(budget, name)) is int


@pytest.mark.parametrize("number", [np.float64(0.5), np.float32(0.5), np.float16(0.5)])
@pytest.mark.parametrize("name", ["average_rank", "fraction", "share_of_base"])
def test_other_numbers_of_numpy_are_taken_as_pythons(name: str, number: Any) -> None:
    budget = Budget(**{name: number})
    assert budget == Budget(**{name: 0.5})
    assert type(getattr(budget, name)) is float


def test_a_budget_for_less_than_a_rank_is_raised() -> None:
    layer = on_layer(tiny_llama(), "q_proj")
    words = "the budget parameters=31 leaves 31 parameters for 2 modules: not even one rank (the cheapest costs 32)"
    refusal(words, lambda: attach(layer, AdaLoRA(Budget(parameters=31)), 30))
    assert attach(layer, AdaLoRA(Budget(parameters=32)), 30)


@pytest.mark.parametrize("profile", ["ragged", "uniform"])
def test_embeddings_that_are_saved_with_their_tied_head_are_exported(profile: Profile, tmp_path: Path) -> None:
    model = tied(modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    export = export_adapter(model, tmp_path / "adapter", profile)
    stock = PeftModel.from_pretrained(tied().unload(), export.path).eval()
    torch.testing.assert_close(logits(stock), logits(model), rtol=1e-5, atol=1e-5)
