"""`loralloc init`: list the packaged recipes, or copy one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loralloc.cli import completion
from loralloc.cli.completion import purpose
from loralloc.errors import UserError
from loralloc.files import check_writable, in_shell
from loralloc.recipes import list_recipes, recipe_text


def init(
    name: Annotated[
        str | None,
        typer.Argument(
            help="Recipe to copy, TASK/METHOD or papers/NAME; without it, list them.", autocompletion=completion.recipes
        ),
    ] = None,
    to: Annotated[Path | None, typer.Option(help="File to write; by default METHOD.yaml here.")] = None,
) -> None:
    """List the recipes that come with loralloc, or copy one to edit."""
    if name is None:
        for recipe, path in list_recipes().items():
            typer.echo(f"{recipe:34} {purpose(path)}")
        typer.echo("\nCopy one with: loralloc init NAME")
        return
    text = recipe_text(name)
    target = to or Path(f"{name.rpartition('/')[2]}.yaml")
    if target.exists():
        raise UserError(f"{target} exists; nothing was overwritten: choose another file with --to")
    check_writable(target.absolute().parent, str(target), "choose another file with --to")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")
    typer.echo(f"wrote {target}; edit it, then: loralloc train {in_shell(target)}")
