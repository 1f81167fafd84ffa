"""Cutting a trained adapter to a lower rank: our `truncate_adapter` against PEFT's `save_as_lora`."""

from __future__ import annotations

import importlib
import tempfile
import time
import warnings
from pathlib import Path

import torch
from contenders import Setting, Step
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn


def compare(setting: Setting) -> dict[str, dict[str, float]]:
    """Halve the rank of the same trained adapter with both; return seconds and the relative error of the updates.

    PEFT gets a fixed rank for every module, ours the same number of ranks in total, which it may place as it likes.
    """
    loralloc = importlib.import_module("loralloc")
    step = Step(setting)
    for _ in range(3):
        step.step()
    with torch.no_grad():  # a spectrum without gaps, as after a long training
        for layer in _layers(step.model).values():
            layer.lora_B["default"].weight.normal_(std=0.02)
    truth, half = _updates(step.model), setting.rank // 2
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        step.model.save_pretrained(source)

        def ours(target: Path) -> None:
            loralloc.truncate_adapter(source, target, loralloc.Budget(average_rank=half))

        def theirs(target: Path) -> None:
            from peft import save_as_lora

            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it says that the adapter is LoRA already
                save_as_lora(target, step.model, rank=half)

        for name, convert in (("loralloc", ours), ("peft", theirs)):
            started, processor = time.perf_counter(), time.process_time()
            convert(Path(folder) / name)
            seconds = time.perf_counter() - started
            results[name] = {"seconds": seconds, "processor": time.process_time() - processor}
            base = setting.shape.build(setting.device)
            found = _updates(PeftModel.from_pretrained(base, Path(folder) / name))
            missed = sum((update - found.get(layer, 0)).square().sum() for layer, update in truth.items())
            results[name]["error"] = float((missed / sum(t.square().sum() for t in truth.values())) ** 0.5)
    return results


def _layers(model: nn.Module) -> dict[str, LoraLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


@torch.no_grad()
def _updates(model: nn.Module) -> dict[str, torch.Tensor]:
    """ΔW by layer; an adapter may have left layers out."""
    return {name: layer.get_delta_weight("default").float() for name, layer in _layers(model).items()}
