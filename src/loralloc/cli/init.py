"""`loralloc init`: list the packaged recipes, or copy one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loralloc.errors import UserError
from loralloc.recipes import list_recipes, recipe_text


def init(
    name: Annotated[str | None, typer.Argument(help="Recipe to copy, TASK/METHOD; without it, list them.")] = None,
    to: Annotated[Path | None, typer.Option(help="File to write; by default METHOD.yaml here.")] = None,
) -> None:
    """List the recipes that come with loralloc, or copy one to edit."""
    if name is None:
        for recipe, path in list_recipes().items():
            typer.echo(f"{recipe:32} {_purpose(path)}")
        typer.echo("\nCopy one with: loralloc init NAME")
        return
    text = recipe_text(name)
    target = to or Path(f"{name.rpartition('/')[2]}.yaml")
    if target.exists():
        raise UserError(f"{target} exists; nothing was overwritten: choose another file with --to")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")
    typer.echo(f"wrote {target}; edit it, then: loralloc train {target}")


def _purpose(path: Path) -> str:
    """The first sentence of a recipe's header."""
    header = [line.lstrip("# ") for line in path.read_text(encoding="utf-8").splitlines()[:4] if line.startswith("#")]
    return " ".join(header).partition(". ")[0].partition(":")[0]
