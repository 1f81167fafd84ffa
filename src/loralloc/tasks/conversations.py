"""Turn chats in common formats into the messages that chat templates take.

| form | example |
|---|---|
| messages | `[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]` |
| ShareGPT | `[{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]` |

The content of a message may be a list of parts of text. An assistant's message may call tools instead of saying
something, and may have a `weight`: 1, or 0 for a turn that is not learned. Null keys are removed: Arrow adds them to a
row if another row has the key.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loralloc.errors import UserError, closest
from loralloc.tasks.rows import Rows, quote

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""ShareGPT's names of roles."""


@dataclass(frozen=True)
class Chat:
    """One chat.

    Attributes:
        messages: What was said, up to the assistant's last turn.
        tools: JSON schemas of the tools that the assistant may call; None for none.
        start: The index of the first message that may be learned; earlier messages are the prompt.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    start: int = 0


def read_chats(rows: Rows, column: str, tools: str | None = None) -> list[Chat]:
    """Read a column of chats.

    Args:
        rows: The rows.
        column: Name of the column.
        tools: Name of the column with their tools; None for none.

    Returns:
        One chat per row, each ending with a turn of the assistant.

    Raises:
        UserError: No such column, or a row that is no chat or has no turn of the assistant.
    """
    offered = read_tools(rows, tools)
    chats = []
    for i, value in enumerate(rows.values(column, "data.messages")):
        where = f'{rows.place(i)}: column "{column}" (data.messages)'
        messages = read_messages(value, where)
        while messages and messages[-1]["role"] != "assistant":  # nothing is learned after the last answer
            messages.pop()
        if not messages:
            raise UserError(f"{where} has no turn of the assistant: there is nothing to learn. Found {quote(value)}")
        if not any(is_learned(message) for message in messages):
            raise UserError(f"{where}: all turns of the assistant have weight 0: there is nothing to learn")
        chats.append(Chat(messages, offered[i]))
    return chats


def read_tools(rows: Rows, column: str | None) -> Sequence[list[dict[str, Any]] | None]:
    """Read a column of tools: lists of JSON schemas, or JSON text of such a list; null or empty for none.

    Raises:
        UserError: No such column, or a value that is neither.
    """
    if column is None:
        return [None] * len(rows)
    found = []
    for i, value in enumerate(rows.column(column, "data.tools")):
        tools = _from_json(value) if isinstance(value, str) and value.strip() else value or None
        if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
            where = f'{rows.place(i)}: column "{column}" (data.tools)'
            raise UserError(f"{where} must hold a list of JSON schemas, found {quote(value)}")
        found.append([without_nulls(tool) for tool in tools] if tools else None)
    return found


def read_messages(value: Any, where: str) -> list[Message]:
    """Read one list of messages.

    Args:
        value: What a row holds.
        where: Place and column, for messages.

    Returns:
        Messages with `role`, `content` as one text, and whatever else they have.

    Raises:
        UserError: It is no list of messages, a role is unknown, a content is missing or holds more than text, or an
            assistant's message is empty, or has a weight that is neither 0 nor 1.
    """
    if not isinstance(value, list) or not all(isinstance(m, dict) and (m.get("role") or m.get("from")) for m in value):
        raise UserError(
            f'{where} must hold a list of messages {{"role": ..., "content": ...}} or {{"from": ..., "value": ...}}, '
            f"found {quote(value)}"
        )
    return [_message(without_nulls(message), f"{where}, message {n}") for n, message in enumerate(value, 1)]


def is_learned(message: Message) -> bool:
    """Whether a message is one that may be learned: the assistant's, and not of weight 0."""
    return message["role"] == "assistant" and message.get("weight", 1) != 0


def _message(message: Message, where: str) -> Message:
    if "role" not in message:
        message = _from_sharegpt(message, where)
    role, calls = message["role"], message.get("tool_calls")
    if role not in ROLES:
        raise UserError(
            f"{where}: unknown role {quote(role)}; there are {', '.join(ROLES)}.{closest(str(role), ROLES)}"
        )
    if calls and not isinstance(calls, list):
        raise UserError(f"{where}: tool_calls must be a list of calls, found {quote(calls)}")
    content = _text(message.get("content"), where)
    if role == "assistant" and not calls and not (content or "").strip():
        raise UserError(f"{where}: the assistant's turn is empty; take the row out, or write what it should say")
    if content is None and not calls:
        raise UserError(f"{where}: the message has no content")
    if role == "assistant" and message.get("weight", 1) not in (0, 1):
        raise UserError(
            f"{where}: the weight of a turn must be 0, which leaves it out of the loss, or 1, found "
            f"{quote(message['weight'])}"
        )
    read = {**message, "content": content or ""}
    if calls:
        read["tool_calls"] = [_call(call, where) for call in calls]
    return read


def _from_sharegpt(message: Message, where: str) -> Message:
    speaker = message["from"]
    if not isinstance(speaker, str) or speaker not in SHAREGPT:
        raise UserError(
            f"{where}: unknown speaker {quote(speaker)}; there are {', '.join(SHAREGPT)}."
            f"{closest(str(speaker), SHAREGPT)}"
        )
    rest = {key: value for key, value in message.items() if key not in ("from", "value")}
    return {"role": SHAREGPT[speaker], "content": message.get("value"), **rest}


def _text(content: Any, where: str) -> str | None:
    """Join a content, which may be a list of parts, into one text."""
    if content is None or isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    for part in parts:
        if not isinstance(part, dict) or part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
            raise UserError(
                f'{where}: content must be text, or a list of {{"type": "text", "text": ...}}, found {quote(part)}'
            )
    return "".join(part["text"] for part in parts)


def _call(call: Any, where: str) -> dict[str, Any]:
    """Read a call of a tool, with its arguments as a mapping: templates turn them into JSON themselves."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(
            f'{where}: a tool call needs {{"function": {{"name": ..., "arguments": ...}}}}, found {quote(call)}'
        )
    given = function.get("arguments", {})
    arguments = _from_json(given) if isinstance(given, str) else given
    if not isinstance(arguments, dict):
        raise UserError(
            f"{where}: the arguments of {function['name']} must be a mapping, or JSON of one, found {quote(given)}"
        )
    return {"type": "function", **{k: v for k, v in call.items() if k != "name" and k != "arguments"}} | {
        "function": {**function, "arguments": arguments}
    }


def without_nulls(value: Any) -> Any:
    """Remove keys that are null from mappings, at any depth.

    >>> without_nulls({"city": "Rome", "unit": None, "days": [{"n": 1, "m": None}]})
    {'city': 'Rome', 'days': [{'n': 1}]}
    """
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _from_json(text: str) -> Any:
    """Parse JSON; return the text itself if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # the latter for thousands of brackets
        return text
