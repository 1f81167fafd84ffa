"""Write what is made from the declarations of recipes, methods and tasks: reference.md and recipe.schema.json.

python docs/write_reference.py
"""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Union

from pydantic import BaseModel, Field, create_model

from loralloc.methods.base import Method
from loralloc.methods.registry import BUILT_IN, PLAIN_LORA, sections_of
from loralloc.methods.settings import BudgetSection
from loralloc.recipe.schema import (
    EvaluateConfig,
    GenerateConfig,
    LoraSection,
    ModelConfig,
    Recipe,
    TrainingConfig,
    listed,
)
from loralloc.tasks.spec import TASKS, DataSection, Task, WeightedSource

FOLDER = Path(__file__).resolve().parent
PAGE, SCHEMA = FOLDER / "reference.md", FOLDER / "recipe.schema.json"

SECTIONS = sections_of(BUILT_IN)
"""The `method` sections of this package's own methods: what else is installed must not change the files."""

INTRODUCTION = """\
# Recipes: every key

Made from the code by `make reference`; do not edit. A key without a default must be given. What an option of a method
means in its paper is in [papers.md](papers.md), which method fits in [how-to-choose.md](how-to-choose.md), and
`loralloc init` lists recipes to copy.

## In an editor

[recipe.schema.json](recipe.schema.json) is the JSON schema of a recipe. Editors that use the YAML language server (Red
Hat's extension for VS Code, and many others) complete keys, show what they mean and underline what is wrong, when the
first line of the recipe says where the schema is, as a path from the recipe or as an address:

```yaml
# yaml-language-server: $schema=docs/recipe.schema.json
```

It knows the methods of this package and checks one key at a time; `loralloc train RECIPE --dry-run` checks the rules
over several keys too. A schema with the methods of all installed packages is written by

```sh
python -c "import json, loralloc.recipe.schema as s; print(json.dumps(s.complete_recipe().model_json_schema()))"
```
"""

BOUNDS = {"gt": "exclusiveMinimum", "ge": "minimum", "lt": "exclusiveMaximum", "le": "maximum"}
"""What pydantic calls the bounds of an integer or float in a schema, and what JSON Schema calls them."""


def schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe."""
    method: Any = Union[tuple(SECTIONS.values())]  # noqa: UP007 - made at run time
    chosen = Field(discriminator="name", description=Recipe.model_fields["method"].description)
    recipe: Any = create_model("Recipe", __base__=Recipe, __doc__=Recipe.__doc__, method=(method, chosen))
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **tidy(recipe.model_json_schema())}


def tidy(node: Any) -> Any:
    """Write a schema of pydantic's in JSON Schema's words only, without what no reader needs.

    >>> tidy({"title": "Eta", "gt": 0, "anyOf": [{"type": "integer"}, {"type": "number"}]})
    {'exclusiveMinimum': 0, 'type': 'number'}
    """
    if isinstance(node, list):
        return [tidy(item) for item in node]
    if not isinstance(node, dict):
        return node
    made = {BOUNDS.get(key, key): tidy(value) for key, value in node.items() if not _is_noise(key, value)}
    if made.get("anyOf") == [{"type": "integer"}, {"type": "number"}]:
        made = {key: value for key, value in made.items() if key != "anyOf"} | {"type": "number"}
    if isinstance(text := made.get("description"), str):
        made["description"] = text.partition("\n\n")[0]  # of a docstring its summary
    return made


def _is_noise(key: str, value: Any) -> bool:
    """Whether it is the title that pydantic makes of a name, or a note for OpenAPI."""
    return (key == "title" and isinstance(value, str)) or (key == "discriminator" and "mapping" in value)


def reference() -> str:
    """Return the page: every key of a recipe, section by section."""
    return "\n".join((INTRODUCTION, *_sections())).rstrip() + "\n"


def _sections() -> Iterator[str]:
    yield _section("## The whole", "The keys of a recipe.", Recipe)
    yield _section("## `model`", _summary(ModelConfig), ModelConfig)
    yield _section("## `data`", f"{_summary(DataSection)} These keys are the same for every task.", DataSection)
    yield _section("### `train`", "One of several sources of training data, with its weight.", WeightedSource)
    for name, task in TASKS.items():
        yield _section(f"### `{name}`", _of_task(task), task.data, task.keys)
    titles = {kind.id: f"{kind.label[0].upper()}{kind.label[1:]}: `{kind.id}`" for kind in BUILT_IN}
    titles[PLAIN_LORA] = f"Plain LoRA: `{PLAIN_LORA}`"
    yield "## `method`\n\n" + _wrapped(
        f"`name` is one of {listed(f'[{name}](#{_anchor(titles[name])})' for name in titles)}."
    )
    for kind in BUILT_IN:
        yield _section(f"### {titles[kind.id]}", f"{_source(kind)} {_summary(kind)}", SECTIONS[kind.id])
    yield _section(f"### {titles[PLAIN_LORA]}", _summary(SECTIONS[PLAIN_LORA]), SECTIONS[PLAIN_LORA])
    yield _section("### `budget`", _summary(BudgetSection), BudgetSection)
    yield _section("## `lora`", _summary(LoraSection), LoraSection)
    yield _section("## `training`", _summary(TrainingConfig), TrainingConfig)
    yield _section("## `evaluate`", _summary(EvaluateConfig), EvaluateConfig)
    yield _section("### `generate`", _summary(GenerateConfig), GenerateConfig)


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False) + "\n"


def _summary(kind: type) -> str:
    """The first paragraph of a class's docstring."""
    return (inspect.getdoc(kind) or "").partition("\n\n")[0]


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _source(kind: type[Method]) -> str:
    """Where a method is published, and what it is in Python."""
    number = kind.paper.removeprefix("arXiv ")
    paper = f"[{kind.paper}](https://arxiv.org/abs/{number}), " if number != kind.paper else ""
    return f"{paper}`loralloc.{kind.__name__}` in Python."


