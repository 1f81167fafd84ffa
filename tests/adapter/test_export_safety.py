"""What an export never harms: the model, files that it did not write, and the export that stood there before."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from exports import ADAPTER_FILES, ADAPTER_PROFILES, MODELS, assert_unchanged, config_of, corrupt_writes, snapshot
from models import cycled_ranks, labelled_batch, logits, lora_config, lora_layers, set_ranks, tiny_peft, train_adapter
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor

from loralloc import UserError, export_adapter
from loralloc.adapter import export as export_module
from loralloc.adapter.export import PROFILES, Profile

# ---- The model stays as it was ----


def busy(name: str) -> PeftModel:
    """A model with two adapters, the second active, a frozen factor, and gradients."""
    model = tiny_peft(name, trained=True)
    model.add_adapter("second", lora_config(name, r=3))
    train_adapter(model, 9, "second")
    model.set_adapter("second")
    next(iter(lora_layers(model).values())).lora_A["second"].weight.requires_grad_(False)
    model(**labelled_batch(name)).loss.backward()
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("profile", PROFILES)
def test_the_model_is_left_as_it_was(tmp_path: Path, name: str, profile: Profile) -> None:
    model = busy(name)
    before, outputs = snapshot(model), logits(model)
    export_adapter(model, tmp_path / "adapter", profile)
    assert_unchanged(model, before)
    assert torch.equal(logits(model), outputs)


@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_left_as_it_was_by_a_failed_export(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = busy(name)
    before, outputs = snapshot(model), logits(model)
    corrupt_writes(monkeypatch)
    with pytest.raises(RuntimeError, match="computes something else"):
        export_adapter(model, tmp_path / "adapter")
    assert_unchanged(model, before)
    assert torch.equal(logits(model), outputs)


@pytest.mark.parametrize("profile", PROFILES)
def test_training_mode_is_left_as_it_was(tmp_path: Path, profile: Profile) -> None:
    model = tiny_peft("llama", trained=True, lora_dropout=0.5).train()
    model.base_model.model.model.layers[0].eval()  # a part frozen by the user
    before = snapshot(model)
    export = export_adapter(model, tmp_path / "adapter", profile)
    assert export.difference < 1e-5  # dropout was off for the check
    assert_unchanged(model, before)


def test_replicated_layers_are_left_as_they_were(tmp_path: Path) -> None:
    model = tiny_peft("llama", trained=True, layer_replication=[(0, 2), (0, 2)])
    before, outputs = snapshot(model), logits(model)
    with pytest.raises(UserError, match="layer_replication builds another model"):
        export_adapter(model, tmp_path / "adapter")
    assert_unchanged(model, before)
    assert torch.equal(logits(model), outputs)


# ---- The folder ----


def test_a_missing_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    export = export_adapter(tiny_peft("llama", trained=True), str(tmp_path / "a" / "b" / "adapter"))
    assert export.path == tmp_path / "a" / "b" / "adapter"
    assert [path.name for path in export.path.parent.iterdir()] == ["adapter"]  # no temporary folder is left


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    export_adapter(tiny_peft("llama", trained=True), tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_config.json").exists()


def test_an_earlier_export_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "adapter"
    model = tiny_peft("llama", trained=True)
    export_adapter(model, path, "merged")
    assert (path / "config.json").exists()
    set_ranks(model, cycled_ranks(model, 1, 2))
    export_adapter(model, path, "ragged")
    assert {file.name for file in path.iterdir()} == ADAPTER_FILES
    assert config_of(path)["r"] == 2


def test_a_foreign_folder_and_a_file_are_refused_and_kept(tmp_path: Path) -> None:
    model = tiny_peft("llama", trained=True)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"thesis exists and is no export of loralloc; nothing was overwritten: choose"):
        export_adapter(model, tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file is a file; give a folder for the export"):
        export_adapter(model, tmp_path / "file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "thesis"]


@pytest.mark.parametrize("marker", ["adapter_config.json", "config.json"])
def test_files_that_no_export_wrote_are_never_deleted(tmp_path: Path, marker: str) -> None:
    path = tmp_path / "outputs"  # a Trainer's output_dir after save_model(), or any project with a config.json
    (path / "checkpoint-500").mkdir(parents=True)
    (path / "checkpoint-500" / "optimizer.pt").write_text("state")
    (path / marker).write_text("{}")
    with pytest.raises(UserError, match="nothing was overwritten"):
        export_adapter(tiny_peft("llama", trained=True), path)
    assert (path / "checkpoint-500" / "optimizer.pt").exists()


def test_files_put_beside_an_export_are_never_deleted(tmp_path: Path) -> None:
    path = tmp_path / "outputs"
    model = tiny_peft("llama", trained=True)
    export_adapter(model, path)
    (path / "checkpoint-500").mkdir()  # the folder becomes the output_dir of a next run
    (path / "checkpoint-500" / "optimizer.pt").write_text("state")
    with suppress(UserError):  # refused or kept: either is right
        export_adapter(model, path)
    assert (path / "checkpoint-500" / "optimizer.pt").exists()


@pytest.mark.parametrize("part", ["lora_B", "lora_A", "classifier"])
@pytest.mark.parametrize("profile", ADAPTER_PROFILES)
def test_a_corrupted_write_is_noticed_and_the_earlier_export_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, profile: Profile
) -> None:
    path = tmp_path / "adapter"
    model = tiny_peft("bert", trained=True)
    export_adapter(model, path, profile)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    corrupt_writes(monkeypatch, part)
    what = {"classifier": r"logits differ by .* \(allowed 1e-05\)"}.get(part, r"the update of bert\.encoder\S+ differs")
    with pytest.raises(RuntimeError, match=rf"computes something else: {what}; nothing was written"):
        export_adapter(model, path, profile)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["adapter"]
    with pytest.raises(RuntimeError, match="computes something else"):
        export_adapter(model, tmp_path / "new", profile)
    assert [file.name for file in tmp_path.iterdir()] == ["adapter"]


def test_a_tensor_that_did_not_reach_the_file_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        lost = next(key for key in tensors if "lora_B" in key)
        save_file({key: value for key, value in tensors.items() if key != lost}, path, metadata=metadata)

    monkeypatch.setattr(export_module, "save_file", save)
    model = tiny_peft("llama")  # B = 0: the logits alone would not show it
    with pytest.raises(RuntimeError, match=r"stock PEFT does not load all of the export: \['base_model.model.*lora_B"):
        export_adapter(model, tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


def test_the_earlier_export_survives_a_move_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "adapter"
    model = tiny_peft("llama", trained=True)
    export_adapter(model, path)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    rename, replace = Path.rename, os.replace

    def failing(self: Path, target: Path) -> Path:
        if Path(target) == path and self.name == "export":
            raise OSError("the disk says no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    monkeypatch.setattr(os, "replace", lambda a, b: failing(Path(a), Path(b)) if Path(b) == path else replace(a, b))
    with pytest.raises(OSError, match="the disk says no"):
        export_adapter(model, path)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["adapter"]


def test_a_link_to_a_folder_is_followed(tmp_path: Path) -> None:
    model = tiny_peft("llama", trained=True)
    export_adapter(model, tmp_path / "v1")
    (tmp_path / "latest").symlink_to(tmp_path / "v1")
    set_ranks(model, cycled_ranks(model, 1))
    export_adapter(model, tmp_path / "latest")
    assert (tmp_path / "latest").readlink() == tmp_path / "v1"
    assert config_of(tmp_path / "v1")["r"] == 1


def test_the_working_directory_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert export_adapter(tiny_peft("llama", trained=True), ".").path == tmp_path / "here"
    assert {file.name for file in (tmp_path / "here").iterdir()} == ADAPTER_FILES
    assert [file.name for file in tmp_path.iterdir()] == ["here"]
