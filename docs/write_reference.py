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
from typing import Any

from pydantic import BaseModel

from loralloc.errors import either
from loralloc.methods.base import Method
from loralloc.methods.registry import BUILT_IN, PLAIN_LORA, sections_of
from loralloc.methods.settings import BudgetSection
from loralloc.recipe.json_schema import as_text, recipe_schema, tidy
from loralloc.recipe.passthrough import LOAD, OPTIONS, PEFT, TRAINER
from loralloc.recipe.schema import Recipe
from loralloc.recipe.sections import (
    CompareConfig,
    EvaluateConfig,
    GenerateConfig,
    LoraSection,
    ModelConfig,
    TrainingConfig,
)
from loralloc.recipe.source import Key, dotted
from loralloc.tasks.spec import TASKS, DataSection, Task, WeightedSource

FOLDER = Path(__file__).resolve().parent
PAGE, SCHEMA = FOLDER / "reference.md", FOLDER / "recipe.schema.json"

SECTIONS = sections_of(BUILT_IN)
"""The `method` sections of this package's own methods: what else is installed must not change the files."""

INTRODUCTION = """\
# Recipes: every key

Generated from the code by `make reference`; do not edit. A key without a default is required. [Papers](papers.md) says
what a method's option means in its paper, [How to choose](how-to-choose.md) which method fits. `loralloc init` lists
recipes to copy.

## In an editor

[recipe.schema.json](recipe.schema.json) is the JSON schema of a recipe. Editors with the YAML language server (Red
Hat's extension for VS Code, and many others) use it to complete keys, show their meaning and underline mistakes. For
this, the first line of the recipe names the schema, as a path relative to the recipe or as a URL:

```yaml
# yaml-language-server: $schema=docs/recipe.schema.json
```

It knows the methods of this package and checks one key at a time. `loralloc train RECIPE --dry-run` also checks rules
over several keys. `loralloc schema --output recipe.schema.json` writes a schema with the methods of all installed
packages.

## Every option of the libraries

Options without a key of their own go into three mappings, under their names in transformers and PEFT:

```yaml
training:
  trainer:                    # any field of the class of the trainer's arguments
    optim: sgd
    report_to: tensorboard    # with the ranks; event files are in RUN/checkpoints/runs
lora:
  peft:                       # any field of LoraConfig
    use_rslora: true
model:
  load:                       # any argument of from_pretrained
    attn_implementation: sdpa
```

On the command line they are flags like all other keys: `--training.trainer.optim sgd`, or `--optim sgd`. Before
anything is loaded, an unknown name is refused with the most similar known one, and a value that the library does not
accept with the library's reason. The tables below list options that another key sets, and options that cannot be set.

* Trackers (`report_to`) get the training's values and evaluations during it; final results are in RUN/metrics.json.
* With `load_best_model_at_end`, the best model is exported. If ranks are allocated, set `eval_delay` so that
  evaluations begin with the final ranks.
* With `push_to_hub`, the exported adapter is pushed once, to `hub_model_id` or to a repository named like the run's
  folder.
* A token in a recipe is also written into RUN/recipe.yaml; log in with `hf auth login` instead.
"""


def reference() -> str:
    """Return the page: every key of a recipe, section by section."""
    return "\n".join((INTRODUCTION, *_sections())).rstrip() + "\n"


def _sections() -> Iterator[str]:
    yield _section("## Top level", "The keys of a recipe.", Recipe)
    yield _section("## `model`", _summary(ModelConfig), ModelConfig)
    yield _options(LOAD)
    yield _section("## `data`", f"{_summary(DataSection)} These keys are the same for every task.", DataSection)
    yield _section("### `train`", "One of several sources of training data, with its weight.", WeightedSource)
    for name, task in TASKS.items():
        yield _section(f"### `{name}`", _of_task(task), task.data, task.keys)
    titles = {kind.id: f"{kind.label[0].upper()}{kind.label[1:]}: `{kind.id}`" for kind in BUILT_IN}
    titles[PLAIN_LORA] = f"Plain LoRA: `{PLAIN_LORA}`"
    yield "## `method`\n\n" + _wrapped(
        f"`name` is one of {either(f'[{name}](#{_anchor(titles[name])})' for name in titles)}."
    )
    for kind in BUILT_IN:
        yield _section(f"### {titles[kind.id]}", f"{_source(kind)} {_summary(kind)}", SECTIONS[kind.id])
    yield _section(f"### {titles[PLAIN_LORA]}", _summary(SECTIONS[PLAIN_LORA]), SECTIONS[PLAIN_LORA])
    yield _section("### `budget`", _summary(BudgetSection), BudgetSection)
    yield _section("## `lora`", _summary(LoraSection), LoraSection)
    yield _options(PEFT)
    yield _section("## `training`", _summary(TrainingConfig), TrainingConfig)
    yield _options(TRAINER)
    yield _section("## `evaluate`", _summary(EvaluateConfig), EvaluateConfig)
    yield _section("### `generate`", _summary(GenerateConfig), GenerateConfig)
    yield _section("## `compare`", _summary(CompareConfig), CompareConfig)


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
    needs = either(forms) if len(forms) == 1 else f"exactly one of {either(forms)}"
    least, reason = task.shortest
    shortest = f" `max_length` is at least {least}: {reason}." if reason else ""
    label = f"{task.label[0].upper()}{task.label[1:]}"
    return f"{label}, with `{task.model_class}`; judged by {either(metrics)}. Columns to name: {needs}.{shortest}"


def _section(heading: str, text: str, kind: type[BaseModel], keys: Collection[str] | None = None) -> str:
    """A heading, a text, and the table of a section's keys, or of some of them."""
    declared = tidy(kind.model_json_schema())
    rows = ["| key | value | default | |", "|---|---|---|---|"]
    for key, node in declared["properties"].items():
        if keys is None or key in keys:
            default = "" if key in declared.get("required", ()) else f" `{_shown(node['default'])}`"
            description = node["description"].replace("[", r"\[")  # as text: brackets would make a link
            rows.append(f"| `{key}` | {either(_values(key, node))} |{default} | {description} |")
    return "\n".join((heading, "", _wrapped(text), *rows, ""))


def _options(key: Key) -> str:
    """What a mapping of a library's options takes, and the table of what it does not."""
    options = next(options for options in OPTIONS if options.key == key)
    owners = either(f"`{owner}`" for owner in dict.fromkeys(options.owners.values()))
    text = f"Any option of {owners}, by its own name, except these:"
    rows = [f"| `{name}` | set `{ours}` |" for name, ours in options.ours.items()]
    rows += [f"| `{name}` | not together with `{dotted(instead)}` |" for name, instead in options.instead.items()]
    rows += [f"| `{name}` | {reason} |" for name, reason in options.refused.items()]
    for task, refused in options.refused_in.items():
        rows += [f"| `{name}` | with task {task}: {reason} |" for name, reason in refused.items()]
    return "\n".join((f"### `{key[-1]}`", "", _wrapped(text), "| option | |", "|---|---|", *rows, ""))


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
    if node["type"] == "object":
        named = "patternProperties" in node or node.get("additionalProperties")
        return ["mapping"] if named else [f"[options](#{key})"]
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
    return {PAGE: reference(), SCHEMA: as_text(recipe_schema(SECTIONS))}


if __name__ == "__main__":
    for path, text in files().items():
        path.write_text(text, encoding="utf-8")