def _of_task(task: Task) -> str:
    """What a task is, and which columns it needs."""
    metrics = [f"`{name}` ({'more' if more else 'less'} is better)" for name, more in task.metrics.items()]
    forms = [" with ".join(f"`{key}`" for key in form) for form in task.forms]
    needs = listed(forms) if len(forms) == 1 else f"exactly one of {listed(forms)}"
    least, reason = task.shortest
    shortest = f" `max_length` is at least {least}: {reason}." if reason else ""
    label = f"{task.label[0].upper()}{task.label[1:]}"
    return f"{label}, with `{task.model_class}`; judged by {listed(metrics)}. Columns to name: {needs}.{shortest}"


def _section(heading: str, text: str, kind: type[BaseModel], keys: Collection[str] | None = None) -> str:
    """A heading, a text, and the table of a section's keys, or of some of them."""
    declared = tidy(kind.model_json_schema())
    rows = ["| key | value | default | |", "|---|---|---|---|"]
    for key, node in declared["properties"].items():
        if keys is None or key in keys:
            default = "" if key in declared.get("required", ()) else f" `{_shown(node['default'])}`"
            rows.append(f"| `{key}` | {listed(_values(key, node))} |{default} | {node['description']} |")
    return "\n".join((heading, "", _wrapped(text), *rows, ""))


def _shown(default: Any) -> str:
    """A default as YAML writes it; a section's own defaults are in its table."""
    return "{}" if isinstance(default, Mapping) else json.dumps(default, ensure_ascii=False).strip('"')


def _values(key: str, node: Mapping[str, Any]) -> list[str]:
    """What the value of a key may be.

    >>> _values("warmup", {"anyOf": [{"type": "number", "minimum": 0, "exclusiveMaximum": 1}, {"type": "null"}]})
    ['number in [0, 1)', '`null`']
    """
    if "$ref" in node or "oneOf" in node:
        return [f"[section](#{key})"]
    if "anyOf" in node:
        return [value for kind in node["anyOf"] for value in _values(key, kind)]
    if "const" in node or "enum" in node:
        return [f"`{word}`" for word in node.get("enum", [node.get("const")])]
    if node["type"] == "array":
        least = f"at least {node['minItems']} " if node.get("minItems", 1) > 1 else ""
        kinds = _values(key, node["items"])
        return [f"list of {least}{kinds[0] if len(kinds) == 1 else 'values'}"]
    plain = {"integer": ["whole number"], "number": ["number"], "string": ["text"], "null": ["`null`"]}
    return [f"{kind}{_range(node)}" for kind in plain.get(node["type"], ["`true`", "`false`"])]


def _range(node: Mapping[str, Any]) -> str:
    """The range of a number, with a space before it; nothing where there is none."""
    low, above, high, below = (
        node.get(name) for name in ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")
    )
    if (low, above) != (None, None) and (high, below) != (None, None):
        start = f"[{low}" if above is None else f"({above}"
        return f" in {start}, {high}]" if below is None else f" in {start}, {below})"
    signs = {"≥": low, ">": above, "≤": high, "<": below}
    return "".join(f" {sign} {bound}" for sign, bound in signs.items() if bound is not None)


def files() -> Mapping[Path, str]:
    """Return the text of every file that is made."""
    return {PAGE: reference(), SCHEMA: json.dumps(schema(), indent=2, ensure_ascii=False) + "\n"}


if __name__ == "__main__":
    for path, text in files().items():
        path.write_text(text, encoding="utf-8")
