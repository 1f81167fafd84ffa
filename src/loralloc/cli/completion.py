"""Shell completion: names of recipes, and paths that a command takes.

Every press of the tab key starts the command line anew, so nothing heavy is imported, and folders are not searched
deeply.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from loralloc.recipes import list_recipes

MOST = 200
"""Paths that are offered at once."""


def recipes(incomplete: str) -> list[tuple[str, str]]:
    """Names of packaged recipes, each with what it is for."""
    return [(name, purpose(path)) for name, path in list_recipes().items() if name.startswith(incomplete)]


def purpose(path: Path) -> str:
    """The first sentence of a recipe's header."""
    header = [line.lstrip("# ") for line in path.read_text(encoding="utf-8").splitlines()[:4] if line.startswith("#")]
    return " ".join(header).partition(". ")[0].partition(":")[0]


def recipe_files(incomplete: str) -> list[str]:
    """Recipes on disk."""
    return _below(incomplete, ["*.yaml", "*/*.yaml", "*.yml", "*/*.yml"])


def runs(incomplete: str) -> list[str]:
    """Run folders."""
    return _holding("recipe.yaml", incomplete)


def adapters(incomplete: str) -> list[str]:
    """Folders of PEFT adapters."""
    return _holding("adapter_config.json", incomplete)


def data_files(incomplete: str) -> list[str]:
    """Files that data are read from."""
    from loralloc.tasks.locations import READABLE

    return _below(
        incomplete, [f"{depth}*{ending}{gz}" for ending in READABLE for gz in ("", ".gz") for depth in ("", "*/")]
    )


def _holding(file: str, incomplete: str) -> list[str]:
    """Folders that hold a file."""
    found = _below(incomplete, [f"{'*/' * depth}{file}" for depth in (1, 2, 3)])
    return [path.removesuffix(f"/{file}") for path in found]


def _below(incomplete: str, patterns: Sequence[str]) -> list[str]:
    """Paths that match a pattern in or below the folder of an incomplete path; they begin as the user has typed it."""
    head, slash, _ = incomplete.rpartition("/")
    start = head + slash
    folder = Path(start or ".").expanduser()

    def found() -> Iterator[str]:
        for pattern in patterns:
            for path in folder.glob(pattern):
                below = path.relative_to(folder)
                if not any(part.startswith(".") for part in below.parts):
                    yield f"{start}{below.as_posix()}"

    return sorted(islice((path for path in found() if path.startswith(incomplete)), MOST))
