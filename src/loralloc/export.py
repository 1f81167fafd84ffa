"""Write the finished adapter for its consumers, and prove that the files compute what the model computes.

| profile   | what is written                                                        | who reads it right           |
|-----------|------------------------------------------------------------------------|------------------------------|
| `ragged`  | each module at its own rank (`rank_pattern`), rank-0 modules left out  | PEFT, vLLM ≥ 0.32, llama.cpp |
| `uniform` | every module padded with zeros to the largest rank                     | everything that reads LoRA   |
| `merged`  | the whole model, the adapter added to the weights                      | everything                   |

The trained scale is folded into B, so that every consumer's rule for the scale gives the same: `ragged` has one
lora_alpha, hence the scale lora_alpha / rank of the module; `uniform` has lora_alpha = r, hence 1.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from loralloc._folders import RECORD, check_target
from loralloc._version import __version__
from loralloc.errors import UserError
from loralloc.gating import is_gated, plain_sites
from loralloc.peft_layers import PREFIX

Profile = Literal["ragged", "uniform", "merged"]
PROFILES: tuple[Profile, ...] = ("ragged", "uniform", "merged")

CHANGES_BASE_WEIGHTS = ("pissa", "olora", "loftq", "corda", "lora_ga")
"""Starts of init_lora_weights under which PEFT subtracts the start from the base weights."""

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM takes for --max-lora-rank."""


@dataclass(frozen=True)
class Factors:
    """A module's update with the scale folded in: ΔW = B A.

    Attributes:
        A: [rank, in].
        B: [out, rank].
    """

    A: Tensor
    B: Tensor

    @property
    def rank(self) -> int:
        """Number of ranks that are not closed."""
        return self.A.shape[0]


