"""Recipes of the papers: their numbers are the papers', and what their headers and their table say is so."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterator
from dataclasses import replace

import pytest

from loralloc import ABLoRA, AdaLoRA, ALLoRA, AutoLoRA, Budget
from loralloc.budget import Modules
from loralloc.methods.registry import make_method
from loralloc.recipe.schema import load_recipe
from loralloc.recipe.source import read_recipe_file
from loralloc.recipe.stages import search_steps, total_steps
from loralloc.recipes import list_recipes, recipe_text
from loralloc.schedule import BudgetSchedule, RoundSchedule

NAMES = [name for name in list_recipes() if name.startswith("papers/")]
FOLDER = list_recipes()[NAMES[0]].parent
METHODS = ("ablora", "adalora", "allora", "autolora")
DATA = [[1]]  # stands for the examples that a method looks at

# Training rows of the data sets.
GLUE = {
    "cola": 8551,
    "mnli": 392702,
    "mrpc": 3668,
    "qnli": 104743,
    "qqp": 363846,
    "rte": 2490,
    "sst2": 67349,
    "stsb": 5749,
}
ROWS = {**GLUE, "boolq": 9427, "copa": 400, "e2e": 42061, "squad": 87599, "xsum": 204045, "cnndm": 287113}

# AdaLoRA, tables 8, 10 and 13: learning rate, batch, epochs, γ, t_i, ΔT, t_f, and T, which follows.
ADALORA = {
    "mnli": (5e-4, 32, 7, 0.1, 8000, 100, 50000, 85904),
    "rte": (1.2e-3, 32, 50, 0.3, 600, 1, 1800, 3900),
    "qnli": (1.2e-3, 32, 5, 0.1, 2000, 100, 8000, 16370),
    "mrpc": (1e-3, 32, 30, 0.1, 600, 1, 1800, 3450),
    "qqp": (5e-4, 32, 5, 0.1, 8000, 100, 25000, 56855),
    "sst2": (8e-4, 32, 24, 0.1, 6000, 100, 22000, 50520),
    "cola": (5e-4, 32, 25, 0.5, 800, 10, 3500, 6700),
    "stsb": (2.2e-3, 32, 25, 0.1, 800, 10, 2000, 4500),
    "xsum": (5e-4, 64, 25, 0.1, 6000, 100, 50000, 79725),
    "cnndm": (5e-4, 32, 15, 0.1, 5000, 100, 85000, 134595),
}
# Of SQuAD, T depends on how many windows the contexts make: about so many, with one a question a little less.
SQUAD = {
    "squad-v1": (1e-3, 16, 10, 0.1, 5000, 100, 25000, 55_000, ROWS["squad"]),
    "squad-v2": (1e-3, 16, 12, 0.1, 5000, 100, 50000, 99_000, 130_319),
}
STARTS = {1: {2, 3}, 2: {4}, 4: {6}, 8: {12}, 16: {24}}
"""Ranks that AdaLoRA starts from, by the average rank that it ends with."""


def matrices_of(task: str) -> int:
    """Those that AdaLoRA adapts: 6 in each of DeBERTaV3-base's 12 layers; in BART-large 12 · 6 and 12 · 10."""
    return 192 if task in ("xsum", "cnndm") else 72


def budgets_of(task: str) -> set[int]:
    """The average ranks of the paper's table, and for GLUE that of its scripts."""
    return {1, 2, 8} | ({16} if task in ("xsum", "cnndm") else {4} if task in SQUAD else set())


def method_of(name: str) -> str:
    return name.removeprefix("papers/").partition("-")[0]


def commands(name: str) -> Iterator[list[str]]:
    """The flags of the commands in a header that have any."""
    file = re.escape(f"{name.removeprefix('papers/')}.yaml")
    yield from (
        shlex.split(words)
        for words in re.findall(rf"^#   .{{11}} loralloc train {file} (.+)$", recipe_text(name), re.M)
    )


def header(name: str) -> str:
    """The text of a header."""
    lines = recipe_text(name).partition("\n\n")[0].splitlines()
    return " ".join(line.removeprefix("#").strip() for line in lines)


