"""The recipe of every run of a comparison."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from loralloc.budget import Budget
from loralloc.compare.grid import (
    BASELINE,
    UNIFORM,
    Cell,
    Contender,
    Point,
    Shapes,
    capacity,
    cell_name,
    contenders,
    section_of,
)
from loralloc.compare.grid import points as budget_points
from loralloc.errors import UserError
from loralloc.methods.registry import PLAIN_LORA, methods, sections, source_of_examples
from loralloc.methods.scaling import average_start, averages
from loralloc.methods.settings import settings
from loralloc.recipe.passthrough import PLANNED, TO_THE_HUB, without
from loralloc.recipe.schema import Recipe, as_tree, complete_recipe, explain, faults
from loralloc.recipe.source import read_recipe_file
from loralloc.recipes import list_recipes
from loralloc.tasks.locations import is_weighted

HELD_OUT = 0.1
"""Share of the training data that a method looks at in place of the validation data, if that is its default."""
CHOSEN_ON = "learning rates are chosen on the one, and the other must not have been looked at; name other data"
"""Why validation and test data must not be the same."""
EVALUATIONS = 10
"""Evaluations during a run if the recipe sets no `eval_every`, whatever `training.trainer.eval_strategy` says.

The table at equal processor time is made from them.
"""


def plan_cells(recipe: Recipe, shapes: Shapes, runs: Path) -> list[Cell]:
    """Plan the runs of a comparison.

    Args:
        recipe: The recipe, checked by `check_comparable`.
        shapes: Shapes of its model and data.
        runs: The folder of all runs.

    Returns:
        The runs with their recipes, grouped by budget. Peers are left out at budgets at which plain LoRA does not have
        the same rank everywhere.

    Raises:
        UserError: A contender cannot have a budget, or a recipe would be refused.
    """
    section, found = section_of(recipe), []
    for point in budget_points(recipe, shapes):
        for contender in contenders(recipe):
            if contender.kind == "peer" and point.whole is None:
                continue
            changes = _changes(recipe, shapes, contender, point)
            for rate in section.learning_rates or ():
                found += [
                    make_cell(recipe, shapes, point, contender, rate, seed, changes, runs) for seed in section.seeds
                ]
    names = [cell.name for cell in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(
            f"compare: two runs would both be called {twice}: two rates or budgets are too close; leave one out"
        )
    return found


def make_cell(
    recipe: Recipe,
    shapes: Shapes,
    point: Point,
    contender: Contender,
    rate: float,
    seed: int,
    changes: Mapping[str, Any],
    runs: Path,
) -> Cell:
    """Make one run: the contender's own settings (`changes`), and those that all runs share."""
    tree = {name: value for name, value in as_tree(recipe).items() if name != "compare"} | dict(changes)
    if tree["method"]["name"] == "random":
        tree["method"] = tree["method"] | {"rank_seed": seed}
    tree["training"] = _training(recipe, shapes, rate, seed)
    tree["evaluate"] = tree["evaluate"] | {"cuts": 0}
    tree["output"] = str(runs / cell_name(point, contender, rate, seed))
    try:
        return Cell(point, contender, float(rate), seed, complete_recipe().model_validate(tree))
    except ValidationError as error:
        reasons = dict.fromkeys(_reason(detail, tree) for detail in faults(error.errors(), tree))
        raise UserError(f"{contender.label} at {point.label}: {'; '.join(reasons)}") from error


def _training(recipe: Recipe, shapes: Shapes, rate: float, seed: int) -> dict[str, Any]:
    """The section `training` of a run: of all runs the same, but for the rate and the seed."""
    # Epochs would be fewer steps for a method that holds examples out.
    own: dict[str, Any] = without(as_tree(recipe.training), ["epochs"])
    own |= {"steps": shapes.steps, "learning_rate": float(rate), "seed": seed}
    own.setdefault("eval_every", max(1, round(shapes.steps / EVALUATIONS)))
    own["compact"] = False  # most contenders have no closed ranks to remove, and results are the same
    # Adapters that nobody has chosen, of which each would take the place of the one before; and evaluations that may be
    # at other steps (epochs are longer for who holds no examples out).
    own["trainer"] = without(own["trainer"], (*TO_THE_HUB, "eval_strategy"))
    return own


def _reason(error: ErrorDetails, tree: Mapping[str, Any]) -> str:
    """What is wrong with a run's recipe; an error about several keys together has no location."""
    return explain(error, tree)[1] if error["loc"] else error["msg"].removeprefix("Value error, ")


def comparable(recipe: Recipe) -> Recipe:
    """Return a recipe that can be compared fairly, before anything is loaded: one with rows to judge methods on.

    Where it names none, and the validation rows are others with every seed, as large a share is cut off for all runs.

    Raises:
        UserError: It cannot be; with every reason, one a line.
    """
    if told := list(_unfair(recipe)):
        raise UserError("\n".join(told))
    if recipe.data.test is not None or isinstance(recipe.data.validation, str):
        return recipe
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"test": recipe.data.validation})})


def check_rows_apart(recipe: Recipe, shapes: Shapes) -> None:
    """Refuse test data that are the validation data, under another name or as a copy, or all of them training data.

    Raises:
        UserError: Their rows are the same.
    """
    rows = shapes.depends_on["data"]
    if "test" in rows and rows["test"] == rows.get("validation"):
        data = recipe.data
        raise UserError(
            f"data.validation, {data.validation}, and data.test, {data.test}, have the same rows: {CHOSEN_ON}"
        )
    for name, count in shapes.repeated.items():
        if shapes.test and count == shapes.test:
            raise UserError(
                f"data.test, {recipe.data.test}: all {count:,} rows are among the {name} data, and methods are judged "
                "on rows that they have not seen; name other data"
            )


