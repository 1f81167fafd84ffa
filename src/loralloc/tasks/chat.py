"""Render chats with the tokenizer's own template, tokenize them, and mark the tokens that the assistant writes.

A template may mark the assistant's turns with `{% generation %}`; of the templates of common models, TRL has copies
that do. With any other template, the messages before a turn are rendered alone: if the whole chat begins with that
text, the turn begins behind it. Otherwise the template is refused, with the turn.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template
from trl.chat_template_utils import get_training_chat_template

from loralloc.errors import UserError
from loralloc.tasks.conversations import Chat, Message, is_learned
from loralloc.tasks.rows import Rows

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""The mark in a template before text that the assistant writes."""

MARK = "x"
"""What is added to a text to see whether a template renders it."""
OPENING = "opening"
"""The kind of a system prompt at the beginning; other turns are of the kind of their role."""

Tokens = tuple[list[int], list[bool]]
"""Ids, and for each whether to learn it."""
Turns = list[tuple[int, int]]
"""Where the assistant's turns begin and end in a text."""


def check_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse a tokenizer that cannot render chats.

    Args:
        tokenizer: The tokenizer.
        name: Name of its model.

    Raises:
        UserError: It has no chat template, or does not know where its tokens stand in the text.
    """
    if tokenizer.chat_template is None:
        raise UserError(
            f'The tokenizer of model "{name}" has no chat template. Name an instruction-tuned model, add a '
            "chat_template.jinja to the model's folder, or use data.prompt and data.completion with data.chat: false."
        )
    if not tokenizer.is_fast:
        raise UserError(f'Chats need a fast tokenizer; model "{name}" has a {type(tokenizer).__name__}.')


def as_chats(tokenizer: PreTrainedTokenizerBase, chat: bool | None) -> bool:
    """Whether prompts and answers become turns of a chat, by a recipe's `data.chat`."""
    return tokenizer.chat_template is not None if chat is None else chat


def tokenize_chats(
    tokenizer: PreTrainedTokenizerBase, chats: Sequence[Chat], rows: Rows, learn: Literal["all", "last"] = "all"
) -> Iterator[Tokens]:
    """Render and tokenize chats.

    Args:
        tokenizer: A tokenizer that passed `check_template`.
        chats: The chats of `rows`.
        rows: Where they came from, for messages.
        learn: Which of the assistant's turns are learned: all after the prompt of a chat, or only the last; but none of
            weight 0.

    Yields:
        The tokens of each chat.

    Raises:
        UserError: The template refuses a chat, leaves out tools or turns, or its text gives no way to find the turns.
    """
    render, turns_of = _renderer(tokenizer, next((chat.tools for chat in chats if chat.tools), None))
    checked: set[str] = set()
    for i, chat in enumerate(chats):
        turns = [n for n, message in enumerate(chat.messages) if message["role"] == "assistant"]
        answers = [n for n in turns if n >= max(chat.start, 1)]  # the first message is no answer
        try:
            asked = answers[-1:] if learn == "last" else answers
            text, places = turns_of(chat, [n for n in asked if is_learned(chat.messages[n])])
            _check_tools(render, chat, rows.place(i), checked)
            _check_turns(render, chat, rows.place(i), checked)
        except (TemplateError, _PrefixError) as error:
            raise UserError(f"{rows.place(i)}: the chat template refuses this chat ({error}).") from error
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        # A token may straddle the place where a turn begins: it belongs to the turn, which needs it.
        keep = [any(begin < end and start < stop for begin, stop in places) for start, end in encoded["offset_mapping"]]
        yield encoded["input_ids"], keep


Render = Callable[..., str]


class _PrefixError(Exception):
    """The assistant's turns cannot be located in the rendered chat."""


def _renderer(
    tokenizer: PreTrainedTokenizerBase, tools: list[dict[str, Any]] | None
) -> tuple[Render, Callable[[Chat, list[int]], tuple[str, Turns]]]:
    """Return a function that renders messages, and one that renders a chat and locates given answers in the text."""
    template = _marked_template(tokenizer) or tokenizer.get_chat_template(tools=tools)
    special: dict[str, Any] = {**tokenizer.special_tokens_map}

    def render(messages: Sequence[Any], tools: Any = None, *, answering: bool = False) -> str:
        text: Any = tokenizer.apply_chat_template(
            list(messages), tools=tools, chat_template=template, tokenize=False, add_generation_prompt=answering
        )
        return text

    def marked(chat: Chat, answers: list[int]) -> tuple[str, Turns]:
        # The mask of `apply_chat_template` is not used: if a turn ends with white space that no token holds, it marks
        # everything after the turn as the assistant's, including the user's turns.
        tools: Any = chat.tools
        rendered: Any = render_jinja_template(
            [chat.messages], tools=tools, chat_template=template, return_assistant_tokens_mask=True, **special
        )
        texts, marked_turns = rendered
        turns = [n for n, message in enumerate(chat.messages) if message["role"] == "assistant"]
        if len(marked_turns[0]) != len(turns):
            raise _PrefixError(f"it marks {len(marked_turns[0])} of the assistant's {len(turns)} turns")
        return texts[0], [place for n, place in zip(turns, marked_turns[0], strict=True) if n in answers]

    def unmarked(chat: Chat, answers: list[int]) -> tuple[str, Turns]:
        whole = render(chat.messages, chat.tools)
        return whole, [_turn(render, chat, whole, index) for index in answers]

    return render, marked if GENERATION.search(template) else unmarked


