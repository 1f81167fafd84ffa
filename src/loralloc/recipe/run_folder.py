"""The run folder, through which the commands hand a run to each other."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from loralloc.errors import UserError
from loralloc.files import drop_half_written, finite, in_shell, write_atomically
from loralloc.recipe.changes import NotResumableError, in_words, lines_without, split_changes
from loralloc.recipe.inputs import check_kept
from loralloc.recipe.schema import Recipe, dump_recipe, load_recipe, peek_recipe

LOCK = ".lock"
"""The file in a run folder that says who is at work in it."""
HEADER = "# The resolved recipe of this run, written by loralloc."
PLACES = ("output", "plan")
"""Keys of a recipe that only say where something is."""


@dataclass(frozen=True)
class RunFolder:
    """Paths inside a run folder.

    Attributes:
        root: The folder.
    """

    ENTRIES: ClassVar[tuple[str, ...]] = (
        "recipe.yaml",
        "ranks.json",
        "adapter",
        "trained",
        "trained.partial",
        "model",
        "trace.jsonl",
        "log.jsonl",
        "metrics.json",
        "losses.json",
        "checkpoints",
        "search",
        "report.html",
        "figures",
    )
    EXPORTS: ClassVar[tuple[str, ...]] = ("ragged", "uniform", "merged", "frontier")
    """What other commands write into it; a new run deletes that too."""

    root: Path

    @classmethod
    def of(cls, recipe: Recipe) -> RunFolder:
        """The folder that a recipe names."""
        return cls(Path(recipe.output).expanduser())

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
    def trained(self) -> Path:
        """The trained weights as PEFT writes them; deleted once the adapter is exported, kept if the export fails."""
        return self.root / "trained"

    @property
    def weights(self) -> Path:
        """The exported adapter; if the export failed, the trained weights."""
        return self.adapter if _is_adapter(self.adapter) else self.trained

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
    def depends_on(self) -> Path:
        """What a search depended on: its checkpoints record it too, but they may be gone."""
        return self.root / "depends_on.json"

    @property
    def losses(self) -> Path:
        """The loss of every held-out example, to compare runs by."""
        return self.root / "losses.json"

    @property
    def report(self) -> Path:
        """The page, written last."""
        return self.root / "report.html"

    @property
    def checkpoints(self) -> Path:
        """Resumable state."""
        return self.root / "checkpoints"

    @property
    def search(self) -> RunFolder:
        """The search that precedes the training of some methods, a folder with its own trace, log and checkpoints."""
        return RunFolder(self.root / "search")

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
        """Open a run that has its adapter, or at least its trained weights.

        Raises:
            UserError: The folder is not a run, or the run has not finished.
        """
        folder = cls.existing(root)
        if not (_is_adapter(folder.weights) and (folder.model / "config.json").is_file()):
            raise UserError(f"{root} has no adapter yet: the run has not finished; loralloc train RECIPE --resume")
        return folder

    @classmethod
    def for_new_run(cls, recipe: Recipe, replace: bool) -> RunFolder:
        """Check that a new run may use its folder; nothing is written yet.

        Raises:
            UserError: The folder exists and is not a run, or is one that is not to be replaced, or holds what the new
                run reads.
        """
        folder = cls.of(recipe)
        if folder.root.is_file():
            raise UserError(f"output: {folder.root} is a file; name a folder")
        if folder.root.is_dir() and not folder.is_unused():
            if not folder.is_run():
                raise UserError(
                    f"output: {folder.root} exists and is not a run; nothing was overwritten: choose another folder"
                )
            if not replace:
                raise UserError(
                    f"output: {folder.root} holds a run already; continue it with --resume, start over with --replace, "
                    "or choose another folder with --output"
                )
            check_kept(recipe, folder.root, (*cls.ENTRIES, *cls.EXPORTS), "--replace")
        return folder

    def create(self, recipe: Recipe) -> None:
        """Make the folder and write the recipe; the files of an earlier run are removed, others stay.

        If the process is killed meanwhile, the folder is a run that has not finished, which can be replaced again.
        """
        self.clear()
        self.root.mkdir(parents=True, exist_ok=True)
        self.go_on(recipe)

    def remove(self) -> None:
        """Delete the folder; what is left of it if the process is killed meanwhile is a run that has not finished."""
        self.clear()
        shutil.rmtree(self.root, ignore_errors=True)

    def clear(self) -> None:
        """Remove the files of a run but its recipe: first those by which it has finished or could go on."""
        first = ("metrics.json", "checkpoints", "search")
        for entry in dict.fromkeys((*first, *self.ENTRIES, *self.EXPORTS)):
            if entry != self.recipe.name:
                _remove(self.root / entry)

    def go_on(self, recipe: Recipe) -> None:
        """Write the recipe that the run continues with, and remove what a killed process left half written."""
        for folder in (self.checkpoints, self.search.root, self.adapter):
            drop_half_written(folder)
        for path in self.root.glob(".*"):  # other hidden files here may not be ours
            if _HALF_WRITTEN.fullmatch(path.name):
                _remove(path)
        _remove(self._partial)
        if not self.recipe.is_file() or self.recipe.read_text(encoding="utf-8") != _text(recipe):
            write_atomically(self.recipe, _text(recipe))

    def holds(self, recipe: Recipe) -> bool:
        """Whether the folder holds a run of exactly this recipe.

        Its paths of this folder and of the plan may differ: the folder may be named in another way, or have moved.
        """
        if not self.recipe.is_file():
            return False
        kept, asked = (lines_without(text, PLACES) for text in (self.recipe.read_text(encoding="utf-8"), _text(recipe)))
        return kept == asked

    def is_unused(self) -> bool:
        """Whether the folder has nothing worth keeping: it is empty, or its run ended before the first step.

        Such a run leaves its recipe, empty files and folders, and the first event of the trace.
        """
        found = [entry for entry in self.root.iterdir() if not _HALF_WRITTEN.fullmatch(entry.name)]
        if not all(entry.name in (*self.ENTRIES, LOCK) for entry in found):
            return False
        files = (path for entry in found for path in (entry, *entry.rglob("*")))
        written = {path for path in files if path.is_file() and path.stat().st_size > 0}
        written.discard(self.root / LOCK)
        traces = {self.trace, self.search.trace}
        begun = any(path.read_bytes().count(b"\n") > 1 for path in written & traces)
        return not begun and written <= {self.recipe, *traces} and (not written or self.is_run())

    def keep_trained(self, save: Callable[[str], None]) -> None:
        """Write the trained weights, completely or not at all.

        Args:
            save: Called with the folder to write.
        """
        for folder in (self._partial, self.trained):
            shutil.rmtree(folder, ignore_errors=True)
        save(str(self._partial))
        self._partial.rename(self.trained)

    @property
    def _partial(self) -> Path:
        return self.root / "trained.partial"

    def drop_trained(self) -> None:
        """Delete the trained weights, now that the adapter is written."""
        shutil.rmtree(self.trained, ignore_errors=True)

    def exported(self, profile: str) -> Path:
        """Where an export goes by default: RUN/PROFILE; but RUN/adapter for `ragged` if the run has no adapter yet."""
        return self.root / profile if self.weights == self.adapter or profile != "ragged" else self.adapter

    def is_run(self) -> bool:
        """Whether the folder's recipe was written by a run."""
        return self.recipe.is_file() and self.recipe.read_text(encoding="utf-8").startswith(HEADER)

    @classmethod
    def resume(cls, recipe: Recipe) -> RunFolder:
        """Open the folder of an interrupted run of the same recipe.

        Raises:
            UserError: It is not a run, belongs to another recipe, has finished with its report, or kept no
                checkpoints.
        """
        folder = cls.existing(cls.of(recipe).root)
        changes, _ = split_changes(folder.load_recipe(), recipe)
        if changes:
            raise NotResumableError(
                f"{folder.recipe} differs from the recipe given: {in_words(changes)}; resume with the same settings, "
                f"or choose another --output{folder.kept_hint()}"
            )
        if folder.metrics.is_file() and folder.report.is_file():
            raise UserError(f"{folder.root} has finished; there is nothing to resume")
        if not recipe.training.keeps_checkpoints and not folder.can_go_on:
            raise UserError(
                f"{folder.root} kept no checkpoints (training.save_every is not set); start over with --replace"
                f"{folder.kept_hint()}"
            )
        return folder

    @property
    def can_go_on(self) -> bool:
        """Whether a resumed run could reuse something: a checkpoint, a finished search, or final metrics."""
        begun = any(path for one in (self, self.search) for path in one.checkpoints.glob("checkpoint-*"))
        return begun or self.search.plan.is_file() or self.metrics.is_file()

    def kept_hint(self) -> str:
        """For messages: the commands for what a run that has not finished has trained; empty if it kept nothing."""
        if self.metrics.is_file():
            return ""
        root = in_shell(self.root)
        if _is_adapter(self.adapter):
            return f"; its adapter is exported: loralloc evaluate {root} and loralloc report {root} look at it"
        return f"; what it trained is kept: loralloc export {root}" if _is_adapter(self.trained) else ""

    def peek_recipe(self) -> Recipe:
        """Read the run's recipe without its method, which takes seconds to import."""
        return peek_recipe(self.recipe) or self.load_recipe()

    def load_recipe(self) -> Recipe:
        """Read the run's recipe."""
        return load_recipe(self.recipe)

    def write_json(self, path: Path, record: dict[str, Any]) -> None:
        """Write a record into the folder."""
        write_atomically(path, json.dumps(finite(record), indent=1, allow_nan=False) + "\n")


_HALF_WRITTEN = re.compile(rf"\.({'|'.join(map(re.escape, RunFolder.ENTRIES))})\.\d+|\.adapter\.[a-z0-9_]{{8}}")
"""Names of temporary files, and of the temporary folder of an export, before they are renamed."""


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _text(recipe: Recipe) -> str:
    return f"{HEADER}\n{dump_recipe(recipe)}"


def _is_adapter(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("adapter_config.json", "adapter_model.safetensors"))
