"""Promises: an entry is refused exactly where PEFT would find no module for it, and no pattern that works is."""

from __future__ import annotations

from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from loralloc.errors import UserError
from loralloc.plain_lora import plain_sites
from loralloc.recipe.from_recipe import add_adapter
from loralloc.recipe.schema import load_recipe
from loralloc.recipe.sections import LoraSection
from loralloc.recipe.targets import check_entries, linear_modules
from loralloc.recipes import list_recipes


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: object) -> object:
        return x


class Model(nn.Module):
    """Twelve layers, and a module that has two names."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(12))
        self.shared = nn.Embedding(5, 4)
        self.embed_tokens = self.shared
        self.head = nn.Linear(4, 2)

    def forward(self, x: object) -> object:
        return x


FIT = [
    "all-linear",
    "All-Linear",
    ["query"],
    ["query", "layers.3.value", "head"],
    "head",
    r".*\.(query|value)",
    r"layers\.(?:0|1|11)\.(query|value)",
    r"layers\.(1|2|0)+\.query",  # only together do 1 and 0 make a 10
    r"layers\.(1|(2|3))\.value",
    r"layers\.[1(|)]\.value",
    r"layers\.\d+\.query|head",
    r"layers\.(\d)(x|)\.query",
    r"(?i)LAYERS\.1\.(QUERY|value)",
    r"(?!head|tail).*\.query",
]
FIT_NOT = [
    (["query", "valeu"], '"valeu"'),
    (["query", "layers.12.value"], '"layers.12.value"'),
    (["query", "uery"], '"uery"'),
    ("query", '"query". A name is written in a list: [query]'),
    (r".*\.(query|valeu)", '"valeu" of the pattern'),
    (r".*\.(query|(valeu|key))?", '"(valeu|key)" of the pattern'),
    (r"layers\.(1|(2|33))\.value", '"33" of the pattern'),
    (r"layers\.\d+\.query|haed", '"haed" of the pattern'),
    (r"layers\.[0-9]{3}\.query", 'the pattern "layers'),
    ("(query", "is no regular expression (missing )"),
]


@pytest.mark.parametrize("entries", FIT, ids=str)
def test_what_fits_is_accepted_as_by_peft(entries: str | list[str]) -> None:
    check_entries(LoraSection(target_modules=entries), Model(), planned=False)
    if entries not in ("all-linear", "All-Linear"):  # which PEFT knows for models of transformers only
        get_peft_model(Model(), LoraConfig(target_modules=entries))
        check_entries(LoraSection(exclude_modules=entries), Model(), planned=False)


def test_to_exclude_all_linear_layers_is_no_pattern_that_fits() -> None:
    with pytest.raises(UserError, match=r'^lora.exclude_modules: no module fits the pattern "all-linear"'):
        check_entries(LoraSection(exclude_modules="all-linear"), Model(), planned=False)


@pytest.mark.parametrize(("entries", "message"), FIT_NOT, ids=str)
@pytest.mark.parametrize("key", ["target_modules", "exclude_modules"])
def test_what_does_not_fit_is_refused(key: str, entries: str | list[str], message: str) -> None:
    section = LoraSection.model_validate({key: entries})
    with pytest.raises(UserError) as caught:
        check_entries(section, Model(), planned=False)
    assert str(caught.value).startswith(f"lora.{key}: ")
    assert message in str(caught.value)
    assert str(caught.value).endswith("the model has query (12), value (12), head (1)")
    check_entries(section, Model(), planned=True)  # a plan names the modules itself


def test_modules_to_save_are_compared_as_peft_compares_them() -> None:
    for entry in ("head", "embed_tokens", "shared", "layers.3", "tokens"):
        check_entries(LoraSection(modules_to_save=[entry]), Model(), planned=True)
    with pytest.raises(UserError, match=r'^lora.modules_to_save: no module is named "heads"\. .*"head"\?'):
        check_entries(LoraSection(modules_to_save=["shared", "heads"]), Model(), planned=True)


def test_linear_layers_of_every_kind_are_listed() -> None:
    from transformers.pytorch_utils import Conv1D

    assert linear_modules(nn.ModuleDict({"c_attn": Conv1D(4, 4), "fc": nn.Linear(4, 4)})) == "c_attn (1), fc (1)"
    assert linear_modules(nn.Embedding(2, 2)) == "no linear layers"


TINY_HEADS: list[Any] = [
    DistilBertForSequenceClassification(
        DistilBertConfig(dim=16, hidden_dim=32, n_layers=1, n_heads=2, vocab_size=20, max_position_embeddings=16)
    ),
    RobertaForSequenceClassification(
        RobertaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=20)
    ),
]


@pytest.mark.parametrize("excluded", ["null", "[KEY]", "'.*KEY'", "'(?i).*KEY'"])
@pytest.mark.parametrize("model", TINY_HEADS, ids=["distilbert", "roberta"])
def test_heads_that_are_trained_in_full_get_no_adapter(model: Any, excluded: str) -> None:
    """DistilBERT's is two layers, RoBERTa's a module of two."""
    names = [name.rpartition(".")[2] for name, _ in model.named_modules()]
    key = "k_lin" if "k_lin" in names else "key"
    words = ["--lora.exclude_modules", excluded.replace("KEY", key)]
    recipe = load_recipe(list_recipes()["sequence-classification/lora"], words)
    adapted = add_adapter(type(model)(model.config), recipe)
    sites = {site.name.rpartition(".")[2] for site in plain_sites(adapted)}
    assert sites
    assert not any("classifier" in site.name for site in plain_sites(adapted))
    assert (key in sites) is (excluded == "null")
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert any("classifier" in name for name in trained)
