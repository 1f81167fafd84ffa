"""`loralloc train` under FSDP2: two processes, each with half of the base model, train the adapter of DDP.

The two processes are given what accelerate sets up on GPUs alone (`fsdp2`), and shard over gloo.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from .command import read_json
from .test_cli_processes import METHODS, SAVING, _torchrun, home

__all__ = ["home"]  # pytest finds fixtures by name

pytestmark = pytest.mark.slow

STEPS = 8
TRAINED = ("adalora", "ablora", "autolora", "allora with adalora", "truncate", "lora")


def _commands() -> dict[str, list[Any]]:
    train = ["train", "recipe.yaml", "--batch_size", 8, "--steps", STEPS]
    commands: dict[str, list[Any]] = {}
    for name in TRAINED:
        alpha = ["--lora.alpha", 4] if "allora" in name else []
        for engine in ("sharded", "ddp"):
            output = f"{engine} {name}"
            commands[output] = [*train, "--method", METHODS[name], *alpha, "--output", output]
    language = ["train", "language.yaml", "--batch_size", 8, "--steps", STEPS]
    return commands | {
        "sharded language": [*language, "--output", "sharded language"],
        "ddp language": [*language, "--output", "ddp language"],
        "sharded whole": [*train, *SAVING, "--output", "whole"],
        "sharded-and-killed": [*train, *SAVING, "--output", "killed"],
        "sharded resumed": [*train, *SAVING, "--output", "killed", "--resume"],
        "sharded evaluated": ["evaluate", "sharded lora"],
    }


@pytest.fixture(scope="module")
def two(home: Path) -> tuple[Path, list[dict[str, Any]]]:
    """The folder, and what came of every command in each of two processes."""
    (home / "commands.json").write_text(json.dumps(_commands(), default=str), encoding="utf-8")
    _torchrun(Path(__file__).with_name("two_processes.py"), home, check=True)
    return home, [read_json(home / f"{rank}.json") for rank in range(2)]


@pytest.mark.parametrize("name", [*TRAINED, "language"])
def test_the_adapter_is_that_of_ddp(name: str, two: Any) -> None:
    first, second = (results[f"sharded {name}"] for results in two[1])
    assert (first["code"], second["code"]) == (0, 0), first["err"] + second["err"]
    assert first["checksum"] == second["checksum"] == two[1][0][f"ddp {name}"]["checksum"]
    assert first["ranks"] == two[1][0][f"ddp {name}"]["ranks"]


@pytest.mark.parametrize("name", [*TRAINED, "language"])
def test_the_base_is_sharded_and_the_adapter_is_not(name: str, two: Any) -> None:
    apart = two[1][0][f"sharded {name}"]["sharded"]
    assert len(apart) >= 20
    assert not [key for key in apart if "lora_" in key or "modules_to_save" in key]
    assert two[1][0][f"ddp {name}"]["sharded"] == []


@pytest.mark.parametrize("name", TRAINED)
def test_the_export_is_that_of_ddp(name: str, two: Any) -> None:
    ours, theirs = (two[0] / f"{engine} {name}" / "adapter" for engine in ("sharded", "ddp"))
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (ours / file).read_bytes() == (theirs / file).read_bytes()
    assert not list(two[0].glob("sharded*/trained*"))


def test_a_run_killed_and_resumed_is_the_same_run(two: Any) -> None:
    for results in two[1]:
        assert results["sharded resumed"]["code"] == 0, results["sharded resumed"]["err"]
        assert results["sharded resumed"]["checksum"] == results["sharded whole"]["checksum"]
        assert results["sharded resumed"]["sharded"]


def test_checkpoints_hold_nothing_of_the_base(two: Any) -> None:
    checkpoint = two[0] / "killed" / "checkpoints" / f"checkpoint-{STEPS}"
    found = {path.name for path in checkpoint.iterdir()}
    assert not [name for name in found if "fsdp" in name or name == "model.safetensors"]
    assert all("lora_" in key or "classifier" in key for key in load_file(checkpoint / "adapter_model.safetensors"))


def test_an_adapter_can_be_evaluated(two: Any) -> None:
    first, second = (results["sharded evaluated"] for results in two[1])
    assert first["code"] == second["code"] == 0, first["err"]
    accuracy = read_json(two[0] / "sharded lora" / "metrics.json")["validation"]["accuracy"]
    assert f"{accuracy:.4f}" in first["out"]
