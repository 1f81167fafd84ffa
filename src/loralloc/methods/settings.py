"""What is made from a method's declaration: its check, its record, and the `method` section of a recipe.

A method is a frozen dataclass. The annotation of a field holds the type, the range and the description of a setting,
and these stand nowhere else:

    rounds: Annotated[Whole, Field(description="rounds of pruning and growing")] = 8
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, create_model

from loralloc.budget import AMOUNTS, Budget
from loralloc.errors import check_choice
from loralloc.setting_types import (
    STRICT,
    Between0And1,
    Examples,
    Length,
    MethodSection,
    Section,
    Source,
    check_value,
)

NONE = "none"
"""How a recipe writes None where the default is a word: in `parity: null` null would be the default, `adam`."""

BUDGET = f"one of {', '.join(AMOUNTS)}, with or without max_rank; or max_rank alone"


class Setting(NamedTuple):
    """A field of a method.

    Attributes:
        name: Its name, in Python and in a recipe.
        annotation: Its type, with range and description.
        default: Its default; `MISSING` where it must be given.
    """

    name: str
    annotation: Any
    default: Any

    @property
    def kinds(self) -> tuple[Any, ...]:
        """The types that a value may have."""
        bare = get_args(self.annotation)[0] if get_origin(self.annotation) is Annotated else self.annotation
        return get_args(bare) if get_origin(bare) in (Union, UnionType) else (bare,)

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that a value may be; empty where it is no word."""
        return next((get_args(kind) for kind in self.kinds if get_origin(kind) is Literal), ())

    @property
    def examples(self) -> Examples | None:
        """What the method wants examples for; None for any other setting."""
        return next((mark for mark in get_args(self.annotation) if isinstance(mark, Examples)), None)

    @property
    def allocator(self) -> bool:
        """Whether it is another method, one that allocates ranks."""
        return any(isinstance(kind, type) and hasattr(kind, "on_gradients") for kind in self.kinds)

    @property
    def plain(self) -> bool:
        """Whether it is a number or a word: no budget, no data, no other method."""
        return self.examples is None and not self.allocator and Budget not in self.kinds


@cache
def settings(kind: type) -> tuple[Setting, ...]:
    """Return what a method's dataclass declares, in its order."""
    hints = get_type_hints(kind, include_extras=True)
    defaults = {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(kind)
    }
    return tuple(Setting(name, hints[name], default) for name, default in defaults.items())


def check_settings(method: Any) -> None:
    """Refuse numbers out of their range and words that are no choice.

    Args:
        method: The method, an instance of its dataclass.

    Raises:
        UserError: With the setting and what it must be.
    """
    types = _types(type(method))
    for setting in filter(lambda setting: setting.plain, settings(type(method))):
        value = getattr(method, setting.name)
        if value is None and NoneType in setting.kinds:
            continue
        if setting.choices:
            check_choice(setting.name, value, setting.choices)
        else:
            check_value(setting.name, value, types[setting.name])


@cache
def _types(kind: type) -> Mapping[str, TypeAdapter[Any]]:
    numbers = [setting for setting in settings(kind) if setting.plain and not setting.choices]
    return {setting.name: TypeAdapter(setting.annotation, config=STRICT) for setting in numbers}


def recorded(method: Any) -> dict[str, Any]:
    """Return the numbers and words that a method was given."""
    return {setting.name: getattr(method, setting.name) for setting in settings(type(method)) if setting.plain}


BudgetSection: Any = create_model(
    "BudgetSection",
    __base__=Section,
    __doc__="What the ranks may cost at the end: exactly one amount, and max_rank beside it or alone.",
    **{setting.name: (setting.annotation, setting.default) for setting in settings(Budget)},  # type: ignore[call-overload]
)


class ClosedSection(MethodSection):
    """A `method` section whose method is known: no other keys."""

    model_config = ConfigDict(extra="forbid")


def recipe_section(kind: Any, allocators: Iterable[str]) -> type[MethodSection]:
    """Make the class of a recipe's `method` section for a method.

    Args:
        kind: The method's class.
        allocators: Ids of the methods that may stand in a setting that is a method, such as `allocate`.
    """
    keys: dict[str, Any] = {"name": (Literal[kind.id], Field(description="the method"))}  # type: ignore[valid-type]
    if kind.search is not None:
        keys["search"] = (Length, Field(default=kind.search.default, description=kind.search.description))
    for setting in settings(kind):
        keys |= _composed(setting, allocators) if setting.allocator else {setting.name: _key(setting)}
    return create_model(f"{kind.__name__}Section", __base__=ClosedSection, __doc__=kind.__doc__, **keys)


def _key(setting: Setting) -> tuple[Any, Any]:
    """Type and default of a key in a recipe."""
    if setting.examples is not None:
        examples = setting.examples
        kind: Any = Between0And1 if examples.held_out else Source
        return kind, Field(default=examples.default, description=examples.description)
    if Budget in setting.kinds:
        if NoneType in setting.kinds:
            return Annotated[BudgetSection | None, *get_args(setting.annotation)[1:]], None
        return BudgetSection, Field(description=BUDGET)
    annotation, default = setting.annotation, setting.default
    if setting.choices and NoneType in setting.kinds and default is not None:
        annotation = Annotated[Literal[*setting.choices, NONE], *get_args(annotation)[1:]]
    return annotation, ... if default is MISSING else default


def _composed(setting: Setting, allocators: Iterable[str]) -> dict[str, Any]:
    """The keys for a method that takes another one: the other's name, its budget, and the source of its examples."""
    source: Any = Source
    names: Any = Annotated[Literal[*allocators] | None, *get_args(setting.annotation)[1:]]
    return {
        setting.name: (names, None),
        "budget": (BudgetSection | None, Field(default=None, description="the budget of the allocating method")),
        "validation": (
            source | None,
            Field(
                default=None,
                description="data that the allocating method scores ranks on: validation, or a fraction cut from train",
            ),
        ),
    }
