"""What is compared: from a recipe and the shapes of its model to budgets, contenders and cells.

Fair by construction: a budget is a number of final parameters, that of plain LoRA at the budget's ranks, and holds for
every contender. All contenders try the same learning rates with the same seeds, on the same data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from loralloc.allocate import keep_within, select
from loralloc.budget import AMOUNTS, Budget, Modules, total_cost
from loralloc.errors import UserError
from loralloc.methods.controls import uniform_scores
from loralloc.methods.registry import PLAIN_LORA, methods
from loralloc.recipe.schema import Recipe
from loralloc.recipe.sections import CompareConfig

Kind = Literal["baseline", "method", "control", "peer", "plan"]

CAPACITY = 1.5
"""Largest rank of a layer over the average rank, if neither `compare.capacity` nor the recipe's budget sets it."""
TRIALS = (0.5, 1, 2)
"""Learning rates that are tried by default, as multiples of the recipe's."""
CONTROLS = ("random", "truncate")
PEERS = {"dora": "DoRA (PEFT)", "rslora": "rsLoRA (PEFT)", "eva": "EVA (PEFT)"}
UNIFORM = "uniform"
NO_LIMIT = 2**20


@dataclass(frozen=True)
class Shapes:
    """Sizes of a model and its data that a comparison needs before anything is trained.

    Attributes:
        modules: Inputs and outputs of every adapted module, by its name.
        train: Training examples; None where they are streamed.
        validation: Validation examples.
        test: Test examples; None where there are none.
        steps: Optimizer steps of plain LoRA, and so of every run.
        base_parameters: Parameters of the base model.
        metric: The metric that the task reports first.
        greater_is_better: Whether a larger value of this metric is better.
        depends_on: Fingerprints of the rows (`data`) and of the base model's weights (`base`).
        repeated: How many of the rows to judge by are among the training rows, and among the validation rows.
    """

    modules: Mapping[str, tuple[int, int]]
    train: int | None
    validation: int
    test: int | None
    steps: int
    base_parameters: int
    metric: str
    greater_is_better: bool
    depends_on: Mapping[str, Any]
    repeated: Mapping[str, int] = field(default_factory=dict)

    @property
    def costs(self) -> list[int]:
        """Parameters of one rank of every module."""
        return [inputs + outputs for inputs, outputs in self.modules.values()]

    def at(self, rank: int) -> Modules:
        """The modules as `Budget` needs them, all with the same rank; adapters are in float32."""
        costs = self.costs
        return Modules([rank] * len(costs), costs, [4 * cost for cost in costs], self.base_parameters)


@dataclass(frozen=True)
class Point:
    """A budget.

    Attributes:
        slug: Its part of the names of runs.
        label: Its name on the page.
        parameters: The most parameters that a final adapter may have.
        ranks: The rank of every module in plain LoRA with so many parameters.
    """

    slug: str
    label: str
    parameters: int
    ranks: tuple[int, ...]

    @property
    def whole(self) -> int | None:
        """Plain LoRA's rank if it is the same in every module; else None."""
        return self.ranks[0] if len(set(self.ranks)) == 1 else None

    @property
    def average(self) -> float:
        """The average rank of a module."""
        return sum(self.ranks) / len(self.ranks)


@dataclass(frozen=True)
class Contender:
    """What is compared: plain LoRA, a method or a variant of one, a control, a peer, or a plan.

    Attributes:
        id: Its part of the names of runs: the name of a method, a variant or a peer, or `plan-of-` and one of these.
        label: Its name on the page.
        kind: The baseline, a method to be judged, a control, a peer (a variant of LoRA from PEFT), or a plan that is
            trained again.
    """

    id: str
    label: str
    kind: Kind


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        point: Its budget.
        contender: Its contender.
        learning_rate: One of the rates that are tried.
        seed: One of the seeds.
        recipe: The recipe of the run.
    """

    point: Point
    contender: Contender
    learning_rate: float
    seed: int
    recipe: Recipe

    @property
    def name(self) -> str:
        """The folder of the run."""
        return cell_name(self.point, self.contender, self.learning_rate, self.seed)


def cell_name(point: Point, contender: Contender, learning_rate: float, seed: int) -> str:
    """Return the name of a run's folder."""
    return f"{point.slug}-{contender.id}-lr{learning_rate:g}-s{seed}"


BASELINE = Contender(PLAIN_LORA, "plain LoRA", "baseline")
"""LoRA with ranks as even as the budget allows; all differences are to it."""


def section_of(recipe: Recipe) -> CompareConfig:
    """Return a recipe's section `compare` with its defaults filled in."""
    section = recipe.compare or CompareConfig()
    filled: dict[str, Any] = {}
    if section.methods is None:
        filled["methods"] = [recipe.method.name]
    if section.learning_rates is None:
        filled["learning_rates"] = [factor * recipe.training.learning_rate for factor in TRIALS]
    return section.model_copy(update=filled | {"budgets": section.budgets or [_own_budget(recipe)]})


