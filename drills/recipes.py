"""Recipes of strangers, read with all their rules."""

from __future__ import annotations

from functools import cache
from typing import Any

import yaml
from hypothesis import strategies as st

from drills.attempt import Place, attempts
from drills.grammar import FILES, damaged, mutated, put
from drills.outcome import Outcome

BOMB = "\n".join(["a0: &a0 [x, x]", *(f"a{depth}: &a{depth} [*a{depth - 1}, *a{depth - 1}]" for depth in range(1, 40))])
ATTACKS = (
    BOMB,
    "task: !!python/object/apply:os.system ['true']",
    "? {a: b}\n: c",
    "%YAML 9.9\n---\na: b",
    "- a\n- b",
    "\0",
)


@cache
def _recipe(name: str) -> Any:
    from loralloc.recipes import recipe_text

    return yaml.safe_load(recipe_text(name))


@cache
def _names() -> list[str]:
    from loralloc.recipes import list_recipes

    return list(list_recipes())


@st.composite
def _cases(draw: st.DrawFn) -> tuple[bytes, str]:
    tree = draw(mutated(_recipe(draw(st.sampled_from(_names())))))
    text = yaml.safe_dump(tree, allow_unicode=True) if draw(st.booleans()) else _flow(tree)
    text = draw(st.sampled_from([text] * 12 + [f"{text}\n{attack}" for attack in ATTACKS] + list(ATTACKS)))
    return draw(damaged(text)), draw(FILES)


def _flow(tree: Any) -> str:
    """The same in brackets."""
    return yaml.safe_dump(tree, allow_unicode=True, default_flow_style=True, width=2**30)


def _run(place: Place, case: tuple[bytes, str]) -> None:
    from loralloc.recipe.schema import dump_recipe, load_recipe, peek_recipe

    path = place.inside / "recipe.yaml"
    put(path, *case, place.outside)
    peek_recipe(path)
    recipe = load_recipe(path)
    (place.written / "again.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(place.written / "again.yaml") == recipe


def drill(seed: int, cases: int) -> Outcome:
    """Read recipes; a recipe that is read is the same when it was written again."""
    return attempts("recipes", _cases(), _run, cases, seed)