def test_there_are_recipes_of_every_paper() -> None:
    assert {method_of(name) for name in NAMES} == set(METHODS)


@pytest.mark.parametrize("name", NAMES)
class TestEveryRecipe:
    def test_loads_and_is_of_the_method_that_its_name_begins_with(self, name: str) -> None:
        recipe = load_recipe(list_recipes()[name])
        assert recipe.method.name == method_of(name)
        assert recipe.output == f"runs/{name.removeprefix('papers/')}"

    def test_its_other_commands_change_it(self, name: str) -> None:
        file = list_recipes()[name]
        flags = list(commands(name))
        assert flags
        assert len(flags) == len(re.findall(r"^#   .{11} loralloc train", recipe_text(name), re.M)) - 1  # and to run it
        assert all(load_recipe(file, words) != load_recipe(file) for words in flags)

    def test_says_where_it_is_from_and_what_is_not(self, name: str) -> None:
        text, bare = header(name), name.removeprefix("papers/")
        assert f"copy        loralloc init {name} " in text
        assert f"run         loralloc train {bare}.yaml " in text
        assert "This recipe has not been run on the real data." in text
        parts = re.findall(r"(Published|Source|Assumes|Inferred|Differs): ", text)
        assert [part for part in parts if part != "Assumes"] == ["Published", "Source", "Inferred", "Differs"]

    def test_what_it_calls_inferred_is_a_key_of_it(self, name: str) -> None:
        inferred = header(name).partition("Inferred: ")[2].partition("Differs: ")[0]
        keys = re.findall(r"\b(?:model|data|method|lora|training|evaluate)\.[a-z_0-9.]*[a-z0-9]", inferred)
        tree = read_recipe_file(list_recipes()[name]).tree
        assert keys
        for key in keys:
            section = tree
            for part in key.split("."):
                assert part in section, key
                section = section[part]


def test_the_table_has_every_recipe_and_no_other() -> None:
    linked = re.findall(r"\]\(([\w-]+)\.yaml\)", (FOLDER / "README.md").read_text(encoding="utf-8"))
    assert sorted(f"papers/{name}" for name in linked) == NAMES == sorted(NAMES)


def test_what_the_table_points_at_exists() -> None:
    links = re.findall(r"\]\(((?!https)[^)]+)\)", (FOLDER / "README.md").read_text(encoding="utf-8"))
    assert [link for link in links if not (FOLDER / link).exists()] == []


def test_the_flags_of_the_table_are_taken() -> None:
    """In a recipe of the paper under which they stand."""
    _, *papers = (FOLDER / "README.md").read_text(encoding="utf-8").split("\n## ")
    flags = [(name, words) for text in papers for name, words in flags_of(text)]
    assert len(flags) == 4
    for name, words in flags:
        assert load_recipe(list_recipes()[name], words) != load_recipe(list_recipes()[name])


def flags_of(paper: str) -> Iterator[tuple[str, list[str]]]:
    """The first recipe of a paper's table, with each flag that stands there by itself."""
    first = re.search(r"\]\(([\w-]+)\.yaml\)", paper)
    assert first
    yield from ((f"papers/{first[1]}", shlex.split(found)) for found in re.findall(r"`(--[^`]+)`", paper))