Checked = tuple[float, float]
"""Largest difference of a logit, and the largest that is allowed."""


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        path: The folder.
        profile: Its profile.
        ranks: Full module name to rank; 0 for modules left out.
        difference: Largest difference of a logit between the model and the reloaded files, on the checked batch.
        allowed: What it may be: rounding of the model's dtype, at the size of the largest logit.
    """

    path: Path
    profile: Profile
    ranks: Mapping[str, int]
    difference: float
    allowed: float

    @property
    def max_rank(self) -> int:
        """The largest rank: what servers reserve for every module."""
        return max(self.ranks.values())

    @property
    def serving(self) -> list[str]:
        """Lines that serve the export."""
        if self.profile == "merged":
            return [f"vllm serve {self.path}"]
        flag = next((rank for rank in VLLM_RANKS if rank >= self.max_rank), self.max_rank)
        need = "vLLM 0.32 or newer" if self.profile == "ragged" else "any vLLM"
        return [
            f"vllm serve BASE_MODEL --enable-lora --max-lora-rank {flag} --lora-modules adapter={self.path}   # {need}"
        ]


def export_adapter(
    model: PeftModel,
    path: str | Path,
    profile: Profile = "ragged",
    *,
    batch: Mapping[str, Tensor] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Export:
    """Write a plain LoRA adapter (or the merged model), reload it with stock PEFT and compare the logits.

    The folder appears only when the check has passed; an adapter that stood there is replaced then.

    Args:
        model: A `PeftModel` whose active adapter is plain LoRA: after `RankAllocation` or `finish()`, or any other.
        path: Folder to write.
        profile: `ragged`, `uniform` or `merged`.
        batch: Inputs for the check, on the model's device; by default token ids drawn at random.
        tokenizer: Saved beside the model in the profile `merged`.

    Raises:
        UserError: Gates are not folded yet, the folder holds something else, or no batch can be made up.
        RuntimeError: The reloaded files compute something else, or hold numbers that are not finite.
    """
    path = Path(path).resolve()
    if profile not in PROFILES:
        raise UserError(f'profile must be one of {", ".join(PROFILES)}; got "{profile}"')
    check_target(path)
    sites = list(plain_sites(model))
    adapter = sites[0][2]
    if is_gated(model, adapter):
        raise UserError(
            "the rank allocation is not finished: its gates are not folded; call finish() or end train() first"
        )
    _check_plain(model, adapter)
    factors = {name: _factors(layer, adapter) for name, layer, _ in sites}
    if not any(factor.rank for factor in factors.values()):
        raise UserError("the adapter has no rank left in any module: there is nothing to export")
    batch = _made_up_batch(model) if batch is None else batch
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary_folder = tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.")
    with temporary_folder as temporary, _evaluating(model):
        folder = Path(temporary) / "export"
        folder.mkdir()
        if profile == "merged":
            checked = _write_merged(model, folder, batch, tokenizer)
        else:
            _write_adapter(model, adapter, folder, factors, profile)
            checked = _reload_difference(model, adapter, folder, batch)
        export = Export(path, profile, {name: factor.rank for name, factor in factors.items()}, *checked)
        if profile != "merged":
            (folder / "README.md").write_text(_card(model, adapter, export), encoding="utf-8")
        record = {"loralloc": __version__, "profile": profile, "ranks": export.ranks, "difference": export.difference}
        record["files"] = sorted(entry.name for entry in folder.iterdir())
        (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        move_into_place(folder, path)
    return export


def _factors(layer: Any, adapter: str) -> Factors:
    """Drop closed ranks (zero in both factors) and fold the scale into B."""
    A, B = layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach()
    if not (torch.isfinite(A).all() and torch.isfinite(B).all()):
        raise RuntimeError("the adapter holds numbers that are not finite; it was not exported")
    keep = (A != 0).any(1) | (B != 0).any(0)
    return Factors(A[keep].clone(), B[:, keep] * float(layer.scaling[adapter]))


def ragged(factors: Mapping[str, Factors]) -> tuple[dict[str, Any], dict[str, Factors]]:
    """Return (LoraConfig fields, stored factors) of the profile `ragged`."""
    open_factors = {name: factor for name, factor in factors.items() if factor.rank > 0}
    top = max(factor.rank for factor in open_factors.values())
    stored = {name: Factors(f.A, f.B * (f.rank / top)) for name, f in open_factors.items()}
    # PEFT takes the first pattern that matches the end of a module's name: longer names first.
    pattern = {name: stored[name].rank for name in sorted(stored, key=len, reverse=True)}
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
    config = plain_config(model.peft_config[adapter], fields, [name for name in factors if name not in stored])
    tensors = get_peft_model_state_dict(model, adapter_name=adapter)
    for name in factors:
        keys = [f"{PREFIX}{name}.lora_{symbol}.weight" for symbol in "AB"]
        dtypes = [tensors.pop(key).dtype for key in keys]
        if name in stored:
            values = (stored[name].A, stored[name].B)
            tensors |= {k: v.to(dtype) for k, v, dtype in zip(keys, values, dtypes, strict=True)}
    config.save_pretrained(str(folder))
    save_file(
        {key: value.detach().contiguous().cpu() for key, value in tensors.items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )


def plain_config(config: PeftConfig, fields: Mapping[str, Any], left_out: list[str]) -> LoraConfig:
    """Copy an adapter's own config, reduced to what every consumer of LoRA understands."""
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
    stay = list(fields["rank_pattern"])
    if left_out and any(a.endswith(f".{b}") or b.endswith(f".{a}") for a in stay for b in left_out):
        # PEFT matches the ends of listed names, so only a pattern tells `fc` from `block.fc`.
        config.target_modules, config.exclude_modules = "|".join(map(re.escape, stay)), None
    elif left_out and isinstance(config.exclude_modules, str):
        # A pattern and names cannot be joined: name the modules that stay instead.
        config.target_modules, config.exclude_modules = stay, None
    elif left_out:
        config.exclude_modules = sorted({*(config.exclude_modules or ()), *left_out})
    return config


def _reload_difference(model: PeftModel, adapter: str, folder: Path, batch: Mapping[str, Tensor]) -> Checked:
    """Load the files beside the trained adapter, on the same base weights, and compare."""
    probe = "loralloc_reload_check"
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    expected = _logits(model, batch)
    try:
        result = model.load_adapter(str(folder), adapter_name=probe)
        lost = [key for key in [*result.missing_keys, *result.unexpected_keys] if probe in key]
        if lost:
            raise RuntimeError(f"stock PEFT does not load all of the export: {lost[:3]}")
        model.set_adapter(probe)
        actual = _logits(model, batch)
    finally:
        model.set_adapter(adapter)
        if probe in model.peft_config:
            model.delete_adapter(probe)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable.get(name, False))
    return _compare(expected, actual)


def _write_merged(
    model: PeftModel, folder: Path, batch: Mapping[str, Tensor], tokenizer: PreTrainedTokenizerBase | None
) -> Checked:
    """Merge a copy, save it, load it again and compare."""
    expected = _logits(model, batch)
    merged = copy.deepcopy(model).merge_and_unload().eval()
    _compare(expected, _logits(merged, batch), ulps=64)  # narrow weights are rounded once more by merging
    merged.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    type(merged.config).from_pretrained(folder)  # the folder is a model that loads by itself
    reloaded = type(merged).from_pretrained(folder, dtype=merged.dtype).to(merged.device)
    return _compare(_logits(merged, batch), _logits(reloaded.eval(), batch))


