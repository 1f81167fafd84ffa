"""The files that a recipe reads: a command that is to delete others must not delete them."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from loralloc.errors import UserError
from loralloc.recipe.schema import Recipe
from loralloc.tasks.locations import named_sources


def check_kept(recipe: Recipe, folder: Path, doomed: Collection[str], doing: str) -> None:
    """Refuse to delete what a recipe reads.

    Args:
        recipe: The recipe.
        folder: The folder in which something is to be deleted.
        doomed: What is to be deleted in it, by name.
        doing: What deletes it, for the message.

    Raises:
        UserError: The model, the plan or a source of data is there.
    """
    root = folder.resolve()
    for key, name in (("model.name", recipe.model.name), ("plan", recipe.plan), *_sources(recipe)):
        path = Path(name or "").expanduser()
        # Also by the name as it is given: if a link on the way is deleted, the name leads nowhere.
        ways = [step for way in (path.absolute(), path.resolve()) for step in (way, *way.parents)]
        if name and path.exists() and any(step.name in doomed and step.parent.resolve() == root for step in ways):
            raise UserError(
                f"{key}: {doing} deletes {name}, which is read here; move it out of {folder}, or choose another folder "
                "with --output"
            )


def _sources(recipe: Recipe) -> list[tuple[str, str]]:
    return [("data", source) for source in named_sources(recipe.data)]
