"""Code on the README and the pages is an excerpt of files that tests run: the comment above a block says of which one.

Parts of recipes may also stand without a file. They are laid over a packaged recipe: the one that the comment names, or
AdaLoRA's for their task, a classifier's where they name none. Sections are merged key by key, but for the data.
"""

from __future__ import annotations

import ast
import json
import re
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from loralloc.recipe.schema import load_recipe
from loralloc.recipes import list_recipes

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"^(?:<!-- (?P<origin>\S+) -->\n)?```(?P<language>python|yaml|toml|json)\n(?P<code>.*?)^```", re.M | re.S
)
RUN_BY_TESTS = (
    r"examples/(quickstart|accelerate_loop)\.py|examples/own_method/\w+\.py|tests/(\w+/)*test_\w+\.py|"
    r"src/loralloc/methods/(\w+/)?\w+\.py"
)
RECIPES = r"(src/loralloc/recipes|examples)/.*\.yaml"
PROJECTS = r"examples/own_method/pyproject\.toml"
ORIGINS = {"python": RUN_BY_TESTS, "yaml": RECIPES, "toml": PROJECTS}
TASK = "sequence-classification"
INDENTS = [" " * depth for depth in (0, 4, 8, 12)]


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
        shapes = [f"\n{textwrap.indent(paragraph, indent)}\n" for indent in INDENTS]
        found = next((shape for shape in shapes if shape in rest), None)
        if found is None:
            lacking.append(paragraph)
        else:
            rest = rest[rest.index(found) + len(found) - 1 :]
    return lacking


def completed(block: Block) -> str | None:
    """A part of a recipe as a whole one; None where it has no keys."""
    part: Any = yaml.safe_load(block.code)
    if part is None or {"model", "data", "method"} <= set(part):
        return part and block.code
    name = f"{part.get('task', TASK)}/adalora" if block.origin is None else block.origin.removeprefix("over:")
    whole = yaml.safe_load(list_recipes()[name].read_text(encoding="utf-8"))
    for key, value in part.items():
        merged = isinstance(value, dict) and key != "data"
        whole[key] = {**whole.get(key, {}), **value} if merged else value
    return yaml.safe_dump(whole)


def check_yaml(block: Block, path: Path) -> None:
    """Read a part of a recipe, or a configuration of accelerate, as the program reads it that takes it."""
    path.write_text(block.code, encoding="utf-8")
    if block.origin == "accelerate-config":
        assert (
            load_config_from_file(str(path)).fsdp_config["fsdp_version"] == 2
        )  # it refuses keys that it does not know
        return
    whole = completed(block)
    if whole is not None:
        path.write_text(whole, encoding="utf-8")
        load_recipe(path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_is_an_excerpt_of_what_a_test_runs_or_is_read(page: Path, tmp_path: Path) -> None:
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.language == "json":
            assert all(isinstance(json.loads(line), dict) for line in block.code.splitlines())
        elif block.origin is not None and re.fullmatch(ORIGINS[block.language], block.origin):
            lacking = missing(block, (ROOT / block.origin).read_text(encoding="utf-8"))
            assert lacking == [], f"not in {block.origin}"
        else:
            assert block.language == "yaml", f"name the file above this block, as <!-- FILE -->:\n{block.code}"
            check_yaml(block, tmp_path / "recipe.yaml")


def test_blocks_are_found() -> None:
    found = [block.language for page in PAGES for block in blocks(page.read_text(encoding="utf-8"))]
    assert set(found) == {"python", "yaml", "toml", "json"}
    assert found.count("python") > 15


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


def test_a_wrong_key_in_a_part_of_a_recipe_is_found(tmp_path: Path) -> None:
    (block,) = blocks("<!-- over:causal-lm/adalora -->\n```yaml\ntraining:\n  bach_size: 4\n```\n")
    with pytest.raises(Exception, match=r"unknown key .*bach_size"):
        check_yaml(block, tmp_path / "recipe.yaml")
