"""Chat messages to tokens, through the tokenizer's own template."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from loralloc.errors import UserError
from loralloc.tasks.rows import Rows, quote

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""The mark of a template that says itself which of its text the assistant writes."""

Message = dict[str, Any]
Tokens = tuple[list[int], list[bool]]
"""Ids, and for each whether to learn it."""


def read_chats(rows: Rows, column: str) -> list[list[Message]]:
    """Read a column of chats that end with a turn of the assistant.

    Args:
        rows: The rows.
        column: Name of the column: lists of messages with `role` and `content`.

    Returns:
        One chat per row.

    Raises:
        UserError: No such column, or a row that is not such a chat.
    """
    chats = []
    for i, value in enumerate(rows.values(column, "data.messages")):
        if not isinstance(value, list) or not all(isinstance(m, dict) and m.get("role") for m in value):
            raise UserError(
                f'{rows.place(i)}: column "{column}" (data.messages) must hold a list of messages '
                f'{{"role": ..., "content": ...}}, found {quote(value)}'
            )
        if not value or value[-1]["role"] != "assistant":
            raise UserError(
                f"{rows.place(i)}: the last message must be the assistant's: there is nothing else to learn. "
                f"Found {quote(value)}"
            )
        # Arrow gives every message the keys of all messages, with None for those it did not have.
        chats.append([{k: v for k, v in message.items() if v is not None} for message in value])
    return chats


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
            "chat_template.jinja to the model's folder, or use data.prompt and data.completion."
        )
    if not tokenizer.is_fast:
        raise UserError(f'Chats need a fast tokenizer; model "{name}" has a {type(tokenizer).__name__}.')


def tokenize_chats(tokenizer: PreTrainedTokenizerBase, chats: Sequence[list[Message]], rows: Rows) -> Iterator[Tokens]:
    """Render and tokenize chats.

    The assistant's turns are learned: all of them where the template marks them with `{% generation %}`,
    otherwise the last one, which is what follows the prompt rendered from the messages before it.

    Args:
        tokenizer: A tokenizer that passed `check_template`.
        chats: What `read_chats` gave for `rows`.
        rows: Where the chats came from, for messages.

    Yields:
        The tokens of each chat.

    Raises:
        UserError: The template refuses a chat, or its text gives no way to find the last turn.
    """
    template = tokenizer.get_chat_template()
    find = _all_turns if GENERATION.search(template) else _last_turn
    for i, chat in enumerate(chats):
        try:
            text, turns = find(tokenizer, template, chat)
        except (TemplateError, _PrefixError) as error:
            raise UserError(f"{rows.place(i)}: the chat template refuses this chat ({error}).") from error
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        # A token may straddle the place where a turn begins: it belongs to the turn, which needs it.
        learn = [any(begin < end and start < stop for begin, stop in turns) for start, end in encoded["offset_mapping"]]
        yield encoded["input_ids"], learn


Turns = list[tuple[int, int]]
"""Where the turns to learn begin and end in a text."""


class _PrefixError(Exception):
    """The prompt is not the beginning of the whole chat."""


def _all_turns(tokenizer: PreTrainedTokenizerBase, template: str, chat: list[Message]) -> tuple[str, Turns]:
    # Not the mask of `apply_chat_template`: where a turn ends with white space that no token holds, it learns all
    # that follows, the user's turns too.
    special: dict[str, Any] = {**tokenizer.special_tokens_map}
    rendered: Any = render_jinja_template([chat], chat_template=template, return_assistant_tokens_mask=True, **special)
    texts, turns = rendered
    return texts[0], turns[0]


def _last_turn(tokenizer: PreTrainedTokenizerBase, template: str, chat: list[Message]) -> tuple[str, Turns]:
    whole: Any = tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False)
    prompt: Any = tokenizer.apply_chat_template(
        chat[:-1], chat_template=template, tokenize=False, add_generation_prompt=True
    )
    if not whole.startswith(prompt):
        raise _PrefixError(
            "it renders earlier messages differently once the answer is there; "
            "mark the assistant's turns in it with {% generation %}"
        )
    return whole, [(len(prompt), len(whole))]
