"""Recipes that come with the package: examples to copy and edit, each one tested."""

from __future__ import annotations

from pathlib import Path

from loralloc.errors import UserError, closest


def list_recipes() -> dict[str, Path]:
    """Find the packaged recipes.

    Returns:
        The file of each recipe, by name, sorted.

    >>> "demo/adalora" in list_recipes()
    True
    """
    folder = Path(__file__).parent
    files = sorted(folder.glob("*/*.yaml"), key=lambda file: file.with_suffix(""))
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}


def recipe_text(name: str) -> str:
    """Read a packaged recipe.

    Args:
        name: Its name, such as `causal-lm/adalora` or `papers/adalora-cola`.

    Returns:
        The YAML, comments included.

    Raises:
        UserError: If there is no such recipe.
    """
    recipes = list_recipes()
    if name not in recipes:
        raise UserError(f'there is no recipe "{name}".{closest(name, recipes)} Recipes: {", ".join(recipes)}')
    return recipes[name].read_text(encoding="utf-8")
