"""What can be wrong with the names and paths of a recipe, found before anything heavy is imported."""

from __future__ import annotations

import os
from collections.abc import Callable

from loralloc.errors import UserError
from loralloc.files import check_writable
from loralloc.plan import RankPlan
from loralloc.recipe.run_folder import RunFolder
from loralloc.recipe.schema import Recipe
from loralloc.tasks.locations import check_load_in, check_source, model_folder, named_sources


def check_inputs(recipe: Recipe, trained: bool = False) -> None:
    """Refuse a recipe whose data, model or plan is missing, or that needs a package that is not installed.

    Args:
        recipe: The recipe.
        trained: Whether its adapter is there: then the plan has done its work, and may be gone.

    Raises:
        UserError: With every mistake, one a line.
    """
    checks: list[Callable[[], object]] = [
        lambda: model_folder(recipe.model.name),
        lambda: check_load_in(recipe.model.load_in),
    ]
    checks += [lambda source=source: check_source(source) for source in named_sources(recipe.data)]
    if (plan := recipe.plan) is not None and not trained:
        checks.append(lambda: RankPlan.load(plan))
    problems = dict.fromkeys(filter(None, map(_problem, checks)))
    if problems:
        raise UserError("\n".join(problems))


def _problem(check: Callable[[], object]) -> str | None:
    try:
        check()
    except UserError as error:
        return str(error)
    return None


def check_output(recipe: Recipe, resume: bool, replace: bool) -> None:
    """Refuse a folder that the run could not use.

    Args:
        recipe: The recipe.
        resume: Whether an interrupted run goes on in it.
        replace: Whether an earlier run in it may be replaced.

    Raises:
        UserError: The folder holds something else, or it cannot be made or written.
    """
    if resume:
        folder = RunFolder.existing(RunFolder.of(recipe).root).root
        check_writable(folder, "output", "a run goes on in its own folder: let yourself write there")
    else:
        folder = RunFolder.for_new_run(recipe, replace).root
        check_writable(folder, "output", "name another with --output")


def is_alone() -> bool:
    """Whether this is the only process; several processes must refuse a recipe together."""
    return os.environ.get("WORLD_SIZE", "1") == "1"
