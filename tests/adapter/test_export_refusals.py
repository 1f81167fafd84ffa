"""What is not exported, and why; and what an export says about itself."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from exports import (
    ADAPTER_PROFILES,
    AUTO,
    adapted,
    assert_unchanged,
    check_round_trip,
    corrupt_writes,
    saved_base,
    snapshot,
)
from models import (
    HIDDEN,
    LABELS,
    VOCABULARY,
    cycled_ranks,
    logits,
    lora_config,
    lora_layers,
    set_ranks,
    tiny_llama,
    tiny_peft,
    train_adapter,
)
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers import GPT2ForSequenceClassification as GPT2Classifier

from loralloc import UserError, export_adapter
from loralloc.adapter.export import PROFILES, Export, Profile
from loralloc.adapter.folders import RECORD
from loralloc.adapter.model_card import VLLM_RANKS
from loralloc.gating import attach_gates, fold_gates, is_gated

# ---- What is refused ----


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("symbol", ["lora_A", "lora_B"])
@pytest.mark.parametrize("profile", PROFILES)
def test_an_adapter_that_is_not_finite_is_not_exported(
    tmp_path: Path, number: float, symbol: str, profile: Profile
) -> None:
    model = tiny_peft("llama", trained=True)
    getattr(next(iter(lora_layers(model).values())), symbol)["default"].weight.data[0, 0] = number
    with pytest.raises(RuntimeError, match="the adapter holds numbers that are not finite; it was not exported"):
        export_adapter(model, tmp_path / "adapter", profile)
    assert list(tmp_path.iterdir()) == []


def test_a_head_that_is_not_finite_is_not_exported(tmp_path: Path) -> None:
    model = tiny_peft("bert", trained=True)
    model.base_model.model.classifier.modules_to_save["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match="logits differ by nan"):
        export_adapter(model, tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("profile", PROFILES)
def test_gates_must_be_folded_first(tmp_path: Path, profile: Profile) -> None:
    model = tiny_peft("llama")
    sites = attach_gates(model)
    with pytest.raises(
        UserError, match=r"not finished: its gates are not folded; call finish\(\) or end train\(\) first"
    ):
        export_adapter(model, tmp_path / "adapter", profile)
    assert is_gated(model, "default")
    assert list(tmp_path.iterdir()) == []
    fold_gates(sites)
    assert export_adapter(model, tmp_path / "adapter", profile).difference == pytest.approx(0, abs=1e-5)


def test_an_unknown_profile_and_a_model_without_an_adapter_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match='profile must be one of ragged, uniform, merged; got "raged"'):
        export_adapter(tiny_peft("llama"), tmp_path / "adapter", "raged")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="expected a PeftModel, got LlamaForCausalLM"):
        export_adapter(tiny_llama(), tmp_path / "adapter")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.fc(x))


class Network(nn.Module):
    """No transformers model: no token ids, no config, a tensor as output, and names that end alike from the root."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Inner()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.block(x))


def network(**settings: Any) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(Network(), LoraConfig(r=4, lora_alpha=6, target_modules=["fc"], **settings))
    train_adapter(model)
    return model.eval()


