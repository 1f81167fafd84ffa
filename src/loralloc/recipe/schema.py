"""Recipes: one YAML file for the whole life of a run, checked as a whole before anything is loaded.

Values come from the defaults here, then the file, then flags. Nothing is coerced: `"12x"` is no number
and `1.5` no step count. Relative paths of data and output are relative to the current directory, not to
the recipe. This module imports neither torch nor transformers, so that `--help` stays fast; the `method` section is
made from the methods themselves, which need torch, so they are imported when a recipe is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any, Self, Union, get_args

from pydantic import BaseModel, Field, SerializeAsAny, ValidationError, create_model, model_validator
from pydantic_core import ErrorDetails

from loralloc.errors import closest, either
from loralloc.recipe.passthrough import MAPPINGS, broken_options, exclusive_keys, option_keys
from loralloc.recipe.rules import EXCLUSIVE, broken_by_method, broken_rules, lost_marker
from loralloc.recipe.sections import (
    CompareConfig,
    DataConfig,
    EvaluateConfig,
    LoraSection,
    ModelConfig,
    TaskName,
    TrainingConfig,
)
from loralloc.recipe.source import Key, apply_overrides, dotted, dump_yaml, get, read_recipe_file, suggest
from loralloc.setting_types import MethodSection, Section, Text, broken_rule, shown


class Recipe(Section):
    """A whole run."""

    task: TaskName = Field(description="what the model learns to do")
    model: ModelConfig = Field(description="the pretrained model")
    data: DataConfig = Field(description="the data and its columns")
    method: SerializeAsAny[MethodSection] = Field(description="how ranks are allocated")
    lora: LoraSection = Field(default=LoraSection(), description="the adapter")
    plan: Text | None = Field(default=None, description="ranks.json of another run: start at its ranks and scale")
    training: TrainingConfig = Field(description="the run")
    evaluate: EvaluateConfig = Field(default=EvaluateConfig(), description="what is evaluated beyond the metrics")
    compare: CompareConfig | None = Field(
        default=None, description="what `loralloc compare` compares; null: its defaults"
    )
    output: Text = Field(description="folder of the run")

    @model_validator(mode="after")
    def _obeys_rules(self) -> Self:
        _refuse(broken_rules(self.model_dump()))
        return self


class _CompleteRecipe(Recipe):
    @model_validator(mode="after")
    def _obeys_its_method(self) -> Self:
        _refuse(_broken_by_libraries(self.model_dump()))
        return self


def _refuse(broken: Iterable[tuple[Key, str]]) -> None:
    if told := [f"{dotted(key)}: {message}" for key, message in broken]:
        raise ValueError("; ".join(told))


@cache
def complete_recipe() -> type[Recipe]:
    """Return the class of recipes whose `method` section is that of one of the installed methods.

    Raises:
        loralloc.errors.UserError: A package brings a method that cannot be imported.
    """
    from loralloc.methods.registry import sections

    method: Any = Union[tuple(sections().values())]  # noqa: UP007 - made at run time
    chosen: Any = (method, Field(discriminator="name", description="how ranks are allocated"))
    return create_model("Recipe", __base__=_CompleteRecipe, __doc__=Recipe.__doc__, method=chosen)


def _models(annotation: Any) -> list[type[BaseModel]]:
    kinds = [annotation, *get_args(annotation)]
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]


def _walk_keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, field in model.model_fields.items():
        yield prefix + name, field.description or ""
        for section in _models(field.annotation):
            yield from _walk_keys(section, f"{prefix}{name}.")


@cache
def recipe_keys() -> Mapping[str, str]:
    """Return the description of every key that a recipe may have, by the key with dots.

    If several methods have a key, the description is the first method's.
    """
    walked = list(_walk_keys(complete_recipe()))
    return {**dict(walked), **dict(reversed(walked))}


def _keys_and_options() -> Mapping[str, str]:
    """The keys of `recipe_keys`, and the options of the libraries underneath."""
    return {**recipe_keys(), **option_keys()}


def _broken_by_libraries(tree: Mapping[str, Any]) -> Iterator[tuple[Key, str]]:
    """Check what only the methods and the libraries underneath can tell; these take seconds to import."""
    yield from broken_options(tree, _keys_and_options())
    yield from broken_by_method(tree)


def _exclusive() -> Iterator[Sequence[Key]]:
    """Keys of which at most one may be set."""
    yield from ([(*section, name) for name in members] for section, members in EXCLUSIVE.items())
    yield from exclusive_keys()


Check = Callable[[Recipe], Iterable[tuple[Key, str]]]
"""Finds what is wrong with a recipe: keys, and for each of them a message."""


def _in_section(key: Key) -> str:
    return f' in "{dotted(key[:-1])}"' if key[:-1] else ""


def _unknown(key: Key, tree: Mapping[str, Any]) -> str:
    name, where = key[-1], _in_section(key)
    if dotted(key) in recipe_keys():
        return f'"{name}"{where} does not apply to method {get(tree, "method", "name")}: remove it'
    return f'unknown key "{name}"{where}.{suggest(key, _keys_and_options())}'


def method_names() -> Sequence[str]:
    """Return the names that `method.name` may have."""
    from loralloc.methods.registry import sections

    return list(sections())


def _of_other_methods(name: Any) -> set[str]:
    """Keys with dots that only other methods have; none where there is no method of this name."""
    from loralloc.methods.registry import sections

    section = sections().get(name) if isinstance(name, str) else None
    if section is None:
        return set()
    own = {key for key, _ in _walk_keys(section, "method.")}
    return {key for key in recipe_keys() if key.startswith("method.") and key not in own}


def _description(key: Key, tree: Mapping[str, Any]) -> str:
    """The description of a key; if several methods have it, that of the recipe's method."""
    from loralloc.methods.registry import sections

    section = sections().get(get(tree, "method", "name"))
    if section is not None and len(key) == 2 and key[0] == "method" and key[1] in section.model_fields:
        return section.model_fields[str(key[1])].description or ""
    return recipe_keys().get(dotted(key), "")  # keys inside a list have none


