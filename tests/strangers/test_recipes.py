"""Recipes of strangers on a model: no pattern and no rank of theirs reaches PEFT before it is checked."""

from __future__ import annotations

import re
from typing import Any

import pytest
from models import tiny_peft
from peft import LoraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from loralloc.errors import UserError
from loralloc.recipe.sections import LoraSection
from loralloc.recipe.targets import check_entries, check_patterns, check_ranks

from .sent import quickly

ENDLESS = "(.*)*" * 12 + "y"

PATTERNS: dict[str, dict[str, Any]] = {
    "target_modules": {"target_modules": ENDLESS},
    "exclude_modules": {"exclude_modules": ENDLESS},
    "peft.rank_pattern": {"peft": {"rank_pattern": {ENDLESS: 2}}},
    "peft.alpha_pattern": {"peft": {"alpha_pattern": {ENDLESS: 2}}},
    "peft.layers_pattern": {"peft": {"layers_to_transform": [0], "layers_pattern": ENDLESS}},
    "an alternative alone": {"target_modules": f".*|{ENDLESS}"},
}


@pytest.mark.parametrize("key", PATTERNS)
def test_patterns_without_end(key: str) -> None:
    model = tiny_peft("llama").unload()
    said = rf'^lora.{key if "." in key else "(target|exclude)_modules"}: ".*y" takes longer than 0.3 s to compare with'
    with quickly(), pytest.raises(UserError, match=said):
        check_entries(LoraSection(**PATTERNS[key]), model, planned=False)


def test_patterns_of_adapted_modules() -> None:
    lora = LoraSection(peft={"rank_pattern": {ENDLESS: 2}})
    with quickly(), pytest.raises(UserError, match=f'^"{re.escape(ENDLESS)}" takes longer than'):
        check_patterns(lora, ["model.layers.0.self_attn.q_proj"])


@pytest.mark.parametrize("ranks", [{"r": 10**9}, {"r": 4, "rank_pattern": {"q_proj": 10**9}}], ids=str)
def test_a_rank_of_a_billion(ranks: dict[str, Any]) -> None:
    model = tiny_peft("llama").unload()
    widest = max(model.get_submodule("model.layers.0.mlp.up_proj").weight.shape)
    wide = max(widest, model.get_output_embeddings().weight.shape[0])  # type: ignore[operator]
    said = (
        rf"^lora.r: rank 1000000000 is above the {wide} dimensions of the model's widest layer; lower it to {wide} at"
    )
    with quickly(), pytest.raises(UserError, match=said):
        check_ranks(LoraConfig(**ranks), model)
    check_ranks(LoraConfig(r=wide), model)


def test_the_size_of_a_layer_is_asked_for_where_it_tells() -> None:
    class LinearScalingRotaryEmbedding(nn.Module):
        """As in transformers: its name is no sign of a weight."""

    model = nn.ModuleDict({"rotary": LinearScalingRotaryEmbedding(), "conv": Conv1D(24, 8)})
    check_ranks(LoraConfig(r=24), model)
    with pytest.raises(UserError, match="rank 25 is above the 24 dimensions of the model's widest layer"):
        check_ranks(LoraConfig(r=25), model)
    check_ranks(LoraConfig(r=10**9), nn.ModuleDict({"rotary": LinearScalingRotaryEmbedding()}))  # PEFT finds no layer
