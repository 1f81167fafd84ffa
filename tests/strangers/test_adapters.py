"""Adapter folders of strangers: refused in words and in less than a second, by `truncate` and before PEFT loads."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.command import done, refused
from models import tiny_peft
from peft import PeftModel

from drills import adapters, plans
from drills.adapters import Stored, weights_file
from loralloc import truncate_adapter  # noqa: F401 - imported before a clock runs
from loralloc.adapter.stored import check_fits, read_adapter
from loralloc.errors import UserError
from loralloc.recipe.from_recipe import load_adapter

from .sent import NO_FILES, adapter, quickly

CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "a rank of a billion": ({"r": 10**9, "rank_pattern": {".*": 4}}, "rank 1,000,000,000 is above the 8 dimensions of"),
    "one that no layer can have": ({"r": 10**30}, "r must be at most 2147483647, got 1000000000000000000000000000000"),
    "one that is none": ({"r": True}, "r must be an integer, got true"),
    "half a rank": ({"r": 4.5}, "r must be an integer, got 4.5"),
    "no ranks": ({"r": 0}, "r must be at least 1, got 0"),
    "one that the file has not": ({"r": 5}, "has rank 4 where adapter_config.json says 5: the files do not belong"),
    "one in a pattern": ({"rank_pattern": {"q": 10**12}}, "rank_pattern must be at most 2147483647, got"),
    "one in a pattern that fits nothing": ({"rank_pattern": {"no": 9999}}, "rank 9,999 is above the 8 dimensions of"),
    "a pattern that is no mapping": ({"rank_pattern": ["q"]}, 'rank_pattern must be a mapping, got ["q"]'),
    "no scale": ({"lora_alpha": math.nan}, "lora_alpha must be a finite number, got NaN"),
    "an infinite scale": ({"lora_alpha": math.inf}, "lora_alpha must be a finite number, got Infinity"),
    "a scale that no float holds": ({"lora_alpha": 10**400}, "lora_alpha must be a finite number, got 1000"),
    "a scale that no model computes with": ({"lora_alpha": 1e40}, "the scale of layers.0.q, 2.5e+39, is larger than"),
    "a negative scale": ({"lora_alpha": -8}, "lora_alpha must be above 0, got -8"),
    "a scale in words": ({"lora_alpha": "8"}, 'lora_alpha must be a number, got "8"'),
    "an infinite scale in a pattern": (
        {"alpha_pattern": {"q": math.inf}},
        "alpha_pattern must be a finite number, got",
    ),
    "an exploding pattern of ranks": (
        {"rank_pattern": {"(.*)*" * 12 + "y": 4}},
        'y" takes longer than 0.3 s to compare with the names of 4 modules; write it without a repetition',
    ),
    "an exploding pattern of scales": (
        {"alpha_pattern": {"(.*)*" * 12 + "y": 4}},
        "takes longer than 0.3 s to compare",
    ),
    "a pattern that is none": ({"rank_pattern": {"(": 4}}, '"(" is no regular expression (missing ), unterminated'),
    "targets that are a mapping": ({"target_modules": {"q": 1}}, "target_modules must be text or a list, got"),
    "a target that is a number": ({"target_modules": ["q", 3]}, "target_modules must be text"),
    "a module to import": (
        {"megatron_config": {"a": 1}, "megatron_core": "this"},
        "megatron_config must be null",
    ),
    "another kind": ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 10**9}, "of type PROMPT_TUNING: only LoRA"),
    "a kind that is a mapping": ({"peft_type": {"a": "\x1b[2J"}}, "is an adapter of type {'a': '\\x1b[2J'}: only LoRA"),
    "a task that is none": ({"task_type": "\x1b[2J"}, "is no config of PEFT: Invalid task type: '\\x1b[2J'"),
    "an update of another kind": ({"lora_bias": True}, "lora_bias makes the update more, or other, than B·A"),
    "layers a billion times": ({"layer_replication": [[0, 10**9]]}, "layer_replication builds another model"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations(name: str, tmp_path: Path) -> None:
    changes, said = CONFIGS[name]
    folder = adapter(tmp_path / "sent", changes)
    with quickly():
        message = refused("truncate", folder, "--fraction", 0.5, "--output", tmp_path / "small")
    assert said in message
    assert str(folder) in message or "belong together" in message
    assert not (tmp_path / "small").exists()
    with quickly(), pytest.raises(UserError):
        check_fits(folder, plans.NAMES)


BEFORE_PEFT: dict[str, tuple[dict[str, Any], str]] = {
    "target_modules": ({"target_modules": "(x+x+)+y"}, "target_modules"),
    "exclude_modules": ({"exclude_modules": "(x+x+)+y"}, "exclude_modules"),
    "modules_to_save": ({"modules_to_save": ["head", "(x+x+)+y"]}, "modules_to_save"),
    "layers_pattern": ({"layers_to_transform": [0], "layers_pattern": "(x+x+)+y"}, "layers_pattern"),
    "layers_pattern in a list": ({"layers_to_transform": 0, "layers_pattern": ["(x+x+)+y"]}, "layers_pattern"),
    "rank_pattern": ({"rank_pattern": {"(x+x+)+y": 4}}, "rank_pattern"),
    "alpha_pattern": ({"alpha_pattern": {"(x+x+)+y": 4}}, "alpha_pattern"),
}


@pytest.mark.parametrize("name", BEFORE_PEFT)
def test_patterns_are_tried_on_the_base_models_names(name: str, tmp_path: Path) -> None:
    changes, key = BEFORE_PEFT[name]
    folder = adapter(tmp_path / "sent", changes)
    said = (
        rf'adapter_config.json: {key}: "\(x\+x\+\)\+y" takes longer than 0.3 s to compare with the names of 5 modules'
    )
    with quickly(), pytest.raises(UserError, match=said):
        check_fits(folder, [*plans.NAMES, "x" * 40])
    check_fits(folder, plans.NAMES)  # which it does not explode on


TENSORS: dict[str, tuple[dict[str, Any], str]] = {
    "int8": ({"kind": "I8"}, "q.lora_A.weight is stored as I8, and weights are F16, BF16, F32, F64"),
    "int64": ({"kind": "I64"}, "is stored as I64, and weights are"),
    "bool": ({"kind": "BOOL"}, "is stored as BOOL, and weights are"),
    "complex": ({"kind": "C64"}, "is stored as C64, and weights are"),
    "8-bit floats": ({"kind": "F8_E4M3"}, "is stored as F8_E4M3, and weights are"),
    "a type that is none": ({"kind": "X"}, "adapter_model.safetensors cannot be read: "),
    "NaN": ({"fill": 255}, "q.lora_A.weight holds numbers that are not finite"),
    "larger than any model computes with": ({"kind": "F64", "fill": 127}, "holds numbers that are not finite"),
    "nothing in it": ({"shape": (4, 0)}, "q.lora_A.weight has the shape [4, 0], which no weight has"),
    "nothing in it, a billion times": ({"shape": (10**12, 0)}, "has the shape [1000000000000, 0], which no weight has"),
    "more ranks than dimensions": ({"shape": (9, 9)}, "has rank 9 where adapter_config.json says 4"),
    "three dimensions": ({"shape": (4, 8, 1)}, "holds no LoRA factors"),
    "no dimension": ({"shape": ()}, "holds no LoRA factors"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_weights(name: str, tmp_path: Path) -> None:
    stored, said = TENSORS[name]
    folder = adapter(tmp_path / "sent", **stored)
    with quickly():
        assert said in refused("truncate", folder, "--fraction", 0.5, "--output", tmp_path / "small")
    with quickly(), pytest.raises(UserError):
        check_fits(folder, plans.NAMES)


def test_more_ranks_than_a_layer_has_dimensions(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "sent", {"r": 9, "rank_pattern": {}})
    tensors = {key: Stored("F32", (9, 8) if "_A" in key else (8, 9), 62) for key in adapters.factors()}
    (folder / "adapter_model.safetensors").write_bytes(weights_file(tensors))
    with pytest.raises(UserError, match=r"sent: layers.0.q has rank 9, above the 8 dimensions of its layer$"):
        read_adapter(folder)


@pytest.mark.parametrize("name", ["x\x1b[2J.lora_A.weight", "x" * 600, "x." * 40 + "lora_A.weight"])
def test_names_that_no_weight_has(name: str, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "sent")
    tensors = {**adapters.factors(), name: Stored("F32", (4, 8), 62)}
    (folder / "adapter_model.safetensors").write_bytes(weights_file(tensors))
    with quickly(), pytest.raises(UserError, match=r"'x.*' is not the name of a weight$"):
        read_adapter(folder)


def test_an_update_too_large_for_the_type_that_it_is_stored_in(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "sent", {"lora_alpha": 1e38}, kind="F16", fill=60)
    message = refused("truncate", folder, "--fraction", 0.5, "--output", tmp_path / "small")
    assert "is too large for torch.float16, in which it is stored" in message
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("kind", NO_FILES)
def test_files_that_are_none(file: str, kind: str, tmp_path: Path) -> None:
    import re

    folder = adapter(tmp_path / "sent")
    put, said = NO_FILES[kind]
    put(folder / file)
    with quickly():
        message = refused("truncate", folder, "--fraction", 0.5, "--output", tmp_path / "small")
    assert re.search(said, message)
    with quickly(), pytest.raises(UserError, match=said):
        check_fits(folder, plans.NAMES)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_link_out_of_the_folder_tells_nothing(file: str, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "sent")
    (tmp_path / "mine").write_text("the secret of this machine")
    (folder / file).unlink()
    (folder / file).symlink_to(tmp_path / "mine")
    message = refused("truncate", folder, "--fraction", 0.5, "--output", tmp_path / "small")
    assert f"{folder / file} is a link out of its folder, to {tmp_path / 'mine'}; put a copy" in message
    assert "secret" not in message


def test_deep_json(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "sent")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": ' + "[" * 100_000)
    with quickly():
        message = refused("truncate", folder, "--fraction", 0.5, "--output", tmp_path / "small")
    assert "adapter_config.json: not JSON (brackets are nested more than 64 deep); it is no config of PEFT" in message


def test_what_is_right_is_read_by_all(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "sent", {"modules_to_save": ["head"], "target_modules": r"layers\.\d\.(q|up)"})
    check_fits(folder, [*plans.NAMES, "head"])
    stored = read_adapter(folder)
    assert stored.scales == {name: 2.0 if name.endswith("q") else 4.0 for name in plans.NAMES}
    assert "wrote" in done("truncate", folder, "--fraction", 0.5, "--output", tmp_path / "small")
    assert read_adapter(tmp_path / "small").config.r > 0


def test_buffers_of_modules_that_are_saved_whole_are_no_weights(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "sent")
    tensors = {**adapters.factors(), "base_model.model.head.position_ids": Stored("I64", (1, 8), 0)}
    (folder / "adapter_model.safetensors").write_bytes(weights_file(tensors))
    assert read_adapter(folder).others.keys() == {"base_model.model.head.position_ids"}


# ---- On a base model ----


@pytest.fixture
def own(tmp_path: Path) -> Callable[..., Path]:
    """An adapter of the tiny Llama, with other values in its configuration."""

    def make(**changes: Any) -> Path:
        tiny_peft("llama", trained=True).save_pretrained(str(tmp_path / "own"))
        path = tmp_path / "own" / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        return tmp_path / "own"

    return make


def test_what_is_right_is_loaded(own: Callable[..., Path]) -> None:
    model = load_adapter(tiny_peft("llama").unload(), own())  # type: ignore[arg-type]
    assert isinstance(model, PeftModel)


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 10**9, "rank_pattern": {".*": 4}},
        {"rank_pattern": {"nothing": 10**9}},
        {"lora_alpha": math.inf},
        {"target_modules": "(.*)*" * 12 + "y"},
    ],
    ids=str,
)
def test_what_is_refused_never_reaches_peft(
    changes: dict[str, Any], own: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, folder = tiny_peft("llama").unload(), own(**changes)
    monkeypatch.setattr(PeftModel, "from_pretrained", lambda *args, **kwargs: pytest.fail("PEFT was asked"))
    with quickly(), pytest.raises(UserError, match=r"adapter_config.json"):
        load_adapter(base, folder)  # type: ignore[arg-type]


def test_weights_that_are_refused_never_reach_peft(own: Callable[..., Path]) -> None:
    from safetensors.torch import load_file, save_file

    folder = own()
    path = folder / "adapter_model.safetensors"
    save_file({key: tensor.to(torch.int8) for key, tensor in load_file(path).items()}, path)
    with quickly(), pytest.raises(UserError, match="is stored as I8, and weights are"):
        load_adapter(tiny_peft("llama").unload(), folder)  # type: ignore[arg-type]
