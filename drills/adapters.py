"""Adapter folders of strangers, truncated and checked for a base model."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

from hypothesis import strategies as st

from drills.attempt import Place, attempts
from drills.grammar import FILES, as_json, damaged, mutated, put, values
from drills.outcome import Outcome
from drills.plans import NAMES

CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "target_modules": ["q", "up"],
    "rank_pattern": {"layers.0.q": 4},
    "alpha_pattern": {"up": 16},
    "modules_to_save": None,
    "exclude_modules": None,
    "use_rslora": False,
    "bias": "none",
    "base_model_name_or_path": "base",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
}
FIELDS = ("layers_to_transform", "layers_pattern", "megatron_config", "megatron_core", "layer_replication", "use_dora")
"""Fields that an adapter seldom has."""

WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I8": 1, "BOOL": 1, "C64": 8, "F8_E4M3": 1, "X": 4}


class Stored(NamedTuple):
    """A tensor of a file: its type, its shape, and the byte that it is filled with."""

    kind: str
    shape: tuple[int, ...]
    fill: int


def factors() -> dict[str, Stored]:
    """Return the tensors of an adapter as it should be."""
    return {
        f"base_model.model.{name}.lora_{symbol}.weight": Stored("F32", (4, 8) if symbol == "A" else (8, 4), 62)
        for name in NAMES
        for symbol in "AB"
    }


@st.composite
def _tensors(draw: st.DrawFn) -> dict[str, Stored]:
    tensors = factors()
    for _ in range(draw(st.integers(0, 2))):
        key = draw(st.sampled_from(list(tensors)))
        change = draw(st.sampled_from(["kind", "shape", "fill", "drop", "name", "more"]))
        old = tensors[key]
        if change == "kind":
            tensors[key] = old._replace(kind=draw(st.sampled_from(list(WIDTHS))))
        elif change == "shape":
            shape = draw(st.lists(st.sampled_from([0, 1, 2, 4, 8, 100]), max_size=4))
            tensors[key] = old._replace(shape=tuple(shape))
        elif change == "fill":
            tensors[key] = old._replace(fill=draw(st.sampled_from([0, 127, 128, 255])))
        elif change == "drop":
            del tensors[key]
        else:
            name = draw(st.sampled_from(["x", "x" * 1_000, "\x1b[2J", "base_model.model.q.lora_A.weight", "lora_gate"]))
            tensors[name] = tensors[key] if change == "more" else tensors.pop(key)
    return tensors


def weights_file(tensors: Mapping[str, Stored]) -> bytes:
    """Return a safetensors file, written by hand: its writers refuse what strangers do not."""
    header, data = {}, b""
    for key, (kind, shape, fill) in tensors.items():
        size = WIDTHS[kind]
        for length in shape:
            size *= length
        header[key] = {"dtype": kind, "shape": shape, "data_offsets": [len(data), len(data) + size]}
        data += bytes([fill]) * size
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


class Case(NamedTuple):
    """An adapter folder: its two files, and what each is."""

    config: bytes
    config_is: str
    weights: bytes
    weights_are: str


@st.composite
def _cases(draw: st.DrawFn) -> Case:
    config = draw(mutated(CONFIG))
    for name in draw(st.lists(st.sampled_from(FIELDS), max_size=1)):
        config[name] = draw(values)
    weights = weights_file(draw(_tensors()))
    if draw(st.integers(0, 9)) == 0:
        at = draw(st.integers(0, len(weights) - 1))
        weights = weights[:at] + draw(st.binary(max_size=8)) + weights[at:]
    return Case(draw(damaged(as_json(config))), draw(FILES), weights, draw(FILES))


def _run(place: Place, case: Case) -> None:
    from loralloc import Budget, truncate_adapter
    from loralloc.adapter import folders

    put(place.inside / folders.ADAPTER_CONFIG, case.config, case.config_is, place.outside)
    put(place.inside / folders.ADAPTER_WEIGHTS, case.weights, case.weights_are, place.outside)
    try:
        truncate_adapter(place.inside, place.written / "small", Budget(fraction=0.5))
    finally:
        try:
            from loralloc.adapter.stored import check_fits
        except ImportError:  # an earlier version, measured for comparison
            check_fits = None
    if check_fits is not None:
        check_fits(place.inside, ["layers", *NAMES, "x" * 40])


def drill(seed: int, cases: int) -> Outcome:
    """Truncate adapters, and look at them as before PEFT loads them."""
    return attempts("adapter folders", _cases(), _run, cases, seed)