def tuning_seeds(recipe: Recipe) -> list[int]:
    """Return the seeds with which every learning rate is tried; the other seeds train at the chosen rates only."""
    section = section_of(recipe)
    return list(section.seeds[: section.tuning_seeds])


def _own_budget(recipe: Recipe) -> Any:
    """The recipe's own budget: that of its method, else `lora.r` as the average rank."""
    own = getattr(recipe.method, "budget", None)
    return {"average_rank": recipe.lora.r} if own is None else own


def contenders(recipe: Recipe) -> list[Contender]:
    """Return all contenders but plans: plain LoRA, the methods, the controls and the peers."""
    section, known = section_of(recipe), methods()
    always = (PLAIN_LORA, UNIFORM, *CONTROLS)
    named = list(dict.fromkeys(section.methods or ()))
    asked = [name for name in named if name not in always]
    labels = {name: f"{known[variant['name']].label}, {name}" for name, variant in section.variants.items()}
    return [
        BASELINE,
        *(Contender(name, labels.get(name) or known[name].label, "method") for name in asked),
        *(Contender(name, known[name].label, "method" if name in named else "control") for name in CONTROLS),
        *(Contender(name, PEERS[name], "peer") for name in section.peers),
    ]


def plan_of(winner: Contender) -> Contender:
    """Return the contender that trains plain LoRA at the ranks that the winner has found."""
    return Contender(f"plan-of-{winner.id}", f"plain LoRA at {winner.label}'s ranks", "plan")


def points(recipe: Recipe, shapes: Shapes) -> list[Point]:
    """Return the budgets, each as one number of final parameters.

    Raises:
        UserError: Two budgets come out the same, one is too small, or a module has too few dimensions.
    """
    found: dict[tuple[int, ...], Point] = {}
    for budget in section_of(recipe).budgets or ():
        given = budget if isinstance(budget, dict) else budget.model_dump(exclude_none=True)
        point = _point(given, recipe, shapes)
        if point.ranks in found:
            raise UserError(
                f"compare.budgets: {point.label} and {found[point.ranks].label} are the same {point.parameters:,} "
                "parameters; leave one of them out"
            )
        found[point.ranks] = point
        _check_room(point, recipe, shapes)
    return list(found.values())


def _point(given: Mapping[str, float], recipe: Recipe, shapes: Shapes) -> Point:
    if "max_rank" in given:
        raise UserError(
            "compare.budgets: max_rank is a cap, and plain LoRA and PEFT's variants have nothing like it; give "
            f"{', '.join(AMOUNTS[:-1])} or {AMOUNTS[-1]} without it"
        )
    budget = Budget(**given)  # type: ignore[arg-type]
    most = recipe.lora.r if "fraction" in given else NO_LIMIT
    target = budget.resolve(shapes.at(most))
    ranks = uniform_ranks(shapes.at(target // sum(shapes.at(1).costs(budget.unit)) + 1), budget, target)
    parameters = total_cost(ranks, shapes.costs)
    ((name, value),) = given.items()
    words = f"{value:,} parameters" if name == "parameters" else f"{name.replace('_', ' ')} {value:g}"
    slug = f"r{value:g}" if name == "average_rank" else f"{name.replace('_', '')}{value:g}"
    return Point(slug, words, parameters, tuple(ranks))


def uniform_ranks(modules: Modules, budget: Budget, target: int) -> list[int]:
    """Return the ranks of plain LoRA under a budget: as even as they can be.

    >>> uniform_ranks(Modules([2, 2, 2], [10, 20, 10], [40, 80, 40]), Budget(total_rank=4), 4)
    [2, 1, 1]
    """
    kept = select(uniform_scores(modules.ranks), budget, modules, target, keep_within)
    return [int(part.sum()) for part in kept.split(list(modules.ranks))]


def capacity(point: Point, recipe: Recipe) -> int:
    """Return the largest rank that a method may give to a layer."""
    ratio: Any = section_of(recipe).capacity
    own = getattr(getattr(recipe.method, "budget", None), "average_rank", None)
    if ratio is None:
        ratio = recipe.lora.r / own if own else CAPACITY
    most = float(f"{ratio * point.average:.12g}")  # 25 / 11 · 11 comes out a hair above 25
    return max(math.ceil(most), *point.ranks)


def _check_room(point: Point, recipe: Recipe, shapes: Shapes) -> None:
    most = capacity(point, recipe)
    name, sizes = min(shapes.modules.items(), key=lambda item: min(item[1]))
    if most > min(sizes):
        raise UserError(
            f"compare.budgets: at {point.label} a layer may get up to rank {most}, but {name} has {min(sizes)} "
            "dimensions; lower the budget or compare.capacity"
        )
