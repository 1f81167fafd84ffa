"""The one place where files of strangers are opened."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loralloc import reading
from loralloc.errors import UserError
from loralloc.files import read_jsonl, write_atomically

from .sent import NO_FILES, quickly


@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_file_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    put, said = NO_FILES[kind]
    put(tmp_path / "a.json")
    for read in (reading.read_text, reading.read_json, reading.read_object):
        with quickly(), pytest.raises((UserError, IsADirectoryError), match=said):
            read(tmp_path / "a.json")


def test_a_socket_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # their paths must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("a.json")
        with pytest.raises(UserError, match="is a socket, and what is read must be a regular file"):
            reading.check_regular(Path("a.json"))


def test_a_file_of_the_kernel_has_no_size_and_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path("/proc/self/maps")
    assert path.stat().st_size == 0
    with pytest.raises(UserError, match=r"/proc/self/maps has 101 bytes, and a file of its kind may have at most 100"):
        reading.read_bytes(path, 100)


def test_a_file_may_be_as_large_as_its_limit(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 100)
    assert reading.read_bytes(tmp_path / "a", 100) == b"x" * 100
    with pytest.raises(UserError, match=r"a has 100 bytes, and a file of its kind may have at most 99$"):
        reading.read_bytes(tmp_path / "a", 99)


def test_text_is_read_with_any_line_ends(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes("ä\r\nb\rc\n".encode())
    assert reading.read_text(tmp_path / "a") == (tmp_path / "a").read_text(encoding="utf-8") == "ä\nb\nc\n"


class TestLinks:
    def test_out_of_the_folder(self, tmp_path: Path) -> None:
        (tmp_path / "sent").mkdir()
        (tmp_path / "mine").write_text("x")
        link = tmp_path / "sent" / "a.json"
        link.symlink_to("../mine")
        message = f"{link} is a link out of its folder, to {tmp_path / 'mine'}; put a copy of the file in its place"
        with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
            reading.check_inside(tmp_path / "sent", [link])

    def test_a_folder_beside_it_with_a_longer_name_is_outside(self, tmp_path: Path) -> None:
        for name in ("sent", "sent-2"):
            (tmp_path / name).mkdir()
        (tmp_path / "sent" / "a").symlink_to("../sent-2/a")
        with pytest.raises(UserError, match="is a link out of its folder"):
            reading.check_inside(tmp_path / "sent", [tmp_path / "sent" / "a"])

    def test_within_it_and_to_it(self, tmp_path: Path) -> None:
        (tmp_path / "sent").mkdir()
        (tmp_path / "sent" / "b").write_text("x")
        (tmp_path / "sent" / "a").symlink_to("b")
        (tmp_path / "latest").symlink_to("sent")
        for folder in (tmp_path / "sent", tmp_path / "latest"):
            reading.check_inside(folder, [folder / "a", folder / "b", folder / "absent"])

    def test_the_cache_of_the_hub_is_made_of_links(self, tmp_path: Path) -> None:
        repository = tmp_path / "models--me--film"
        snapshot = repository / "snapshots" / "0123"
        snapshot.mkdir(parents=True)
        (repository / "blobs").mkdir()
        (repository / "blobs" / "abc").write_text("x")
        (snapshot / "a.json").symlink_to("../../blobs/abc")
        (snapshot / "sub").mkdir()
        (snapshot / "sub" / "c.json").symlink_to("../../../blobs/abc")
        reading.check_inside(snapshot, [snapshot / "a.json"])
        reading.check_inside(snapshot / "sub", [snapshot / "sub" / "c.json"])
        (tmp_path / "mine").write_text("x")
        (snapshot / "b.json").symlink_to("../../../mine")
        with pytest.raises(UserError, match="is a link out of its folder"):
            reading.check_inside(snapshot, [snapshot / "b.json"])

    def test_in_a_circle(self, tmp_path: Path) -> None:
        (tmp_path / "a").symlink_to("a")
        reading.check_inside(tmp_path, [tmp_path / "a"])
        with pytest.raises(
            UserError, match=r"a: cannot be read \(Too many levels of symbolic links\); restore the file"
        ):
            reading.read_object(tmp_path / "a")

    def test_a_file_is_never_written_through_one(self, tmp_path: Path) -> None:
        import os

        (tmp_path / "mine").write_text("x")
        for name in ("page.html", f".page.html.{os.getpid()}"):
            (tmp_path / name).symlink_to("mine")
        write_atomically(tmp_path / "page.html", "new")
        assert (tmp_path / "mine").read_text() == "x"
        assert (tmp_path / "page.html").read_text() == "new"
        assert not (tmp_path / "page.html").is_symlink()


class TestJson:
    @pytest.mark.parametrize("bracket", ["[", '{"a":'])
    def test_depth(self, bracket: str) -> None:
        close = {"[": "]", '{"a":': "}"}[bracket]
        for depth in (reading.DEEPEST, 1, 3):
            text = bracket * depth + "1" + close * depth
            assert reading.parse_json(text) == json.loads(text)
        for depth in (reading.DEEPEST + 1, 500, 200_000):
            with quickly(), pytest.raises(ValueError, match=r"^brackets are nested more than 64 deep$"):
                reading.parse_json(bracket * depth + "1" + close * depth)

    def test_many_brackets_side_by_side(self) -> None:
        assert len(reading.parse_json(f"[{','.join(['[[]]'] * 1000)}]")) == 1000

    @pytest.mark.parametrize("text", [r'"\ud800"', r'{"a\udc00b": 1}', r'["\uD83D"]', r'["\uDE00\uD83D"]'])
    def test_half_a_character(self, text: str) -> None:
        with pytest.raises(ValueError, match=r"^a string has half a character \(a lone surrogate\)$"):
            reading.parse_json(text)

    def test_a_whole_one(self) -> None:
        assert reading.parse_json(r'"\ud83d\ude00 \\ud800"') == "\N{GRINNING FACE} \\ud800"

    @given(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        )
    )
    def test_what_json_reads(self, value: object) -> None:
        assert reading.parse_json(json.dumps(value)) == value
        assert reading.parse_json(json.dumps(value, ensure_ascii=False)) == value

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            (b"[1]", "a.json: expected a JSON object, got list; restore the file"),
            (b"{", r"a.json: not JSON \(Expecting property name .*\); restore the file"),
            (b"\xff", r"a.json: cannot be read as UTF-8 text \(byte 0\); restore the file"),
            (b'{"a": 1' + b"0" * 5000 + b"}", r"a.json: not JSON \(Exceeds the limit .*\); restore the file"),
        ],
    )
    def test_what_is_no_object(self, content: bytes, said: str, tmp_path: Path) -> None:
        (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(UserError, match=f"{said}$"):
            reading.read_object(tmp_path / "a.json")

    @pytest.mark.parametrize("step", ["-1", "1e300", "1e999", "-1e999", "NaN", "[1]", "null", str(2**60), '"x"'])
    def test_rows_have_steps(self, step: str, tmp_path: Path) -> None:
        (tmp_path / "log.jsonl").write_text(f'{{"step": {step}}}\n{{"step": 1}}\n')
        with pytest.raises(UserError, match="line 1: not a JSON object with a step"):
            read_jsonl(tmp_path / "log.jsonl")


def test_an_error_of_a_write_names_the_file_that_was_asked_for(tmp_path: Path) -> None:
    missing = tmp_path / "none" / "file"
    with pytest.raises(FileNotFoundError) as error:
        write_atomically(missing, "new\n")
    assert error.value.filename == str(missing)
