"""Promises: the assistant's words are learned and nothing else, with every kind of template."""

from __future__ import annotations

import re
from typing import Any

import pytest
from datasets import Dataset
from tiny_models import build_tokenizer
from transformers import PreTrainedTokenizerFast

from loralloc.errors import UserError
from loralloc.tasks.chat import check_template, read_chats, tokenize_chats
from loralloc.tasks.rows import Rows

PLAIN = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ m['role'] }} : {% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }} </s> {% endgeneration %}"
    "{% else %}{{ m['content'] }} </s> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
FORGETFUL = "{% for m in messages %}{% if loop.last %}{{ m['role'] }} : {{ m['content'] }}{% endif %}{% endfor %}"
STRICT = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('Chats begin with the user') }}{% endif %}" + PLAIN

CHAT = [
    {"role": "user", "content": "a b"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "no no"},
]


def rows_of(chats: list[Any]) -> Rows:
    return Rows("train.jsonl", ("chat",), [{"chat": chat} for chat in chats], range(1, len(chats) + 1))


def tokenizer_of(template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = build_tokenizer("<s> $A", None, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


def learned(template: str, chat: list[dict[str, str]]) -> tuple[list[str], list[str]]:
    """All tokens of a chat, and those that are learned."""
    tokenizer = tokenizer_of(template)
    [(ids, learn)] = tokenize_chats(tokenizer, [chat], rows_of([chat]))
    tokens = tokenizer.convert_ids_to_tokens(ids)
    return tokens, [token for token, keep in zip(tokens, learn, strict=True) if keep]


def test_the_last_turn_is_learned_without_marks() -> None:
    tokens, kept = learned(PLAIN, CHAT)
    assert " ".join(tokens) == "user : a b </s> assistant : yes </s> user : c </s> assistant : no no </s>"
    assert kept == ["no", "no", "</s>"]


def test_all_turns_are_learned_with_marks() -> None:
    tokens, kept = learned(MARKED, CHAT)
    assert tokens == learned(PLAIN, CHAT)[0]
    assert kept == ["yes", "</s>", "no", "no", "</s>"]


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    message = r"train.jsonl:1: the chat template refuses this chat \(it renders earlier messages differently once .*"
    with pytest.raises(UserError, match=message + re.escape("mark the assistant's turns in it with {% generation %}")):
        learned(FORGETFUL, CHAT)


def test_what_the_template_refuses_is_reported_with_its_reason() -> None:
    message = r"train.jsonl:1: the chat template refuses this chat \(Chats begin with the user\)"
    with pytest.raises(UserError, match=message):
        learned(STRICT, CHAT[1:])


def test_chats_are_read_from_lists_and_from_arrow() -> None:
    # Arrow gives the first message the key of the second.
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": "x"}]
    table = Dataset.from_list([{"chat": chat}])
    for rows in (rows_of([chat]), Rows("train.parquet", ("chat",), table, [1], unit="row")):
        assert read_chats(rows, "chat") == [chat]


@pytest.mark.parametrize("value", ["hello", [{"content": "a"}], ["hello"], {"role": "user", "content": "a"}])
def test_values_that_are_no_chat(value: Any) -> None:
    message = r'train.jsonl:2: column "chat" \(data.messages\) must hold a list of messages {"role": ..., "content"'
    with pytest.raises(UserError, match=message):
        read_chats(rows_of([CHAT, value]), "chat")


@pytest.mark.parametrize("chat", [[], CHAT[:1], CHAT[:3]])
def test_chats_without_an_answer(chat: Any) -> None:
    with pytest.raises(UserError, match=r"train.jsonl:2: the last message must be the assistant's"):
        read_chats(rows_of([CHAT, chat]), "chat")


def test_a_tokenizer_without_a_template() -> None:
    with pytest.raises(UserError, match=r'model "tiny" has no chat template. .* use data.prompt and data.completion'):
        check_template(tokenizer_of(None), "tiny")
    check_template(tokenizer_of(PLAIN), "tiny")


def test_a_slow_tokenizer() -> None:
    class Slow(PreTrainedTokenizerFast):
        is_fast = False

    slow = Slow(tokenizer_object=tokenizer_of(None).backend_tokenizer)
    slow.chat_template = PLAIN
    with pytest.raises(UserError, match=r'Chats need a fast tokenizer; model "tiny" has a Slow'):
        check_template(slow, "tiny")
