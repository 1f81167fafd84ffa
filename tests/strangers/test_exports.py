"""A record of an export names no file to delete, to push, or to look at: what goes has to be what was exported."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from models import tiny_peft

from loralloc import Budget, UserError, export_adapter, truncate_adapter
from loralloc.adapter import folders
from loralloc.adapter.folders import RECORD, check_target, exported_files, write_card

from .sent import NO_FILES, adapter, quickly


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """An export that was truncated from another: small, and quickly written."""
    truncate_adapter(adapter(tmp_path / "sent"), tmp_path / "export", Budget(fraction=0.5))
    return tmp_path / "export"


def record(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    found = json.loads((folder / RECORD).read_text())
    change(found)
    (folder / RECORD).write_text(json.dumps(found))


def again(folder: Path) -> None:
    """Write an export where one stands."""
    truncate_adapter(folder.parent / "sent", folder, Budget(fraction=0.5))


def test_an_export_is_replaced(export: Path) -> None:
    assert set(exported_files(export)) == {path.name for path in export.iterdir()}
    again(export)
    again(export)


@pytest.mark.parametrize("name", ["thesis.tex", "photos/cat.jpg"])
@pytest.mark.parametrize("digest", ["", "0" * 64, None])
def test_a_record_cannot_name_a_file_of_mine(name: str, digest: str | None, export: Path) -> None:
    mine = export / name
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("years of work")
    record(export, lambda found: found["files"].update({name: digest}))
    with pytest.raises(UserError, match=r"nothing was overwritten: (move it away, or )?choose another folder$"):
        again(export)
    assert mine.read_text() == "years of work"


def test_a_file_that_no_record_names_stays(export: Path) -> None:
    (export / "photos").mkdir()
    (export / "photos" / "cat.jpg").write_text("x")
    with pytest.raises(UserError, match=r"export holds more than the export written there \(photos/cat.jpg\); nothing"):
        again(export)


def test_an_empty_folder_in_it_is_not_the_exports(export: Path) -> None:
    (export / "photos").mkdir()
    with pytest.raises(UserError, match=r"holds more than the export written there \(photos\)"):
        again(export)


def test_names_outside_of_the_folder_mean_nothing(export: Path) -> None:
    mine = export.parent / "thesis.tex"
    mine.write_text("years of work")
    record(export, lambda found: found["files"].update({"../thesis.tex": "", str(mine): ""}))
    again(export)
    assert mine.read_text() == "years of work"


def test_what_was_edited_stays(export: Path) -> None:
    path = export / "ranks.json"
    path.write_text(path.read_text() + "\n")
    with pytest.raises(
        UserError, match=r"export: ranks.json has changed since it was exported; nothing was overwritten"
    ):
        again(export)


class TestCardThatIsWrittenAnew:
    @pytest.mark.parametrize("write", [1, 2, 3])
    def test_killed_before_any_write_it_may_be_replaced(
        self, write: int, export: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_card(export, "before")
        alive, made = folders.write_atomically, []

        def die(path: Path, text: str) -> None:
            made.append(path)
            if len(made) == write:
                raise KeyboardInterrupt
            alive(path, text)

        monkeypatch.setattr(folders, "write_atomically", die)
        with pytest.raises(KeyboardInterrupt):
            write_card(export, "after")
        monkeypatch.undo()
        assert (export / "README.md").read_text() == ("after" if write == 3 else "before")
        again(export)

    def test_a_card_of_mine_stays(self, export: Path) -> None:
        write_card(export, "before")
        record(export, lambda found: found.update(next_card="0" * 64))
        (export / "README.md").write_text("years of work")
        said = "README.md has changed since it was exported; nothing was overwritten: move it away, or choose another"
        with pytest.raises(UserError, match=said):
            again(export)
        (export / "README.md").rename(export.parent / "mine.md")
        again(export)


def test_a_link_in_its_place_is_not_what_was_exported(export: Path) -> None:
    (export / "ranks.json").rename(export.parent / "mine.json")
    (export / "ranks.json").symlink_to("../mine.json")
    with pytest.raises(UserError, match=r"ranks.json has changed since it was exported; nothing was overwritten"):
        again(export)
    assert (export.parent / "mine.json").exists()


def test_a_fifo_is_not_waited_for(export: Path) -> None:
    (export / "ranks.json").unlink()
    os.mkfifo(export / "ranks.json")
    with quickly(), pytest.raises(UserError, match=r"ranks.json has changed since it was exported"):
        check_target(export)


@pytest.mark.parametrize("files", [["adapter_config.json"], None, 3, "README.md", {"README.md": 3}])
def test_a_record_that_does_not_say_what_files_hold(files: Any, export: Path) -> None:
    record(export, lambda found: found.update(files=files))
    said = f"{export / RECORD} does not say what its files hold, as those of earlier versions; nothing was overwritten"
    with pytest.raises(UserError, match=f"^{re.escape(said)}: choose another folder$"):
        again(export)
    with pytest.raises(UserError, match=r"as those of earlier versions; remove the folder and export it again$"):
        exported_files(export)


@pytest.mark.parametrize("kind", NO_FILES)
def test_a_record_that_is_no_file(kind: str, export: Path) -> None:
    put, said = NO_FILES[kind]
    put(export / RECORD)
    with quickly(), pytest.raises(UserError, match=said):
        check_target(export)


@pytest.mark.parametrize("text", ["{", "[]", '{"files": ' + "[" * 100_000])
def test_a_record_that_is_none(text: str, export: Path) -> None:
    (export / RECORD).write_text(text)
    with quickly(), pytest.raises(UserError, match=r"nothing was overwritten: choose another folder$"):
        check_target(export)


class TestPushed:
    def test_only_what_was_checked(self, export: Path) -> None:
        (export / "adapter_model.safetensors").write_bytes(b"other weights")
        with pytest.raises(UserError, match=r"adapter_model.safetensors has changed since it was exported and checked"):
            exported_files(export)

    def test_no_file_of_this_machine(self, export: Path) -> None:
        (export.parent / "key").write_text("secret")
        (export / "notes.txt").symlink_to("../key")
        record(export, lambda found: found["files"].update({"notes.txt": ""}))
        with pytest.raises(UserError, match=r"notes.txt is a link out of its folder"):
            exported_files(export)
        record(export, lambda found: found["files"].update({"../key": ""}))
        with pytest.raises(UserError, match="is a link out of its folder"):
            exported_files(export)

    def test_a_card_may_be_edited(self, tmp_path: Path) -> None:
        exported = export_adapter(tiny_peft("llama", trained=True), tmp_path / "adapter")
        (exported.path / "README.md").write_text("Trained by me.")
        assert "README.md" in exported_files(exported.path)
        with pytest.raises(UserError, match=r"README.md has changed since it was exported; nothing was overwritten"):
            check_target(exported.path)
        write_card(exported.path, "Trained by me.")  # as a run does, which writes its results into the card
        check_target(exported.path)
