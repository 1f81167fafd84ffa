"""Promises: a template is filled with columns and nothing else, and what is wrong with one is said."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loralloc.errors import UserError
from loralloc.tasks.rows import Rows
from loralloc.tasks.templates import columns_of, is_template, render


def rows_of(*records: dict[str, Any]) -> Rows:
    columns = tuple(dict.fromkeys(key for record in records for key in record))
    return Rows("train.jsonl", columns, list(records), range(1, len(records) + 1))


def test_columns_are_put_where_they_are_named() -> None:
    rows = rows_of({"question": "2 + 2", "level": 1}, {"question": "{x}", "level": 2.5})
    assert render(rows, "Q{{{level}}}: {question}\n", "data.prompt") == ["Q{1}: 2 + 2\n", "Q{2.5}: {x}\n"]


@pytest.mark.parametrize("name", ["text-en", "2nd_text", "0", "text (en)", "ünï côde", "class"])
def test_columns_of_any_name(name: str) -> None:
    rows = rows_of({name: "yes"}, {name: 2.5})
    assert columns_of(f"{{{name}}}", "data.prompt") == [name]
    assert render(rows, f"Q: {{{name}}}.", "data.prompt") == ["Q: yes.", "Q: 2.5."]


@given(st.text(), st.text(min_size=1).filter(str.strip))
def test_a_value_is_never_read_as_a_template(before: str, value: str) -> None:
    literal = before.replace("{", "{{").replace("}", "}}")
    assert render(rows_of({"a": value}), literal + "{a}", "data.text") == [before + value]


@pytest.mark.parametrize("empty", ["", None])
def test_white_space_before_an_empty_last_column_goes_with_it(empty: str | None) -> None:
    rows = rows_of({"instruction": "Say hi", "input": empty}, {"instruction": "Add", "input": "1 2"})
    assert render(rows, "{instruction}\n\n{input}", "data.prompt") == ["Say hi", "Add\n\n1 2"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{a",
            r"data.text: expected '}' before end of string in '{a'; a brace that is text is written twice: {{ or }}",
        ),
        ("{a.b}", r"data.text: braces must hold the name of one column; '{a.b}' has {a.b}"),
        ("{a!r}", r"data.text: braces must hold the name of one column; '{a!r}' has {a}"),
        ("{a[0]}", r"data.text: braces must hold the name of one column; '{a[0]}' has {a[0]}"),
        ("{ }", r"data.text: braces must hold the name of one column; '{ }' has { }"),
        ("{}", r"data.text: braces must hold the name of one column; '{}' has {}"),
    ],
)
def test_malformed(template: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        render(rows_of({"a": "x"}), template, "data.text")
    assert str(error.value) == message
    assert columns_of("{a} {a} {b c}", "data.text") == ["a", "b c"]


def test_a_column_that_is_missing_or_holds_no_text() -> None:
    with pytest.raises(UserError, match=r'train.jsonl has no column "b" \(data.text\). Its columns: a'):
        render(rows_of({"a": "x"}), "{b}", "data.text")
    with pytest.raises(UserError, match=r'train.jsonl:2: column "a" \(data.text\) must hold text, found list'):
        render(rows_of({"a": "x"}, {"a": ["y"]}), "{a}", "data.text")


def test_a_row_that_is_blank() -> None:
    with pytest.raises(UserError, match=r"train.jsonl:2: data.prompt is empty here: {\"a\": null}"):
        render(rows_of({"a": "x"}, {"a": None}), "{a}", "data.prompt")


def test_a_name_is_no_template() -> None:
    assert [is_template(words) for words in ("text", "{text}", "a}")] == [False, True, True]
