"""The classes of a data set in words, and those that may be one class spelt in several ways. Standard library only."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping

SHOWN = 8
"""Classes named one by one; if there are more, the rarest is named too, because misspelt labels are rare."""
LENGTH = 40
"""Characters shown of a class's name."""

_NUMBER = re.compile(r"([-+]?)0*(\d+?)(?:\.(\d*?)0*)?")


def class_words(classes: Mapping[str, int]) -> str:
    """List classes with their counts, the commonest first.

    Args:
        classes: Name to number of examples.

    Returns:
        The classes on one line, quoted so that blanks can be seen.

    >>> class_words({"neg": 80, "pos": 120, " pos": 1})
    '"pos" 120, "neg" 80, " pos" 1'
    >>> class_words({str(i): 1000 - i for i in range(100)})[-37:]
    '"7" 993 and 92 more, down to "99" 901'
    """
    ordered = sorted(classes.items(), key=lambda item: -item[1])
    words = [f"{_shown(name)} {count:,}" for name, count in ordered]
    if len(words) <= SHOWN + 1:
        return ", ".join(words)
    return f"{', '.join(words[:SHOWN])} and {len(words) - SHOWN:,} more, down to {words[-1]}"


def alike(classes: Mapping[str, int]) -> list[list[str]]:
    """Find classes that differ only in blanks, case, how a character is coded, or how a number is written.

    Args:
        classes: Name to number of examples.

    Returns:
        Groups of two names or more, each with the commonest first; of equally common ones, the shortest.

    >>> alike({"pos": 9, " Pos": 1, "neg": 5})
    [['pos', ' Pos']]
    """
    groups: dict[str, list[str]] = {}
    for name in sorted(classes, key=lambda name: (-classes[name], len(name))):
        groups.setdefault(_essence(name), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def warnings(classes: Mapping[str, int]) -> list[str]:
    """Say which classes may be one class that is spelt in several ways, and what to do.

    Args:
        classes: Name to number of training examples.

    Returns:
        A sentence or two for each group of such classes.
    """
    found = []
    for group in alike(classes):
        shown = [_shown(name) for name in group]
        if len({unicodedata.normalize("NFC", text) for text in shown}) < len(group):
            shown = [ascii(name) for name in group]  # the same letter, coded in two ways
        spelt = ", ".join(f"{text} ({classes[name]:,})" for text, name in zip(shown, group, strict=True))
        found.append(
            f"{spelt} are {len(group)} classes, though they differ in spelling only (training examples in brackets). "
            f"If they mean the same, write them alike in the data{_locating(classes, group)}."
        )
    return found


def _locating(classes: Mapping[str, int], group: list[str]) -> str:
    """How to find the rows that spell a class otherwise."""
    right = [name for name in classes if name not in group[1:]]
    if not 2 <= len(right) <= SHOWN:
        return ""
    return f"; with data.labels: {json.dumps(right, ensure_ascii=False)} the first row spelt otherwise is named"


def _essence(name: str) -> str:
    """Normalise a name: without case, surrounding or repeated blanks, invisible characters and redundant zeros."""
    text = unicodedata.normalize("NFKC", name).casefold()
    text = "".join(character for character in text if unicodedata.category(character) != "Cf")
    text = " ".join(text.split())
    if number := _NUMBER.fullmatch(text):
        sign, whole, fraction = number.groups()
        return f"{sign.strip('+')}{whole}.{fraction or ''}"
    return text


def _shown(name: str) -> str:
    """Quote a class, shortened, with invisible characters escaped."""
    text = name if len(name) <= LENGTH else f"{name[: LENGTH - 3]}..."
    return '"' + "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text) + '"'