def test_a_model_without_token_ids_needs_a_batch(tmp_path: Path) -> None:
    model = network()
    with pytest.raises(UserError, match=r"Network does not take token ids: pass batch=\{...\}, inputs for the check"):
        export_adapter(model, tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []
    assert export_adapter(model, tmp_path / "adapter", batch={"x": torch.randn(5, 8)}).difference < 1e-5


@pytest.mark.parametrize(
    ("settings", "ranks"),
    [
        *[(settings, ranks) for settings in ({}, {"exclude_modules": "nothing"}) for ranks in ((1, 3), (3, 1))],
        ({}, (3, 0)),
        ({"exclude_modules": "nothing"}, (0, 3)),
        ({}, (0, 3)),
        ({"exclude_modules": "nothing"}, (3, 0)),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:You have passed exclude_modules")
def test_a_name_that_is_the_end_of_another_name_can_be_left_out(
    tmp_path: Path, ranks: tuple[int, int], settings: dict[str, Any]
) -> None:
    model = network(**settings)
    set_ranks(model, {"fc": ranks[0], "block.fc": ranks[1]})
    x = torch.randn(5, 8)
    export = export_adapter(model, tmp_path / "adapter", batch={"x": x})
    torch.manual_seed(0)
    stock = PeftModel.from_pretrained(Network(), export.path)
    torch.testing.assert_close(stock(x), model(x), rtol=1e-5, atol=1e-5)


def test_the_check_looks_at_every_sample_of_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    batch = {"x": torch.cat([torch.zeros(1, 8), torch.randn(4, 8)])}
    model.base_model.model.block.fc.base_layer.bias.data.zero_()  # the first sample stays zero up to the last layer
    corrupt_writes(monkeypatch, "lora_B")
    with pytest.raises(RuntimeError, match="computes something else"):
        export_adapter(model, tmp_path / "adapter", batch=batch)


def classifier_without_padding() -> PeftModel:
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=1, n_head=2, n_positions=32, num_labels=LABELS)
    return get_peft_model(GPT2Classifier(config), lora_config("gpt2", task_type="SEQ_CLS"))


def few_positions() -> PeftModel:
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=1, n_head=2, n_positions=8)
    return get_peft_model(GPT2LMHeadModel(config), lora_config("gpt2"))


def trained_tokens() -> PeftModel:
    return tiny_peft("llama", trained=True, trainable_token_indices=[1, 2])


@pytest.mark.parametrize("build", [classifier_without_padding, few_positions, trained_tokens])
def test_a_model_of_token_ids_needs_no_batch(tmp_path: Path, build: Callable[[], PeftModel]) -> None:
    assert export_adapter(build(), tmp_path / "adapter").difference < 1e-5


def test_an_adapter_with_trained_tokens_is_not_offered_to_a_server(tmp_path: Path) -> None:
    """vLLM reads factors alone. Merged, the embeddings are the model's."""
    for profile in ("ragged", "merged"):
        assert bool(export_adapter(trained_tokens(), tmp_path / profile, profile).serving) == (profile == "merged")
    text = (tmp_path / "ragged" / "README.md").read_text(encoding="utf-8")
    assert "vllm serve" not in text


OTHER = "{} makes the update more, or other, than B·A; leave it out of LoraConfig"
UNSUPPORTED: dict[str, tuple[Callable[[], PeftModel], str]] = {
    "Embedding": (
        lambda: tiny_peft("llama", trained=True, target_modules=["embed_tokens", "q_proj"]),
        "model.embed_tokens: LoRA on Embedding layers is not supported (its update is a table look-up, not a product "
        'with an input); leave out what is not supported, LoraConfig(exclude_modules=["model.embed_tokens"]) '
        "(lora.exclude_modules in a recipe)",
    ),
    "Conv2d": (
        lambda: get_peft_model(nn.Sequential(nn.Conv2d(3, 8, 3)), LoraConfig(target_modules=["0"])),
        "0: LoRA on Conv2d layers is not supported (its factors are convolution kernels); the model has no linear "
        "layers that LoRA could adapt",
    ),
    "lora_bias": (
        lambda: tiny_peft("bert", trained=True, lora_bias=True),
        OTHER.format("lora_bias"),
    ),
    "dora": (
        lambda: tiny_peft("llama", trained=True, use_dora=True),
        OTHER.format("use_dora"),
    ),
    "bias": (
        lambda: tiny_peft("llama", trained=True, bias="lora_only"),
        'bias="lora_only" trains biases of the base model, which are no part of plain LoRA; set '
        'LoraConfig(bias="none")',
    ),
    "layer_replication": (
        lambda: tiny_peft("llama", trained=True, layer_replication=[(0, 2), (0, 2)]),
        "layer_replication builds another model from the base model's layers, which is no part of plain LoRA; leave it "
        "out of LoraConfig",
    ),
}


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_an_adapter_that_is_more_than_lora_is_refused_in_words(tmp_path: Path, kind: str, profile: Profile) -> None:
    build, text = UNSUPPORTED[kind]
    with pytest.raises(UserError, match=f"^{re.escape(text)}$"):
        export_adapter(build(), tmp_path / "adapter", profile)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.filterwarnings("ignore:.*changes the base weights of the model")
def test_a_start_that_changed_the_base_weights_is_refused(tmp_path: Path, start: str, profile: Profile) -> None:
    text = (
        f'init_lora_weights="{start}" changes the base weights at the start, so that the adapter fits no stock base '
        "model; train with LoraConfig(init_lora_weights=True); PEFT converts an adapter that is trained already, where "
        "its start was saved: save_pretrained(path, path_initial_model_for_weight_conversion=...)"
    )
    with pytest.raises(UserError, match=f"^{re.escape(text)}$"):
        export_adapter(adapted("llama", init_lora_weights=start), tmp_path / "adapter", profile)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:lora with eva initialization")
def test_settings_of_the_start_are_not_left_in_the_config(tmp_path: Path) -> None:
    model = adapted("llama", init_lora_weights="eva", eva_config=EvaConfig())
    check_round_trip("llama", model, tmp_path / "adapter", "ragged")  # warnings are errors here


@pytest.mark.parametrize(("state", "cure"), [("merged", "unmerge_adapter"), ("disabled", "enable_adapter_layers")])
def test_a_merged_or_disabled_adapter_is_refused(tmp_path: Path, state: str, cure: str) -> None:
    model = tiny_peft("llama", trained=True)
    if state == "merged":
        model.merge_adapter()
    else:
        model.base_model.disable_adapter_layers()
    before = snapshot(model)
    text = (
        f"model.layers.0.self_attn.q_proj: the adapter is {state}, so there is nothing to compare with; "
        f"call {cure}() first"
    )
    with pytest.raises(UserError, match=f"^{re.escape(text)}$"):
        export_adapter(model, tmp_path / "adapter")
    assert_unchanged(model, before)


@pytest.mark.parametrize("profile", PROFILES)
def test_an_adapter_with_every_rank_closed_is_refused(tmp_path: Path, profile: Profile) -> None:
    model = tiny_peft("llama", trained=True)
    set_ranks(model, dict.fromkeys(lora_layers(model), 0))
    with pytest.raises(UserError, match=r"^the adapter has no rank left in any module: there is nothing to export$"):
        export_adapter(model, tmp_path / "adapter", profile)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_nobody_may_write_into_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    expected = f"{tmp_path}/new/adapter: you may not write into {tmp_path}; choose another folder"
    with pytest.raises(UserError, match=f"^{re.escape(expected)}$"):
        export_adapter(tiny_peft("llama", trained=True), tmp_path / "new" / "adapter")
    assert list(tmp_path.iterdir()) == []


def test_a_deep_bf16_model_merges_with_no_more_error_than_pefts_own_merge(tmp_path: Path) -> None:
    base = tiny_llama(layers=24, dtype=torch.bfloat16)
    torch.manual_seed(1)
    model = get_peft_model(base, lora_config("llama")).eval()
    train_adapter(model)
    for layer in lora_layers(model).values():
        layer.lora_B["default"].weight.data.mul_(0.1)
    export = export_adapter(model, tmp_path / "merged", "merged")
    stock = logits(model.merge_and_unload())
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(export.path, dtype="auto")), stock)