def faults(errors: Sequence[ErrorDetails], tree: Mapping[str, Any]) -> list[ErrorDetails]:
    """Choose which errors of pydantic to tell, and name them by keys of the recipe alone.

    A value of several possible types is refused once for each of them, and the type that was tried stands among the
    keys. The one that was meant leads deepest into the value; for each key its first error is told.

    Args:
        errors: All errors.
        tree: The recipe that was validated.
    """
    found = [(error, *_keys_of(error, tree)) for error in errors]
    depths: dict[Key, int] = {}
    for _, key, several in found:
        depths[several] = max(depths.get(several, 0), len(key))
    told: dict[object, ErrorDetails] = {}
    for error, key, several in found:
        if not several or len(key) == depths[several]:
            told.setdefault((key, several) if several else len(told), {**error, "loc": key})
    return list(told.values())


def _keys_of(error: ErrorDetails, tree: Mapping[str, Any]) -> tuple[Key, Key]:
    """The key that an error is about, and the key of several types that it is in; the latter is empty for none."""
    place: tuple[Any, ...] = error["loc"]
    if place[:1] == ("method",) and place[1:2] and place[1] in method_names():  # pydantic adds which class it tried
        place = (place[0], *place[2:])
    key: Key = ()
    several: Key = ()
    value: Any = tree
    for n, part in enumerate(place, 1):
        there = range(len(value)) if isinstance(value, list) else value if isinstance(value, Mapping) else ()
        if part in there:
            key, value = (*key, part), value[part]
        elif n == len(place) and error["type"] == "missing":
            key = (*key, part)
        else:
            several = several or key
    return key, several


