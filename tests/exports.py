"""What the tests of exports share: base models on disk, the round trip, and damage done on purpose.

"Stock" is a fresh base model from its saved files and `PeftModel.from_pretrained`, as any user would load it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from models import BUILDERS, logits, lora_config, lora_layers, train_adapter
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from loralloc import export_adapter
from loralloc.adapter import export as export_module
from loralloc.adapter.export import Export, Profile
from loralloc.adapter.folders import RECORD

MODELS = list(BUILDERS)
ADAPTER_PROFILES: tuple[Profile, ...] = ("ragged", "uniform")
ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors", "README.md", RECORD}
AUTO: Mapping[str, Any] = {
    "llama": AutoModelForCausalLM,
    "bert": AutoModelForSequenceClassification,
    "gpt2": AutoModelForCausalLM,
}

_BASES = TemporaryDirectory(prefix="loralloc-tests-")


@cache
def saved_base(name: str) -> Path:
    """The folder of a base model."""
    folder = Path(_BASES.name) / name
    BUILDERS[name]().save_pretrained(folder)
    return folder


def adapted(name: str, **settings: Any) -> PeftModel:
    """A trained adapter on a model that was loaded from its files."""
    base = AUTO[name].from_pretrained(saved_base(name))
    torch.manual_seed(1)
    model = get_peft_model(base, lora_config(name, **settings)).eval()
    train_adapter(model)
    return model


def stock_reload(name: str, export: Export) -> nn.Module:
    """The export as its user loads it."""
    if export.profile == "merged":
        return AUTO[name].from_pretrained(export.path)
    return PeftModel.from_pretrained(AUTO[name].from_pretrained(saved_base(name)), export.path)


def check_round_trip(name: str, model: PeftModel, path: Path, profile: Profile) -> Export:
    """Export, reload as stock, compare on inputs that the export has not seen."""
    expected = logits(model)
    export = export_adapter(model, path, profile)
    difference = float((logits(stock_reload(name, export)) - expected).abs().max())
    assert difference <= 1e-5 * max(1.0, float(expected.abs().max()))
    assert export.difference <= 1e-5 * max(1.0, float(expected.abs().max()))
    assert (export.path, export.profile) == (path, profile)
    return export


def config_of(folder: Path) -> dict[str, Any]:
    """What adapter_config.json holds."""
    return json.loads((folder / "adapter_config.json").read_text())


def stored(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Full module name to (A, B) as they stand in the file."""
    tensors = load_file(folder / "adapter_model.safetensors")
    names = {key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")}
    return {
        name.removeprefix("base_model.model."): (tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"])
        for name in names
    }


def corrupt_writes(monkeypatch: pytest.MonkeyPatch, part: str = "lora_B") -> None:
    """Let what reaches the disk differ from what was meant: half of one tensor's values."""

    def save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        key = next(key for key in tensors if part in key)
        save_file({**tensors, key: 0.5 * tensors[key]}, path, metadata=metadata)

    monkeypatch.setattr(export_module, "save_file", save)


def snapshot(model: PeftModel) -> dict[str, Any]:
    """Everything about a model that a check could disturb; tensors as their bytes, so that == compares them."""
    layers = {
        name: (layer.active_adapters, layer.merged_adapters[:], layer.disable_adapters, dict(layer.scaling))
        for name, layer in lora_layers(model).items()
    }
    return {
        "state": {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()},
        "gradients": {n: None if p.grad is None else p.grad.numpy().tobytes() for n, p in model.named_parameters()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "training": {name: module.training for name, module in model.named_modules()},
        "adapters": (list(model.peft_config), model.active_adapter, list(model.active_adapters)),
        "layers": layers,
        "configs": {name: config.to_dict() for name, config in model.peft_config.items()},
    }


def assert_unchanged(model: PeftModel, before: Mapping[str, Any]) -> None:
    """Compare with an earlier snapshot, part by part so that a failure names the part."""
    after = snapshot(model)
    for part, value in before.items():
        assert after[part] == value, part
