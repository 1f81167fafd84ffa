"""Mistakes in the user's input, told apart from mistakes of ours."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """A mistake in the user's input: the command line prints it without a traceback and exits with 2."""


def closest(word: str, choices: Iterable[str]) -> str:
    """Offer the choice that a mistyped word most likely meant.

    Args:
        word: What the user wrote.
        choices: What would have been accepted.

    Returns:
        A sentence to append to an error message, or nothing when no choice is near.

    >>> closest("learning_rat", ["learning_rate", "batch_size"])
    ' Did you mean "learning_rate"?'
    >>> closest(" POS", ["neg", "pos"])
    ' Did you mean "pos"?'
    >>> closest("colour", ["learning_rate", "batch_size"])
    ''
    """
    choices = list(choices)
    same = [choice for choice in choices if choice.strip().casefold() == word.strip().casefold()]
    found = same or get_close_matches(word, choices, n=1, cutoff=0.7)
    return f' Did you mean "{found[0]}"?' if found else ""


def listed(names: Iterable[str], word: str = "and") -> str:
    """Join names, at least one, for a sentence.

    >>> listed(["adalora", "uniform", "lora"]), listed(["lora"])
    ('adalora, uniform and lora', 'lora')
    """
    *first, last = names
    return f"{', '.join(first)} {word} {last}" if first else last


def either(names: Iterable[str]) -> str:
    """Join names, at least one, of which one is to be chosen.

    >>> either(["adalora", "uniform", "lora"])
    'adalora, uniform or lora'
    """
    return listed(names, "or")


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Refuse a value that is none of the choices.

    Args:
        name: Name of the argument.
        value: What was given.
        choices: What would have been accepted.

    Raises:
        UserError: With the choices, and the nearest one.

    >>> check_choice("mode", "fast", ("fast", "exact"))
    """
    options = list(choices)
    if value not in options:
        raise UserError(f'{name} must be one of {", ".join(options)}; got "{value}".{closest(str(value), options)}')