def explain(error: ErrorDetails, tree: Mapping[str, Any]) -> tuple[Key, str]:
    """Return the key that an error of `faults` is about, and a message; `tree` is the recipe that was validated."""
    kind = error["type"]
    key: Key = tuple(error["loc"])
    if kind == "extra_forbidden":
        return key, _unknown(key, tree)
    if kind == "union_tag_not_found":
        key = (*key, "name")
    if kind in ("missing", "union_tag_not_found"):
        return key, f'missing "{key[-1]}"{_in_section(key)}: {_description(key, tree)}'.removesuffix(": ")
    value, hint = error["input"], ""
    if kind == "union_tag_invalid":
        key, value = (*key, "name"), error.get("ctx", {})["tag"]
        rule, hint = f"must be {either(method_names())}", closest(str(value), method_names())
    else:
        rule = broken_rule(error)
    return key, f"{dotted(key)} {rule}, got {shown(value)}.{hint}".removesuffix(".")


def load_recipe(path: Path, overrides: Sequence[str] = (), check: Check | None = None) -> Recipe:
    """Read a recipe: defaults, then the file, then flags.

    Args:
        path: The YAML file.
        overrides: Words left over on the command line, such as `["--training.steps", "100"]` or
            `["--learning-rate=5e-4"]`.
        check: A further check of the complete recipe; each key it yields is reported with its line or flag.

    Returns:
        The recipe, complete and checked.

    Raises:
        loralloc.errors.UserError: With every mistake, one a line, each with its line or flag.
    """
    source = read_recipe_file(path)
    source.report(lost_marker(source.tree))
    words = (overrides, _keys_and_options(), list(_exclusive()), MAPPINGS)
    outlined = deepcopy(source)
    apply_overrides(outlined, *words)
    apply_overrides(source, *words, _of_other_methods(get(outlined.tree, "method", "name")))
    source.report(broken_rules(source.tree))
    source.report(_broken_by_libraries(source.tree))
    try:
        recipe = complete_recipe().model_validate(source.tree)
    except ValidationError as error:
        # An error without a location repeats the broken rules.
        told = faults(error.errors(), source.tree)
        source.report(explain(detail, source.tree) for detail in told if detail["loc"])
        source.raise_problems()
        raise
    source.raise_problems()  # keys that are set twice, flags that mean nothing
    if check is not None:
        source.report(check(recipe))
        source.raise_problems()
    return recipe


def peek_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe | None:
    """Read a recipe without its method, which takes seconds to import: for what can be refused before that.

    Args:
        path: The YAML file.
        overrides: As for `load_recipe`.

    Returns:
        The recipe, its `method` unchecked; None if anything else in it is invalid.

    Raises:
        loralloc.errors.UserError: There is no such file, or it is no recipe at all.
    """
    source = read_recipe_file(path)
    keys = dict(_walk_keys(Recipe))
    apply_overrides(source, overrides, keys, [*_exclusive()])
    try:
        return Recipe.model_validate(source.tree)
    except ValidationError:
        return None


def dump_recipe(recipe: Recipe) -> str:
    """Write a recipe with all its defaults, as YAML that loads back to an equal recipe.

    Args:
        recipe: The recipe.

    Returns:
        The text. Keys that are null are left out if null is their default.
    """
    return dump_yaml(as_tree(recipe))


def as_tree(section: BaseModel) -> dict[str, Any]:
    """Return a recipe, or a section of one, as keys and values, without keys that are null if null is the default."""
    return _without_unset(section, section.model_dump())


def _without_unset(section: Any, values: Any) -> Any:
    """Leave out the values of a section that are null and have null as their default."""
    if isinstance(section, list):
        return [_without_unset(*pair) for pair in zip(section, values, strict=True)]
    if not isinstance(section, BaseModel):
        return values
    defaults = {name: field.default for name, field in type(section).model_fields.items()}
    return {
        name: _without_unset(getattr(section, name), value)
        for name, value in values.items()
        if value is not None or defaults.get(name) is not None
    }
