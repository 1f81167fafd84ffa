"""The README's code is an excerpt of files that tests run: the comment above a block says of which one."""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest

from loralloc.recipe.schema import load_recipe

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^(?:<!-- (?P<origin>\S+) -->\n)?```(?P<language>python|yaml)\n(?P<code>.*?)^```", re.M | re.S)
RUN_BY_TESTS = r"examples/quickstart\.py|tests/(\w+/)*test_\w+\.py"
RECIPES = r"(src/loralloc/recipes|examples)/.*\.yaml"


class Block(NamedTuple):
    origin: str | None
    language: str
    code: str


def blocks(text: str) -> list[Block]:
    return [Block(**found.groupdict()) for found in BLOCK.finditer(text)]


def imported(code: str) -> set[tuple[str | None, str]]:
    """What a file or a block imports by name."""
    nodes = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)]
    return {(node.module, alias.name) for node in nodes for alias in node.names}


def missing(block: Block, source: str) -> list[str]:
    """What of a block is not in a file: paragraphs that are not there literally and in order, at one indentation.

    Of imports, the names count: a block shows those that it needs.
    """
    lacking = []
    if block.language == "python":
        lacking += [f"import of {name}" for _, name in sorted(imported(block.code) - imported(source))]
    rest = f"\n{source}"
    for paragraph in re.split(r"\n\n+", block.code.strip("\n")):
        if re.match(r"(from|import) ", paragraph):
            continue
        shapes = [f"\n{textwrap.indent(paragraph, indent)}\n" for indent in ("", "    ")]
        found = next((shape for shape in shapes if shape in rest), None)
        if found is None:
            lacking.append(paragraph)
        else:
            rest = rest[rest.index(found) + len(found) - 1 :]
    return lacking


def test_every_block_of_the_readme_is_an_excerpt_of_what_a_test_runs(tmp_path: Path) -> None:
    found = blocks((ROOT / "README.md").read_text(encoding="utf-8"))
    assert {block.language for block in found} == {"python", "yaml"}
    for block in found:
        if block.origin is None:
            assert block.language == "yaml", f"name the file above this block, as <!-- FILE -->:\n{block.code}"
            path = tmp_path / "recipe.yaml"
            path.write_text(block.code, encoding="utf-8")
            load_recipe(path)
        else:
            assert re.fullmatch(RUN_BY_TESTS if block.language == "python" else RECIPES, block.origin), block.origin
            lacking = missing(block, (ROOT / block.origin).read_text(encoding="utf-8"))
            assert lacking == [], f"not in {block.origin}"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("from math import pi\n\nx = pi\n", []),
        ("x = pi\n\ny = x  # twice\n", []),
        ("y = x  # twice\n\nx = pi\n", ["x = pi"]),
        ("from math import tau\n\nx = tau\n", ["import of tau", "x = tau"]),
        ("y = x\n", ["y = x"]),
        ("x = p\n", ["x = p"]),
    ],
)
def test_what_is_not_in_a_file_is_found(code: str, expected: list[str]) -> None:
    source = "from math import e, pi\n\nx = pi\n\ndef f():\n    y = x  # twice\n"
    (block,) = blocks(f"text\n\n<!-- file.py -->\n```python\n{code}```\n")
    assert block.origin == "file.py"
    assert missing(block, source) == expected