# ---- What the export says ----


@pytest.mark.parametrize(
    ("rank", "flag"), [(1, 1), (2, 8), (8, 8), (9, 16), (33, 64), (200, 256), (257, 320), (321, 512), (512, 512)]
)
def test_the_serving_line_has_a_rank_that_vllm_takes(rank: int, flag: int) -> None:
    assert flag in VLLM_RANKS
    for profile, need in (("ragged", "vLLM 0.32 or newer"), ("uniform", "any vLLM")):
        export = Export(Path("out/adapter"), profile, {"a": rank, "b": 0}, 0.0, 1e-5)
        assert export.serving == [
            f"vllm serve BASE_MODEL --enable-lora --max-lora-rank {flag} --lora-modules adapter=out/adapter   # {need}"
        ]
    assert Export(Path("out/merged"), "merged", {"a": rank}, 0.0, 1e-5).serving == ["vllm serve out/merged"]


@pytest.mark.parametrize("profile", ADAPTER_PROFILES)
def test_the_card_says_what_it_is_and_its_front_matter_is_yaml(tmp_path: Path, profile: Profile) -> None:
    model = adapted("llama")
    set_ranks(model, cycled_ranks(model, 3, 0, 1))
    export = export_adapter(model, tmp_path / "adapter", profile)
    text = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": str(saved_base("llama")),
        "library_name": "peft",
        "tags": ["lora", "loralloc"],
    }
    assert f"(profile `{profile}`): 8 ranks over 6 modules, largest rank 3." in body
    assert json.loads((tmp_path / "adapter" / RECORD).read_text())["ranks"] == export.ranks
    assert ("hot-swapping" in body) == (profile == "ragged")
    assert f"{export.difference:.1e}" in body
    assert export.serving[0].replace(str(export.path), "path/to/this/folder") in body
    assert str(export.path) not in body
    assert "must be at least 3" in body


ODD = ("C:\\models\\a", "/x/#1", "/data/my: model", "@home", "null", "{name}")


@pytest.mark.parametrize("base", ["org/model", "", *ODD])
@pytest.mark.filterwarnings("ignore:Could not find a config file in")
def test_any_name_of_a_base_model_makes_valid_front_matter(tmp_path: Path, base: str) -> None:
    model = tiny_peft("llama", trained=True)
    model.peft_config["default"].base_model_name_or_path = base
    export_adapter(model, tmp_path / "adapter")
    front = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8").split("---\n")[1]
    assert yaml.safe_load(front)["base_model"] == (base or "BASE_MODEL")


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_merged_export_loads_by_itself_without_peft(tmp_path: Path, name: str) -> None:
    model = tiny_peft(name, trained=True)
    export = export_adapter(model, tmp_path / "merged", "merged")
    assert not any("lora" in key for key in load_file(export.path / "model.safetensors"))
    assert not (export.path / "adapter_config.json").exists()
    reloaded = AUTO[name].from_pretrained(export.path)
    torch.testing.assert_close(logits(reloaded), logits(model), rtol=1e-5, atol=1e-5)


def test_the_tokenizer_is_saved_beside_a_merged_model(tmp_path: Path) -> None:
    class Tokenizer:
        def save_pretrained(self, folder: Path) -> None:
            (folder / "tokenizer.json").write_text("{}")

    export_adapter(tiny_peft("llama"), tmp_path / "merged", "merged", tokenizer=Tokenizer())  # type: ignore[arg-type]
    assert (tmp_path / "merged" / "tokenizer.json").exists()
