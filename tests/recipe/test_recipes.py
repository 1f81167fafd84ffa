from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from loralloc.errors import UserError
from loralloc.recipe.schema import Recipe, dump_recipe, load_recipe, recipe_keys
from loralloc.recipes import list_recipes, recipe_text
from loralloc.tasks.locations import READABLE
from loralloc.tasks.spec import TASKS, DataSection

COMMENTED_OUT = re.compile(r"^( *)# ( *[a-z_0-9]+:(?: |$))")
CONTROLS = ("depth_linear", "random", "truncate", "uniform")
NAMES = [  # those of the papers are another kind: test_papers.py
    f"{folder}/{method}"
    for folder in sorted((*TASKS, "demo"))
    for method in sorted(
        ("adalora", "lora", *(() if folder == "demo" else ("ablora", "allora", "autolora", *CONTROLS)))
    )
    if method not in ("ablora", "autolora") or TASKS[folder].own_loss
]


def test_the_list_is_complete_and_sorted() -> None:
    known = list(NAMES)
    known.insert(known.index("demo/lora"), "demo/compare")  # another kind: tests/compare
    assert [name for name in list_recipes() if not name.startswith("papers/")] == known


@pytest.mark.parametrize("name", NAMES)
class TestEveryRecipe:
    def test_loads_and_comes_back_from_its_dump(self, name: str, tmp_path: Path) -> None:
        recipe = load_recipe(list_recipes()[name])
        copy = tmp_path / "recipe.yaml"
        copy.write_text(dump_recipe(recipe), encoding="utf-8")
        assert load_recipe(copy) == recipe
        assert recipe.method.name == name.partition("/")[2]

    def test_its_override_line_works(self, name: str) -> None:
        (words,) = re.findall(r"^# +override +loralloc train \S+ (.+)$", recipe_text(name), re.M)
        file = list_recipes()[name]
        assert load_recipe(file, words.split()) != load_recipe(file)

    def test_says_how_to_copy_and_run_it(self, name: str) -> None:
        text = recipe_text(name)
        assert text.startswith("# ")
        assert f"#   copy        loralloc init {name}" in text
        assert f"#   run         loralloc train {name.partition('/')[2]}.yaml\n" in text
        assert "# Assumes: " in text

    def test_what_is_commented_out_can_be_taken_in(self, name: str, tmp_path: Path) -> None:
        """Each key where it stands, with its value; of keys that exclude each other, one at a time."""
        recipe = load_recipe(list_recipes()[name])
        length = {"steps", "epochs"} - recipe.training.model_dump(exclude_none=True).keys()
        lines = [COMMENTED_OUT.sub(r"\1\2", line) for line in recipe_text(name).splitlines()]
        forms = TASKS[recipe.task].forms
        for form, replaced in itertools.product(forms, ("plan", "peft|use_rslora|init_lora_weights")):
            others = {key for columns in forms for key in columns} - set(form)
            looks = [] if TASKS[recipe.task].own_loss else ["validation"]  # no method that looks at data learns it
            left_out = "|".join([*others, *length, *looks, replaced, "streaming"])  # which needs more than itself
            text = "\n".join(line for line in lines if not re.match(rf" *({left_out}):", line))
            path = tmp_path / "recipe.yaml"
            other = "adalora" if looks else "ablora"
            path.write_text(text.replace("allocate: adalora", f"allocate: {other}"), encoding="utf-8")
            taken = load_recipe(path)
            assert set(form) <= taken.data.model_dump(exclude_none=True).keys()
            assert taken.training.trainer
            assert taken.model.load
            assert taken.plan or taken.lora.peft

    def test_has_every_key_once(self, name: str) -> None:
        recipe = load_recipe(list_recipes()[name])
        sections = {
            section: list(getattr(recipe, section).model_dump()) for section in ("model", "method", "lora", "training")
        }
        sections["data"] = [*DataSection.model_fields, *TASKS[recipe.task].keys]
        written: dict[str, list[str]] = {}
        for line in recipe_text(name).splitlines():
            if top := re.match(r"(?:# )?([a-z]+):(?: |$)", line):
                written[top[1]] = []
            elif key := re.match(r"  (?:# )?([a-z_0-9]+):", line):
                written[list(written)[-1]].append(key[1])
        assert sorted(written) == sorted(Recipe.model_fields)
        for section, keys in sections.items():
            assert sorted(written[section]) == sorted(keys), section

    def test_comments_say_why_and_what_else_not_what_a_key_is(self, name: str) -> None:
        """That is in the declarations, and made from them in docs/reference.md."""
        described = {text.lower().rstrip(".") for text in recipe_keys().values()}
        comments = re.findall(r"^ *(?:# )?\w+: .*?  # (.+)$", recipe_text(name), re.M)
        assert not {comment.lower().rstrip(".") for comment in comments} & described

    def test_the_formats_it_names_are_those_there_are(self, name: str) -> None:
        for listed in re.findall(r"^  train: (.+)# also (.+);", recipe_text(name), re.M):
            assert set(re.findall(r"\.[a-z]+", "".join(listed))) == {*READABLE, ".gz"}