@torch.no_grad()
def _logits(model: torch.nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    outputs = model(**batch)
    if isinstance(outputs, Tensor):
        return outputs
    logits = getattr(outputs, "logits", None)
    return outputs[0] if logits is None else logits


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode inside; each module's own mode and the generators' states after it."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _compare(expected: Tensor, actual: Tensor, ulps: int = 4) -> Checked:
    """Largest difference of a logit, and what is allowed; an error when it is more than rounding.

    Allowed are 1e-5 in fp32 and a few units in the last place of a narrower dtype, relative to the largest logit.
    """
    relative = max(1e-5, ulps * torch.finfo(expected.dtype).eps)
    expected, actual = expected.float(), actual.float()
    difference = float((expected - actual).abs().max())
    tolerance = relative * max(1.0, float(expected.abs().max()))
    if not difference <= tolerance:
        raise RuntimeError(
            f"the reloaded export computes something else: logits differ by {difference:.3g} "
            f"(allowed {tolerance:.3g}); nothing was written"
        )
    return difference, tolerance


def _made_up_batch(model: PeftModel) -> dict[str, Tensor]:
    """Draw token ids for the check: one sample where the model cannot pad, no longer than its positions."""
    inner: Any = model.get_base_model()
    if getattr(inner, "main_input_name", None) != "input_ids":
        raise UserError(
            f"{type(inner).__name__} does not take token ids: pass batch={{...}}, inputs for the check of the export"
        )
    config = inner.config.get_text_config()
    samples = 1 if getattr(config, "pad_token_id", None) is None else 2
    length = min(16, getattr(config, "max_position_embeddings", None) or 16)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (samples, length), generator=generator).to(inner.device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {**batch, "decoder_input_ids": ids} if inner.config.is_encoder_decoder else batch


def _check_plain(model: PeftModel, adapter: str) -> None:
    """Refuse an adapter that is more than B·A on the base weights: the files could not say so."""
    check_plain_config(model.peft_config[adapter])
    for name, layer, _ in plain_sites(model):
        if adapter in layer.lora_variant or layer.lora_bias[adapter] or layer.lora_A[adapter].weight.dim() != 2:
            raise UserError(f"{name}: not plain LoRA on a linear layer (a variant, a bias or a convolution)")
        if layer.merged or layer.disable_adapters:
            state, cure = ("merged", "unmerge_adapter()") if layer.merged else ("disabled", "enable_adapter_layers()")
            raise UserError(f"{name}: the adapter is {state}, so there is nothing to compare with; call {cure} first")


def check_plain_config(config: PeftConfig) -> None:
    """Refuse what a config says of an adapter that is more than B·A on the base weights."""
    assert isinstance(config, LoraConfig)
    start = config.init_lora_weights
    if isinstance(start, str) and start.startswith(CHANGES_BASE_WEIGHTS):
        raise UserError(
            f'init_lora_weights="{start}" changed the base weights at the start, so the adapter fits no stock base; '
            "convert it with PEFT (path_initial_model_for_weight_conversion) or train with init_lora_weights=True"
        )
    if config.layer_replication or config.bias != "none":
        what = "layer_replication" if config.layer_replication else f'bias="{config.bias}"'
        raise UserError(f"an adapter with {what} is more than plain LoRA and cannot be exported as such")


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


def _card(model: PeftModel, adapter: str, export: Export) -> str:
    """The adapter's model card."""
    base = model.peft_config[adapter].base_model_name_or_path or "unknown"
    rows = "\n".join(f"| `{name}` | {rank} |" for name, rank in export.ranks.items())
    serving = "\n".join(replace(export, path=Path("path/to/this/folder")).serving)
    return f"""---
base_model: {json.dumps(base)}
library_name: peft
tags:
- lora
- loralloc
---

# LoRA adapter with allocated ranks

A plain LoRA adapter (profile `{export.profile}`), {sum(export.ranks.values())} ranks over {len(export.ranks)} modules,
largest rank {export.max_rank}. After writing, stock PEFT loaded it; the largest difference of a logit to the trained
model was {export.difference:.1e}.

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/to/this/folder")  # base_model: {base}
```

Serving (`--max-lora-rank` must be at least {export.max_rank}):

```
{serving}
```

| module | rank |
|---|---|
{rows}
"""
