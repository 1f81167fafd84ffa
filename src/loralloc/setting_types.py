"""Types of settings, with their ranges, and how a value that does not fit is told.

A recipe and the methods declare their settings with these. Imports neither torch nor transformers, so that `--help`
stays fast.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from loralloc.errors import UserError


def is_number(value: Any) -> bool:
    """Whether a value is a number, which a bool is not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_text(value: Any) -> bool:
    """Whether a value is text that is not empty."""
    return isinstance(value, str) and bool(value)


def _check_number(value: Any) -> Any:
    if not is_number(value):
        raise ValueError("must be a number")
    if not abs(value) <= sys.float_info.max:  # a float, or an integer that no float holds
        raise ValueError("must be a finite number")
    return value


def _check_phase(value: Any) -> Any:
    if is_number(value) and value >= 0 and (isinstance(value, int) or value < 1):
        return value
    raise ValueError("must be a fraction of the run below 1, such as 0.1, or a whole number of steps")


def _check_length(value: Any) -> Any:
    if is_number(value) and (value >= 2 if isinstance(value, int) else 0 < value <= 1):
        return value
    raise ValueError("must be a share of the training that follows, such as 0.5 or 1.0, or a number of steps from 2 on")


def _check_source(value: Any) -> Any:
    if value == "validation" or (isinstance(value, float) and 0 < value < 1):
        return value
    raise ValueError("must be validation (the recipe's validation data), or a fraction to cut from train, such as 0.1")


Text = Annotated[str, Field(min_length=1)]
# Keeps 8 apart from 8.0, so that a resolved recipe reads as it was written; checked before pydantic tries both types,
# which would report both.
Number = Annotated[int | float, BeforeValidator(_check_number, json_schema_input_type=int | float)]
Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Positive = Annotated[Number, Field(gt=0)]
AtLeastZero = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Between0And1 = Annotated[float, Field(gt=0, lt=1)]
# Checked by a function, which the schema of a recipe cannot read: it shows the input type.
Phase = Annotated[Number, BeforeValidator(_check_phase, json_schema_input_type=Whole | Share)]
Length = Annotated[
    Number,
    BeforeValidator(
        _check_length, json_schema_input_type=Annotated[int, Field(ge=2)] | Annotated[float, Field(gt=0, le=1)]
    ),
]
Source = Annotated[
    float | str, BeforeValidator(_check_source, json_schema_input_type=Literal["validation"] | Between0And1)
]

STRICT = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
"""Nothing is coerced: `"12"` is no number and `1.5` no step count."""


class Section(BaseModel):
    """A mapping in a recipe: no unknown keys, nothing coerced."""

    model_config = STRICT


class MethodSection(Section):
    """The `method` section of a recipe, whichever the method; each method has a class of its own, made from it."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(description="the method")

    if TYPE_CHECKING:  # the keys of a method are made from its class

        def __getattr__(self, name: str) -> Any: ...


@dataclass(frozen=True)
class Examples:
    """Marks the setting of a method that takes examples to look at. A recipe says there where they come from.

    Attributes:
        description: What they are for.
        default: The recipe's: `validation`, a fraction to cut from the training data, or None for none.
        held_out: Whether they must be cut from the training data: the recipe's validation data are refused.
    """

    description: str
    default: float | str | None = None
    held_out: bool = False


_RULES = {  # kinds of pydantic errors, in our words
    "int_type": "an integer",
    "float_type": "a number",
    "string_type": "text",
    "string_unicode": "Unicode text; in a shell of another encoding, set LC_ALL=C.UTF-8",
    "string_too_short": "text that is not empty",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
    "none_required": "null",
    "finite_number": "a finite number",
    "greater_than": "above {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "below {lt}",
    "less_than_equal": "at most {le}",
    "literal_error": "{expected}",
    "model_type": "a mapping of keys",
    "model_attributes_type": "a mapping of keys",
}


def broken_rule(error: ErrorDetails) -> str:
    """Say what a value must be, from pydantic's account of why it is refused."""
    context = error.get("ctx", {})
    if error["type"] not in _RULES:
        return str(context.get("error", error["msg"]))
    limits = {name: f"{limit:.10g}" if is_number(limit) else limit for name, limit in context.items()}
    return "must be " + _RULES[error["type"]].format(**limits).replace("'", "")


def joined_rule(errors: Sequence[ErrorDetails]) -> str:
    """Say what a value of several possible types must be, from why it is refused as each of them."""
    known = [error for error in errors if error["type"] in _RULES] or errors[:1]
    rules = dict.fromkeys(broken_rule(error).removeprefix("must be ") for error in known)
    return f"must be {' or '.join(rules)}"


def shown(value: Any) -> str:
    """Write a value that is refused, in at most 80 characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_value(name: str, value: Any, type_: TypeAdapter[Any]) -> None:
    """Refuse a value that is not of a type or outside its range.

    Args:
        name: Name of the argument.
        value: What was given.
        type_: The type, with its range.

    Raises:
        UserError: With what it must be.

    >>> check_value("rounds", 8, TypeAdapter(Whole, config=STRICT))
    """
    try:
        type_.validate_python(value)
    except ValidationError as error:
        raise UserError(f"{name} {broken_rule(error.errors()[0])}, got {shown(value)}") from None
