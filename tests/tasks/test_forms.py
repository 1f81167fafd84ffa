"""Promises: common columns are recognised, and named ones are taken."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from loralloc.errors import UserError
from loralloc.tasks.conversations import Chat
from loralloc.tasks.forms import Chats, Pairs, Texts, read_form
from loralloc.tasks.rows import Rows

USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
SHARED = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
NOTHING = dict.fromkeys(("text", "prompt", "completion", "messages", "tools"))


def rows_of(record: dict[str, Any]) -> Rows:
    return Rows("train.jsonl", tuple(record), [record], [1])


@pytest.mark.parametrize(
    ("record", "form"),
    [
        ({"text": "a", "id": "1"}, Texts(["a"])),
        ({"messages": [USER, ANSWER]}, Chats([Chat([USER, ANSWER])])),
        ({"conversations": SHARED}, Chats([Chat([USER, ANSWER])])),
        ({"prompt": "a", "completion": "b"}, Pairs(["a"], ["b"])),
        ({"instruction": "a", "input": "x", "output": "b", "text": "all"}, Pairs(["a\n\nx"], ["b"])),
        ({"instruction": "a", "output": "b"}, Pairs(["a"], ["b"])),
    ],
    ids=["text", "messages", "sharegpt", "pair", "alpaca", "alpaca without input"],
)
def test_common_columns(record: dict[str, Any], form: Any) -> None:
    assert read_form(rows_of(record), SimpleNamespace(**NOTHING)) == form


def test_named_columns_come_first() -> None:
    record = {"messages": [USER, ANSWER], "question": "q", "reply": "r", "text": "t"}
    columns = {**NOTHING, "prompt": "{question}?", "completion": "reply"}
    assert read_form(rows_of(record), SimpleNamespace(**columns)) == Pairs(["q?"], ["r"])
    assert read_form(rows_of(record), SimpleNamespace(**{**NOTHING, "text": "{text}!"})) == Texts(["t!"])


@pytest.mark.parametrize("completion", [[ANSWER], "b"])
def test_prompts_that_are_chats(completion: Any) -> None:
    record = {"prompt": [USER], "completion": completion}
    assert read_form(rows_of(record), SimpleNamespace(**NOTHING)) == Chats([Chat([USER, ANSWER], start=1)])


def test_a_column_of_tools_is_taken_without_being_named() -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    form = read_form(rows_of({"messages": [USER, ANSWER], "tools": [tool]}), SimpleNamespace(**NOTHING))
    assert form == Chats([Chat([USER, ANSWER], [tool])])


def test_columns_that_mean_nothing() -> None:
    message = r"train.jsonl: what to learn is not known. Its columns are body, title; name data.text, data.prompt with"
    with pytest.raises(UserError, match=message):
        read_form(rows_of({"body": "a", "title": "b"}), SimpleNamespace(**NOTHING))


def test_completions_that_are_chats_without_an_answer() -> None:
    message = r'train.jsonl:1: column "completion" \(data.completion\) has no turn of the assistant'
    with pytest.raises(UserError, match=message):
        read_form(rows_of({"prompt": [USER, ANSWER], "completion": [USER]}), SimpleNamespace(**NOTHING))


def test_tools_beside_texts() -> None:
    with pytest.raises(UserError, match=r"data.tools is for chats, and these rows are texts; take it out"):
        read_form(rows_of({"text": "a", "t": []}), SimpleNamespace(**{**NOTHING, "tools": "t"}))


def test_pairs_become_chats_of_two_turns() -> None:
    assert Pairs(["a"], ["b"]).chats() == [Chat([USER, ANSWER], start=1)]
