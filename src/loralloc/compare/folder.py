"""The folder of a comparison: a run folder for every cell, and the files that summarise them.

OUT/compare.yaml   the resolved recipe        OUT/compare.html   the page       OUT/runs/NAME/      a run
OUT/compare.csv    a row for every run        OUT/figures/       PNG files      OUT/recipes/, logs/, failures/, plans/
OUT/compare.json   what the page says         OUT/depends_on.json   fingerprints of the rows and of the base model
"""

from __future__ import annotations

import fcntl
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loralloc.compare.grid import section_of
from loralloc.errors import UserError
from loralloc.files import write_atomically
from loralloc.reading import read_object
from loralloc.recipe.changes import difference, lines_without
from loralloc.recipe.inputs import check_kept
from loralloc.recipe.run_folder import RunFolder
from loralloc.recipe.schema import Recipe, dump_recipe
from loralloc.recipe.sections import CompareConfig
from loralloc.recipe.source import read_recipe_file

HEADER = "# The resolved recipe of this comparison, written by loralloc."
MAY_DIFFER = ("compare", "output")
"""What may change between two calls: what is compared, and how the folder is named."""


@dataclass(frozen=True)
class CompareFolder:
    """Paths inside the folder of a comparison.

    Attributes:
        root: The folder.
    """

    root: Path

    @classmethod
    def of(cls, recipe: Recipe) -> CompareFolder:
        """The folder that a recipe names."""
        return cls(Path(recipe.output).expanduser())

    @property
    def recipe(self) -> Path:
        """The resolved recipe; a folder that has this file is a comparison."""
        return self.root / "compare.yaml"

    @property
    def page(self) -> Path:
        """The page."""
        return self.root / "compare.html"

    @property
    def table(self) -> Path:
        """A row for every run."""
        return self.root / "compare.csv"

    @property
    def record(self) -> Path:
        """What the page says, as numbers."""
        return self.root / "compare.json"

    @property
    def depends_on(self) -> Path:
        """Fingerprints of what all runs depend on: the rows, and the weights of the base model."""
        return self.root / "depends_on.json"

    @property
    def figures(self) -> Path:
        """The figures of the page."""
        return self.root / "figures"

    @property
    def runs(self) -> Path:
        """The run folders."""
        return self.root / "runs"

    def run(self, name: str) -> RunFolder:
        """The folder of a run."""
        return RunFolder(self.runs / name)

    def run_recipe(self, name: str) -> Path:
        """The recipe that a run is started with."""
        return self.root / "recipes" / f"{name}.yaml"

    def log(self, name: str) -> Path:
        """What a run has printed."""
        return self.root / "logs" / f"{name}.log"

    def scaled_plan(self, name: str) -> Path:
        """The plan that a run has found, at the scale of the recipe; missing where the run itself has that scale."""
        return self.root / "plans" / f"{name}.json"

    def failure(self, name: str) -> Path:
        """The file that says why a run has failed; missing for any other run."""
        return self.root / "failures" / f"{name}.json"

    def check(self, recipe: Recipe) -> None:
        """Refuse a folder that holds something else; this writes nothing.

        The section `compare` may differ from an earlier call: more seeds, other methods, but not other `threads` once
        runs have begun to keep something. The folder's path may differ.

        Raises:
            UserError: The folder holds something else, or the comparison of a recipe that differs elsewhere; or its
                runs hold what the recipe reads.
        """
        if self.root.is_file():
            raise UserError(f"output: {self.root} is a file; name a folder for the comparison with --output")
        if not self.root.is_dir() or not any(_counts(entry) for entry in self.root.iterdir()):
            return
        if RunFolder(self.root).is_run():
            raise UserError(f"output: {self.root} holds a run; name a folder for the comparison with --output")
        if not (self.recipe.is_file() and self.recipe.read_text(encoding="utf-8").startswith(HEADER)):
            raise UserError(f"output: {self.root} exists and is no comparison; name another folder with --output")
        kept, asked = (
            lines_without(text, MAY_DIFFER) for text in (self.recipe.read_text(encoding="utf-8"), self._text(recipe))
        )
        if (differs := _first_difference(kept, asked)) is not None:
            raise UserError(
                f"output: {self.root} holds the comparison of another recipe, which says {differs[0]}, not "
                f"{differs[1]}; only the section compare may differ. Name another folder with --output"
            )
        check_kept(recipe, self.root, [self.runs.name], "a run that is repeated")
        threads, before = section_of(recipe).threads, self._threads()
        if threads != before and any(RunFolder(path).can_go_on for path in self.runs.glob("*")):
            raise UserError(
                f"output: {self.root} has runs that were made with compare.threads: {before}, on which losses depend "
                f"in their last digits, and this comparison has {threads}; give the same number, or name another "
                "folder with --output"
            )

    def _threads(self) -> int:
        """The threads of the runs that were made; a recipe without a section `compare` has its default."""
        section = read_recipe_file(self.recipe).tree.get("compare") or {}
        return section.get("threads", CompareConfig().threads)

    def check_unchanged(self, depends_on: Mapping[str, Any]) -> None:
        """Refuse to compare with runs that were made with other rows or another base model; this writes nothing.

        Runs of a version that wrote no fingerprints are taken as they are. If none has finished, anything may change.

        Args:
            depends_on: Fingerprints, as `Shapes` has them.

        Raises:
            UserError: Something has changed since a run has finished.
        """
        if not self.depends_on.is_file() or not any(self.runs.glob("*/metrics.json")):
            return
        theirs = read_object(self.depends_on)
        found = [words for kind, mine in depends_on.items() if (words := difference(kind, theirs.get(kind), mine))]
        if found:
            raise UserError(
                f"output: {self.root} has runs that were made with something else: {'; '.join(found)}. They cannot be "
                "compared with new ones; name another folder with --output"
            )

    def create(self, recipe: Recipe, depends_on: Mapping[str, Any]) -> None:
        """Make the folder, and write the recipe and the fingerprints of what it depends on.

        The recipe comes first: by it the folder is known as a comparison, if the process is killed meanwhile.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        write_atomically(self.recipe, self._text(recipe))
        for folder in (self.runs, self.figures, *(self.root / name for name in ("recipes", "logs", "failures"))):
            folder.mkdir(exist_ok=True)
        write_atomically(self.depends_on, json.dumps(depends_on) + "\n")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Let one comparison at a time work on the folder.

        Raises:
            UserError: Another comparison is working on it.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UserError(f"output: another loralloc compare is at work in {self.root}; wait for it") from error
            yield

    def fail(self, name: str, reason: str, *, final: bool) -> None:
        """Record why a run has failed.

        Args:
            name: The run.
            reason: In words.
            final: Whether it would fail again; such a run is repeated only on request.
        """
        write_atomically(self.failure(name), json.dumps({"reason": reason, "final": final}) + "\n")

    def reason(self, name: str) -> tuple[str, bool] | None:
        """Return why a run has failed, and whether it would fail again; None if it has not failed."""
        path = self.failure(name)
        if not path.is_file():
            return None
        record = json.loads(path.read_text(encoding="utf-8"))
        return record["reason"], record["final"]

    @staticmethod
    def _text(recipe: Recipe) -> str:
        return f"{HEADER}\n{dump_recipe(recipe)}"


def _counts(entry: Path) -> bool:
    """Whether a folder with this entry may be somebody's: not what a process that was killed at once has left."""
    return entry.name != ".lock" and not re.fullmatch(r"\.compare\.yaml\.\d+", entry.name)


def _first_difference(kept: list[str], asked: list[str]) -> tuple[str, str] | None:
    for index in range(max(len(kept), len(asked))):
        pair = [lines[index].strip() if index < len(lines) else "nothing" for lines in (kept, asked)]
        if pair[0] != pair[1]:
            return pair[0], pair[1]
    return None
