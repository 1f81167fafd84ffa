"""Promises: every format gives the same rows, and a malformed one is refused with file, row and reason."""

from __future__ import annotations

import csv
import gzip
import json
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset

from loralloc.errors import UserError
from loralloc.tasks import data, hub
from loralloc.tasks.data import load_splits, read_rows, stream_rows

RECORDS = [{"text": 'a "quoted", text', "label": "x"}, {"text": "two\nlines", "label": "y"}]


def as_table(delimiter: str) -> str:
    lines = [["text", "label"], *[[row["text"], row["label"]] for row in RECORDS]]
    return "\r\n".join(delimiter.join('"' + field.replace('"', '""') + '"' for field in line) for line in lines)


FILES = {
    "rows.jsonl": "\n".join(json.dumps(row) for row in RECORDS) + "\n\n",
    "rows.json": json.dumps(RECORDS, indent=1),
    "lines.json": "\n".join(json.dumps(row) for row in RECORDS),
    "rows.csv": as_table(","),
    "rows.tsv": as_table("\t"),
}


def save(folder: Path, name: str, content: str | bytes) -> str:
    raw = content.encode() if isinstance(content, str) else content
    path = folder / name
    path.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    return str(path)


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str, packed: str) -> None:
    rows = read_rows(save(tmp_path, name + packed, FILES[name]))
    assert rows.columns == ("text", "label")
    assert list(rows.records) == RECORDS


@pytest.mark.parametrize("packed", ["", ".gz"])
def test_parquet(tmp_path: Path, packed: str) -> None:
    Dataset.from_list(RECORDS).to_parquet(str(tmp_path / "plain.parquet"))
    content = (tmp_path / "plain.parquet").read_bytes()
    rows = read_rows(save(tmp_path, f"rows.parquet{packed}", content))
    assert rows.columns == ("text", "label")
    assert rows.values("text", "data.text") == [row["text"] for row in RECORDS]
    assert rows.place(1).endswith(f"rows.parquet{packed}, row 2")


def test_text_documents_are_parted_by_blank_lines(tmp_path: Path) -> None:
    source = save(tmp_path, "rows.txt", "\nfirst\nstill first\n \n\nsecond\r\nstill second\r\n")
    rows = read_rows(source)
    assert rows.values("text", "data.text") == ["first\nstill first", "second\nstill second"]
    assert list(rows.numbers) == [2, 6]


def test_numbers_are_lines_of_the_file(tmp_path: Path) -> None:
    assert list(read_rows(save(tmp_path, "a.jsonl", '\n{"a": 1}\n\n{"a": 2}\n')).numbers) == [2, 4]
    assert list(read_rows(save(tmp_path, "a.csv", 'a\n"x\ny"\nz\n')).numbers) == [2, 4]


def test_columns_are_those_of_any_row(tmp_path: Path) -> None:
    assert read_rows(save(tmp_path, "a.jsonl", '{"a": 1}\n{"b": 2}\n')).columns == ("a", "b")


def test_json_strings_may_hold_line_separators(tmp_path: Path) -> None:
    rows = read_rows(save(tmp_path, "a.jsonl", '{"a": "x\u2028y"}\n'))
    assert rows.values("a", "data.text") == ["x\u2028y"]


def test_a_byte_order_mark_is_not_data(tmp_path: Path) -> None:
    assert read_rows(save(tmp_path, "a.csv", b"\xef\xbb\xbfa,b\n1,2\n")).columns == ("a", "b")


def test_an_empty_field_is_a_missing_value(tmp_path: Path) -> None:
    rows = read_rows(save(tmp_path, "a.csv", "a,b\n1,\n"))
    with pytest.raises(UserError, match=r'a.csv:2: no value in column "b"'):
        rows.values("b", "data.label")


