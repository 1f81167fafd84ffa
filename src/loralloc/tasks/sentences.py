"""Sentences as words with a tag each, read from tags or from spans of characters."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

from loralloc.errors import UserError
from loralloc.tasks.rows import Rows, quote, records_of
from loralloc.tasks.spec import TokenClassificationData
from loralloc.tasks.tags import Scheme, Span, fault_of, from_spans, recognise, to_bio

logger = logging.getLogger(__name__)

WORD = re.compile(r"[^\W_]+|\S")
"""A word of a text: a run of letters and digits, or any other sign alone."""


@dataclass(frozen=True)
class Sentences:
    """The sentences of one source.

    Attributes:
        rows: Where they come from.
        words: The words of each.
        tags: A tag for every word.
        texts: Their texts; None unless the data give spans of characters.
    """

    rows: Rows
    words: list[list[str]]
    tags: list[list[str]]
    texts: list[str] | None = None

    @property
    def found(self) -> set[str]:
        """The distinct tags."""
        return {tag for tags in self.tags for tag in tags}


def read_sentences(rows: Rows, data: TokenClassificationData) -> Sentences:
    """Read the sentences of a source as they are, whatever the scheme of their tags.

    Args:
        rows: The rows.
        data: The recipe's data section.

    Raises:
        UserError: No such column, or a row that cannot be read; with the row and the reason.
    """
    if data.text is not None:
        return _read_spans(rows, data.text, str(data.spans))
    words = list(_lists(rows, str(data.tokens), "data.tokens", _word))
    tags = list(_lists(rows, str(data.tags), "data.tags", _tag))
    for i, (row_words, row_tags) in enumerate(zip(words, tags, strict=True)):
        if not row_words:
            raise UserError(f'{rows.place(i)}: an empty sentence, column "{data.tokens}" (data.tokens) has no words')
        if len(row_words) != len(row_tags):
            raise UserError(
                f"{rows.place(i)}: {len(row_words)} words (data.tokens) and {len(row_tags)} tags (data.tags); every "
                f"word needs one: {rows.quoted(i)}"
            )
    return Sentences(rows, words, tags)


def scheme_of(sources: Sequence[Sentences], named: Scheme | None) -> Scheme:
    """Return the scheme that a recipe names, or else recognise it from all tags.

    Raises:
        UserError: The tags are of several schemes.
    """
    scheme = named or recognise(set().union(*(sentences.found for sentences in sources)))
    if scheme is None:
        some = ", ".join(sorted(set().union(*(sentences.found for sentences in sources)))[:12])
        raise UserError(
            f"{sources[0].rows.source}: the tags are of several schemes ({some}): either all write spans of words, "
            "as B-X and I-X, or none does. Write them alike, or set data.scheme: plain where each stands alone"
        )
    return scheme


def in_scheme(sentences: Sentences, scheme: Scheme) -> Sentences:
    """Check the tags, and turn those of scheme iob1 into BIO.

    Raises:
        UserError: A tag that its scheme does not allow there; with the row, the word, and what to do.
    """
    for i, tags in enumerate(sentences.tags):
        if (fault := fault_of(tags, scheme)) is not None:
            place, reason = fault
            word = quote(sentences.words[i][place])
            raise UserError(
                f'{sentences.rows.place(i)}: word {place + 1}, {word}, has the tag "{tags[place]}", {reason}'
            )
    return replace(sentences, tags=[to_bio(tags) for tags in sentences.tags]) if scheme == "iob1" else sentences


def _lists(rows: Rows, column: str, key: str, read: Callable[[Any, Sequence[str]], str | None]) -> Iterator[list[str]]:
    """Read a column of lists of texts, or of texts separated by white space."""
    for i, (value, classes) in enumerate(zip(rows.values(column, key), rows.class_names(column), strict=True)):
        parts = _parted(value) if isinstance(value, str) else value
        if not isinstance(parts, list):
            raise UserError(
                f'{rows.place(i)}: column "{column}" ({key}) must hold a list of texts (in JSON, where a text '
                f"holds it), or a text parted by white space, found {type(value).__name__} {quote(value)}"
            )
        texts = [read(part, classes) for part in parts]
        if None in texts:
            place = texts.index(None)
            raise UserError(
                f'{rows.place(i)}: item {place + 1} of column "{column}" ({key}) is no text: {quote(parts[place])}'
            )
        yield [text for text in texts if text is not None]


def _parted(text: str) -> list[Any] | None:
    """Split a text into words: a JSON list, as in some CSV files, or by white space; None for a Python list."""
    if re.fullmatch(r"\s*\[\s*'.*'\s*\]\s*", text, re.S):
        return None
    if re.fullmatch(r'\s*\[\s*".*"\s*\]\s*', text, re.S):
        with suppress(ValueError):
            return list(json.loads(text))
    return text.split()


def _word(value: Any, classes: Sequence[str]) -> str | None:
    del classes  # words are no classes
    return value if isinstance(value, str) else None


def _tag(value: Any, classes: Sequence[str]) -> str | None:
    """Read a tag: a text, a number, or the number of a class that the data set names."""
    if type(value) is int and value >= 0:  # -100 often stands for no tag
        return classes[value] if value < len(classes) else str(value)
    return value if isinstance(value, str) and value.strip() else None


class Place(NamedTuple):
    """Characters of a text, the end exclusive."""

    start: int
    end: int


def places_of_words(text: str) -> list[Place]:
    """Find the words of a text.

    >>> places_of_words("It's 5")
    [Place(start=0, end=2), Place(start=2, end=3), Place(start=3, end=4), Place(start=5, end=6)]
    """
    return [Place(*found.span()) for found in WORD.finditer(text)]


def _read_spans(rows: Rows, text_column: str, span_column: str) -> Sentences:
    texts = rows.strings(text_column, "data.text")
    words, tags, widened = [], [], 0
    for i, (text, value) in enumerate(zip(texts, rows.column(span_column, "data.spans"), strict=True)):
        places = places_of_words(text)
        where = f'{rows.place(i)}: column "{span_column}" (data.spans)'
        spans, moved = _spans_of_words(text, _read_places(where, text, value), places, where)
        widened += moved
        words.append([text[start:end] for start, end in places])
        tags.append(from_spans(spans, len(places)))
    if widened:
        logger.warning(
            "%s: %d spans begin or end inside a word; they are widened to whole words, for training and for metrics.",
            rows.source,
            widened,
        )
    return Sentences(rows, words, tags, texts)


def _read_places(where: str, text: str, value: Any) -> list[Span]:
    """Read the spans of a text, in characters, and sort them."""
    records = records_of(value)
    if records is None and value != {} and value is not None:
        raise UserError(f"{where} must hold a list of {{start, end, label}}, found {quote(value)}")
    spans = [_read_place(where, text, record) for record in records or []]
    ordered = sorted(spans)
    for first, second in pairwise(ordered):
        if second.start < first.end:
            raise UserError(
                f"{where} has spans that overlap, {_named(text, first)} and {_named(text, second)}: a word has one tag"
            )
    return ordered


def _read_place(where: str, text: str, record: Any) -> Span:
    start, end, label = (record.get(name) if isinstance(record, dict) else None for name in Span._fields)
    if type(start) is not int or type(end) is not int or not isinstance(label, str) or not label.strip():
        raise UserError(
            f"{where} must hold spans with start and end, whole numbers, and label, a text: {quote(record)}"
        )
    span = Span(start, end, label)
    if not 0 <= span.start <= span.end <= len(text):
        raise UserError(
            f"{where} has the span {span.start} to {span.end} ({span.label}), outside of its text of {len(text)} "
            "characters"
        )
    if not text[span.start : span.end].strip():
        raise UserError(f"{where} has the span {_named(text, span)}, which is empty")
    return span


def _named(text: str, span: Span) -> str:
    return f"{quote(text[span.start : span.end])} ({span.start} to {span.end}, {span.label})"


def _spans_of_words(text: str, spans: Sequence[Span], places: Sequence[Place], where: str) -> tuple[list[Span], int]:
    """Convert spans of characters to spans of words; also return how many had to be widened to whole words."""
    found: list[Span] = []
    widened = 0
    for span in spans:
        inside = [i for i, (start, end) in enumerate(places) if start < span.end and end > span.start]
        first, last = inside[0], inside[-1]
        if found and first < found[-1].end:
            word = text[places[first].start : places[first].end]
            raise UserError(
                f"{where} has spans that overlap: {_named(text, span)} and the one before it both have a part of the "
                f"word {quote(word)}, and a word has one tag"
            )
        widened += places[first].start < span.start or places[last].end > span.end
        found.append(Span(first, last + 1, span.label))
    return found, widened
