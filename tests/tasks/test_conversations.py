"""Promises: every common form of a chat is read as the same messages, and what cannot be learned is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from datasets import Dataset

from loralloc.errors import UserError
from loralloc.tasks.conversations import Chat, read_chats, read_messages
from loralloc.tasks.rows import Rows

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "a b"},
    {"role": "assistant", "content": "yes"},
]
SHAREGPT = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": "a b"},
    {"from": "gpt", "value": "yes"},
]
PARTS = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in CHAT]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def rows_of(*chats: Any, **columns: list[Any]) -> Rows:
    records = [{"chat": chat, **{key: values[i] for key, values in columns.items()}} for i, chat in enumerate(chats)]
    return Rows("train.jsonl", ("chat", *columns), records, range(1, len(chats) + 1))


@pytest.mark.parametrize("form", [CHAT, SHAREGPT, PARTS], ids=["messages", "sharegpt", "parts"])
def test_three_forms_of_one_chat(form: Any) -> None:
    assert read_chats(rows_of(form), "chat") == [Chat(CHAT)]


def test_what_arrow_adds_is_taken_out() -> None:
    first = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [CALL]}]
    other = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}
    second = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": [other]}]
    table = Dataset.from_list([{"chat": first}, {"chat": second}])
    assert table[0]["chat"][1]["tool_calls"][0]["function"]["arguments"] == {"city": "Rome", "zone": None}
    read = read_chats(Rows("train.parquet", ("chat",), table, [1, 2], unit="row"), "chat")
    assert [chat.messages[1]["tool_calls"] for chat in read] == [[CALL], [other]]


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        {"function": {"name": "weather", "arguments": '{"city": "Rome"}'}},
        {"name": "weather", "arguments": {"city": "Rome"}},
    ],
    ids=["mapping", "json", "flat"],
)
def test_calls_of_tools_have_one_form(call: Any) -> None:
    messages = read_messages([{"role": "assistant", "content": None, "tool_calls": [call]}], "here")
    assert messages == [{"role": "assistant", "content": "", "tool_calls": [CALL]}]


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])], ids=["list", "json"])
def test_tools_are_read_beside_the_chat(tools: Any) -> None:
    rows = rows_of(CHAT, CHAT, tools=[tools, None])
    assert [chat.tools for chat in read_chats(rows, "chat", "tools")] == [[TOOL], None]


def test_what_follows_the_last_answer_is_left_out() -> None:
    assert read_chats(rows_of([*CHAT, {"role": "user", "content": "c"}]), "chat") == [Chat(CHAT)]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "hello",
            'must hold a list of messages {"role": ..., "content": ...} or {"from": ..., "value": ...}, found "h',
        ),
        ([{"content": "a"}], "must hold a list of messages"),
        (["hello"], "must hold a list of messages"),
        ([], "has no turn of the assistant: there is nothing to learn. Found []"),
        (CHAT[:2], "has no turn of the assistant"),
        ([{"role": "asistant", "content": "a"}], ', message 1: unknown role "asistant"; there are system, developer, '),
        ([{"role": "asistant", "content": "a"}], 'Did you mean "assistant"?'),
        ([{"from": "gptt", "value": "a"}], ', message 1: unknown speaker "gptt"; there are human, user, gpt'),
        ([{"from": ["human"], "value": "a"}], ', message 1: unknown speaker ["human"]; there are human, user, gpt'),
        ([{"role": ["user"], "content": "a"}], ', message 1: unknown role ["user"]; there are system, developer, '),
        (
            [{"role": "assistant", "content": "a", "tool_calls": 5}],
            ", message 1: tool_calls must be a list of calls, found 5",
        ),
        ([*CHAT[:2], {"role": "assistant", "content": None}], ", message 3: the assistant's turn is empty"),
        ([*CHAT[:2], {"role": "assistant", "content": " "}], ", message 3: the assistant's turn is empty"),
        ([{"role": "user", "content": None}], ", message 1: the message has no content"),
        (
            [{"role": "user", "content": [{"type": "image", "url": "x"}]}],
            ', message 1: content must be text, or a list of {"type": "text", "text": ...}, found {"type": "image"',
        ),
        ([{"role": "assistant", "tool_calls": [{"id": 1}]}], ', message 1: a tool call needs {"function": {"name"'),
        (
            [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "x"}]}],
            ', message 1: the arguments of f must be a mapping, or JSON of one, found "x"',
        ),
    ],
)
def test_what_is_no_chat_to_learn_from(value: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        read_chats(rows_of(CHAT, value), "chat")
    assert str(error.value).startswith('train.jsonl:2: column "chat" (data.messages)')
    assert message in str(error.value)


@pytest.mark.parametrize("weight", [0.5, 2, "0", [0]])
def test_weights_that_are_neither_0_nor_1(weight: Any) -> None:
    with pytest.raises(UserError) as error:
        read_chats(rows_of([*CHAT[:2], {**CHAT[2], "weight": weight}]), "chat")
    assert str(error.value) == (
        'train.jsonl:1: column "chat" (data.messages), message 3: the weight of a turn must be 0, which leaves it out '
        f"of the loss, or 1, found {json.dumps(weight)}"
    )


def test_a_chat_whose_turns_all_have_weight_0() -> None:
    read_chats(rows_of([*CHAT[:2], {**CHAT[2], "weight": 1}]), "chat")
    with pytest.raises(UserError) as error:
        read_chats(rows_of([*CHAT[:2], {**CHAT[2], "weight": 0}]), "chat")
    assert str(error.value) == (
        'train.jsonl:1: column "chat" (data.messages): all turns of the assistant have weight 0: there is nothing '
        "to learn"
    )


@pytest.mark.parametrize("tools", ["weather", 5, "[" * 100_000])
def test_tools_that_are_none(tools: Any) -> None:
    with pytest.raises(
        UserError, match=r'train.jsonl:1: column "tools" \(data.tools\) must hold a list of JSON schemas'
    ):
        read_chats(rows_of(CHAT, tools=[tools]), "chat", "tools")
