"""Modules whose names look alike to PEFT: as ends of each other, or as regular expressions.

PEFT takes keys of `rank_pattern` and `alpha_pattern` for expressions that fit the ends of names, and saves them sorted.
"""

from __future__ import annotations

import copy
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from exports import ADAPTER_PROFILES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import lora_layers, set_ranks
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from loralloc import Budget, RankPlan, export_adapter, patterns, truncate_adapter
from loralloc.adapter.export import Profile
from loralloc.adapter.from_plan import lora_config
from loralloc.patterns import key_of, keyed
from loralloc.plan import ModuleRank

PARTS = st.sampled_from(["v", "1", "fc", "fc_1", "fcx1", "lm_head", "t2u", "layers", "c(", "a+b", "[", "x-y", "^", "é"])
NAMES = st.lists(PARTS, min_size=1, max_size=4).map(".".join)
NUMBERED = st.lists(st.sampled_from(["0", "1", "11", "2", "v", "a+b", "layers"]), min_size=1, max_size=4).map(".".join)
VALUES = st.one_of(*(st.dictionaries(names, st.integers(1, 3), min_size=1, max_size=8) for names in (NAMES, NUMBERED)))


class Chain(nn.Module):
    """Square layers in a row.

    Args:
        names: Their names; a dot means a module inside of another.
    """

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.order = names
        for name in names:
            *parents, last = name.split(".")
            place: nn.Module = self
            for parent in parents:
                if parent not in place._modules:
                    place.add_module(parent, nn.Module())
                place = place._modules[parent]
            place.add_module(last, nn.Linear(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        layers = dict(self.named_modules())
        for name in self.order:
            x = x + torch.tanh(layers[name](x))
        return x


ALIKE = {
    "ends of each other": ("layers.1.v", "vision.layers.1.v"),
    "a whole name that ends another": ("proj", "text.proj"),
    "a dot that fits any character": ("fc_1", "fc.1"),
    "no expressions": ("a+b", "c("),
}
"""Two names for a test of either order of ranks."""


def base_of(*names: str) -> Chain:
    torch.manual_seed(0)
    return Chain(*names)


def trained(base: nn.Module, ranks: Mapping[str, int], **settings: Any) -> PeftModel:
    """An adapter whose modules have these ranks, of four."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": list(ranks), **settings})
    model = get_peft_model(copy.deepcopy(base), config).eval()
    filled(model)
    set_ranks(model, dict(ranks))
    return model


@torch.no_grad()
def filled(model: PeftModel) -> None:
    """Give every factor of the adapter random values."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.normal_()


@torch.no_grad()
def check_same(base: nn.Module, model: PeftModel, folder: Path) -> PeftModel:
    """Compare with what stock PEFT loads from a folder, which is returned."""
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(2))
    stock = PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()
    torch.testing.assert_close(stock(x), model(x), rtol=1e-4, atol=1e-4)
    return stock


# ---- Keys of patterns ----


@pytest.fixture(params=[patterns.MANY, 1], ids=["names", "names that share a key"])
def many(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(patterns, "MANY", request.param)
    return int(request.param)


UNCHANGED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@UNCHANGED
@given(values=VALUES)
def test_stock_peft_finds_every_modules_own_value_in_sorted_keys(many: int, values: dict[str, int]) -> None:
    saved = json.loads(json.dumps(keyed(values), sort_keys=True))
    for order in (saved, dict(reversed(saved.items()))):
        assert {name: order[get_pattern_key(list(order), name)] for name in values} == values


@UNCHANGED
@given(values=VALUES)
def test_every_key_fits_a_module(many: int, values: dict[str, int]) -> None:
    """PEFT warns of others."""
    assert {get_pattern_key([key], name) for key in keyed(values) for name in values} >= keyed(values).keys()


def test_many_modules_have_few_keys() -> None:
    """Python remembers 512 regular expressions; with more of them PEFT is ten times as slow."""
    ends = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    values = {f"layers.{n}.{end}": 1 + n % 3 for n in range(400) for end in ends}
    assert len(keyed(values)) == 9
    experts = {f"layers.{layer}.experts.{n}.up": 1 + n % 3 for layer in range(4) for n in range(100)}
    assert len(keyed(experts)) == 12
    few = dict(list(values.items())[: patterns.MANY - 1])
    assert keyed(few) == few


def test_keys_that_modules_share_are_written_and_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(patterns, "MANY", 1)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("as quick to compare as names"))
    base = Chain("layers.0.v", "layers.1.v", "layers.2.v", "vision.layers.0.v")
    ranks = dict(zip(base.order, (1, 2, 1, 2), strict=True))
    plan = RankPlan("made", {name: ModuleRank(rank, 2, 6, 6, 1.0) for name, rank in ranks.items()})
    torch.manual_seed(0)
    config = lora_config(plan, base, init_lora_weights=False)
    assert config.rank_pattern == {r"^layers\.(0|2)\.v": 1, "layers.1.v": 2, "vision.layers.0.v": 2}
    model = get_peft_model(copy.deepcopy(base), config).eval()
    assert {name: layer.r["default"] for name, layer in lora_layers(model).items()} == ranks
    export_adapter(model, tmp_path / "out", profile="ragged", batch={"x": torch.randn(2, 3, 6)})
    check_same(base, model, tmp_path / "out")
    truncate_adapter(tmp_path / "out", tmp_path / "cut", Budget(total_rank=5))


def test_names_are_keys_wherever_that_is_right() -> None:
    plain = {"model.layers.0.mlp.up_proj": 2, "model.layers.1.mlp.up_proj": 1, "lm_head": 2, "t2u.lm_head": 2}
    assert keyed(plain) == plain
    assert list(keyed({"fc": 1, "a.fc": 2, "b.a.fc": 3})) == ["^fc", r"^a\.fc", "b.a.fc"]
    assert key_of("proj.1", ["layers.0.proj_1"]) == r"proj\.1"


# ---- Files ----


@pytest.mark.parametrize("ranks", [(2, 4), (4, 2), (3, 3)], ids=str)
@pytest.mark.parametrize("profile", ADAPTER_PROFILES)
@pytest.mark.parametrize("alike", ALIKE)
def test_an_export(alike: str, profile: Profile, ranks: tuple[int, int], tmp_path: Path) -> None:
    names = ALIKE[alike]
    base = base_of(*names)
    model = trained(base, dict(zip(names, ranks, strict=True)))
    export_adapter(model, tmp_path / "adapter", profile, batch={"x": torch.ones(1, 6)})
    check_same(base, model, tmp_path / "adapter")


@pytest.mark.parametrize("ranks", [(2, 4), (4, 2)], ids=str)
@pytest.mark.parametrize("alike", ALIKE)
def test_a_truncation(alike: str, ranks: tuple[int, int], tmp_path: Path) -> None:
    names = ALIKE[alike]
    base = base_of(*names)
    model = trained(base, dict(zip(names, ranks, strict=True)))
    model.save_pretrained(str(tmp_path / "source"))
    plan = truncate_adapter(tmp_path / "source", tmp_path / "small", Budget(total_rank=6)).plan
    assert plan.ranks == dict(zip(names, ranks, strict=True))
    check_same(base, model, tmp_path / "small")
    again = truncate_adapter(tmp_path / "small", tmp_path / "again", Budget(fraction=1.0)).plan
    assert again.ranks == plan.ranks
    check_same(base, model, tmp_path / "again")


@pytest.mark.parametrize("planned", [[(2, 1.0), (4, 1.0)], [(4, 1.0), (2, 1.0)], [(4, 1.0), (4, 3.0)]], ids=str)
@pytest.mark.parametrize("alike", ALIKE)
def test_an_adapter_from_a_plan(alike: str, planned: list[tuple[int, float]], tmp_path: Path) -> None:
    names = ALIKE[alike]
    base = base_of(*names)
    modules = {name: ModuleRank(rank, 4, 6, 6, scale) for name, (rank, scale) in zip(names, planned, strict=True)}
    config = lora_config(RankPlan("ablora", modules, {}, 8, {}), base)
    model = get_peft_model(copy.deepcopy(base), config).eval()
    filled(model)
    model.save_pretrained(str(tmp_path / "adapter"))
    stock = lora_layers(check_same(base, model, tmp_path / "adapter"))
    assert {name: (layer.r["default"], layer.scaling["default"]) for name, layer in stock.items()} == dict(
        zip(names, planned, strict=True)
    )


# ---- Modules that are left out ----

LAYERS = tuple(f"{tower}layers.{layer}.{kind}" for tower in ("", "vision.") for layer in (0, 1) for kind in ("q", "v"))

SELECTIONS: dict[str, dict[str, Any]] = {
    "names": {"target_modules": ["q", "v"]},
    "a pattern": {"target_modules": r".*\.(q|v)"},
    "layers": {"layers_to_transform": [0], "layers_pattern": "layers"},
    "layers of any name": {"layers_to_transform": [1]},
    "exclusions": {"exclude_modules": ["vision.layers.1.q"]},
    "a pattern of exclusions": {"exclude_modules": r"vision\..*"},
    "a pattern with choices": {"exclude_modules": r"(?i)VISION\..*|layers\.1\.v"},
    "layers and exclusions": {
        "layers_to_transform": [0],
        "layers_pattern": "layers",
        "exclude_modules": r"vision\..*\.v",
    },
}
"""Ways to select some of `LAYERS`."""


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_only_what_had_an_adapter_and_a_rank_has_one_afterwards(selection: str, first: int, tmp_path: Path) -> None:
    settings = {"target_modules": ["q", "v"], **SELECTIONS[selection]}
    base = base_of(*LAYERS)
    names = list(lora_layers(get_peft_model(copy.deepcopy(base), LoraConfig(**settings))))
    ranks = {name: 0 if number % 2 == first else 3 for number, name in enumerate(names)}
    model = trained(base, ranks, **settings)
    kept = {name for name, rank in ranks.items() if rank}
    assert 0 < len(kept) < len(names) <= len(LAYERS)
    export_adapter(model, tmp_path / "adapter", batch={"x": torch.ones(1, 6)})
    model.save_pretrained(str(tmp_path / "source"))
    truncate_adapter(tmp_path / "source", tmp_path / "small", Budget(total_rank=3 * len(kept)))
    for folder in (tmp_path / "adapter", tmp_path / "small"):
        assert set(lora_layers(check_same(base, model, folder))) == kept
    one = truncate_adapter(tmp_path / "small", tmp_path / "one", Budget(total_rank=1)).plan
    stock = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "one"))
    assert set(lora_layers(stock)) == {name for name, rank in one.ranks.items() if rank}
