"""Every method there is: those of this package, and those that installed packages bring.

A package brings methods with an entry point, `NAME = "MODULE:CLASS"` under `[project.entry-points."loralloc.methods"]`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import MISSING
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal

from pydantic import Field

from loralloc.budget import Budget
from loralloc.errors import UserError
from loralloc.methods.ablora import ABLoRA
from loralloc.methods.adalora import AdaLoRA
from loralloc.methods.allora import ALLoRA
from loralloc.methods.autolora import AutoLoRA
from loralloc.methods.base import Method
from loralloc.methods.controls import DepthLinear, Random, Uniform
from loralloc.methods.settings import NONE, ClosedSection, recipe_section, settings
from loralloc.methods.truncate import Truncate
from loralloc.setting_types import MethodSection

BUILT_IN: tuple[type[Method], ...] = (AdaLoRA, ABLoRA, AutoLoRA, ALLoRA, Uniform, Random, DepthLinear, Truncate)
GROUP = "loralloc.methods"
PLAIN_LORA = "lora"
"""What recipes call training without a method."""


class PlainLoRASection(ClosedSection):
    """Plain LoRA, the baseline: every layer keeps rank lora.r."""

    name: Literal["lora"] = Field(description="the method")  # type: ignore[assignment]


@cache
def methods() -> Mapping[str, type[Method]]:
    """Return every method by its id.

    Raises:
        UserError: A package's method cannot be imported, is no method, or has the id of another one.
    """
    by_id = {kind.id: kind for kind in BUILT_IN}
    for entry in entry_points(group=GROUP):
        kind = _load(entry)
        if kind.id in (*by_id, PLAIN_LORA):
            raise UserError(f'{_source(entry)}: there is a method "{kind.id}" already; give this one another id')
        by_id[kind.id] = kind
    return by_id


def _load(entry: EntryPoint) -> type[Method]:
    try:
        kind = entry.load()
    except Exception as error:  # whatever somebody else's module raises
        raise UserError(f"{_source(entry)} cannot be imported: {type(error).__name__}: {error}") from error
    if not (isinstance(kind, type) and issubclass(kind, Method)):
        raise UserError(f"{_source(entry)} is no class derived from loralloc.methods.base.Method")
    return kind


def _source(entry: EntryPoint) -> str:
    package = "" if entry.dist is None else f" of {entry.dist.name}"
    return f'the method "{entry.name}"{package} ({entry.value})'


@cache
def sections() -> Mapping[str, type[MethodSection]]:
    """Return the class of a recipe's `method` section for every method, and for plain LoRA."""
    return sections_of(methods().values())


def sections_of(kinds: Collection[type[Method]]) -> Mapping[str, type[MethodSection]]:
    """Return the class of a recipe's `method` section for some methods, and for plain LoRA."""
    allocators = [kind.id for kind in kinds if _takes_only_a_budget(kind)]
    return {kind.id: recipe_section(kind, allocators) for kind in kinds} | {PLAIN_LORA: PlainLoRASection}


def _takes_only_a_budget(kind: type[Method]) -> bool:
    """Whether a method can be built from a budget and examples alone: only such methods can be composed with others."""
    return [setting.name for setting in settings(kind) if setting.default is MISSING] == ["budget"]


def _looks_at_examples(kind: type[Method]) -> bool:
    return any(setting.examples is not None for setting in settings(kind))


def broken_rules(name: str, value: Callable[..., Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Check the rules of a recipe's method that involve several settings: its own rules, and those of composition.

    Args:
        name: The method's id; plain LoRA and unknown ones have no rules.
        value: Looks a key up, see `Method.broken_rules`.

    Yields:
        The key that a rule is about, and what is wrong with it.
    """
    kind = methods().get(name)
    if kind is None:
        return
    yield from kind.broken_rules(value)
    for setting in settings(kind):
        if setting.allocator:
            yield from _broken_composition(setting.name, value)


def _broken_composition(key: str, value: Callable[..., Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Check that a budget and examples are given exactly if the allocating method needs them."""
    chosen, budget, validation = (value("method", name) for name in (key, "budget", "validation"))
    kind = methods().get(chosen) if isinstance(chosen, str) else None
    looking = [name for name, other in methods().items() if _takes_only_a_budget(other) and _looks_at_examples(other)]
    if chosen is not None and budget is None:
        yield ("method", key), f"method.{key}: {chosen} needs a budget: add method.budget"
    if chosen is None and budget is not None:
        yield ("method", "budget"), f"method.budget has no effect without method.{key}, such as adalora"
    looks = kind is not None and _looks_at_examples(kind)
    if looks and validation is None:
        told = f"method.{key}: {chosen} scores ranks on validation data: add method.validation, as validation or 0.1"
        yield ("method", key), told
    if not looks and validation is not None:
        yield ("method", "validation"), f"method.validation has no effect without method.{key}: {' or '.join(looking)}"


def source_of_examples(name: str, value: Callable[..., Any]) -> Any:
    """Return where a recipe's method takes the examples from that it looks at; None where it looks at none.

    Args:
        name: The method's id; plain LoRA and unknown ones look at none.
        value: Looks a key up, see `Method.broken_rules`.
    """
    kind = methods().get(name)
    return value("method", "validation") if kind is not None and kind.looks_at_examples(value) else None


def held_out_for(section: MethodSection) -> Any:
    """Return the same for the section `method` of a checked recipe: `validation`, a share of the data, or None."""
    return source_of_examples(section.name, lambda *key: getattr(section, key[-1], None))


def make_method(section: MethodSection, examples: Any = None) -> Method | None:
    """Return the method of a recipe; None for plain LoRA.

    Args:
        section: The recipe's `method`.
        examples: The examples that the method may look at, where it looks at any.
    """
    kind = methods().get(section.name)
    if kind is None:
        return None
    chosen: dict[str, Any] = {}
    for setting in settings(kind):
        value = getattr(section, setting.name, None)
        if setting.examples is not None:
            value = examples
        elif setting.allocator and value is not None:
            value = _allocator(methods()[value], section, examples)
        elif Budget in setting.kinds:
            value = _budget(value)
        chosen[setting.name] = None if setting.choices and value == NONE else value
    return kind(**chosen)


def _allocator(kind: Any, section: Any, examples: Any) -> Method:
    """The method that another one composes with, with its defaults."""
    data = {setting.name: examples for setting in settings(kind) if setting.examples is not None}
    return kind(budget=_budget(section.budget), **data)


def _budget(section: Any) -> Budget | None:
    return None if section is None else Budget(**section.model_dump(exclude_none=True))