def _marked_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """TRL's copy of the tokenizer's template with marks; None if TRL has none, or the template has marks already."""
    try:
        return get_training_chat_template(tokenizer)
    except (ValueError, TemplateError):
        return None


def _turn(render: Render, chat: Chat, whole: str, index: int) -> tuple[int, int]:
    """Where a turn of the assistant begins and ends in the text of the whole chat."""
    before = render(chat.messages[:index], chat.tools, answering=True)
    if not whole.startswith(before):
        earlier = index < len(chat.messages) - 1
        raise _PrefixError(
            f"it renders what comes before message {index + 1} differently once the answer is there; mark the "
            f"assistant's turns in it with {{% generation %}}{', or set data.learn: last' if earlier else ''}"
        )
    through = render(chat.messages[: index + 1], chat.tools).rstrip()
    if not whole.startswith(through):
        raise _PrefixError(
            f"it renders message {index + 1} differently once more follows; mark the assistant's turns in it with "
            "{% generation %}, or set data.learn: last"
        )
    return len(before), len(through)


def check_turns(tokenizer: PreTrainedTokenizerBase, messages: list[Message], place: str, checked: set[str]) -> None:
    """Refuse a chat of which the tokenizer's own template leaves out a turn; see `_check_turns`.

    Raises:
        UserError: A turn is left out, or the template refuses the chat.
    """

    def render(messages: Sequence[Any], tools: Any = None) -> str:
        text: Any = tokenizer.apply_chat_template(list(messages), tools=tools, tokenize=False)
        return text

    try:
        _check_turns(render, Chat(messages), place, checked)
    except TemplateError as error:
        raise UserError(f"{place}: the chat template refuses a chat ({error}).") from error


def _check_turns(render: Render, chat: Chat, place: str, checked: set[str]) -> None:
    """Refuse turns, but the assistant's, that the template leaves out.

    What a turn says may stand elsewhere in the chat too: a turn is left out if the text stays as it is when the turn
    says something else.

    Args:
        render: Renders messages.
        chat: The chat.
        place: Where it is, for messages.
        checked: The kinds of turns that earlier chats had, which are not checked again; those of this chat are added.

    Raises:
        UserError: A turn is left out.
    """
    kinds = [_kind(message, n) for n, message in enumerate(chat.messages)]
    due = [n for n, kind in enumerate(kinds) if kind and kind not in checked]
    if not due:
        return
    checked.update(kinds)
    whole = render(chat.messages, chat.tools)
    for n in due:
        message = chat.messages[n]
        if render(_with(chat, n, {**message, "content": message["content"] + MARK}), chat.tools) != whole:
            continue
        if kinds[n] == OPENING:
            raise UserError(
                f"{place}: the chat template of this model leaves out system prompts, so the model would never see "
                "them; put what they say into the first question, or use a model that has them"
            )
        raise UserError(
            f"{place}: the chat template of this model leaves out message {n + 1}, of role {message['role']}, so the "
            "model would never see it; take such messages out, or use a model that has them"
        )


def _kind(message: Message, n: int) -> str:
    """The kind of a turn that the model is to read; empty for a turn that says nothing, or is the assistant's."""
    role = message["role"]
    if role == "assistant" or not message["content"].strip():
        return ""
    return OPENING if n == 0 and role in ("system", "developer") else role


def _with(chat: Chat, n: int, message: Message) -> list[Message]:
    """The messages of a chat, with another one at a place."""
    return [*chat.messages[:n], message, *chat.messages[n + 1 :]]


def _check_tools(render: Render, chat: Chat, place: str, checked: set[str]) -> None:
    """Refuse tools, or calls of them, that the template leaves out; only the first chat with any is checked."""
    if chat.tools and "tools" not in checked:
        checked.add("tools")
        if render(chat.messages) == render(chat.messages, chat.tools):
            raise UserError(
                f"{place}: the chat template of this model ignores tools, so the model would never see them; take the "
                "column out (data.tools), or use a model that calls tools"
            )
    places = [(n, c) for n, message in enumerate(chat.messages) for c in range(len(message.get("tool_calls", ())))]
    if places and "calls" not in checked:
        checked.add("calls")
        whole = render(chat.messages, chat.tools)
        for n, c in places:
            calls = list(chat.messages[n]["tool_calls"])
            name = calls[c]["function"]["name"]
            calls[c] = {**calls[c], "function": {**calls[c]["function"], "name": name + MARK}}
            if render(_with(chat, n, {**chat.messages[n], "tool_calls": calls}), chat.tools) == whole:
                raise UserError(
                    f"{place}: the chat template of this model leaves out calls of tools, such as {name}; use a model "
                    "that calls tools"
                )
