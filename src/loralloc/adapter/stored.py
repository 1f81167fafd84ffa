"""Read an adapter from a folder of any origin, and check it before anything is made from it.

PEFT trusts a folder: it allocates a rank of a billion, matches a pattern for as long as it takes, and copies a weight
in int8 or with infinities into the model. So the folder is read here first. Its configuration must have the types and
ranges of LoRA. Its tensors must come from a safetensors file, with valid names, types and shapes and finite numbers.
Both must agree on every module's rank.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import torch
from peft import LoraConfig
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loralloc.adapter.check import Factors
from loralloc.adapter.folders import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check_adapter_folder
from loralloc.errors import UserError
from loralloc.naming import is_module_name
from loralloc.patterns import AT_LAYERS, ENDING, SAVED, PatternError, check, fitting
from loralloc.peft_layers import PREFIX
from loralloc.plain_lora import check_plain_config
from loralloc.plan import MOST_FEATURES
from loralloc.reading import read_object
from loralloc.setting_types import Positive, Share, Text, joined_rule, shown

FLOATS = ("F16", "BF16", "F32", "F64")
"""Types that a weight may be stored in, as safetensors calls them."""
BUFFERS = ("I64", "I32", "BOOL")
"""Types of the buffers, such as positions, of a module that is saved in full."""
LARGEST = torch.finfo(torch.float32).max
"""No weight and no scale may be larger: models compute in no wider type."""

_FACTOR = re.compile(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight")

Rank = Annotated[int, Field(ge=1, le=MOST_FEATURES)]
Entries = str | list[Text]


class _Settings(BaseModel):
    """The fields of adapter_config.json that are checked. Others may be there; PEFT reads or ignores them."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    r: Rank
    lora_alpha: Positive
    rank_pattern: dict[Text, Rank] | None = None
    alpha_pattern: dict[Text, Positive] | None = None
    target_modules: Entries | None = None
    exclude_modules: Entries | None = None
    modules_to_save: list[Text] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: Entries | None = None
    init_lora_weights: bool | str | None = None
    use_rslora: bool | None = None
    fan_in_fan_out: bool | None = None
    lora_dropout: Share | None = None
    bias: str | None = None
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    megatron_config: None = None  # with it, PEFT imports a module that the file names


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter as it stands in its folder.

    Attributes:
        config: Its configuration.
        factors: A [r, in] and B [out, r] of linear layers, by full module name.
        scales: The scale of B A, by full module name.
        others: All other tensors, by their keys in the file.
    """

    config: LoraConfig
    factors: Mapping[str, Factors]
    scales: Mapping[str, float]
    others: Mapping[str, Tensor]


def read_adapter(folder: Path) -> StoredAdapter:
    """Read a LoRA adapter.

    Args:
        folder: Folder with `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        UserError: It is not a valid LoRA adapter; the message says why.
    """
    check_adapter_folder(folder)
    config = _read_config(folder)
    pairs: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in _tensors(folder / ADAPTER_WEIGHTS):
        match = _FACTOR.fullmatch(key)
        if match is not None and tensor.dim() == 2:
            pairs.setdefault(match[1], {})[match[2]] = tensor
        else:
            others[key] = tensor
    factors = {}
    for name, pair in pairs.items():
        if pair.keys() != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
            raise UserError(f"{folder}: the factors of {name} do not fit together")
        factors[name] = Factors(pair["A"], pair["B"])
    if not factors:
        raise UserError(f"{folder}: {ADAPTER_WEIGHTS} holds no LoRA factors")
    return StoredAdapter(config, factors, _scales(folder, config, factors), others)


def check_fits(folder: Path, names: Sequence[str]) -> None:
    """Refuse an adapter that PEFT must not load onto a base model.

    Args:
        folder: Folder of the adapter.
        names: Names of the base model's modules.

    Raises:
        UserError: It must not be loaded; the message says why.
    """
    config = read_adapter(folder).config
    _check_known(folder, config)
    for key, around in (
        ("target_modules", "{}"),
        ("exclude_modules", "{}"),
        ("modules_to_save", SAVED),
        ("layers_pattern", AT_LAYERS),
        ("rank_pattern", ENDING),
        ("alpha_pattern", ENDING),
    ):
        found = getattr(config, key) or ()
        if isinstance(found, str):
            found = [found]
        elif key in ("target_modules", "exclude_modules"):
            continue  # PEFT compares the entries of a list with the ends of names
        try:
            check(list(found), names, around)
        except PatternError as error:
            raise UserError(f"{folder / ADAPTER_CONFIG}: {key}: {error}") from error


def _check_known(folder: Path, config: LoraConfig) -> None:
    """Refuse anything but plain LoRA and DoRA; adapters with DoRA come from comparisons."""
    update = copy(config)
    update.use_dora = False
    try:
        check_plain_config(update)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error


def _read_config(folder: Path) -> LoraConfig:
    """Read the configuration; refuse values that no LoRA adapter has."""
    path = folder / ADAPTER_CONFIG
    settings = read_object(path, "it is no config of PEFT")
    if (kind := settings.get("peft_type")) != "LORA":
        raise UserError(f"{folder} is an adapter of type {str(kind)[:80]}: only LoRA can be read")
    try:
        _Settings.model_validate(settings)
    except ValidationError as error:
        errors = error.errors()
        first = errors[0]["loc"][0]  # the key
        rule = joined_rule([one for one in errors if one["loc"][0] == first])
        raise UserError(f"{path}: {first} {rule}, got {shown(settings.get(str(first)))}") from None
    try:
        config = LoraConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"{path} is no config of PEFT: {str(error).splitlines()[0]}") from error
    assert isinstance(config, LoraConfig)
    return config


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a file; the header of each is checked before the tensor is loaded."""
    size, memory = path.stat().st_size, _memory()
    if size > memory:
        raise UserError(f"{path} has {size:,} bytes, and this machine has {memory:,} of memory")
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - the file is no mapping
                header = file.get_slice(key)
                kind, shape = header.get_dtype(), header.get_shape()
                if not is_module_name(key):
                    raise UserError(f"{path}: {key[:80]!r} is not the name of a weight")
                if kind not in FLOATS and (kind not in BUFFERS or ".lora_" in key):
                    raise UserError(f"{path}: {key} is stored as {kind}, and weights are {', '.join(FLOATS)}")
                if not 1 <= min(shape, default=1) <= max(shape, default=1) <= MOST_FEATURES:
                    raise UserError(f"{path}: {key} has the shape {shape}, which no weight has")
                tensor = file.get_tensor(key)
                if kind in FLOATS and not float(tensor.abs().max()) <= LARGEST:
                    raise UserError(f"{path}: {key} holds numbers that are not finite")
                yield key, tensor
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error


def _memory() -> int:
    """Bytes of memory of this machine, as far as it says."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 2**63


def _scales(folder: Path, config: LoraConfig, factors: Mapping[str, Factors]) -> dict[str, float]:
    """The scale of B·A as PEFT computes it; refuse a configuration with other ranks than the file."""
    names = list(factors)
    try:
        ranks = _by_pattern(config.rank_pattern or {}, names, config.r)
        alphas = _by_pattern(config.alpha_pattern or {}, names, float(config.lora_alpha))
    except PatternError as error:
        raise UserError(f"{folder / ADAPTER_CONFIG}: {error}") from error
    scales = {}
    for name, factor in factors.items():
        rank, widest = factor.rank, max(factor.A.shape[1], factor.B.shape[0])
        if ranks[name] != rank:
            raise UserError(
                f"{name} has rank {rank} where {ADAPTER_CONFIG} says {ranks[name]}: the files do not belong together"
            )
        if rank > widest:
            raise UserError(f"{folder}: {name} has rank {rank}, above the {widest} dimensions of its layer")
        scales[name] = alphas[name] / (math.sqrt(rank) if config.use_rslora else rank)
        if scales[name] > LARGEST:
            raise UserError(f"{folder}: the scale of {name}, {scales[name]:g}, is larger than any model computes with")
    _check_unused(folder, config, max(max(*factor.A.shape, *factor.B.shape) for factor in factors.values()))
    return scales


def _check_unused(folder: Path, config: LoraConfig, widest: int) -> None:
    """Refuse configured ranks above the widest module: PEFT could give them to modules that the file does not have."""
    for rank in (config.r, *(config.rank_pattern or {}).values()):
        if rank > widest:
            raise UserError(f"{folder / ADAPTER_CONFIG}: rank {rank:,} is above the {widest:,} dimensions of any layer")


_Value = TypeVar("_Value")


def _by_pattern(patterns: Mapping[str, _Value], names: Sequence[str], default: _Value) -> dict[str, _Value]:
    """The value for each module: of the first pattern that matches the end of its name, else the default."""
    found = dict.fromkeys(names, default)
    fits = fitting(list(patterns), names, ENDING)
    for value, fitted in reversed(list(zip(patterns.values(), fits, strict=True))):
        found |= dict.fromkeys(fitted, value)
    return found
