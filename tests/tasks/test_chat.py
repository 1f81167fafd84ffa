"""Promises: the assistant's words are learned and nothing else, with every kind of template."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import trl
from tiny_models import build_tokenizer
from transformers import PreTrainedTokenizerFast

from loralloc.errors import UserError
from loralloc.tasks.chat import check_template, tokenize_chats
from loralloc.tasks.conversations import Chat
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


def learned(template: str, chat: list[dict[str, Any]], learn: Any = "all", **given: Any) -> tuple[list[str], list[str]]:
    """All tokens of a chat, and those that are learned."""
    tokenizer = tokenizer_of(template)
    [(ids, keep)] = tokenize_chats(tokenizer, [Chat(chat, **given)], rows_of([chat]), learn)
    tokens = tokenizer.convert_ids_to_tokens(ids)
    return tokens, [token for token, kept in zip(tokens, keep, strict=True) if kept]


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["plain", "marked"])
class TestWhatIsLearned:
    def test_every_turn_of_the_assistant(self, template: str) -> None:
        tokens, kept = learned(template, CHAT)
        assert " ".join(tokens) == "user : a b </s> assistant : yes </s> user : c </s> assistant : no no </s>"
        assert kept == ["yes", "</s>", "no", "no", "</s>"]

    def test_the_last_turn(self, template: str) -> None:
        assert learned(template, CHAT, "last")[1] == ["no", "no", "</s>"]

    def test_but_turns_of_weight_0(self, template: str) -> None:
        first, last = ([{**m, "weight": 0} if n == left else m for n, m in enumerate(CHAT)] for left in (1, 3))
        assert learned(template, first)[1] == ["no", "no", "</s>"]
        assert learned(template, last)[1] == ["yes", "</s>"]
        assert learned(template, last, "last")[1] == []
        assert learned(template, [{**m, "weight": 1} for m in CHAT])[1] == ["yes", "</s>", "no", "no", "</s>"]

    def test_only_what_follows_the_prompt(self, template: str) -> None:
        assert learned(template, CHAT, start=2)[1] == ["no", "no", "</s>"]


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    message = (
        r"train.jsonl:1: the chat template refuses this chat \(it renders what comes before message 2 differently "
    )
    cure = "mark the assistant's turns in it with {% generation %}, or set data.learn: last"
    with pytest.raises(UserError, match=message + "once the answer is there; " + re.escape(cure)):
        learned(FORGETFUL, CHAT)
    with pytest.raises(UserError, match=r"message 4 differently once the answer is there; mark the .* %}\)"):
        learned(FORGETFUL, CHAT, "last")


def test_a_template_that_writes_a_turn_differently_once_more_follows() -> None:
    template = PLAIN.replace("</s>", "{% if loop.last or m.role == 'user' %}</s>{% else %}good{% endif %}")
    with pytest.raises(
        UserError, match=r"\(it renders message 2 differently once more follows; mark .*, or set data.learn: last\)"
    ):
        learned(template, CHAT)
    assert learned(template, CHAT, "last")[1] == ["no", "no", "</s>"]


def test_trls_copies_mark_the_templates_of_common_models() -> None:
    """Qwen 3 leaves the thoughts of earlier turns out, so that no part of a chat begins as the whole does."""
    (folder,) = [Path(part) for part in trl.__path__]
    template = (folder / "chat_templates" / "qwen3.jinja").read_text(encoding="utf-8")
    kept = learned(template, CHAT)[1]
    assert [kept.count(word) for word in ("yes", "no")] == [1, 2]
    assert not {"user", "a", "b", "c"} & set(kept)


def test_what_the_template_refuses_is_reported_with_its_reason() -> None:
    message = r"train.jsonl:1: the chat template refuses this chat \(Chats begin with the user\)"
    with pytest.raises(UserError, match=message):
        learned(STRICT, CHAT[1:])


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["plain", "marked"])
def test_what_opens_a_chat_answers_nothing(template: str) -> None:
    assert learned(template, [CHAT[1], *CHAT])[1] == ["yes", "</s>", "no", "no", "</s>"]
    assert learned(template, CHAT, start=4)[1] == []


def test_a_template_that_marks_some_turns() -> None:
    template = MARKED.replace("m['role'] == 'assistant'", "m['role'] == 'assistant' and loop.last")
    with pytest.raises(UserError, match=r"it marks 1 of the assistant's 2 turns"):
        learned(template, CHAT)


def test_a_system_prompt_that_the_template_leaves_out() -> None:
    chat = [{"role": "system", "content": "good"}, *CHAT[:2]]
    assert "good" in learned(PLAIN, chat)[0]
    template = PLAIN.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")
    with pytest.raises(UserError, match=r"train.jsonl:1: the chat template of this model leaves out system prompts"):
        learned(template, chat)
    assert learned(template, CHAT)[1] == learned(PLAIN, CHAT)[1]


def test_a_system_prompt_whose_words_stand_elsewhere_too() -> None:
    template = PLAIN.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")
    with pytest.raises(UserError, match=r"train.jsonl:1: the chat template of this model leaves out system prompts"):
        learned(template, [{"role": "system", "content": "a"}, *CHAT])


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["plain", "marked"])
@pytest.mark.parametrize("role", ["system", "tool", "user"])
def test_a_later_turn_that_the_template_leaves_out(template: str, role: str) -> None:
    chat = [{"role": "system", "content": "c"}, *CHAT[:2], {"role": role, "content": "yes"}, CHAT[3]]
    assert learned(template, chat)[1] == ["yes", "</s>", "no", "no", "</s>"]
    said = f"{{% for m in messages if m['role'] != '{role}' or m['content'] in ['c', 'a b'] %}}"
    with pytest.raises(UserError) as error:
        learned(template.replace("{% for m in messages %}", said), chat)
    assert str(error.value) == (
        f"train.jsonl:1: the chat template of this model leaves out message 4, of role {role}, so the model would "
        "never see it; take such messages out, or use a model that has them"
    )


TOOL = {"type": "function", "function": {"name": "yes", "parameters": {"type": "object", "properties": {}}}}
CALLING = [
    CHAT[0],
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "yes", "arguments": {}}}]},
]
WITH_TOOLS = (
    "{% if tools %}{% for t in tools %}{{ t.function.name }} {% endfor %}{% endif %}"
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }}"
    "{% for call in m.tool_calls or [] %} {{ call.function.name }}{% endfor %} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


def test_tools_reach_the_model() -> None:
    tokens, kept = learned(WITH_TOOLS, CALLING, tools=[TOOL])
    assert (tokens[0], kept) == ("yes", ["yes", "</s>"])


def test_tools_that_the_template_ignores() -> None:
    message = r"train.jsonl:1: the chat template of this model ignores tools, .*; take the column out \(data.tools\)"
    with pytest.raises(UserError, match=message):
        learned(PLAIN, CHAT, tools=[TOOL])
    with pytest.raises(
        UserError, match=r"train.jsonl:1: the chat template of this model leaves out calls of tools, such as"
    ):
        learned(PLAIN, CALLING)
    named_elsewhere = [{"role": "user", "content": "yes"}, CALLING[1]]
    with pytest.raises(UserError, match=r"leaves out calls of tools, such as yes; use a model that calls tools"):
        learned(PLAIN, named_elsewhere)


def test_a_tokenizer_without_a_template() -> None:
    with pytest.raises(
        UserError,
        match=r'model "tiny" has no chat template. .* use data.prompt and data.completion with data.chat: false',
    ):
        check_template(tokenizer_of(None), "tiny")
    check_template(tokenizer_of(PLAIN), "tiny")


def test_a_slow_tokenizer() -> None:
    class Slow(PreTrainedTokenizerFast):
        is_fast = False

    slow = Slow(tokenizer_object=tokenizer_of(None).backend_tokenizer)
    slow.chat_template = PLAIN
    with pytest.raises(UserError, match=r'Chats need a fast tokenizer; model "tiny" has a Slow'):
        check_template(slow, "tiny")