def test_long_fields_are_read_and_the_limit_is_left_as_it_was(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    assert len(read_rows(save(tmp_path, "a.csv", f"a\n{'x' * 200_000}\n")).values("a", "data.text")[0]) == 200_000
    assert csv.field_size_limit() == before


MALFORMED = {
    "a.jsonl": [
        ('{"a": 1}\n{"a": 2\n', r"""a.jsonl:2: not valid JSON \(Expecting ',' delimiter\): {"a": 2$"""),
        ('{"a": 1}\n[1, 2]\n', r"a.jsonl:2: a row must be a JSON object, found \[1, 2\]"),
        ("\n\n", r"a.jsonl is empty: it has no rows"),
        (b'{"a": 1}\n{"a": "\xff"}\n', r"a.jsonl:2: not UTF-8 text \(byte 0xff\). Save the file as UTF-8"),
        (f'{{"a": {"x" * 500}}}', r"a.jsonl:1: not valid JSON \(Expecting value\): {\"a\": x+\.\.\.$"),
    ],
    "a.json": [
        ('[{"a": 1},\n {"a" 2}]', r"""a.json:2: not valid JSON \(Expecting ':' delimiter\):  {"a" 2}\]"""),
        ('[{"a": 1}, 7]', r"a.json, row 2: a row must be a JSON object, found 7"),
        ("[]", r"a.json is empty: it has no rows"),
    ],
    "a.csv": [
        ("a,b\n1,2\n1,2,3\n", r'a.csv:3: 3 values, but the header names 2 columns: \["1", "2", "3"\]'),
        ('a,b\n1,2\n"x"y,2\n', r"""a.csv:3: malformed row \(',' expected after '"'\).*doubled \(""\): "x"y,2"""),
        ("a,b\n", r"a.csv is empty: it has no rows"),
        ("", r"a.csv is empty: it has no rows"),
    ],
    "a.parquet": [(b"not parquet", r"a.parquet is not a readable Parquet file \(Parquet magic bytes not found")],
    "a.txt": [(" \n\n", r"a.txt is empty: it has no rows")],
    "a.xlsx": [
        ("x", r'cannot tell the format from the extension ".xlsx". Known: .jsonl, .json, .csv, .tsv, .parquet, .txt')
    ],
}


@pytest.mark.parametrize(
    ("name", "content", "message"), [(name, *case) for name, cases in MALFORMED.items() for case in cases]
)
def test_malformed_files(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    source = save(tmp_path, name, content)
    with pytest.raises(UserError, match=message):
        read_rows(source)


def streamed(source: str) -> list[Any]:
    return [record for rows in stream_rows(sources(source)) for record in rows.records]


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.tsv"])
def test_streamed_rows_are_the_same(tmp_path: Path, name: str, packed: str) -> None:
    source = save(tmp_path, name + packed, "\n\n" + FILES[name])
    assert streamed(source) == list(read_rows(source).records) == RECORDS


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.csv", content) for content, _ in MALFORMED["a.csv"][:2]]
    + [("a.jsonl", content) for content, _ in MALFORMED["a.jsonl"][:2]]
    + [("a.csv", "a;b\n1;2\n"), ("a.csv", 'a,b\n1,"2\n'), ("a.tsv", "a,b\n1,2\n")],
)
def test_malformed_files_are_told_alike_when_they_are_streamed(tmp_path: Path, name: str, content: str) -> None:
    source = save(tmp_path, name, content)
    with pytest.raises(UserError) as whole:
        read_rows(source)
    with pytest.raises(UserError) as stream:
        streamed(source)
    assert str(stream.value) == str(whole.value)


def test_text_in_another_encoding_is_not_streamed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a.csv: not UTF-8 text \(byte 0xe9\). Save the file as UTF-8"):
        streamed(save(tmp_path, "a.csv", b"text\ncaf\xe9\n"))


def test_a_streamed_column_must_have_a_unique_name(tmp_path: Path) -> None:
    (rows,) = stream_rows(sources(save(tmp_path, "a.csv", "text,text,other\n1,2,3\n")))
    with pytest.raises(
        UserError, match=r'column "text" \(data.text\) stands 2 times in the header: give each a unique'
    ):
        rows.values("text", "data.text")
    assert rows.values("other", "data.text") == ["3"]


def test_a_packed_table_of_arrow_is_not_streamed(tmp_path: Path) -> None:
    Dataset.from_list(RECORDS).to_parquet(str(tmp_path / "a.parquet"))
    assert streamed(str(tmp_path / "a.parquet")) == RECORDS
    message = r"cannot be streamed; .jsonl, .csv, .tsv can, each also with .gz, and .parquet, unpacked"
    with pytest.raises(UserError, match=message):
        streamed(save(tmp_path, "a.parquet.gz", b""))


def test_a_stream_leaves_the_limit_of_fields_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "PIECE", 1)
    before = csv.field_size_limit()
    stream = stream_rows(sources(save(tmp_path, "a.csv", f"a\n1\n{'x' * 200_000}\n")))
    assert next(stream).records == [{"a": "1"}]
    assert csv.field_size_limit() == before  # also between two rows
    assert len(next(stream).records[0]["a"]) == 200_000


def test_a_broken_gzip_file(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"a": 1}\n' * 1000)
    for content in (b'{"a": 1}\n', whole[:20], whole[:-4], whole[:12] + b"\xff" * 20):
        (tmp_path / "a.jsonl.gz").write_bytes(content)
        for read in (read_rows, streamed):
            with pytest.raises(UserError, match=r"a.jsonl.gz is not a complete gzip file \("):
                read(str(tmp_path / "a.jsonl.gz"))


def test_a_missing_file(tmp_path: Path) -> None:
    save(tmp_path, "train.jsonl", "{}")
    with pytest.raises(UserError, match=r'trian.jsonl: no such file. Did you mean "train.jsonl"\?'):
        read_rows(str(tmp_path / "trian.jsonl"))
    with pytest.raises(UserError, match=r"nowhere.*no such file\.$"):
        read_rows(str(tmp_path / "nowhere" / "train.jsonl"))


def test_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is a folder; name a file in it"):
        read_rows(str(tmp_path))


