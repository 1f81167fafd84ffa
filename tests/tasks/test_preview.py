"""Promises: what is shown of an example is its text, whole, with what is learned told apart."""

from __future__ import annotations

from typing import Any

from tiny_models import build_tokenizer

from loralloc.methods.validation import IGNORED
from loralloc.tasks.preview import parts_of

TOKENIZER = build_tokenizer("$A", None, unk_token="<unk>", eos_token="</s>")


def ids_of(text: str) -> list[int]:
    return TOKENIZER(text)["input_ids"]


def test_runs_of_learned_tokens() -> None:
    ids = ids_of("a b yes c no no")
    labels = [IGNORED, IGNORED, ids[2], IGNORED, *ids[4:]]
    parts = parts_of(TOKENIZER, {"input_ids": ids, "labels": labels})
    assert parts == [("a b", "context"), (" yes", "learned"), (" c", "context"), (" no no", "learned")]


def test_one_label_for_all() -> None:
    assert parts_of(TOKENIZER, {"input_ids": ids_of("a b"), "labels": 3}) == [("a b", "context"), (" → 3", "learned")]


def test_classes_by_name() -> None:
    def learned(labels: Any, classes: list[str]) -> str:
        context, (text, kind) = parts_of(TOKENIZER, {"input_ids": ids_of("a b"), "labels": labels}, False, classes)
        assert (context, kind) == (("a b", "context"), "learned")
        return text

    assert learned(1, ["no", "yes"]) == " → yes"
    assert learned([1.0, 0.0, 1.0], ["bad", "film", "good"]) == " → [bad, good]"
    assert learned([0.0, 1.0], ["bad", "good"]) == " → [good]"  # as many classes as tokens
    assert learned([0.0, 0.0, 0.0], ["bad", "film", "good"]) == " → []"


def test_two_answers() -> None:
    example = {"prompt_ids": ids_of("a b"), "chosen_ids": ids_of("yes"), "rejected_ids": ids_of("no")}
    assert parts_of(TOKENIZER, example) == [("a b", "context"), (" yes", "learned"), (" no", "rejected")]


def test_tags_are_beside_their_words() -> None:
    ids = ids_of("a b yes")  # the number of a tag may be that of another token
    parts = parts_of(TOKENIZER, {"input_ids": ids, "labels": [ids[1], IGNORED, 0]})
    assert parts == [("a", "learned"), (" b", "context"), (" yes", "learned")]


def test_choices() -> None:
    example = {"input_ids": [ids_of("a yes"), ids_of("a no")], "labels": 1}
    assert parts_of(TOKENIZER, example) == [("a yes\n", "context"), ("a no\n", "learned")]
