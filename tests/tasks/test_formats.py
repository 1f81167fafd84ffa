"""Promises: a damaged file is refused with its name and the reason; a column that nobody uses breaks nothing."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from pyarrow import parquet

from loralloc.errors import UserError
from loralloc.tasks.classes import label_names
from loralloc.tasks.data import read_rows

TEXTS, LABELS = ["one", "two"], ["x", "y"]


def save(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def save_table(folder: Path, table: pyarrow.Table, **options: Any) -> bytes:
    parquet.write_table(table, folder / "made", **options)
    return (folder / "made").read_bytes()


UNUSED = {
    "the index of pandas": ",text,label\n0,one,x\n1,two,y\n",
    "no name": "text,label,\none,x,\ntwo,y,z\n",
    "the same name twice": "text,note,label,note\none,1,x,2\ntwo,3,y,4\n",
    "long and odd": f'text,label,note\none,x,"a,""b""\n{"z" * 200_000}"\ntwo,y,\n',
}


class TestUnusedColumns:
    @pytest.mark.parametrize("case", UNUSED)
    def test_csv(self, case: str, tmp_path: Path) -> None:
        rows = read_rows(save(tmp_path, "a.csv", UNUSED[case]))
        assert rows.strings("text", "data.text") == TEXTS
        assert label_names(rows, "label") == LABELS

    def test_a_name_that_stands_twice_is_refused_when_it_is_used(self, tmp_path: Path) -> None:
        text = "text,label,label\none,x,y\n"
        message = r'a.csv: column "label" \(data.label\) stands 2 times in the header: give each a unique name\.$'
        with pytest.raises(UserError, match=message):
            read_rows(save(tmp_path, "a.csv", text)).values("label", "data.label")
        cured = read_rows(save(tmp_path, "a.csv", text.replace("label\n", "other\n")))
        assert cured.values("label", "data.label") == ["x"]

    def test_only_blank_names(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r'no column "text".*Its columns: none with a unique name\.'):
            read_rows(save(tmp_path, "a.csv", ",\n1,2\n")).values("text", "data.text")

    @pytest.mark.parametrize("row", ["two,y", "two,y,1,2", 'two,y,"1"2'])
    def test_the_form_of_every_row_is_checked_all_the_same(self, row: str, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"a.csv:3: (\d values, but the header names 3|malformed row)"):
            read_rows(save(tmp_path, "a.csv", f"text,label,unused\none,x,\n{row}\n"))

    def test_parquet(self, tmp_path: Path) -> None:
        columns = {"text": pyarrow.array(TEXTS), "map": pyarrow.array([[("a", 1)]] * 2, pyarrow.map_("string", "int8"))}
        table = pyarrow.table(
            [*columns.values(), *([pyarrow.array(LABELS)] * 3)], [*columns, "label", "twice", "twice"]
        )
        rows = read_rows(save(tmp_path, "a.parquet", save_table(tmp_path, table)))
        assert rows.columns == ("text", "label")
        assert rows.strings("text", "data.text") == TEXTS
        assert label_names(rows.select([1]), "label") == ["y"]
        with pytest.raises(UserError, match=r'a.parquet: column "twice" \(data.label\) stands 2 times in the header'):
            label_names(rows, "twice")
        with pytest.raises(UserError, match=r'column "map" \(data.text\) has the type map<.*>: write it as text, num'):
            rows.select([0]).strings("map", "data.text")

    def test_the_cures_of_parquet(self, tmp_path: Path) -> None:
        table = pyarrow.table([pyarrow.array(LABELS), pyarrow.array(LABELS)], ["twice", "other"])
        rows = read_rows(save(tmp_path, "a.parquet", save_table(tmp_path, table)))
        assert label_names(rows, "twice") == LABELS


class TestParquet:
    @pytest.fixture
    def whole(self, tmp_path: Path) -> bytes:
        table = pyarrow.table({"text": [f"text {i}" for i in range(3000)], "label": LABELS * 1500})
        return save_table(tmp_path, table, use_dictionary=False, write_page_checksum=True)

    @pytest.mark.parametrize("packed", ["", ".gz"])
    def test_damaged(self, whole: bytes, packed: str, tmp_path: Path) -> None:
        def flipped(start: int, stop: int) -> bytes:
            return whole[:start] + bytes(byte ^ 0x55 for byte in whole[start:stop]) + whole[stop:]

        end = len(whole)
        damaged = {
            "cut": whole[: end // 2],
            "empty": b"",
            "another format": b'{"text": "one", "label": "x"}\n',
            "flipped data": flipped(200, 2000),
            "one flipped byte": flipped(900, 901),
            "flipped footer": flipped(end - 200, end - 8),
        }
        message = (
            rf"a.parquet{packed} is not a readable Parquet file \(.+\). Is it complete\? Copy or write it again\.$"
        )
        for content in damaged.values():
            source = save(tmp_path, f"a.parquet{packed}", gzip.compress(content) if packed else content)
            with pytest.raises(UserError, match=message):
                read_rows(source)
        cured = gzip.compress(whole) if packed else whole
        assert len(read_rows(save(tmp_path, f"a.parquet{packed}", cured))) == 3000

    def test_bytes_that_are_no_text(self, tmp_path: Path) -> None:
        text = pyarrow.array([b"one", b"\xff\xfe"]).view(pyarrow.string())
        content = save_table(tmp_path, pyarrow.table({"text": text}))
        with pytest.raises(UserError, match=r"a.parquet is not a readable Parquet file \(.*UTF8"):
            read_rows(save(tmp_path, "a.parquet", content))

    @pytest.mark.parametrize("columns", [["text"], []])
    def test_no_rows(self, columns: list[str], tmp_path: Path) -> None:
        table = pyarrow.table({name: pyarrow.array([], pyarrow.string()) for name in columns})
        with pytest.raises(UserError, match=r"a.parquet is empty: it has no rows"):
            read_rows(save(tmp_path, "a.parquet", save_table(tmp_path, table)))

    def test_what_pandas_and_the_hub_write(self, tmp_path: Path) -> None:
        table = pyarrow.table({"text": pyarrow.array(TEXTS, pyarrow.large_string()), "label": LABELS})
        coded = table.set_column(1, "label", table["label"].dictionary_encode())
        rows = read_rows(save(tmp_path, "a.parquet", save_table(tmp_path, coded)))
        assert (rows.strings("text", "data.text"), label_names(rows, "label")) == (TEXTS, LABELS)
        features = Features({"label": ClassLabel(names=["no", "yes"]), "text": Value("string")})
        numbered = Dataset.from_dict({"label": [1, 0], "text": TEXTS}, features=features)
        numbered.to_parquet(str(tmp_path / "b.parquet"))
        assert label_names(read_rows(str(tmp_path / "b.parquet")), "label") == ["yes", "no"]


class TestSeparators:
    @pytest.mark.parametrize(("character", "name"), [(";", "semicolons"), ("|", "vertical bars"), ("\t", "tabs")])
    @pytest.mark.parametrize("text", ["one", "one, two", '"one"'])
    def test_a_csv_with_another_separator(self, character: str, name: str, text: str, tmp_path: Path) -> None:
        content = f"text{character}label\n{text}{character}x\n"
        message = rf"a.csv:1: the columns are separated by {name}, but those of a .csv file by commas\. .* header is"
        with pytest.raises(UserError, match=message) as caught:
            read_rows(save(tmp_path, "a.csv", content))
        rows = list(csv.reader(content.splitlines(), delimiter=character))
        if character == "\t":
            assert f"Rename it to {tmp_path}/a.tsv." in str(caught.value)
            cured = save(tmp_path, "a.tsv", content)
        else:
            assert "Save the file with commas." in str(caught.value)
            with (tmp_path / "b.csv").open("w", newline="") as file:
                csv.writer(file).writerows(rows)
            cured = str(tmp_path / "b.csv")
        assert read_rows(cured).values("text", "data.text") == [rows[1][0]]

    def test_a_packed_tsv_with_commas(self, tmp_path: Path) -> None:
        content = gzip.compress(b"text,label\none,x\n")
        with pytest.raises(UserError, match=rf"separated by commas, but .* .tsv .* Rename it to {tmp_path}/a.csv.gz\."):
            read_rows(save(tmp_path, "a.tsv.gz", content))
        assert read_rows(save(tmp_path, "a.csv.gz", content)).values("label", "data.label") == ["x"]

    @pytest.mark.parametrize("content", ["text\none; two | three\n", "text;,label\none,x\n"])
    def test_the_same_characters_within_texts(self, content: str, tmp_path: Path) -> None:
        assert len(read_rows(save(tmp_path, "a.csv", content))) == 1

    def test_the_line_with_which_excel_names_the_separator(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="separated by semicolons"):
            read_rows(save(tmp_path, "a.csv", "sep=;\ntext;label\none;x\n"))


class TestJson:
    @pytest.mark.parametrize("value", [r'"half \ud800"', '"x", "a": "y"', '{"b": 1, "b": 2}'])
    def test_lines_and_lists_are_checked_alike(self, value: str, tmp_path: Path) -> None:
        row = f'{{"a": {value}}}'
        with pytest.raises(UserError, match=r"a.jsonl:2: not valid JSON \((surrogates not|\"[ab]\" occurs twice)"):
            read_rows(save(tmp_path, "a.jsonl", f'{{"a": "x"}}\n{row}\n'))
        with pytest.raises(UserError, match=r"a.json: not valid JSON \((surrogates not|\"[ab]\" occurs twice)"):
            read_rows(save(tmp_path, "a.json", f'[{{"a": "x"}}, {row}]'))

    def test_the_line_of_a_list(self, tmp_path: Path) -> None:
        text = json.dumps([{"a": "\N{LINE SEPARATOR}\N{NEXT LINE}"}, {"a": 1}], ensure_ascii=False, indent=0)
        with pytest.raises(UserError, match=r'a.json:6: not valid JSON \(.*\): "a" 1$'):
            read_rows(save(tmp_path, "a.json", text.replace('"a": 1', '"a" 1')))


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ('{"text": ["one", "two"], "label": ["x", "y"]}', "of columns (text, label)"),
        ('{"text": {"0": "one", "1": "two"}, "label": {"0": "x", "1": "y"}}\n', "of columns (text, label)"),
        ('{\n "text": ["one", "two"],\n "label": ["x", "y"]\n}\n', "of columns (text, label)"),
        ('{\n "data": [{"text": "one"}]\n}\n', "on several lines"),
    ],
)
def test_one_object_that_is_no_row(text: str, kind: str, tmp_path: Path) -> None:
    path = save(tmp_path, "a.json", text)
    with pytest.raises(UserError) as error:
        read_rows(path)
    cure = "write a list of objects, one for each row, or an object a line"
    assert str(error.value) == f"{path} is one object {kind}; {cure}"


@pytest.mark.parametrize("text", ['{"text": "one"}\n', '{"messages": [{"role": "user"}, {"role": "assistant"}]}'])
def test_one_object_that_is_a_row(text: str, tmp_path: Path) -> None:
    assert len(read_rows(save(tmp_path, "a.json", text))) == 1


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_malformed_row_is_quoted_whatever_ends_its_line(end: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'a.csv:3: malformed row .*: "x"y,2$'):
        read_rows(save(tmp_path, "a.csv", end.join(["a,b", "1,2", '"x"y,2', ""])))
