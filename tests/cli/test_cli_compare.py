"""What `loralloc compare` says: before it runs anything, and while it does."""

from __future__ import annotations

import builtins
import importlib.metadata
from collections.abc import Iterator, Sequence
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from loralloc.cli import watch
from loralloc.cli.watch import Lines, LiveTable
from loralloc.compare import execute
from loralloc.compare.cells import plan_cells
from loralloc.compare.execute import Ended, Job, RayExecutor, run_job
from loralloc.compare.grid import Shapes
from loralloc.compare.results import Row
from loralloc.errors import UserError
from loralloc.recipe.schema import load_recipe
from loralloc.recipes import list_recipes

from .command import done, log_rows, refused

SHAPES = Shapes(
    {"q": (16, 16), "k": (16, 32)}, 48, 20, 30, 16, 10_000, "accuracy", greater_is_better=True, depends_on={}
)


class TestRefusals:
    def test_before_anything_runs(self, recipe: Path, here: Path) -> None:
        assert refused("compare", recipe, "--methods", "adalorra").startswith(
            "--methods: compare.methods: there is no method adalorra;"
        )
        assert refused("compare", recipe, "--plan", "nowhere.json").startswith("nowhere.json")
        assert refused("compare", "--seeds", 3).startswith("name the recipe before the flags")
        assert not (here / "run").exists()

    def test_budgets_that_cannot_be_equal(self, recipe: Path, here: Path) -> None:
        said = refused("compare", recipe, "--methods", "allora", "--budgets", 1.5)
        assert said.startswith("allora keeps every rank of lora.r, and no whole rank costs the ")
        assert not (here / "run").exists()

    def test_no_validation_data(self, recipe: Path) -> None:
        assert refused("compare", recipe, "--data.validation", 0).startswith(
            "--data.validation: data.validation must be"
        )
        assert "nowhere.jsonl" in refused("compare", recipe, "--data.validation", "nowhere.jsonl")

    def test_jobs_beside_a_cluster(self, recipe: Path) -> None:
        assert refused("compare", recipe, "--ray", "auto", "--jobs", 2) == (
            "--jobs is for this machine, and a Ray cluster schedules its runs itself: give one of them"
        )

    def test_a_folder_that_holds_a_run(self, recipe: Path, run: Path) -> None:
        assert refused("compare", recipe) == ("output: run holds a run; name a folder for the comparison with --output")

    def test_a_method_of_a_package_that_is_broken(self, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from loralloc.methods import registry

        entry = importlib.metadata.EntryPoint("theirs", "no_such_package.module:Method", registry.GROUP)
        monkeypatch.setattr(registry, "entry_points", lambda group: [entry])
        # Caches of their own: recipes have the classes that the old ones hold.
        for name in ("methods", "sections"):
            monkeypatch.setattr(registry, name, cache(getattr(registry, name).__wrapped__))
        said = refused("compare", recipe)
        assert 'the method "theirs" (no_such_package.module:Method) cannot be imported' in said


def test_ray_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    alive = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "ray":
            raise ImportError(name)
        return alive(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError) as error:
        RayExecutor("auto")
    assert str(error.value) == '--ray needs the package ray: pip install "loralloc[ray]"'


@pytest.mark.usefixtures("unreported")
def test_train_says_whom_the_section_is_for(recipe: Path, here: Path) -> None:
    said = done("train", recipe, "--seeds", 2)
    assert "the section compare is for loralloc compare; this trains adalora alone" in said
    assert "the section compare" not in done("train", recipe, "--output", "other")
    assert log_rows(here / "run") == log_rows(here / "other")


def test_the_packaged_comparison_is_small_and_fair() -> None:
    from loralloc.compare.cells import comparable

    recipe = comparable(load_recipe(list_recipes()["demo/compare"]))
    cells = plan_cells(recipe, SHAPES, Path("runs"))
    assert len(cells) == 4 * 2 * 2
    assert {cell.recipe.model.name for cell in cells} == {"demo:minilm"}


class TestJobs:
    @staticmethod
    def job(here: Path, **changed: Any) -> Job:
        (here / "recipe.yaml").touch()
        return Job(
            **{
                "name": "a",
                "recipe": str(here / "recipe.yaml"),
                "log": str(here / "a.log"),
                "peer": None,
                "threads": 1,
                "folder": str(here),
                **changed,
            }
        )

    def test_a_machine_that_does_not_see_the_folder(self, here: Path) -> None:
        assert run_job(self.job(here, recipe="/nowhere/recipe.yaml")) == Ended(
            "a", "this machine does not see /nowhere/recipe.yaml: all machines must share the output folder"
        )

    @pytest.mark.parametrize(
        ("code", "log", "reason"),
        [
            (2, "some note\nerror: the loss diverged\nmore\n", "the loss diverged"),
            (1, "Traceback\nMemoryError: too much\n", "MemoryError: too much"),
            (-9, "", "killed by SIGKILL; see {log}"),
            (3, "", "ended with exit code 3; see {log}"),
        ],
    )
    def test_why_a_run_has_failed(self, here: Path, code: int, log: str, reason: str) -> None:
        path = here / "a.log"
        path.write_text(f"error: of an earlier try\n{log}")
        assert execute._reason(code, path, len("error: of an earlier try\n")) == reason.format(log=path)


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Iterator[StringIO]:
    file = StringIO()
    monkeypatch.setattr(watch, "console", Console(file=file, width=110, highlight=False))
    return file  # type: ignore[return-value]


class Shown:
    """Stands for the live display; keeps what it was given."""

    def update(self, shown: Any) -> None:
        self.shown = shown


def cells() -> Sequence[Any]:
    recipe = load_recipe(list_recipes()["demo/compare"], ["--learning_rates", "1e-3"])
    return plan_cells(recipe, SHAPES, Path("runs"))


def test_lines_tell_how_each_run_ends_and_how_long_the_rest_takes(
    screen: StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([0.0, 0.0, 60.0, 120.0])
    monkeypatch.setattr(watch, "clock", lambda: next(now))
    lines, found = Lines(), cells()
    lines.planned(found, found[4:])
    for cell, row in ((found[0], Row(found[0], validation={"loss": 0.5})), (found[1], Row(found[1], reason="killed"))):
        lines.started(cell.name)
        lines.ended(cell.name, row, 30.0)
    assert screen.getvalue().splitlines() == [
        "  8 runs, 4 of them run before",
        "  1/4  r1-lora-lr0.001-s0  validation loss 0.5000  30 s, 3 min left",
        "  2/4  r1-lora-lr0.001-s1  failed: killed  30 s, 2 min left",
    ]


def test_the_live_table_counts_by_contender(screen: StringIO) -> None:
    live = Shown()
    table, found = LiveTable(live), cells()  # type: ignore[arg-type]
    table.planned(found, [])
    table.started(found[0].name)
    table.started(found[1].name)
    table.ended(found[1].name, Row(found[1], reason="killed [by] hand"), 1.0)
    watch.console.print(live.shown)
    said = screen.getvalue()
    rows = {line.split("  ")[0]: line.split()[-2:] for line in said.splitlines() if line.startswith("average rank")}
    assert rows["average rank 1, plain LoRA"] == ["1", "1"]
    assert rows["average rank 1, AdaLoRA"][-1] == "2"
    assert "killed [by] hand" in said
