"""Two recipes as text, and what speaks against a recipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from loralloc.errors import UserError
from loralloc.recipe.schema import load_recipe

CLASSIFICATION = """\
task: sequence-classification
model:
  name: demo:minilm
data:
  train: data/train.jsonl
  text: sentence
  label: label
method:
  name: adalora
  budget:
    average_rank: 8
training:
  steps: 300
output: runs/a
"""
LANGUAGE_MODEL = """\
task: causal-lm
model: {name: small}
data:
  train: data/train.jsonl
  text: text
method: {name: lora}
training: {steps: 300}
output: runs/a
"""

Write = Callable[..., Path]


def edit(old: str, new: str, text: str = CLASSIFICATION) -> str:
    assert text.count(old) == 1
    return text.replace(old, new)


def problems(path: Path, *flags: str) -> list[str]:
    with pytest.raises(UserError) as error:
        load_recipe(path, flags)
    return str(error.value).split("\n")