@pytest.mark.parametrize("task", [*ADALORA, *SQUAD])
class TestAdaLoRA:
    def test_a_run_has_the_papers_steps_phases_and_budgets(self, task: str) -> None:
        recipe = load_recipe(list_recipes()[f"papers/adalora-{task}"])
        rate, batch, epochs, gamma, t_i, interval, t_f, published, *rows = {**ADALORA, **SQUAD}[task]
        training, method, matrices = recipe.training, make_method(recipe.method, None), matrices_of(task)
        assert (training.learning_rate, training.batch_size * training.accumulation) == (rate, batch)
        assert training.epochs == epochs
        total = total_steps(recipe, rows[0] if rows else ROWS[task])
        assert total == published or (rows and 0.98 * published < total < published)
        budget = Budget(total_rank=8 * matrices)
        phases = {"gamma": gamma, "warmup": t_i, "cooldown": t_f, "interval": interval}
        assert method == replace(AdaLoRA.as_published(budget, order="reference"), **phases)
        modules = Modules([recipe.lora.r] * matrices, [1] * matrices, [4] * matrices)
        schedule = method.schedule(total, modules.total("ranks"), method.budget.resolve(modules))
        b_0, b_T = 12 * matrices, 8 * matrices
        assert schedule == BudgetSchedule(total, t_i, total - t_f, interval, start=b_0, target=b_T)
        assert (schedule.budget(t_i), schedule.budget(total - t_f), schedule.budget(total - 1)) == (b_0, b_T, b_T)
        assert b_0 > schedule.budget((t_i + total - t_f) // 2) > b_T

    def test_other_budgets_start_where_the_paper_starts(self, task: str) -> None:
        name = f"papers/adalora-{task}"
        found = set()
        for words in [[], *commands(name)]:
            recipe = load_recipe(list_recipes()[name], words)
            average, rest = divmod(recipe.method.budget.total_rank, matrices_of(task))
            assert rest == 0
            assert recipe.lora.r in STARTS[average]
            found.add(average)
        assert found == budgets_of(task)


@pytest.mark.parametrize("name", [name for name in NAMES if method_of(name) == "ablora"])
def test_ablora_moves_ranks_a_quarter_of_an_epoch_apart_after_the_first_epoch(name: str) -> None:
    recipe = load_recipe(list_recipes()[name])
    rows = ROWS[name.split("-")[1]]
    assert recipe.training.batch_size * recipe.training.accumulation == (16 if rows < 10_000 else 128)
    steps, method = total_steps(recipe, rows), make_method(recipe.method, DATA)
    assert method == ABLoRA.as_published(Budget(average_rank=8), DATA, samples=32)
    epoch = math.ceil(rows / (recipe.training.batch_size * recipe.training.accumulation))
    schedule = method.schedule(steps, 8, 8)
    assert schedule == RoundSchedule(10 * epoch, 8, 8, warmup=epoch, interval=epoch // 4, rounds=8)
    assert recipe.lora.alpha == recipe.method.budget.average_rank  # eq. 3 has no factor
    assert (recipe.training.learning_rate, recipe.training.warmup) == (1e-4, 0.06)
    assert (recipe.training.eval_every, recipe.training.early_stopping) == (200, 10)


@pytest.mark.parametrize("task", GLUE)
def test_autolora_searches_as_many_steps_as_the_public_code(task: str) -> None:
    recipe = load_recipe(list_recipes()[f"papers/autolora-{task}"])
    searched = int(0.7 * GLUE[task])
    assert search_steps(recipe, GLUE[task]) == 20 * (searched // 32 + 1)
    assert make_method(recipe.method, DATA) == AutoLoRA.as_published(DATA)
    assert (recipe.lora.r, recipe.lora.alpha, recipe.lora.target_modules) == (8, 16, ["query", "value"])
    assert (recipe.method.validation, recipe.method.logit_learning_rate, recipe.method.beta1) == (0.3, 3e-4, 0.5)


def test_autolora_searches_cola_as_long_as_the_public_code_says() -> None:
    assert load_recipe(list_recipes()["papers/autolora-cola"]).method.search == 3760


@pytest.mark.parametrize("name", [name for name in NAMES if method_of(name) == "allora"])
def test_allora_is_the_papers(name: str) -> None:
    recipe = load_recipe(list_recipes()[name])
    assert make_method(recipe.method, None) == ALLoRA(eta=2.0, mode="paper")
    assert recipe.lora.alpha == recipe.lora.r == 32
    assert recipe.lora.dropout == 0
    assert recipe.training.learning_rate == 1e-4
    single = name != "papers/allora-commonsense"
    assert recipe.training.epochs == (2 if single else 3)
    assert recipe.training.trainer.get("optim") == ("sgd" if single else None)
