"""Nothing is unpickled: no adapter, no checkpoint, no base model, by whichever way somebody offers it."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.command import refused, save_encoder
from models import tiny_peft
from safetensors.torch import load_file
from transformers import Trainer

from loralloc import AdaLoRA, Budget, UserError, attach
from loralloc.adapter.stored import check_fits
from loralloc.recipe.from_recipe import load_adapter
from loralloc.tasks.base import ModelSection
from loralloc.tasks.pretrained import load_config, load_model, load_tokenizer, locate
from loralloc.training.trainer import PlainTrainer
from loralloc.unpickling import nothing_unpickled


class Bomb:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return (Path.touch, (self.trace,))


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return tmp_path / "a program has run"


def pickled(folder: Path, safe: str, name: str, trace: Path) -> None:
    """Put a pickle with the same weights, and a bomb, in the place of a safetensors file."""
    tensors: dict[str, Any] = dict(load_file(folder / safe))
    (folder / safe).unlink()
    torch.save({**tensors, "bomb": Bomb(trace)}, folder / name)


def test_the_bomb_works(trace: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(trace)))
    assert trace.exists()


def test_inside_torch_load_is_refused_and_afterwards_it_is_torchs(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(2)}, tmp_path / "x.bin")
    before = torch.load
    for file in (tmp_path / "x.bin", str(tmp_path / "x.bin")):
        with (
            nothing_unpickled("do else"),
            pytest.raises(UserError, match=r"is a pickle, which can run any code, and is"),
        ):
            torch.load(file, weights_only=True)
    assert torch.load is before
    assert torch.equal(torch.load(tmp_path / "x.bin", weights_only=True)["x"], torch.ones(2))


def test_guards_that_overlap_leave_torch_its_own(tmp_path: Path) -> None:
    """As those of two threads do, of which the first to begin is the first to end."""
    torch.save({"x": torch.ones(2)}, tmp_path / "x.bin")
    before, first, second = torch.load, nothing_unpickled("do this"), nothing_unpickled("do that")
    with first:
        second.__enter__()
    with pytest.raises(UserError, match="do that"):
        torch.load(tmp_path / "x.bin")
    second.__exit__(None, None, None)
    assert torch.load is before


# ---- Adapters ----


def test_an_adapter(tmp_path: Path, trace: Path) -> None:
    tiny_peft("llama", trained=True).save_pretrained(str(tmp_path / "sent"))
    pickled(tmp_path / "sent", "adapter_model.safetensors", "adapter_model.bin", trace)
    said = "has no adapter_model.safetensors; convert adapter_model.bin, a pickle, with PEFT's save_pretrained"
    assert said in refused("truncate", tmp_path / "sent", "--fraction", 0.5, "--output", tmp_path / "small")
    for load in (
        lambda: check_fits(tmp_path / "sent", []),
        lambda: load_adapter(tiny_peft("llama"), tmp_path / "sent"),
    ):  # type: ignore[arg-type]
        with pytest.raises(UserError, match=said):
            load()
    assert not trace.exists()


def test_a_checkpoint_of_an_allocation(tmp_path: Path, trace: Path) -> None:
    model = tiny_peft("llama")
    attach(model, AdaLoRA(Budget(average_rank=2)), 10)
    model.save_pretrained(str(tmp_path / "checkpoint"))
    pickled(tmp_path / "checkpoint", "adapter_model.safetensors", "adapter_model.bin", trace)
    with pytest.raises(
        UserError, match=r"adapter_model.bin is a pickle, which can run any code, and is not read; give a"
    ):
        model.load_adapter(str(tmp_path / "checkpoint"), "default")
    assert not trace.exists()


def test_a_checkpoint_of_plain_lora(tmp_path: Path, trace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where transformers finds no safetensors file, it lets PEFT read the pickle."""
    torch.save(Bomb(trace), tmp_path / "adapter_model.bin")
    read = lambda self, folder: torch.load(folder / "adapter_model.bin", weights_only=False)  # noqa: E731
    monkeypatch.setattr(Trainer, "_load_from_checkpoint", read)
    trainer = object.__new__(PlainTrainer)
    with pytest.raises(UserError, match=r"is not read; take that checkpoint away, and resume from an earlier one$"):
        trainer._load_from_checkpoint(tmp_path)
    assert not trace.exists()
    read(trainer, tmp_path)
    assert trace.exists()


# ---- Base models ----


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_encoder(tmp_path / "base")


def load(folder: Path, **options: Any) -> Any:
    class Section(ModelSection):
        name, dtype, load_in, trust_remote_code, load = str(folder), "float32", None, False, options

    checkpoint = locate(Section())  # type: ignore[abstract]
    load_config(checkpoint)
    return load_model("sequence-classification", checkpoint, load_tokenizer(checkpoint), seed=0)


def _renamed(folder: Path, trace: Path) -> None:
    pickled(folder, "model.safetensors", "pytorch_model.bin", trace)


def _in_the_index(folder: Path, trace: Path) -> None:
    keys = list(load_file(folder / "model.safetensors"))
    pickled(folder, "model.safetensors", "pytorch_model.bin", trace)
    index = {"metadata": {}, "weight_map": dict.fromkeys(keys, "pytorch_model.bin")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _named_by_the_config(folder: Path, trace: Path) -> None:
    pickled(folder, "model.safetensors", "adapter_model.bin", trace)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": "adapter_model.bin"}))


OFFERED: dict[str, Callable[[Path, Path], None]] = {
    "as pytorch_model.bin": _renamed,
    "by an index of safetensors": _in_the_index,
    "by the configuration": _named_by_the_config,
}


@pytest.mark.parametrize("way", OFFERED)
def test_a_base_model(way: str, base: Path, trace: Path) -> None:
    OFFERED[way](base, trace)
    with pytest.raises(UserError, match=r"pickle.*set model.load.use_safetensors: false if you trust whoever wrote it"):
        load(base)
    assert not trace.exists()


def test_a_base_model_that_its_user_trusts(base: Path, tmp_path: Path) -> None:
    expected = load(base)
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    torch.save(tensors, base / "pytorch_model.bin")
    found = load(base, use_safetensors=False)
    for name, weight in expected.state_dict().items():
        assert torch.equal(weight, found.state_dict()[name]), name


def test_even_there_no_program_runs(base: Path, trace: Path) -> None:
    _renamed(base, trace)
    with pytest.raises(
        UserError,
        match=r"pytorch_model.bin is a pickle with more than tensors, which could run any code, and is refused",
    ):
        load(base, use_safetensors=False)
    assert not trace.exists()


def test_an_adapter_beside_a_base_model(base: Path, tmp_path: Path, trace: Path) -> None:
    """Transformers would load it together with the model."""
    tiny_peft("bert", trained=True).save_pretrained(str(tmp_path / "adapter"))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(tmp_path / "adapter" / name, base / name)
    pickled(base, "adapter_model.safetensors", "adapter_model.bin", trace)
    with pytest.raises(
        UserError, match=r"holds a PEFT adapter beside the model. Move adapter_config.json elsewhere, or"
    ):
        load(base)
    assert not trace.exists()
