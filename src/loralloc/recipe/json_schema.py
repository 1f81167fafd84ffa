"""The JSON schema of recipes: with it, an editor completes keys, shows what they mean, and checks their values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Union

from pydantic import Field, create_model

from loralloc.recipe.schema import Recipe
from loralloc.setting_types import MethodSection

BOUNDS = {"gt": "exclusiveMinimum", "ge": "minimum", "lt": "exclusiveMaximum", "le": "maximum"}
"""What pydantic calls the bounds of an integer or float in a schema, and what JSON Schema calls them."""


def recipe_schema(sections: Mapping[str, type[MethodSection]]) -> dict[str, Any]:
    """Return the JSON schema of a recipe.

    Args:
        sections: The `method` sections that a recipe may have, by the name of the method.
    """
    method: Any = Union[tuple(sections.values())]  # noqa: UP007 - made at run time
    chosen = Field(discriminator="name", description=Recipe.model_fields["method"].description)
    recipe: Any = create_model("Recipe", __base__=Recipe, __doc__=Recipe.__doc__, method=(method, chosen))
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **tidy(recipe.model_json_schema())}


def tidy(node: Any) -> Any:
    """Turn a schema by pydantic into plain JSON Schema, without generated titles and notes for OpenAPI.

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
        made["description"] = text.partition("\n\n")[0]  # the summary of a docstring
    return made


def _is_noise(key: str, value: Any) -> bool:
    """Whether it is the title that pydantic makes of a name, or a note for OpenAPI."""
    return (key == "title" and isinstance(value, str)) or (key == "discriminator" and "mapping" in value)


def as_text(schema: Mapping[str, Any]) -> str:
    """Write a schema as the text of a file."""
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"
