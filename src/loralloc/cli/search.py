"""The first stage of methods that search for ranks and then train anew: the search, in RUN/search.

The search trains on one part of the training data and learns the ranks on the other; the retraining sees both. Neither
the validation nor the test data of the recipe are looked at before the retraining.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from loralloc.cli import stage, terminal
from loralloc.cli.build import add_adapter, method_data, task_data
from loralloc.cli.folder import RunFolder
from loralloc.config import Recipe
from loralloc.errors import UserError
from loralloc.methods.registry import PLAIN_LORA, make_method, methods, sections
from loralloc.plan import RankPlan
from loralloc.training import processes


def searches(recipe: Recipe) -> bool:
    """Whether the recipe's method searches for ranks before what it exports is trained."""
    kind = methods().get(recipe.method.name)
    return kind is not None and kind.search is not None


def steps_of(recipe: Recipe, examples: int) -> int:
    """Optimizer steps of the search.

    Args:
        recipe: The recipe.
        examples: Training examples before the split.
    """
    length: float = recipe.method.model_dump()["search"]
    return length if isinstance(length, int) else max(1, round(length * stage.total_steps(recipe, examples)))


def find_plan(recipe: Recipe, folder: RunFolder, resume: bool) -> RankPlan:
    """Search for the ranks, or read what an earlier process has found.

    Returns:
        The plan of RUN/search/ranks.json.
    """
    with processes.together():
        if resume and folder.search.plan.is_file():
            return RankPlan.load(folder.search.plan)
    with processes.together():
        _, _, trainer, allocation, steps = prepare(recipe, folder)
    if not resume:
        processes.on_main(folder.create, recipe)
    processes.on_main(folder.search.root.mkdir, exist_ok=True)
    stage.train(trainer, folder.search.checkpoints, steps, resume)
    plan = None if allocation is None else allocation.plan
    assert plan is not None
    if (failure := stage.failure(recipe, plan)) is not None:
        raise UserError(failure)
    seen: Any = trainer.train_dataset, trainer.eval_dataset
    record = dict(zip(("examples", "held_out"), map(len, seen), strict=True)) | {"steps": plan.provenance["steps"]}
    record["seconds"] = round(trainer.train_seconds, 1)
    processes.on_main(_write, folder, record, plan)
    return plan


def prepare(recipe: Recipe, folder: RunFolder) -> stage.Stage:
    """Load and check everything that the search needs, and show it.

    Returns:
        The stage; its `data` are those of the recipe, of which the search sees parts.
    """
    data = task_data(recipe)
    train, held = method_data(recipe.method, data, recipe.training.seed)
    assert held is not None
    steps = steps_of(recipe, len(data.train))
    model = add_adapter(data.model, recipe)
    settings = {"steps": steps, "epochs": None, "eval_every": None}
    searching = recipe.model_copy(update={"training": recipe.training.model_copy(update=settings)})
    seen = replace(data, train=train, validation=held, test=None)
    trainer, allocation = stage.make_trainer(searching, seen, model, folder.search, make_method(recipe.method, held))
    assert allocation is not None
    allocation.run.begin(steps)
    terminal.show_start(recipe, data, model)
    terminal.show_processes(recipe)
    terminal.show_search(steps, len(train), len(held))
    return stage.Stage(data, model, trainer, allocation, steps)


def _write(folder: RunFolder, record: dict[str, Any], plan: RankPlan) -> None:
    folder.write_json(folder.search.metrics, record)
    plan.save(folder.search.plan)  # last: it says that the search is over


def retraining(recipe: Recipe, folder: RunFolder) -> Recipe:
    """Plain LoRA at the ranks that the search has found, on all training data."""
    plain = sections()[PLAIN_LORA](name=PLAIN_LORA)
    return recipe.model_copy(update={"method": plain, "plan": str(folder.search.plan.resolve())})


def combined(searched: RankPlan, trained: RankPlan) -> RankPlan:
    """The plan of the whole run: the ranks and settings of the search, the steps of both stages."""
    found = searched.provenance
    steps = {key: found[key] for key in ("total_steps", "steps", "bad_steps")}
    return replace(searched, provenance={**trained.provenance, "settings": found["settings"], "search": steps})


def metrics(folder: RunFolder) -> dict[str, Any]:
    """Examples, steps and seconds of the search."""
    return json.loads(folder.search.metrics.read_text(encoding="utf-8"))
