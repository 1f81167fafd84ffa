"""Every recipe of the papers, trained for ten steps on a tiny model of its architecture and made-up rows."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from safetensors.torch import load_file
from torch import Tensor

from loralloc.recipe.schema import Recipe, load_recipe
from loralloc.recipes import list_recipes
from loralloc.tasks.spec import TASKS

from .command import WORDS, done, ranks, write_rows
from .paper_models import save_tiny, tiny_of

NAMES = [name for name in list_recipes() if name.startswith("papers/")]
pytestmark = [
    pytest.mark.usefixtures("unreported"),
    pytest.mark.filterwarnings("ignore:ALLoRA:UserWarning", "ignore:fan_in_fan_out:UserWarning"),
]

TEXTS = ("text", "text_pair", "prompt", "completion", "choices", "source", "target", "question", "context")


def columns(recipe: Recipe) -> Iterator[str]:
    """The columns that a recipe reads as text, alone or in templates."""
    for value in filter(None, (getattr(recipe.data, key) for key in TEXTS)):
        for entry in [value] if isinstance(value, str) else value:
            yield from re.findall(r"\{(\w+)\}", entry) or [entry]


def made_up(recipe: Recipe, count: int, seed: int) -> list[dict[str, Any]]:
    """Rows with the columns that a recipe names, and labels that take turns."""
    generator = random.Random(seed)
    label = recipe.data.label or recipe.data.answer
    kind = float if recipe.data.labels == "regression" else int
    rows = []
    for i in range(count):
        row: dict[str, Any] = {column: " ".join(generator.choices(WORDS, k=5)) for column in columns(recipe)}
        if label:
            row[label] = kind(i % 2)
        if recipe.task == "question-answering":
            row["answers"] = {"text": row["context"].split()[:1], "answer_start": [0]}
        if recipe.task == "token-classification":
            row |= {"tokens": generator.choices(WORDS, k=4), "tags": ["B-DNA", "I-DNA", "O", "B-RNA"]}
        rows.append(row)
    return rows


def shortened(recipe: Recipe, matrices: int) -> list[object]:
    """The words that make ten steps of a recipe's run, with every phase that it has."""
    words: list[object] = ["--training.steps", 10, "--training.batch_size", 4, "--training.accumulation", 1,
                           "--training.warmup", 2, "--data.max_length", 32, "--data.test", "null",
                           "--data.also", "null", "--model.dtype", "float32", "--training.bf16", "false"]  # fmt: skip
    method = recipe.method
    if method.name == "adalora":
        words += ["--method.warmup", 2, "--method.cooldown", 4, "--interval", 1, "--total_rank", 8 * matrices]
    elif method.name == "ablora":
        words += ["--rounds", 2, "--eval_every", 5, "--save_every", 5]
    elif method.name == "autolora":
        words += ["--search", 10]
    if recipe.data.stride is not None:
        words += ["--data.stride", 8]
    if recipe.task == "seq2seq":
        words += ["--data.target_length", 16]
    if recipe.evaluate.generate is not None:
        words += ["--evaluate.generate.samples", 2, "--evaluate.generate.max_new_tokens", 4]
    return words


def trained(name: str, here: Path, *words: object) -> tuple[Recipe, Path]:
    """Copy a recipe and train ten steps of it into ./run; the recipe and the folder of the base model."""
    done("init", name)
    file = (here / Path(name).name).with_suffix(".yaml")
    recipe = load_recipe(file)
    tiny = tiny_of(recipe.model.name)
    base = save_tiny(tiny, here / "base")
    for seed, split in enumerate(("train", "validation")):
        write_rows(here / f"{split}.jsonl", made_up(recipe, 48 // (seed + 1), seed))
    done("train", file, "--model.name", base, "--data.train", "train.jsonl", "--data.validation", "validation.jsonl",
         "--output", "run", *shortened(recipe, tiny.matrices), *words)  # fmt: skip
    return recipe, base


@pytest.mark.parametrize("name", NAMES)
def test_ten_steps_end_in_an_adapter_with_all_that_is_new(name: str, here: Path) -> None:
    recipe, base = trained(name, here)
    if recipe.method.name in ("adalora", "ablora"):
        found = ranks(here / "run")
        assert len(found) == tiny_of(recipe.model.name).matrices
        assert sum(found.values()) == 8 * len(found)
    stored = stored_tensors(here)
    assert any(tensor.any() for key, tensor in stored.items() if ".lora_B." in key)
    assert new_parameters(recipe, base) <= stored.keys()


def test_a_pooler_that_is_neither_in_the_checkpoint_nor_trained_is_refused(here: Path) -> None:
    with pytest.raises(AssertionError, match=r"Add them to lora.modules_to_save: \[pooler.dense\]"):
        trained("papers/adalora-cola", here, "--lora.modules_to_save", "null")


def stored_tensors(here: Path) -> dict[str, Tensor]:
    """The tensors of the exported adapter, by the base model's names."""
    stored = load_file(here / "run" / "adapter" / "adapter_model.safetensors")
    return {key.removeprefix("base_model.model."): tensor for key, tensor in stored.items()}


def new_parameters(recipe: Recipe, base: Path) -> set[str]:
    """What a checkpoint lacks: drawn at random, so that it must be trained and kept."""
    kind = getattr(transformers, TASKS[recipe.task].model_class)
    _, loaded = kind.from_pretrained(base, output_loading_info=True)
    assert bool(loaded["missing_keys"]) == bool(TASKS[recipe.task].heads)
    return set(loaded["missing_keys"])