def sources(train: str, validation: float | str = 0.25, test: float | str | None = None) -> Any:
    return SimpleNamespace(train=train, validation=validation, test=test)


def test_validation_is_cut_from_train_or_read(tmp_path: Path) -> None:
    train = save(tmp_path, "train.jsonl", "".join(f'{{"n": {i}}}\n' for i in range(8)))
    other = save(tmp_path, "other.jsonl", '{"n": 9}\n')
    cut = load_splits(sources(train, 0.25), seed=0)
    assert (len(cut.train), len(cut.validation), cut.test) == (6, 2, None)
    assert len(list(cut.all())) == 2
    named = load_splits(sources(train, other, other), seed=0)
    assert [len(rows) for rows in named.all()] == [8, 1, 1]


def test_rows_to_test_on_can_be_cut_off_too_and_are_the_same_whatever_the_seed(tmp_path: Path) -> None:
    train = save(tmp_path, "train.jsonl", "".join(f'{{"n": {i}}}\n' for i in range(40)))
    one, other = (
        [rows.values("n", "data.text") for rows in load_splits(sources(train, 0.25, 0.1), seed=seed).all()]
        for seed in (0, 1)
    )
    assert one[2] == other[2]
    assert one[1] != other[1], "those to validate on are others"
    assert [len(rows) for rows in one] == [27, 9, 4]
    assert sorted(chain(*one)) == list(range(40)), "no row is in two of them"
    named = load_splits(sources(train, train, 0.1), seed=0)
    assert [len(rows) for rows in named.all()] == [36, 40, 4]


def test_too_few_rows_to_test_on(tmp_path: Path) -> None:
    train = save(tmp_path, "train.jsonl", '{"n": 1}\n')
    with pytest.raises(UserError, match=r"cut 0.1 of them off for test. Give more rows, or name a file in data.test"):
        load_splits(sources(train, train, 0.1), seed=0)


def test_the_cut_is_stratified_by_the_groups_given(tmp_path: Path) -> None:
    train = save(tmp_path, "train.jsonl", "".join(f'{{"n": {i % 2}}}\n' for i in range(20)))
    cut = load_splits(sources(train, 0.2), seed=3, groups=lambda rows: rows.values("n", "data.label"))
    assert sorted(cut.validation.values("n", "data.label")) == [0, 0, 1, 1]


def test_demo_data_by_split() -> None:
    train, test = read_rows("demo:docstrings"), read_rows("demo:docstrings@test")
    assert train.columns == test.columns == ("text", "label", "module")
    assert len(train) > len(test) > 0


def test_unknown_demo_data() -> None:
    with pytest.raises(UserError, match=r'No demo data "docstring"; there is demo:docstrings'):
        read_rows("demo:docstring")
    with pytest.raises(UserError, match=r'no split "tests". Splits: train, validation, test. Did you mean "test"'):
        read_rows("demo:docstrings@tests")


@pytest.mark.parametrize(
    ("source", "arguments"),
    [
        ("hub:imdb", ("imdb", None, "train")),
        ("hub:owner/name@test", ("owner/name", None, "test")),
        ("hub:nyu-mll/glue/qnli@validation", ("nyu-mll/glue", "qnli", "validation")),
    ],
)
def test_hub_names(monkeypatch: pytest.MonkeyPatch, source: str, arguments: tuple[Any, ...]) -> None:
    calls = []

    def load(name: str, config: str | None, split: str) -> Dataset:
        calls.append((name, config, split))
        return Dataset.from_list(RECORDS)

    monkeypatch.setattr(data, "is_reachable", lambda name, kind: True)
    monkeypatch.setattr(data, "load_dataset", load)
    rows = read_rows(source)
    assert calls == [arguments]
    assert rows.place(0) == f"{source}, row 1"
    assert rows.values("label", "data.label") == ["x", "y"]


@pytest.mark.parametrize("source", ["hub:", "hub:a//b", "hub:a/b/c/d", "hub:@train"])
def test_malformed_hub_names(source: str) -> None:
    with pytest.raises(UserError, match=r"write hub:NAME\[/CONFIG\]\[@SPLIT\], as in hub:nyu-mll/glue/qnli@train"):
        read_rows(source)


def test_a_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (data, hub):
        monkeypatch.setattr(module, "is_offline_mode", lambda: False)
    monkeypatch.setattr(data, "is_reachable", lambda name, kind: False)
    message = r"hub:imdb: The Hub cannot be reached: connect to the network, or give a path.*HF_HUB_OFFLINE=1 uses what"
    with pytest.raises(UserError, match=message):
        read_rows("hub:imdb")


def test_a_data_set_that_is_not_in_the_cache() -> None:
    """The tests run with HF_HUB_OFFLINE=1: this is the library's own error."""
    message = r"hub:owner/never-downloaded cannot be loaded: Couldn't reach .*HF_HUB_OFFLINE is set, .*: unset it, or"
    with pytest.raises(UserError, match=message):
        read_rows("hub:owner/never-downloaded")
