"""A checkpoint is whole or it is none: every file that was cut, changed or lost is found, the list of them too."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loralloc.training import manifest
from loralloc.training.checkpoint import drop_after, drop_cut_off, newest_whole
from loralloc.training.manifest import MANIFEST, Manifest, damage, read_manifest, sealed, unsealed, write_manifest

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
RECORDS = st.dictionaries(st.text().filter(lambda key: key != "checksum"), VALUES, max_size=4)


def flip(path: Path, bit: int) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    path.write_bytes(bytes(content))


def save(folder: Path, step: int, **facts: Any) -> Path:
    """A checkpoint of two files, one of them in a folder of its own."""
    checkpoint = folder / f"checkpoint-{step}"
    (checkpoint / "inner").mkdir(parents=True)
    (checkpoint / "weights.safetensors").write_bytes(bytes(range(256)))
    (checkpoint / "inner" / "state.json").write_text("{}", encoding="utf-8")
    write_manifest(checkpoint, Manifest(step=step, processes=1, **facts))
    return checkpoint


class TestSeal:
    @given(RECORDS)
    def test_a_record_comes_back(self, record: dict[str, Any]) -> None:
        assert unsealed(sealed(record).encode()) == record

    @given(RECORDS, st.integers(min_value=0))
    def test_one_bit_is_enough_to_break_it(self, record: dict[str, Any], bit: int) -> None:
        content = bytearray(sealed(record).encode())
        content[bit // 8 % len(content)] ^= 1 << bit % 8
        with pytest.raises(ValueError, match="its content is not what was written"):
            unsealed(bytes(content))

    @pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"null", b"3", b'{"checksum": "abc"}', b"\xff"])
    def test_what_was_not_sealed_is_refused(self, content: bytes) -> None:
        with pytest.raises(ValueError, match="its content is not what was written"):
            unsealed(content)


class TestDamage:
    @pytest.fixture
    def checkpoint(self, tmp_path: Path) -> Path:
        return save(tmp_path, 4, depends_on={"recipe": {"lora.r": 4}})

    def test_none_where_nothing_happened(self, checkpoint: Path) -> None:
        assert damage(checkpoint) is None
        found = read_manifest(checkpoint)
        assert (found.step, found.processes, found.ended, found.best) == (4, 1, False, None)
        assert found.depends_on == {"recipe": {"lora.r": 4}}
        assert found.files.keys() == {"weights.safetensors", "inner/state.json"}

    def test_every_bit_counts(self, checkpoint: Path) -> None:
        path = checkpoint / "weights.safetensors"
        for bit in range(0, 8 * 256, 97):
            flip(path, bit)
            assert damage(checkpoint) == "weights.safetensors has other content than was written"
            flip(path, bit)
            assert damage(checkpoint) is None

    @pytest.mark.parametrize(
        ("act", "reason"),
        [
            (lambda c: os.truncate(c / "weights.safetensors", 99), "weights.safetensors has 99 bytes instead of 256"),
            (lambda c: (c / "inner" / "state.json").unlink(), "inner/state.json is missing"),
            (lambda c: (c / MANIFEST).unlink(), "it has no manifest.json: its writing was cut off"),
            (lambda c: os.truncate(c / MANIFEST, 9), "its manifest.json is damaged"),
            (lambda c: (c / MANIFEST).write_text(sealed({"step": 4})), "its manifest.json is damaged"),
            (lambda c: (c / MANIFEST).write_text(sealed({"a": 4})), "its manifest.json is damaged"),
        ],
    )
    def test_is_told(self, act: Callable[[Path], Any], reason: str, checkpoint: Path) -> None:
        act(checkpoint)
        assert damage(checkpoint) == reason

    def test_a_checkpoint_under_another_name(self, checkpoint: Path) -> None:
        assert damage(checkpoint.rename(checkpoint.with_name("checkpoint-9"))) == "it was written as checkpoint-4"

    def test_everything_is_on_the_disk_before_the_list_is(self, tmp_path: Path, monkeypatch: Any) -> None:
        secured: list[str] = []
        real = os.fsync

        def fsync(descriptor: int) -> None:
            secured.append(os.readlink(f"/proc/self/fd/{descriptor}").removeprefix(str(tmp_path)))
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        save(tmp_path, 4)
        files = {"/checkpoint-4/weights.safetensors", "/checkpoint-4/inner/state.json"}
        folders = {"/checkpoint-4/inner", "/checkpoint-4", ""}
        listed = next(index for index, name in enumerate(secured) if MANIFEST in name)
        assert set(secured[:listed]) == files | folders
        assert secured[listed + 1 :] == ["/checkpoint-4"] * 2, "both names of the list are on the disk too"


class TestNewestWhole:
    def test_has_the_highest_step(self, tmp_path: Path) -> None:
        assert newest_whole(tmp_path / "none").checkpoint is None
        for step in (9, 10, 2):
            save(tmp_path, step)
        assert newest_whole(tmp_path).checkpoint == tmp_path / "checkpoint-10"

    def test_passes_over_what_is_damaged_and_says_why(self, tmp_path: Path) -> None:
        for step in (2, 9, 10):
            save(tmp_path, step)
        flip(tmp_path / "checkpoint-10" / "weights.safetensors", 77)
        (tmp_path / "checkpoint-9" / MANIFEST).unlink()
        found = newest_whole(tmp_path)
        assert found.checkpoint == tmp_path / "checkpoint-2"
        assert found.skipped == {
            "checkpoint-10": "weights.safetensors has other content than was written",
            "checkpoint-9": "it has no manifest.json: its writing was cut off",
        }

    @pytest.mark.parametrize("damaged", [True, False])
    def test_tells_a_damaged_checkpoint_from_one_that_was_cut_off(self, damaged: bool, tmp_path: Path) -> None:
        name = "weights.safetensors" if damaged else MANIFEST
        (save(tmp_path, 2) / name).unlink()
        found = newest_whole(tmp_path)
        assert (found.checkpoint, found.damaged) == (None, damaged)

    def test_needs_its_best_state(self, tmp_path: Path) -> None:
        for step, best in {2: None, 6: "checkpoint-6", 8: "checkpoint-6"}.items():
            save(tmp_path, step, best=best)
        assert newest_whole(tmp_path).checkpoint == tmp_path / "checkpoint-8"
        flip(tmp_path / "checkpoint-6" / "inner" / "state.json", 3)
        found = newest_whole(tmp_path)
        content = "inner/state.json has other content than was written"
        assert found.checkpoint == tmp_path / "checkpoint-2"
        assert found.skipped["checkpoint-8"] == f"the best state is in checkpoint-6, and {content}"


@pytest.mark.parametrize(("kept", "left"), [(9, {"checkpoint-2", "checkpoint-9"}), (None, set())])
def test_checkpoints_of_steps_that_come_again_go(kept: int | None, left: set[str], tmp_path: Path) -> None:
    for name in ("checkpoint-2", "checkpoint-9", "checkpoint-10", "checkpoint-mine", "runs"):
        (tmp_path / name).mkdir()
    drop_after(tmp_path, None if kept is None else tmp_path / f"checkpoint-{kept}")
    assert {path.name for path in tmp_path.iterdir()} == left | {"checkpoint-mine", "runs"}


def test_what_was_cut_off_makes_room(tmp_path: Path) -> None:
    save(tmp_path, 2)
    (save(tmp_path, 4) / MANIFEST).unlink()
    drop_cut_off(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_a_checksum_is_that_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert manifest.sha256_of(tmp_path / "a").startswith("ba7816bf")
    assert json.loads((save(tmp_path, 1) / MANIFEST).read_text())["files"]["inner/state.json"]["size"] == 2
