"""What a model will see of an example, as text, and which of it is learned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from loralloc.methods.validation import IGNORED

Part = tuple[str, Literal["context", "learned", "rejected"]]
"""A piece of text, and what it is: context, learned, or the answer that a preference is learned against."""


def parts_of(
    tokenizer: PreTrainedTokenizerBase,
    example: Mapping[str, Any],
    targets_apart: bool = False,
    classes: Sequence[str] = (),
) -> list[Part]:
    """Turn an example as a trainer has it back into text.

    Args:
        tokenizer: The model's tokenizer.
        example: Input ids with a label each, with one label, with a 0 or 1 for each class, with a target sequence, or
            with the first and last token of an answer; or a prompt with two answers; or the ids of several choices.
        targets_apart: Whether the labels are a target sequence.
        classes: The names of the classes, in the order of the model's outputs; empty where there are none.

    Returns:
        Its pieces, in their order.
    """
    if "chosen_ids" in example:
        prompt = list(example["prompt_ids"])
        context, chosen = _pieces(tokenizer, [prompt, example["chosen_ids"]])
        _, rejected = _pieces(tokenizer, [prompt, example["rejected_ids"]])
        return [(context, "context"), (chosen, "learned"), (rejected, "rejected")]
    ids = example["input_ids"]
    labels = _answer_labels(example) if "start_positions" in example else example["labels"]
    if isinstance(ids[0], Sequence):
        choices = [_pieces(tokenizer, [choice])[0] for choice in ids]
        return [(f"{text}\n", "learned" if n == labels else "context") for n, text in enumerate(choices)]
    if classes or not isinstance(labels, Sequence):
        return [(_pieces(tokenizer, [ids])[0], "context"), (f" → {_named(labels, classes)}", "learned")]
    if targets_apart:
        source, target = (_pieces(tokenizer, [part])[0] for part in (ids, labels))
        return [(f"{source} → ", "context"), (target, "learned")]
    runs = [
        (keep, [token for token, _ in run]) for keep, run in groupby(zip(ids, labels, strict=True), key=_is_learned)
    ]
    texts = _pieces(tokenizer, [tokens for _, tokens in runs])
    return [(text, "learned" if keep else "context") for text, (keep, _) in zip(texts, runs, strict=True)]


def _named(labels: Any, classes: Sequence[str]) -> str:
    """The name of a class, the names of several, or a number."""
    if isinstance(labels, Sequence):
        return f"[{', '.join(name for name, has in zip(classes, labels, strict=True) if has)}]"
    return str(classes[labels] if classes else labels)


def _answer_labels(example: Mapping[str, Any]) -> list[int]:
    """Labels for the tokens of an answer within its text; if there is no answer, for the first token."""
    answer = range(example["start_positions"], example["end_positions"] + 1)
    return [token if place in answer else IGNORED for place, token in enumerate(example["input_ids"])]


def _is_learned(token: tuple[int, int]) -> bool:
    return token[1] != IGNORED


def _pieces(tokenizer: PreTrainedTokenizerBase, parts: Iterable[Sequence[int]]) -> list[str]:
    """Decode consecutive parts, each after those before it: alone, many tokens lose the space they begin with."""
    ids: list[int] = []
    texts = [""]
    for part in parts:
        ids += part
        texts.append(str(tokenizer.decode(ids)))
    return [text[len(before) :] for before, text in pairwise(texts)]
