"""docs/reference.md and docs/recipe.schema.json are what the declarations say, and fit the packaged recipes."""

from __future__ import annotations

import doctest
import re
from collections.abc import Collection, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from loralloc.methods.registry import BUILT_IN, PLAIN_LORA
from loralloc.recipe.json_schema import recipe_schema
from loralloc.recipe.passthrough import OPTIONS
from loralloc.recipe.source import read_recipe_file
from loralloc.recipes import list_recipes
from loralloc.tasks.spec import TASKS

DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(DOCS)
    return __import__("write_reference")


@pytest.fixture
def schema(writer: ModuleType) -> dict[str, Any]:
    return recipe_schema(writer.SECTIONS)


def others() -> list[str]:
    """Libraries whose options are in the files, in another release than the files are made with."""
    pinned = dict(re.findall(r"^(\w+)==([\w.]+)", (DOCS.parent / "constraints.txt").read_text(encoding="utf-8"), re.M))
    return [name for name in ("transformers", "trl", "peft") if metadata.version(name) != pinned[name]]


@pytest.mark.skipif(bool(others()), reason=f"the files say the options of other releases of {', '.join(others())}")
@pytest.mark.parametrize("name", ["reference.md", "recipe.schema.json"])
def test_the_committed_file_is_what_the_declarations_say(writer: ModuleType, name: str) -> None:
    made = writer.files()[DOCS / name]
    assert (DOCS / name).read_text(encoding="utf-8") == made, f"docs/{name} is not up to date: run `make reference`"


def test_examples_of_the_writer_hold(writer: ModuleType) -> None:
    assert doctest.testmod(writer) == (0, 1)


def test_the_page_has_every_method_task_and_key(writer: ModuleType, schema: dict[str, Any]) -> None:
    page = writer.reference()
    for kind in BUILT_IN:
        assert re.search(rf"^### .*: `{kind.id}`$", page, re.M)
        assert kind.paper in page
    for name in (PLAIN_LORA, *TASKS):
        assert f"`{name}`" in page
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\| (.+) \|$", page, re.M))
    keys = {key for name in writer.SECTIONS for key in properties(schema, name)}
    of_one_source = {"source", "weight"}  # entries of a list, to which no key of a recipe leads
    assert {key.rpartition(".")[2] for key in keys} | of_one_source == set(rows)


def test_methods_of_other_packages_do_not_change_the_files(schema: dict[str, Any]) -> None:
    kinds = {*(kind.id for kind in BUILT_IN), PLAIN_LORA}
    defined = schema["$defs"]
    assert {node["properties"]["name"]["const"] for node in defined.values() if "const" in name_of(node)} == kinds


def name_of(node: Mapping[str, Any]) -> Mapping[str, Any]:
    return node["properties"].get("name", {})


@pytest.mark.parametrize(
    ("key", "taken", "refused"),
    [
        ("training.warmup", [0, 0.1, 500], [1.5, -1]),
        ("method.search", [0.5, 1.0, 2], [0, 1.5]),
        ("method.budget.average_rank", [8, 0.5, None], [0]),
        ("data.validation", [0.1, "dev.jsonl"], [0, 1.5, ""]),
        ("data.labels", ["regression", ["a", "b"], None], [["a"], "classes"]),
        ("training.trainer", [{"optim": "sgd"}], ["sgd", None, {"optimizer": "sgd"}]),
        ("data.also", [{"other": "other.jsonl"}], [{"other": 1}]),
    ],
)
def test_the_schema_has_ranges_that_a_function_checks(
    schema: dict[str, Any], key: str, taken: list[Any], refused: list[Any]
) -> None:
    node = properties(schema, "autolora")[key]
    assert [value for value in taken if not fits(value, node)] == []
    assert [value for value in refused if fits(value, node)] == []


@pytest.mark.parametrize("path", list_recipes().values(), ids=list_recipes())
def test_packaged_recipes_fit_the_schema(schema: dict[str, Any], path: Path) -> None:
    tree = read_recipe_file(path).tree
    known = properties(schema, tree["method"]["name"])
    for key, value in leaves(tree, known):
        assert fits(value, known[key]), key
    assert set(schema["required"]) <= set(tree)


def test_the_page_has_every_option_that_is_not_taken_and_why(writer: ModuleType) -> None:
    page = writer.reference()
    for options in OPTIONS:
        _, _, section = page.partition(f"### `{options.key[-1]}`\n")
        rows = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", section.partition("\n## ")[0], re.M))
        in_a_task = [name for refused in options.refused_in.values() for name in refused]
        assert list(rows) == [*options.ours, *options.instead, *options.refused, *in_a_task]
        assert {rows[name] for name in options.refused} == set(options.refused.values())


def properties(schema: Mapping[str, Any], method: str) -> dict[str, Any]:
    """The schema of every key of a recipe with a method, by the key with dots."""
    return dict(_walk(schema, schema["$defs"], method, ""))


def _walk(node: Mapping[str, Any], defined: Mapping[str, Any], method: str, prefix: str) -> Iterator[tuple[str, Any]]:
    for key, inner in node["properties"].items():
        yield prefix + key, inner
        for kind in (inner, *inner.get("anyOf", ()), *inner.get("oneOf", ())):
            section = defined.get(kind.get("$ref", "").rpartition("/")[2])
            if section is not None and name_of(section).get("const", method) == method:
                yield from _walk(section, defined, method, f"{prefix}{key}.")


def leaves(tree: Mapping[str, Any], known: Collection[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The keys without keys below them; a mapping whose keys the user chooses is one value."""
    for key, value in tree.items():
        if isinstance(value, dict) and any(other.startswith(f"{prefix}{key}.") for other in known):
            yield from leaves(value, known, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def fits(value: Any, node: Mapping[str, Any]) -> bool:
    """Whether a value fits a schema, as far as recipes need JSON Schema."""
    if "anyOf" in node:
        return any(fits(value, kind) for kind in node["anyOf"])
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    number = isinstance(value, int | float) and not isinstance(value, bool)
    right = {
        "integer": number and whole,
        "number": number,
        "string": isinstance(value, str),
        "boolean": isinstance(value, bool),
        "null": value is None,
        "array": isinstance(value, list),
        "object": isinstance(value, dict),
    }
    if not right[node["type"]]:
        return False
    if number:
        return (
            node.get("minimum", value) <= value <= node.get("maximum", value)
            and not value <= node.get("exclusiveMinimum", float("-inf"))
            and not value >= node.get("exclusiveMaximum", float("inf"))
        )
    if isinstance(value, dict):
        named, others = node.get("properties", {}), node.get("additionalProperties", {})
        kinds = {key: named.get(key, others) for key in value}
        return all(kind is not False and ("type" not in kind or fits(value[key], kind)) for key, kind in kinds.items())
    if isinstance(value, list):
        return len(value) >= node.get("minItems", 0) and all(fits(item, node["items"]) for item in value)
    choices = node.get("enum", [node.get("const", value)])
    return value in choices and (not isinstance(value, str) or len(value) >= node.get("minLength", 0))
