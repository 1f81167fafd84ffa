"""Write the finished adapter for its consumers, and prove that the files compute what the model computes.

| profile   | what is written                                                        | who reads it right           |
|-----------|------------------------------------------------------------------------|------------------------------|
| `ragged`  | each module at its own rank (`rank_pattern`), rank-0 modules left out  | PEFT, vLLM ≥ 0.32, llama.cpp |
| `uniform` | every module padded with zeros to the largest rank                     | these, older vLLM, SGLang,   |
|           |                                                                        | PEFT's hot-swapping          |
| `merged`  | the whole model, the adapter added to the weights                      | everything                   |

The trained scale is folded into B, so that every consumer computes the same update, whatever its rule for the scale:
`ragged` has one lora_alpha, so a module's scale is lora_alpha / its rank; `uniform` has lora_alpha = r, so it is 1.
"""

from __future__ import annotations

import copy
import re
import shutil
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from loralloc._version import __version__
from loralloc.adapter import folders
from loralloc.adapter.check import (
    Checked,
    Factors,
    check_adapter,
    check_batch,
    compare,
    compare_weights,
    computing_plainly,
    logits,
    rounded_otherwise,
)
from loralloc.adapter.folders import check_target, record_export
from loralloc.adapter.model_card import Export, Profile, model_card
from loralloc.errors import UserError, check_choice
from loralloc.gating import is_gated
from loralloc.naming import ends_in, joined, sort_names
from loralloc.patterns import keyed
from loralloc.peft_layers import PREFIX, peft_model
from loralloc.plain_lora import PlainSite, check_active, check_mergeable, check_plain, plain_sites, stored_apart
from loralloc.sharding import own_place

PROFILES: tuple[Profile, ...] = ("ragged", "uniform", "merged")