def _unfair(recipe: Recipe) -> Iterator[str]:
    data, training = recipe.data, recipe.training
    if recipe.plan is not None:
        yield "plan: a comparison gives every method the same budget; take the plan out"
    choosing = {
        "keep_best": training.keep_best,
        "early_stopping": training.early_stopping,
        "trainer.load_best_model_at_end": training.trainer.get("load_best_model_at_end"),
    }
    for name, asked in choosing.items():
        if asked:
            yield (
                f"training.{name}: all methods train for the same number of steps, and truncation has no earlier state "
                "with its ranks; take it out"
            )
    if getattr(getattr(recipe.method, "budget", None), "max_rank", None) is not None:
        yield (
            "method.budget.max_rank: a comparison converts budgets into parameters, and plain LoRA has nothing like a "
            "cap; take it out"
        )
    if planned := [name for name in recipe.lora.peft if name in PLANNED]:
        yield f"lora.peft.{planned[0]}: a comparison sets ranks and scale of every run itself; take it out"
    if isinstance(data.validation, str) and data.validation == data.test:
        yield (f"data.validation and data.test are both {data.test}: {CHOSEN_ON}")
    if data.test is None and not isinstance(data.validation, str) and is_weighted(data.train):
        yield (
            "data.test: rows to compare methods on cannot be cut off training data that are mixed by weights, others "
            "with every seed; name test data, or a file in data.validation"
        )
    for contender in contenders(recipe):
        if contender.kind == "method" and _looks_at(_settings(recipe, contender)) == "validation":
            yield (
                f"compare.variants.{contender.id}.validation: {contender.id} would look at the validation data, on "
                "which learning rates are chosen, and no other method does; set it to a share of the training data, "
                f"such as {HELD_OUT}"
            )


def _looks_at(method: Mapping[str, Any]) -> Any:
    return source_of_examples(method["name"], lambda *key: method.get(key[-1]))


def _changes(recipe: Recipe, shapes: Shapes, contender: Contender, point: Point) -> dict[str, Any]:
    """The parts of the recipe that are a contender's own at a budget: `method` and `lora`."""
    lora, scale = as_tree(recipe.lora), scale_of(recipe, shapes)

    def adapter(rank: int, alpha: float) -> dict[str, Any]:
        return lora | {"r": rank, "alpha": int(alpha) if alpha == int(alpha) else alpha}

    if contender.kind == "peer" or (contender == BASELINE and point.whole is not None):
        rank = point.whole or 1
        made = adapter(rank, scale * rank)
        if contender.id == "rslora":
            made["peft"] = made["peft"] | {"use_rslora": True}
        return {"method": {"name": PLAIN_LORA}, "lora": made}
    method = _settings(recipe, contender)
    name = method["name"]
    if _allocates(name, method):
        most, method = capacity(point, recipe), method | {"budget": {"parameters": point.parameters}}
    elif point.whole is None:
        raise UserError(
            f"{name} keeps every rank of lora.r, and no whole rank costs the {point.parameters:,} parameters of "
            f"{point.label}; give an average rank that is whole, or take {name} out of compare.methods"
        )
    else:
        most = point.whole
    unit = _divisor(method, most, shapes)
    if name == "allora":  # it has no scaling factor, and no dropout
        return {"method": method, "lora": adapter(most, unit) | {"dropout": 0.0}}
    return {"method": method, "lora": adapter(most, scale * unit)}


def scale_of(recipe: Recipe, shapes: Shapes) -> float:
    """Return the scale that a recipe's own method trains at, which is that of all runs but ALLoRA's."""
    return recipe.lora.alpha / _divisor(as_tree(recipe.method), recipe.lora.r, shapes)


def _divisor(method: Mapping[str, Any], rank: int, shapes: Shapes) -> float:
    """What lora.alpha is divided by under a method's settings, with `rank` as lora.r."""
    if not averages(method["name"], method.get("allocate")):
        return rank
    sizes = [min(pair) for pair in shapes.modules.values()]
    return average_start(Budget(**method["budget"]), shapes.at(rank), sizes)


def _settings(recipe: Recipe, contender: Contender) -> dict[str, Any]:
    """The section `method` of a contender; its budget is set by `_changes`."""
    variant = section_of(recipe).variants.get(contender.id, {})
    name = UNIFORM if contender == BASELINE else variant.get("name", contender.id)
    return _method(recipe, name) | variant


def _method(recipe: Recipe, name: str) -> dict[str, Any]:
    """A method's settings: the recipe's own, else those of the packaged recipe, else the defaults.

    If it would look at the validation data, it looks at a share of the training data instead.
    """
    packaged = list_recipes().get(f"{recipe.task}/{name}")
    method: dict[str, Any] = {"name": name}
    if name == recipe.method.name:
        method = as_tree(recipe.method)
    elif packaged is not None:
        method = dict(read_recipe_file(packaged).tree["method"])
    declared = sections()[name].model_fields.get("validation")
    default = None if declared is None else declared.default
    if method.get("validation", default) == "validation":
        method["validation"] = HELD_OUT
    return method


def _allocates(name: str, method: Mapping[str, Any]) -> bool:
    """Whether a method chooses ranks under a budget; a method that wraps an allocator does so only if one is set."""
    composed = [setting.name for setting in settings(methods()[name]) if setting.allocator]
    return "budget" in sections()[name].model_fields and all(method.get(key) for key in composed)
