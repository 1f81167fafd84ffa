"""Recognise the columns of a source, and read them as texts, pairs of a prompt and an answer, or chats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loralloc.errors import UserError
from loralloc.tasks.conversations import Chat, read_chats, read_messages, read_tools
from loralloc.tasks.rows import Rows
from loralloc.tasks.spec import LanguageModelData
from loralloc.tasks.templates import is_template, render

ALPACA = "{instruction}\n\n{input}"


@dataclass(frozen=True)
class Texts:
    """Plain texts; all tokens are learned."""

    texts: list[str]


@dataclass(frozen=True)
class Pairs:
    """Prompts, and answers that are learned."""

    prompts: list[str]
    completions: list[str]

    def chats(self) -> list[Chat]:
        """The same as chats of two turns."""
        pairs = zip(self.prompts, self.completions, strict=True)
        return [Chat(turn("user", prompt) + turn("assistant", answer), start=1) for prompt, answer in pairs]


@dataclass(frozen=True)
class Chats:
    """Chats; the assistant's turns are learned."""

    chats: list[Chat]


Form = Texts | Pairs | Chats


def turn(role: str, content: str) -> list[dict[str, Any]]:
    """A chat of one message."""
    return [{"role": role, "content": content}]


def read_form(rows: Rows, data: LanguageModelData) -> Form:
    """Read what a language model learns from.

    Args:
        rows: The rows.
        data: The recipe's data section. Where it names no column, common names are looked for: messages,
            conversations (ShareGPT), prompt and completion, instruction, input and output (Alpaca), text.

    Raises:
        UserError: No such column, no column with a common name, or a row that cannot be read.
    """
    named = {key: getattr(data, key) for key in ("text", "prompt", "completion", "messages")}
    if not any(named.values()):
        named |= _recognised(rows)
    if named["messages"]:
        return Chats(read_chats(rows, named["messages"], _tools_column(rows, data.tools)))
    form = _read_pairs(rows, named["prompt"], named["completion"], data.tools) if named["prompt"] else None
    if data.tools and not isinstance(form, Chats):
        raise UserError("data.tools is for chats, and these rows are texts; take it out")
    if form is not None:
        return form
    text: str = named["text"]
    return Texts(render(rows, text, "data.text") if is_template(text) else rows.strings(text, "data.text", blank=True))


def _recognised(rows: Rows) -> dict[str, str]:
    """The keys of a recipe that fit common names among the columns."""
    has = set(rows.columns).issuperset
    for name in ("messages", "conversations"):
        if has({name}):
            return {"messages": name}
    if has({"prompt", "completion"}):
        return {"prompt": "prompt", "completion": "completion"}
    if has({"instruction", "output"}):
        return {"prompt": ALPACA if has({"input"}) else "instruction", "completion": "output"}
    if has({"text"}):
        return {"text": "text"}
    raise UserError(
        f"{rows.source}: what to learn is not known. Its columns are {', '.join(rows.columns) or 'without names'}; "
        "name data.text, data.prompt with data.completion (a column each, or a template such as "
        '"{question}\\n{options}"), or data.messages.'
    )


def _tools_column(rows: Rows, named: str | None) -> str | None:
    return named or ("tools" if "tools" in rows.columns else None)


def _read_pairs(rows: Rows, prompt: str, completion: str, tools: str | None) -> Pairs | Chats:
    if _holds_chats(rows, prompt):
        prompts, answers = _messages(rows, prompt, "data.prompt"), _messages(rows, completion, "data.completion")
        offered = read_tools(rows, _tools_column(rows, tools))
        for i, after in enumerate(answers):
            if not any(message["role"] == "assistant" for message in after):
                raise UserError(
                    f'{rows.place(i)}: column "{completion}" (data.completion) has no turn of the assistant'
                )
        joined = zip(prompts, answers, offered, strict=True)
        return Chats([Chat(before + after, given, start=len(before)) for before, after, given in joined])
    return Pairs(read_texts(rows, prompt, "data.prompt"), read_texts(rows, completion, "data.completion"))


def _holds_chats(rows: Rows, column: str) -> bool:
    values = [] if is_template(column) else rows.values(column, "data.prompt")
    return bool(values) and isinstance(values[0], list)


def _messages(rows: Rows, column: str, key: str) -> list[list[dict[str, Any]]]:
    """Read a column of chats; a text counts as one message of the assistant."""
    values = rows.values(column, key)
    where = [f'{rows.place(i)}: column "{column}" ({key})' for i in range(len(rows))]
    return [
        read_messages(turn("assistant", value) if isinstance(value, str) else value, place)
        for value, place in zip(values, where, strict=True)
    ]


def read_texts(rows: Rows, words: str, key: str) -> list[str]:
    """Read a column of texts, or fill a template.

    Raises:
        UserError: No such column, or a text that is missing or blank.
    """
    return render(rows, words, key) if is_template(words) else rows.strings(words, key)
