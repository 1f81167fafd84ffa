"""`loralloc schema`: the JSON schema of recipes, for editors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loralloc.errors import UserError
from loralloc.files import check_writable


def schema(
    output: Annotated[Path | None, typer.Option(help="File to write; without it, the schema is printed.")] = None,
) -> None:
    """Write the JSON schema of recipes, with the methods of all installed packages: editors complete and check by it.

    The first line of a recipe says where it is: # yaml-language-server: $schema=recipe.schema.json
    """
    if output is not None and output.exists() and not _is_schema(output):
        raise UserError(f"{output} exists and is no JSON schema; nothing was overwritten: choose another file")
    if output is not None:
        check_writable(output.absolute().parent, "--output", "choose another file")
    from loralloc.methods.registry import sections
    from loralloc.recipe.json_schema import as_text, recipe_schema

    text = as_text(recipe_schema(sections()))
    if output is None:
        typer.echo(text, nl=False)
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text, encoding="utf-8")
    typer.echo(f"wrote {output}; the first line of a recipe beside it: # yaml-language-server: $schema={output.name}")


def _is_schema(path: Path) -> bool:
    return path.is_file() and '"$schema"' in path.read_text(encoding="utf-8", errors="replace")