@pytest.mark.parametrize("folder", ["causal-lm", "demo", "sequence-classification"])
def test_the_baseline_costs_what_adalora_keeps_and_differs_in_nothing_else(folder: str) -> None:
    ours = load_recipe(list_recipes()[f"{folder}/adalora"])
    baseline = load_recipe(list_recipes()[f"{folder}/lora"])
    assert ours.method.name == "adalora"
    assert ours.method.budget.average_rank == baseline.lora.r
    assert ours.lora.alpha / ours.lora.r == baseline.lora.alpha / baseline.lora.r
    same = {"task", "model", "data", "training"}
    assert ours.model_dump(include=same) == baseline.model_dump(include=same)


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("task", TASKS)
def test_a_control_has_adaloras_budget_and_scale_and_differs_in_nothing_else(task: str, control: str) -> None:
    ours, theirs = (load_recipe(list_recipes()[f"{task}/{method}"]) for method in (control, "adalora"))
    assert ours.method.budget == theirs.method.budget
    assert ours.lora.alpha / ours.lora.r == theirs.lora.alpha / theirs.lora.r
    same = {"task", "model", "data", "training"}
    assert ours.model_dump(include=same) == theirs.model_dump(include=same)


@pytest.mark.parametrize("task", TASKS)
def test_allora_starts_as_fast_as_the_baseline(task: str) -> None:
    ours, baseline = (load_recipe(list_recipes()[f"{task}/{method}"]) for method in ("allora", "lora"))
    assert ours.method.mode == "hybrid"
    assert ours.lora.r == ours.lora.alpha == baseline.lora.r
    pace = baseline.training.learning_rate * baseline.lora.alpha / baseline.lora.r
    assert ours.method.eta * ours.training.learning_rate == pace
    assert ours.model_dump(include={"task", "model", "data"}) == baseline.model_dump(include={"task", "model", "data"})


@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if task.own_loss])
def test_ablora_costs_what_the_baseline_does_at_its_scale(task: str) -> None:
    ours = load_recipe(list_recipes()[f"{task}/ablora"])
    baseline = load_recipe(list_recipes()[f"{task}/lora"])
    average = ours.method.budget.average_rank
    assert average == baseline.lora.r == ours.lora.r / 2
    assert ours.lora.alpha / average == baseline.lora.alpha / baseline.lora.r
    same = {"task", "model", "data", "training"}
    assert ours.model_dump(include=same) == baseline.model_dump(include=same)


def test_the_demo_is_small_seeded_and_offline() -> None:
    recipe = load_recipe(list_recipes()["demo/adalora"])
    assert recipe.model.name == "demo:minilm"
    assert recipe.data.train == "demo:docstrings"
    assert (recipe.training.steps, recipe.training.batch_size, recipe.data.max_length) == (300, 16, 64)
    assert (recipe.training.seed, recipe.training.eval_every) == (0, None)


def test_an_unknown_name_meets_the_nearest_and_the_list() -> None:
    with pytest.raises(UserError) as error:
        recipe_text("causal-lm/adalor")
    assert str(error.value) == (
        'there is no recipe "causal-lm/adalor". Did you mean "causal-lm/adalora"? Recipes: ' + ", ".join(list_recipes())
    )


EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_there_are_examples() -> None:
    assert len(list(EXAMPLES.glob("*.yaml"))) >= 2


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_is_a_recipe(path: Path) -> None:
    assert load_recipe(path).output == f"runs/{path.stem}"
