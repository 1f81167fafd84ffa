"""The run folder: the interface between the verbs."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loralloc.config import Recipe, dump_recipe, load_recipe
from loralloc.errors import UserError


@dataclass(frozen=True)
class RunFolder:
    """Paths inside a run folder.

    Attributes:
        root: The folder.
    """

    root: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe; the file that makes a folder a run."""
        return self.root / "recipe.yaml"

    @property
    def plan(self) -> Path:
        """The rank plan."""
        return self.root / "ranks.json"

    @property
    def adapter(self) -> Path:
        """The plain PEFT adapter."""
        return self.root / "adapter"

    @property
    def model(self) -> Path:
        """Configuration (with the task's labels) and tokenizer of the base model; its weights stay where they are."""
        return self.root / "model"

    @property
    def trace(self) -> Path:
        """Allocation events."""
        return self.root / "trace.jsonl"

    @property
    def log(self) -> Path:
        """Losses, learning rates, budgets."""
        return self.root / "log.jsonl"

    @property
    def metrics(self) -> Path:
        """Final figures."""
        return self.root / "metrics.json"

    @property
    def checkpoints(self) -> Path:
        """Resumable state."""
        return self.root / "checkpoints"

    @classmethod
    def existing(cls, root: Path) -> RunFolder:
        """Open a run.

        Raises:
            UserError: The folder is missing or is not a run.
        """
        folder = cls(root)
        if not root.is_dir():
            raise UserError(f"there is no folder {root}; a run folder is what `loralloc train` writes")
        if not folder.recipe.is_file():
            raise UserError(f"{root} is not a run: it has no recipe.yaml; name the output folder of `loralloc train`")
        return folder

    @classmethod
    def finished(cls, root: Path) -> RunFolder:
        """Open a run that has its adapter.

        Raises:
            UserError: The folder is not a run, or the run has not finished.
        """
        folder = cls.existing(root)
        if not (folder.adapter / "adapter_config.json").is_file():
            raise UserError(f"{root} has no adapter yet: the run has not finished; loralloc train RECIPE --resume")
        return folder

    @classmethod
    def create(cls, recipe: Recipe, replace: bool) -> RunFolder:
        """Make the folder of a new run and write its recipe.

        Raises:
            UserError: The folder exists and is not a run, or is one that is not to be replaced.
        """
        folder = cls(Path(recipe.output))
        if folder.root.is_file():
            raise UserError(f"output: {folder.root} is a file; name a folder")
        if folder.root.exists() and any(folder.root.iterdir()):
            if not folder.recipe.is_file():
                raise UserError(
                    f"output: {folder.root} exists and is not a run; nothing was overwritten: choose another folder"
                )
            if not replace:
                raise UserError(
                    f"output: {folder.root} holds a run already; continue it with --resume, start over with --replace, "
                    "or choose another folder with --output"
                )
            shutil.rmtree(folder.root)
        folder.root.mkdir(parents=True, exist_ok=True)
        folder.recipe.write_text(dump_recipe(recipe), encoding="utf-8")
        return folder

    @classmethod
    def resume(cls, recipe: Recipe) -> RunFolder:
        """Open the folder of an interrupted run of the same recipe.

        Raises:
            UserError: It is not a run, belongs to another recipe, has finished, or kept no checkpoints.
        """
        folder = cls.existing(Path(recipe.output))
        if dump_recipe(folder.load_recipe()) != dump_recipe(recipe):
            raise UserError(
                f"{folder.recipe} differs from the recipe given; resume with the same settings, or choose another "
                "--output"
            )
        if folder.metrics.is_file():
            raise UserError(f"{folder.root} has finished; there is nothing to resume")
        if recipe.training.save_every is None:
            raise UserError(
                f"{folder.root} kept no checkpoints (training.save_every is not set); start over with --replace"
            )
        return folder

    def load_recipe(self) -> Recipe:
        """Read the run's recipe."""
        return load_recipe(self.recipe)

    def write_json(self, path: Path, record: dict[str, Any]) -> None:
        """Write a record into the folder."""
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
