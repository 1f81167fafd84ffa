from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loralloc.errors import UserError
from loralloc.recipe.schema import complete_recipe, dump_recipe, load_recipe, recipe_keys
from loralloc.recipe.source import dump_yaml
from loralloc.recipes import list_recipes

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=12) | st.sampled_from(
    ["1e-3", "yes", "null", "010", "- a", "a: b", " x ", "#", "~", "1_0", "2020-01-01", "=", "<<", "é\x85\u2028"]
)
COUNT = st.integers(1, 2**63 - 1)
WHOLE = st.integers(-(2**63), 2**63 - 1)
UNIT = st.floats(0, 1, exclude_min=True, exclude_max=True)
POSITIVE = COUNT | st.floats(0, 1e300, exclude_min=True)
PHASE = st.floats(0, 0.5, exclude_max=True)
NAMES = TEXT | st.lists(TEXT, min_size=1, max_size=3)


def some(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=fields)


def merged(*parts: st.SearchStrategy[Mapping[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.tuples(*parts).map(lambda dicts: {key: value for part in dicts for key, value in part.items()})


DATA = some(validation=UNIT | TEXT, test=TEXT, max_length=COUNT)
TASKS = st.one_of(
    st.fixed_dictionaries({
        "task": st.just("sequence-classification"),
        "data": merged(
            st.fixed_dictionaries({"train": TEXT, "text": TEXT, "label": TEXT}),
            some(
                text_pair=TEXT,
                labels=st.just("regression") | st.lists(TEXT | WHOLE, min_size=2, max_size=4, unique_by=str),
            ),
            DATA,
        ),
    }),
    st.fixed_dictionaries({
        "task": st.just("causal-lm"),
        "data": merged(
            st.fixed_dictionaries({"train": TEXT}),
            st.one_of(
                st.fixed_dictionaries({"text": TEXT}),
                st.fixed_dictionaries({"prompt": TEXT, "completion": TEXT}),
                st.fixed_dictionaries({"messages": TEXT}),
            ),
            DATA,
        ),
    }),
    st.fixed_dictionaries({
        "task": st.just("seq2seq"),
        "data": merged(
            st.fixed_dictionaries({"train": TEXT, "source": TEXT, "target": TEXT}), some(target_length=COUNT), DATA
        ),
    }),
)  # fmt: skip
BUDGET = st.one_of(
    st.fixed_dictionaries({"average_rank": st.floats(0.1, 12) | st.integers(1, 12)}),
    st.fixed_dictionaries({"total_rank": COUNT}),
    st.fixed_dictionaries({"parameters": COUNT}),
    st.fixed_dictionaries({"fraction": UNIT | st.just(1)}),
)
METHOD = st.just({"name": "lora"}) | merged(
    st.fixed_dictionaries({"name": st.just("adalora"), "budget": BUDGET}),
    some(
        warmup=PHASE,
        interval=COUNT,
        beta1=UNIT,
        importance=st.sampled_from(["smoothed", "sensitivity", "magnitude"]),
        parity=st.sampled_from(["adam", "sgd", "none"]),
        gamma=st.floats(0, 10),
    ),
)
LORA = some(
    r=st.integers(12, 10**9),
    alpha=POSITIVE,
    dropout=st.floats(0, 0.9),
    target_modules=NAMES,
    exclude_modules=NAMES,
    modules_to_save=st.lists(TEXT, max_size=2),
)
TRAINING = merged(
    st.fixed_dictionaries({"steps": COUNT}) | st.fixed_dictionaries({"epochs": POSITIVE}),
    some(
        learning_rate=UNIT,
        warmup=PHASE | st.integers(0, 100),
        seed=st.integers(0, 2**32 - 1),
        eval_every=COUNT,
        bf16=st.booleans(),
    ),
)
RECIPES = merged(
    TASKS,
    st.fixed_dictionaries({
        "model": st.fixed_dictionaries({"name": TEXT}),
        "method": METHOD,
        "lora": LORA,
        "training": TRAINING,
        "output": TEXT,
    }),
)  # fmt: skip


class TestDump:
    @given(RECIPES)
    def test_comes_back_equal(self, tmp_path_factory: pytest.TempPathFactory, tree: dict[str, Any]) -> None:
        recipe = complete_recipe().model_validate(tree)
        path = tmp_path_factory.getbasetemp() / "dumped.yaml"
        path.write_text(dump_recipe(recipe), encoding="utf-8", newline="")
        assert load_recipe(path) == recipe

    def test_is_stable_and_shows_defaults_in_the_order_of_the_models(self, tmp_path: Path) -> None:
        text = dump_recipe(load_recipe(list_recipes()["demo/lora"]))
        path = tmp_path / "dumped.yaml"
        path.write_text(text, encoding="utf-8")
        assert text == dump_recipe(load_recipe(path))
        assert text.startswith("task: sequence-classification\nmodel:\n  name: demo:minilm\n  dtype: float32\n")
        assert "  learning_rate: 0.001\n" in text
        assert "null" not in text

    def test_shared_lists_make_no_aliases(self) -> None:
        names = ["a"]
        recipe = load_recipe(list_recipes()["demo/lora"])
        lora = recipe.lora.model_copy(update={"target_modules": names, "modules_to_save": names})
        assert "*" not in dump_recipe(recipe.model_copy(update={"lora": lora}))


class TestRobustness:
    LINES = st.sampled_from(
        [
            *dump_recipe(load_recipe(list_recipes()["demo/adalora"])).splitlines(),
            "  epochs: .nan",
            "lora: {r: 1e400}",
            "? x",
            "- y",
        ]
    )
    TREE = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda child: (
            st.lists(child, max_size=3)
            | st.dictionaries(st.sampled_from([key.rpartition(".")[2] for key in recipe_keys()]), child, max_size=6)
        ),
        max_leaves=20,
    )

    @given(st.lists(LINES | st.text(max_size=20), max_size=14), st.lists(st.text(max_size=10), max_size=2))
    def test_any_text_is_a_recipe_or_a_user_error(
        self, tmp_path_factory: pytest.TempPathFactory, lines: list[str], words: list[str]
    ) -> None:
        path = tmp_path_factory.getbasetemp() / "random.yaml"
        path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
        with suppress(UserError):
            load_recipe(path, words)

    @given(RECIPES, st.sampled_from(sorted(recipe_keys())), TREE)
    def test_any_value_anywhere_is_fine_or_a_user_error(
        self, tmp_path_factory: pytest.TempPathFactory, tree: dict[str, Any], key: str, value: object
    ) -> None:
        *sections, name = key.split(".")
        inner = tree = {**tree}
        for section in sections:
            inner[section] = dict(inner.get(section, {}))
            inner = inner[section]
        inner[name] = value
        path = tmp_path_factory.getbasetemp() / "changed.yaml"
        path.write_text(dump_yaml(tree), encoding="utf-8", newline="")
        with suppress(UserError):
            load_recipe(path)
