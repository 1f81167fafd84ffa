"""Rules of a recipe's `method` section that no single key can state."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, ClassVar

import pytest
from datasets import Dataset
from pydantic import Field

from loralloc import Uniform
from loralloc.errors import UserError
from loralloc.methods import registry
from loralloc.recipe.from_recipe import method_data
from loralloc.recipe.schema import load_recipe
from loralloc.setting_types import Examples

ALLORA = """\
task: sequence-classification
model: {{name: demo:minilm}}
data: {{train: data/train.jsonl, text: sentence, label: label}}
method: {{name: allora{method}}}
lora: {{{lora}}}
training: {{steps: 300}}
output: runs/a
"""
EIGHT = "r: 8, alpha: 8"


def written(tmp_path: Path, method: str, lora: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(ALLORA.format(method=method, lora=lora), encoding="utf-8")
    return path


ABLORA = ", allocate: ablora, budget: {average_rank: 4}"


@pytest.mark.parametrize(
    ("method", "lora"),
    [
        ("", EIGHT),
        (", eta: 1.41, mode: post", EIGHT),
        (", allocate: uniform, budget: {average_rank: 4}", EIGHT),
        (f"{ABLORA}, validation: 0.1", "r: 8, alpha: 4"),  # the scale is alpha over the average starting rank
    ],
)
def test_allora_is_taken_with_and_without_a_method_that_allocates(method: str, lora: str, tmp_path: Path) -> None:
    assert load_recipe(written(tmp_path, method, lora)).method.name == "allora"


@pytest.mark.parametrize(
    ("method", "lora", "expected"),
    [
        ("", "",
         "recipe.yaml:5: lora.alpha is 24, but ALLoRA has no scaling factor: set lora.alpha to lora.r, which is 12"),
        ("", "r: 8",
         "recipe.yaml:5: lora.alpha is 24, but ALLoRA has no scaling factor: set lora.alpha to lora.r, which is 8"),
        ("", f"{EIGHT}, dropout: 0.1",
         "recipe.yaml:5: lora.dropout is 0.1, but ALLoRA trains without dropout: set it to 0"),
        (", allocate: uniform", EIGHT, "recipe.yaml:4: method.allocate: uniform needs a budget: add method.budget"),
        (", budget: {average_rank: 4}", EIGHT,
         "recipe.yaml:4: method.budget has no effect without method.allocate, such as adalora"),
        (", allocate: allora", EIGHT, "recipe.yaml:4: method.allocate must be adalora, ablora, uniform"),
        (ABLORA, "r: 8, alpha: 4",
         "recipe.yaml:4: method.allocate: ablora scores ranks on validation data: add method.validation, as"),
        (f"{ABLORA}, validation: validation", EIGHT,
         "alpha is 8, but ALLoRA has no scaling factor: set lora.alpha to the average rank, which is 4"),
        (", validation: 0.1", EIGHT,
         "recipe.yaml:4: method.validation has no effect without method.allocate: ablora"),
        (", eta: 0", EIGHT, "recipe.yaml:4: method.eta must be above 0, got 0"),
    ],
)  # fmt: skip
def test_allora_has_neither_scale_nor_dropout_and_a_budget_only_for_another_method(
    method: str, lora: str, expected: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=re.escape(expected)):
        load_recipe(written(tmp_path, method, lora))


@dataclass(frozen=True)
class Looking(Uniform):
    """A method of somebody else's that allocates by examples."""

    id: ClassVar[str] = "looking"

    seen: Annotated[Any, Examples("what it looks at", default="validation")] = None
    weights: Annotated[list[int], Field(description="a list of numbers")] = field(default_factory=list)


@pytest.mark.parametrize(
    ("method", "broken"),
    [
        ({"allocate": "looking", "budget": {}, "validation": "validation"}, []),
        ({"allocate": "looking", "budget": {}}, ["method.allocate: looking scores ranks on validation data: add"]),
        (
            {"allocate": "uniform", "budget": {}, "validation": 0.1},
            ["method.validation has no effect without method.allocate: ablora or looking"],
        ),
    ],
)
def test_composing_is_for_methods_of_others_too(
    method: dict[str, Any], broken: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {**registry.methods(), "looking": Looking}
    monkeypatch.setattr(registry, "methods", lambda: known)
    assert "looking" in str(registry.sections_of(known.values())["allora"].model_fields["allocate"].annotation)
    told = [text for _, text in registry.broken_rules("allora", lambda section, key, *_: method.get(key))]
    assert len(told) == len(broken)
    assert all(text.startswith(start) for text, start in zip(told, broken, strict=True))


@pytest.mark.parametrize(("score", "held_out"), [("ablation", 2), ("gate", 0), ("sensitivity", 0)])
def test_no_examples_are_held_out_for_a_score_that_looks_at_none(score: str, held_out: int) -> None:
    section = registry.sections()["ablora"](name="ablora", budget={"total_rank": 4}, validation=0.1, score=score)  # type: ignore[call-arg]
    data: Any = SimpleNamespace(train=Dataset.from_dict({"n": range(20)}), classes={})
    train, looked_at = method_data(section, data, seed=0)
    assert (len(train), len(looked_at or ())) == (20 - held_out, held_out)  # type: ignore[arg-type]
