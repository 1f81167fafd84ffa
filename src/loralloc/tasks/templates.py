r"""Texts made of columns: `"{instruction}\n\n{input}"`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from string import Formatter
from typing import Any

from loralloc.errors import UserError
from loralloc.tasks.rows import Rows

_COLUMN = re.compile(r"(?=.*\S)[^.\[\]{}]+")
"""A name of a column that may stand in braces. A dot or a bracket would ask for a part of a value."""


def is_template(words: str) -> bool:
    r"""Whether the value of a key is a template with columns in braces, and not the name of a column.

    >>> is_template("{question}\n"), is_template("question")
    (True, False)
    """
    return "{" in words or "}" in words


def columns_of(template: str, key: str) -> list[str]:
    """Return the columns that a template names.

    Args:
        template: Text with columns in braces; `{{` is a brace.
        key: The recipe key that has this template, for the message.

    Returns:
        The columns, each once, in their order.

    Raises:
        UserError: A brace is alone, or what is in braces is more than a name.

    >>> columns_of("{question} {{sic}} {context}{question}", "data.prompt")
    ['question', 'context']
    """
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise UserError(
            f"{key}: {error} in {template!r}; a brace that is text is written twice: {{{{ or }}}}"
        ) from error
    for _, name, form, conversion in parts:
        if name is not None and (not name or form or conversion or not _COLUMN.fullmatch(name)):
            raise UserError(f"{key}: braces must hold the name of one column; {template!r} has {{{name}}}")
    return list(dict.fromkeys(name for _, name, _, _ in parts if name))


def fill(template: str, values: Mapping[str, Any]) -> str:
    """Put values into a template, by the names of its columns; unlike with `str.format`, these may be of any kind.

    >>> fill("{{{2nd-text}}}: {0}", {"2nd-text": "a", "0": 1})
    '{a}: 1'
    """
    parts = Formatter().parse(template)
    return "".join(text if name is None else f"{text}{values[name]}" for text, name, _, _ in parts)


def render(rows: Rows, template: str, key: str) -> list[str]:
    """Fill a template for every row; a column without a value in a row is empty there.

    Args:
        rows: The rows.
        template: Text with columns in braces.
        key: The recipe key that has this template, for messages.

    Returns:
        One text per row. If the template ends with a column that is empty in a row, the white space before it goes too.

    Raises:
        UserError: The template is malformed, a column is missing or holds no text or number, or a text is blank.
    """
    values = {column: rows.column(column, key) for column in columns_of(template, key)}
    last = next((name for name in values if template.endswith(f"{{{name}}}")), None)
    texts = []
    for index in range(len(rows)):
        filled = {name: "" if column[index] is None else column[index] for name, column in values.items()}
        for name, value in filled.items():
            if not isinstance(value, str | int | float):
                raise UserError(
                    f'{rows.place(index)}: column "{name}" ({key}) must hold text, found {type(value).__name__}'
                )
        text = fill(template, filled)
        texts.append(text.rstrip() if last is not None and filled[last] == "" else text)
        if not texts[-1].strip():
            raise UserError(f"{rows.place(index)}: {key} is empty here: {rows.quoted(index)}")
    return texts
