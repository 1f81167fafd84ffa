"""`loralloc export --push`: exactly the files of a checked export leave, or none and the reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file

from loralloc.adapter import hub as module

from .command import done, files, loralloc, read_json, refused


class FakeHub:
    """Stands for the Hub: keeps what is pushed, as it is."""

    def __init__(self) -> None:
        self.repositories: dict[str, bool] = {}
        self.pushed: dict[str, dict[str, bytes]] = {}
        self.error: Exception | None = None

    def __call__(self) -> FakeHub:
        return self

    def create_repo(self, name: str, *, private: bool | None, exist_ok: bool) -> Any:
        assert exist_ok
        if self.error is not None:
            raise self.error
        self.repositories.setdefault(name, bool(private))

        class Url(str):
            repo_id = name

        return Url(f"https://huggingface.co/{name}")

    def repo_info(self, name: str) -> Any:
        return type("Info", (), {"private": self.repositories[name]})

    def upload_folder(
        self, *, repo_id: str, folder_path: Path, allow_patterns: list[str], revision: str | None
    ) -> None:
        assert revision is None
        content = files(Path(folder_path))
        kept = filter_repo_objects(list(content), allow_patterns=allow_patterns)
        self.pushed[repo_id] = {name: content[name] for name in kept}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """A Hub at which somebody is logged in."""
    fake = FakeHub()
    monkeypatch.setattr(module, "HfApi", fake)
    monkeypatch.setattr(module, "get_token", lambda: "hf_token")
    monkeypatch.setattr(module, "is_offline_mode", lambda: False)
    return fake


ADAPTER = {"README.md", "adapter_config.json", "adapter_model.safetensors", "loralloc_export.json"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}


class TestPushed:
    def test_the_runs_own_adapter_with_its_card(self, run: Path, hub: FakeHub) -> None:
        said = done("export", run, "--push", "me/film")
        assert f"pushed {run / 'adapter'} to https://huggingface.co/me/film" in said
        assert (
            f"note: the files name {read_json(run / 'adapter/adapter_config.json')['base_model_name_or_path']}" in said
        )
        (pushed,) = hub.pushed.values()
        assert pushed == files(run / "adapter")
        assert set(pushed) == ADAPTER | TOKENIZER
        assert b"## Results (test)" in pushed["README.md"]
        assert hub.repositories == {"me/film": False}
        assert not (run / "ragged").exists()

    @pytest.mark.parametrize("profile", ["uniform", "merged"])
    def test_another_profile_is_exported_and_checked_first(self, profile: str, run: Path, hub: FakeHub) -> None:
        said = done("export", run, "--profile", profile, "--push", "me/film")
        assert said.index("checked: reloaded") < said.index("pushed ")
        assert hub.pushed["me/film"] == files(run / profile)
        assert ("model.safetensors" in hub.pushed["me/film"]) is (profile == "merged")

    def test_nothing_else_that_lies_there(self, run: Path, hub: FakeHub) -> None:
        (run / "adapter" / "secrets.txt").write_text("mine")
        (run / "adapter" / "notes").mkdir()
        (run / "adapter" / "notes" / "README.md").write_text("mine")
        done("export", run, "--push", "me/film")
        assert set(hub.pushed["me/film"]) == ADAPTER | TOKENIZER

    def test_no_gate_leaves(self, run: Path, hub: FakeHub) -> None:
        done("export", run, "--push", "me/film")
        tensors = load_file(run / "adapter" / "adapter_model.safetensors")
        assert any("lora_A" in name for name in tensors)
        assert not any("gate" in name for name in tensors)

    def test_a_private_repository(self, run: Path, hub: FakeHub) -> None:
        done("export", run, "--push", "me/film", "--private")
        assert hub.repositories == {"me/film": True}
        done("export", run, "--push", "me/film")  # it stays what it is
        assert hub.repositories == {"me/film": True}


class TestRefused:
    def test_nothing_private_goes_into_the_open(self, run: Path, hub: FakeHub) -> None:
        hub.repositories["me/film"] = False
        said = refused("export", run, "--push", "me/film", "--private")
        assert said == "me/film is there and public; nothing was pushed: make it private, or choose another name"
        assert hub.pushed == {}

    def test_a_run_that_has_not_finished(self, run: Path, hub: FakeHub) -> None:
        shutil.rmtree(run / "adapter")
        assert "has no adapter yet: the run has not finished" in refused("export", run, "--push", "me/film")
        assert (hub.pushed, hub.repositories) == ({}, {})

    def test_an_adapter_that_nobody_has_checked(self, run: Path, hub: FakeHub) -> None:
        (run / "adapter" / "loralloc_export.json").unlink()
        assert "is no export of loralloc, so nobody has checked it" in refused("export", run, "--push", "me/film")
        assert hub.pushed == {}

    def test_an_adapter_in_part(self, run: Path, hub: FakeHub) -> None:
        (run / "adapter" / "README.md").unlink()
        assert "lacks README.md, which was exported there; export it again" in refused(
            "export", run, "--push", "me/film"
        )
        assert hub.pushed == {}

    @pytest.mark.parametrize(
        ("name", "reason"), [("film", "name the user or the organisation too"), ("me/film/x", "Repo id must be in")]
    )
    def test_no_name_of_a_repository(self, name: str, reason: str, run: Path, hub: FakeHub) -> None:
        said = refused("export", run, "--push", name)
        assert said.startswith(f'--push takes OWNER/NAME, got "{name}": ')
        assert reason in said

    def test_offline(self, run: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "is_offline_mode", lambda: True)
        said = refused("export", run, "--profile", "uniform", "--push", "me/film")
        assert said == "HF_HUB_OFFLINE is set, so nothing is pushed: unset it"
        assert not (run / "uniform").exists()

    def test_nobody_is_logged_in(self, run: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "get_token", lambda: None)
        assert "run `hf auth login` first, or set HF_TOKEN" in refused("export", run, "--push", "me/film")

    @pytest.mark.parametrize("error", [OSError("403 Forbidden\nmore"), RuntimeError("403 Forbidden")])
    def test_by_the_hub(self, error: Exception, run: Path, hub: FakeHub) -> None:
        hub.error = error
        assert refused("export", run, "--push", "me/film") == "not pushed to me/film: 403 Forbidden"
        assert json.loads((run / "adapter" / "loralloc_export.json").read_text())["profile"] == "ragged"

    def test_private_without_a_push(self, run: Path, hub: FakeHub) -> None:
        assert "name a repository with --push OWNER/NAME" in refused("export", run, "--private")
        assert loralloc("export", run).code == 0
        assert hub.repositories == {}
