"""`loralloc schema`: the JSON schema of recipes."""

from __future__ import annotations

import json
from pathlib import Path

from loralloc.methods.registry import sections
from loralloc.recipe.json_schema import as_text, recipe_schema

from .command import done, refused


def test_is_printed(here: Path) -> None:
    schema = json.loads(done("schema"))
    assert schema == recipe_schema(sections())
    assert list(here.iterdir()) == []


def test_is_written_and_written_anew(here: Path) -> None:
    said = done("schema", "--output", "editor/recipe.schema.json")
    path = here / "editor" / "recipe.schema.json"
    assert said == (
        "wrote editor/recipe.schema.json; the first line of a recipe beside it: "
        "# yaml-language-server: $schema=recipe.schema.json\n"
    )
    assert path.read_text(encoding="utf-8") == as_text(recipe_schema(sections()))
    path.write_text('{"$schema": "an older one"}', encoding="utf-8")
    done("schema", "--output", path)
    assert "task" in json.loads(path.read_text(encoding="utf-8"))["properties"]


def test_nothing_else_is_overwritten(here: Path) -> None:
    recipe = here / "recipe.yaml"
    recipe.write_text("task: causal-lm\n", encoding="utf-8")
    assert refused("schema", "--output", recipe) == (
        f"{recipe} exists and is no JSON schema; nothing was overwritten: choose another file"
    )
    assert refused("schema", "--output", here).startswith(f"{here} exists and is no JSON schema")
    assert recipe.read_text(encoding="utf-8") == "task: causal-lm\n"


def test_names_the_options_of_the_libraries_and_not_those_that_are_refused() -> None:
    schema = recipe_schema(sections())
    trainer = schema["$defs"]["TrainingConfig"]["properties"]["trainer"]
    assert trainer["additionalProperties"] is False
    assert trainer["properties"]["optim"] == {"description": "The optimizer to use"}
    assert {"max_steps", "deepspeed"} & set(trainer["properties"]) == set()
    assert "use_rslora" in schema["$defs"]["LoraSection"]["properties"]["peft"]["properties"]
    assert "attn_implementation" in schema["$defs"]["ModelConfig"]["properties"]["load"]["properties"]
