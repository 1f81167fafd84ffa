"""Rules of a recipe's `method` section that no single key can state."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from loralloc.config import load_recipe
from loralloc.errors import UserError

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
