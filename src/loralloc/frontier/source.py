"""The source of a frontier: a finished run, or any plain LoRA adapter with a recipe for its data."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel

from loralloc.adapter.folders import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check_adapter_folder, recorded_modules
from loralloc.errors import UserError
from loralloc.files import in_shell, sha256_of
from loralloc.plan import RankPlan
from loralloc.reading import read_object
from loralloc.recipe.fingerprints import learned_from
from loralloc.recipe.run_folder import RunFolder
from loralloc.recipe.schema import Recipe, dump_recipe, load_recipe
from loralloc.setting_types import is_number
from loralloc.tasks.base import TaskData
from loralloc.training.fingerprints import weights_fingerprint


@dataclass(frozen=True)
class Source:
    """An adapter, and what is needed to train it further.

    Attributes:
        adapter: Folder of the adapter.
        recipe: Its task, data and settings.
        folder: Where the frontier is written.
        recipe_file: The recipe file given for an adapter; None for a run, which has its own recipe.
        scales: The scale of B A during training, by module; empty if it was not recorded.
        modules: Number of adapted modules, those that kept no rank included; None if unknown.
        steps: Optimizer steps of its training; None if unknown.
        seconds: Time of its training; None if unknown.
    """

    adapter: Path
    recipe: Recipe
    folder: Path
    recipe_file: Path | None
    scales: Mapping[str, float]
    modules: int | None
    steps: int | None
    seconds: float | None

    @classmethod
    def of(cls, path: Path, recipe: Path | None, output: Path | None) -> Source:
        """Return the source that a path names.

        Args:
            path: A run folder, or the folder of an adapter.
            recipe: The recipe for an adapter without a run folder.
            output: Folder to write; by default RUN/frontier.

        Raises:
            UserError: The path is neither, the run has not finished, an adapter lacks a recipe or an output, or a run
                is given a recipe.
        """
        if (path / "recipe.yaml").is_file() or not path.is_dir():
            if recipe is not None:
                raise UserError(f"--recipe: the run {path} has its own recipe; leave it out")
            return cls._of_run(path, output)
        check_adapter_folder(path)
        if recipe is None:
            raise UserError(
                f"{path} is an adapter without a run: name the recipe that says which base model and data it is for, "
                "--recipe recipe.yaml"
            )
        if output is None:
            raise UserError(f"{path} is an adapter without a run: name a folder to write, --output FOLDER")
        modules = len(recorded_modules(path) or ()) or None
        return cls(path, load_recipe(recipe), output, recipe, {}, modules, None, None)

    @classmethod
    def _of_run(cls, path: Path, output: Path | None) -> Source:
        folder = RunFolder.finished(path)
        if folder.weights != folder.adapter:
            raise UserError(f"{path} has no adapter: its export failed; loralloc export {in_shell(path)} writes it")
        plan, metrics = RankPlan.load(folder.plan), _read(folder.metrics)
        scales = {name: module.scale for name, module in plan.modules.items()}
        recipe = _for_one_process(folder.load_recipe(), _count(metrics.get("processes")) or 1)
        steps = _count(plan.provenance.get("steps"))
        found: Any = metrics.get("train_seconds")
        seconds = float(found) if is_number(found) else None
        written = output or path / "frontier"
        return cls(folder.adapter, recipe, written, None, scales, len(plan.modules), steps, seconds)

    @property
    def named(self) -> str:
        """The arguments that name it on the command line."""
        run, adapter = in_shell(self.adapter.parent), in_shell(self.adapter)
        if self.recipe_file is None and self.folder == self.adapter.parent / "frontier":
            return run
        named = run if self.recipe_file is None else f"{adapter} --recipe {in_shell(self.recipe_file)}"
        return f"{named} --output {in_shell(self.folder)}"

    def fingerprint(self) -> str:
        """Return an id of the adapter: the start of a SHA-256 of its weights and its config, where its scale is."""
        told = "".join(sha256_of(self.adapter / name) for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG))
        return _digest(told)

    def made_from(self, model: PeftModel, data: TaskData) -> dict[str, str]:
        """Fingerprint what scores and sizes depend on beside their settings: adapter, base model, recipe, data.

        Args:
            model: The base model with the adapter, as they were loaded.
            data: The task's data.
        """
        rows = learned_from(self.recipe, data)
        made_by = _digest(f"{dump_recipe(self.recipe)}{rows}{weights_fingerprint(model)}")
        return {"adapter": self.fingerprint(), "made_by": made_by}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _for_one_process(recipe: Recipe, processes: int) -> Recipe:
    """Raise the accumulation so that one process sees as many examples a step as the run's processes together."""
    accumulation = recipe.training.accumulation * processes
    return recipe.model_copy(update={"training": recipe.training.model_copy(update={"accumulation": accumulation})})


def _read(path: Path) -> dict[str, Any]:
    return read_object(path) if path.exists() else {}


def _count(value: Any) -> int | None:
    """Return a value from a file if it is a positive count; else None."""
    return value if type(value) is int and 0 < value < 2**31 else None
