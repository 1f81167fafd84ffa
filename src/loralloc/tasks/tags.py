"""Tags of words: how they write spans of words, and what is wrong with them. Standard library only.

| scheme | a span of three words, and one of a single word right behind it |
|---|---|
| `bio` | B-X I-X I-X B-X |
| `iob1` | I-X I-X I-X B-X: B- only where a span of the same type ends right before |
| `bilou` | B-X I-X L-X U-X; the letters E for L and S for U are the same scheme (BIOES) |
| `plain` | every tag stands alone: no spans |
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

Scheme = Literal["bio", "iob1", "bilou", "plain"]

OUTSIDE = "O"
_OF_SPANS = re.compile(r"([BIELSU])-(.+)", re.S)
_LETTERS = {"bio": "BI", "iob1": "BI", "bilou": "BIELSU"}


class Span(NamedTuple):
    """Words that belong together.

    Attributes:
        start: The index of the first word.
        end: The index after the last word.
        label: The type of the span.
    """

    start: int
    end: int
    label: str


def parted(tag: str) -> tuple[str, str]:
    """Split a tag into its letter and its type; the type is empty for a tag that belongs to no span.

    >>> parted("B-Gene"), parted("O"), parted("NN")
    (('B', 'Gene'), ('O', ''), ('NN', ''))
    """
    found = _OF_SPANS.fullmatch(tag)
    return (found[1], found[2]) if found else (tag, "")


def recognise(tags: Collection[str]) -> Scheme | None:
    """Find the scheme of some distinct tags; None if they are of several schemes.

    >>> recognise({"O", "B-X", "I-X"}), recognise({"O", "I-X"}), recognise({"NN", "O"}), recognise({"B-X", "NN"})
    ('bio', 'iob1', 'plain', None)
    """
    letters = {letter for letter, label in map(parted, tags) if label}
    if not letters:
        return "plain"
    others = {tag for tag in tags if not parted(tag)[1]} - {OUTSIDE}
    if others or (letters & set("ES") and letters & set("LU")):
        return None
    return "bilou" if letters & set("ELSU") else "bio" if "B" in letters else "iob1"


def tag_set(tags: Collection[str], scheme: Scheme) -> list[str]:
    """List all tags of a scheme for the types in some distinct tags: O first, then type by type.

    >>> tag_set({"O", "B-X", "B-Y", "I-Y"}, "bio")
    ['O', 'B-X', 'I-X', 'B-Y', 'I-Y']
    """
    assert scheme != "plain"
    pairs = [parted(tag) for tag in tags]
    written_so = any(letter in "ES" and label for letter, label in pairs)
    letters = "BI" if scheme != "bilou" else "BIES" if written_so else "BILU"
    return [
        OUTSIDE,
        *(f"{letter}-{label}" for label in sorted({label for _, label in pairs} - {""}) for letter in letters),
    ]


def fault_of(tags: Sequence[str], scheme: Scheme) -> tuple[int, str] | None:
    """Find the first tag of a sentence that its scheme does not allow.

    Args:
        tags: One tag a word.
        scheme: The scheme.

    Returns:
        The index of the tag, and what is wrong with it and what to do; None if all tags are allowed.
    """
    if scheme == "plain":
        return None
    known = _LETTERS[scheme]
    for place, tag in enumerate(tags):
        letter, label = parted(tag)
        if tag != OUTSIDE and (not label or letter not in known):
            letters = ", ".join(f"{letter}-" for letter in known)
            return place, f"which is no tag of scheme {scheme} (O, and types behind {letters}); see data.scheme"
    return {"bio": _broken_bio, "bilou": _broken_bilou}.get(scheme, lambda tags: None)(tags)


def _broken_bio(tags: Sequence[str]) -> tuple[int, str] | None:
    before = ""
    for place, (letter, label) in enumerate(map(parted, tags)):
        if letter == "I" and label != before:
            return place, (
                f"but the word before it is not in a {label}: begin spans with B-{label}, or set data.scheme: iob1 "
                "where spans begin with I-"
            )
        before = label
    return None


def _broken_bilou(tags: Sequence[str]) -> tuple[int, str] | None:
    inside = ""
    for place, (letter, label) in enumerate(map(parted, tags)):
        goes_on = letter in "IEL"
        if goes_on and label != inside:
            return place, f"but no span of {label} has begun: begin it with B-{label}"
        if inside and not goes_on:
            return place, f"but the span of {inside} before it has no end: end it with L-{inside} or E-{inside}"
        inside = label if letter in "BI" else ""
    return (len(tags) - 1, f"but the sentence ends there: end the span of {inside} with L- or E-") if inside else None


def to_bio(tags: Sequence[str]) -> list[str]:
    """Turn tags of scheme iob1 into BIO.

    >>> to_bio(["I-X", "I-X", "B-X", "I-Y"])
    ['B-X', 'I-X', 'B-X', 'B-Y']
    """
    return from_spans(spans_of(tags), len(tags))


def from_spans(spans: Collection[Span], count: int) -> list[str]:
    """Write the spans of a sentence of `count` words as BIO tags.

    >>> from_spans([Span(1, 3, "X")], 4)
    ['O', 'B-X', 'I-X', 'O']
    """
    tags = [OUTSIDE] * count
    for start, end, label in spans:
        tags[start:end] = [f"B-{label}", *[f"I-{label}"] * (end - start - 1)]
    return tags


def spans_of(tags: Sequence[str]) -> list[Span]:
    """Return the spans of tags of any scheme but plain, also of predicted tags that break the scheme's rules.

    A span goes on while the type stays the same, no letter begins another span, and none has ended this one; CoNLL's
    script and seqeval read tags in this way too.

    >>> spans_of(["I-X", "I-X", "O", "B-Y", "B-Y"])
    [Span(start=0, end=2, label='X'), Span(start=3, end=4, label='Y'), Span(start=4, end=5, label='Y')]
    """
    found: list[Span] = []
    start, inside, before = 0, "", OUTSIDE
    for place, (letter, label) in enumerate([*map(parted, tags), (OUTSIDE, "")]):
        if inside and not (label == inside and letter in "IEL" and before not in "ELSU"):
            found.append(Span(start, place, inside))
            inside = ""
        if label and not inside:
            start, inside = place, label
        before = letter
    return found