def export_adapter(
    model: PeftModel,
    path: str | Path,
    profile: Profile = "ragged",
    *,
    batch: Mapping[str, Any] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Export:
    """Write a plain LoRA adapter (or the merged model), reload it with stock PEFT and compare the logits.

    The folder appears only after the check has passed; an earlier export in it is replaced. The model does not change,
    so a refused export can be repeated. If the model is sharded over processes, all of them must call this, and the
    first one's files stay.

    Args:
        model: A `PeftModel` whose active adapter is plain LoRA: after `RankAllocation` or `finish()`, or any other.
        path: Folder to write.
        profile: `ragged`, `uniform` or `merged`.
        batch: Inputs of the model for the check; by default two samples that the model was trained on, or random token
            ids if no allocation has trained it.
        tokenizer: Saved beside the adapter or the model.

    Raises:
        UserError: Gates are not folded yet, the folder holds something else, no batch can be made up, or the model
            does not take it.
        RuntimeError: The reloaded files compute something else, or hold numbers that are not finite.
    """
    path = Path(path).resolve()
    check_choice("profile", profile, PROFILES)
    with own_place(model, path) as place:
        return replace(_export_to(place, peft_model(model), profile, batch, tokenizer), path=path)


def _export_to(
    path: Path,
    model: PeftModel,
    profile: Profile,
    batch: Mapping[str, Any] | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Export:
    check_target(path)
    sites = list(plain_sites(model))
    adapter = sites[0].adapter
    if is_gated(model, adapter):
        raise UserError(
            "the rank allocation is not finished: its gates are not folded; call finish() or end train() first"
        )
    layers = [(site.name, site.layer) for site in sites]
    check_plain(model, adapter, layers)
    check_active(layers)
    if profile == "merged":
        check_mergeable(model, layers)
    factors = {site.name: _factors(site) for site in sites}
    if not any(factor.rank for factor in factors.values()):
        raise UserError("the adapter has no rank left in any module: there is nothing to export")
    batch = check_batch(model, batch)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary_folder = tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.")
    with temporary_folder as temporary:
        folder = Path(temporary) / "export"
        folder.mkdir()
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if profile == "merged":
            checked = _write_merged(model, folder, batch)
        else:
            _write_adapter(model, adapter, folder, factors, profile)
            checked = check_adapter(model, folder, factors, batch)
        export = _export(model, adapter, path, profile, factors, checked)
        if profile != "merged":
            write_card(model, export, folder)
        record = {"loralloc": __version__, "profile": profile, "ranks": export.ranks, "difference": export.difference}
        record_export(folder, record)
        move_into_place(folder, path)
    return export


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write the active adapter in the profile `ragged`, without a check or a model card.

    Args:
        model: A model whose active adapter is plain LoRA.
        folder: Folder to write; what stands there is replaced.
    """
    sites = list(plain_sites(model))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _write_adapter(model, sites[0].adapter, folder, {site.name: _factors(site) for site in sites}, "ragged")


def write_card(model: PeftModel, export: Export, folder: Path, facts: Mapping[str, Any] | None = None) -> None:
    """Write the model card of an adapter into its folder (see `model_card`)."""
    tokenizer = (folder / "tokenizer_config.json").is_file()
    text = model_card(model.get_base_model(), export, tokenizer, facts)
    folders.write_card(folder, text)


def _export(
    model: PeftModel, adapter: str, path: Path, profile: Profile, factors: Mapping[str, Factors], checked: Checked
) -> Export:
    config, base = model.peft_config[adapter], model.get_base_model()
    return Export(
        path=path,
        profile=profile,
        ranks={name: factor.rank for name, factor in factors.items()},
        difference=checked.difference,
        allowed=checked.allowed,
        base=config.base_model_name_or_path or getattr(base, "name_or_path", "") or "BASE_MODEL",
        revision=config.revision,
        has_head=any(getattr(config, key, None) for key in ("modules_to_save", "trainable_token_indices")),
        generates=_is_served(base),
    )


def _factors(site: PlainSite) -> Factors:
    """Drop closed ranks (zero in both factors) and fold the scale into B."""
    A, B = site.A.detach(), site.B.detach()
    if not (torch.isfinite(A).all() and torch.isfinite(B).all()):
        raise RuntimeError("the adapter holds numbers that are not finite; it was not exported")
    keep = (A != 0).any(1) | (B != 0).any(0)
    return Factors(A[keep].clone(), B[:, keep] * site.scaling)


def ragged(factors: Mapping[str, Factors]) -> tuple[dict[str, Any], dict[str, Factors]]:
    """Return (LoraConfig fields, stored factors) of the profile `ragged`."""
    open_factors = {name: factor for name, factor in factors.items() if factor.rank > 0}
    top = max(factor.rank for factor in open_factors.values())
    stored = {name: Factors(f.A, f.B * (f.rank / top)) for name, f in open_factors.items()}
    pattern = keyed({name: factor.rank for name, factor in stored.items()})
    return {"r": top, "lora_alpha": top, "rank_pattern": pattern}, stored


def uniform(factors: Mapping[str, Factors]) -> tuple[dict[str, Any], dict[str, Factors]]:
    """Return (LoraConfig fields, stored factors) of the profile `uniform`."""
    top = max(1, *(factor.rank for factor in factors.values()))
    stored = {}
    for name, factor in factors.items():
        missing = top - factor.rank
        A = torch.nn.functional.pad(factor.A, (0, 0, 0, missing))
        B = torch.nn.functional.pad(factor.B, (0, missing))
        stored[name] = Factors(A, B)
    return {"r": top, "lora_alpha": top, "rank_pattern": {}}, stored


def _write_adapter(
    model: PeftModel, adapter: str, folder: Path, factors: Mapping[str, Factors], profile: Profile
) -> None:
    """Write adapter_config.json and adapter_model.safetensors."""
    fields, stored = (ragged if profile == "ragged" else uniform)(factors)
    config = plain_config(model.peft_config[adapter], fields, list(factors), stored)
    tensors = get_peft_model_state_dict(model, adapter_name=adapter)
    for name in factors:
        keys = [f"{PREFIX}{name}.lora_{symbol}.weight" for symbol in "AB"]
        dtypes = [tensors.pop(key).dtype for key in keys]
        if name in stored:
            values = (stored[name].A, stored[name].B)
            tensors |= {k: v.to(dtype) for k, v, dtype in zip(keys, values, dtypes, strict=True)}
    tensors = without_left_out(tensors, factors, stored)
    config.save_pretrained(str(folder))
    save_file(stored_apart(tensors), folder / "adapter_model.safetensors", metadata={"format": "pt"})


def without_left_out(tensors: Mapping[str, Tensor], names: Collection[str], kept: Collection[str]) -> dict[str, Tensor]:
    """Drop what PEFT has saved of the base model's layer itself, as of every output layer with an adapter.

    Args:
        tensors: Tensors by their keys in a file.
        names: All adapted modules.
        kept: Those that have a rank; only of the others the layer is dropped.
    """
    layers = tuple(f"{PREFIX}{name}.base_layer." for name in names if name not in kept)
    return {key: tensor for key, tensor in tensors.items() if not key.startswith(layers)}


def plain_config(
    config: PeftConfig, fields: Mapping[str, Any], names: Sequence[str], kept: Collection[str]
) -> LoraConfig:
    """Copy an adapter's own config, reduced to what every consumer of LoRA understands.

    Args:
        config: The config that the adapter was trained with.
        fields: What the profile sets.
        names: All adapted modules.
        kept: Those that have a rank; the others are left out.
    """
    config = copy.deepcopy(config)
    assert isinstance(config, LoraConfig)
    for key, value in {
        **fields,
        "alpha_pattern": {},
        "use_rslora": False,
        "init_lora_weights": True,
        "eva_config": None,
        "inference_mode": True,
    }.items():
        setattr(config, key, value)
    if left_out := [name for name in names if name not in kept]:
        # Whatever selects the modules (targets, layers, exclusions) stays as it is, and more is excluded. PEFT matches
        # the ends of listed names, so only a pattern tells `fc` from `block.fc`, or goes with a pattern.
        listed = not (isinstance(config.exclude_modules, str) or any(ends_in(a, b) for a in kept for b in left_out))
        excluded = joined(config.exclude_modules, left_out if listed else "|".join(map(re.escape, left_out)))
        config.exclude_modules = excluded if isinstance(excluded, str) else sorted(set(excluded))
    sort_names(config)
    return config


def _write_merged(model: PeftModel, folder: Path, batch: Mapping[str, Any]) -> Checked:
    """Merge a copy, save it, load it again and compare."""
    with computing_plainly(model):
        expected = logits(model, batch)
        merged = copy.deepcopy(model).merge_and_unload().eval()
        rounded = partial(rounded_otherwise, model, batch, merged.dtype)
        compare(expected, logits(merged, batch), rounded, ulps=64)  # narrow weights are rounded once more by merging
        merged.save_pretrained(folder)
        type(merged.config).from_pretrained(folder)  # the folder is a model that loads by itself
        reloaded = type(merged).from_pretrained(folder, dtype=merged.dtype).to(merged.device)
        compare_weights(merged, reloaded)
        # The same weights, but not always the same kernels: what a training loop has put around the model is gone.
        return compare(logits(merged, batch), logits(reloaded.eval(), batch), rounded, ulps=64)


def move_into_place(folder: Path, path: Path) -> None:
    """Swap the finished folder in; the old one goes only after that."""
    if path.exists():
        old = folder.with_name("old")
        path.rename(old)
        try:
            folder.rename(path)
        except OSError:
            old.rename(path)
            raise
        shutil.rmtree(old)
    else:
        folder.rename(path)


def _is_served(base: Any) -> bool:
    """Whether servers of language models take the model: one that generates, and has no encoder beside its decoder."""
    both = getattr(getattr(base, "config", None), "is_encoder_decoder", False)
    return not both and bool(getattr(base, "can_generate", lambda: False)())
