"""`loralloc demo`: two runs that fit into three minutes on any machine, and what is said of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from rich.console import Console

from loralloc.cli import demo, fit, progress, terminal
from loralloc.cli.fit import SLACK, Measured, steps_within
from loralloc.recipe import evaluations
from loralloc.recipe import run as pipeline
from loralloc.recipe.schema import load_recipe
from loralloc.recipes import list_recipes

from .command import RECIPE, done, examples, read_json, refused, write_rows


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory, encoder: Path) -> dict[str, Path]:
    """The demo's recipes, but for a tiny model and eight classes of two words."""
    folder = tmp_path_factory.mktemp("demo")
    rows = [{"text": row["text"], "label": f"area{index % 8}"} for index, row in enumerate(examples(40, 4))]
    write_rows(folder / "areas.jsonl", rows)
    text = RECIPE.replace("{data}/train.jsonl", "{data}/areas.jsonl").replace("{data}/validation.jsonl", "0.2")
    text = text.replace("  text: text", "  test: {data}/areas.jsonl\n  text: text").replace("steps: 16", "steps: 4")
    text = text.format(encoder=encoder, data=folder)
    plain = (
        re.sub(r"name: adalora\n.*\n.*\n", "name: lora\n", text).replace("r: 4", "r: 2").replace("alpha: 8", "alpha: 4")
    )
    paths = {f"demo/{name}": folder / f"{name}.yaml" for name in demo.METHODS}
    for path, content in zip(paths.values(), (text, plain), strict=True):
        path.write_text(content, encoding="utf-8")
    return paths


@contextmanager
def prepared(cases: dict[str, Path]) -> Iterator[pytest.MonkeyPatch]:
    """The demo takes these recipes, however short they are, and draws no report."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loralloc.recipes.list_recipes", lambda: cases)
        patch.setattr(demo, "LEAST", 1)
        patch.setattr(pipeline, "write_report", lambda folder: folder / "report.html")
        yield patch


class Shown(NamedTuple):
    folder: Path
    said: str
    evaluated: list[str]


@pytest.fixture(scope="module")
def shown(cases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Shown:
    """A demo in a narrow terminal: its folder, what it said, and what it evaluated."""
    folder, evaluated, alive = tmp_path_factory.mktemp("shown"), [], evaluations.evaluate

    def noted(trainer: Any, data: Any, prefix: str, *rest: Any) -> Any:
        evaluated.append(prefix)
        return alive(trainer, data, prefix, *rest)

    with prepared(cases) as patch:
        patch.setattr(evaluations, "evaluate", noted)
        narrow = Console(highlight=False, width=80)
        for module in (terminal, progress, fit):
            patch.setattr(module, "console", narrow)
        return Shown(folder, done("demo", "--output", folder), evaluated)


class TestDemo:
    def test_compares_two_runs_of_one_budget(self, shown: Shown) -> None:
        table = shown.said[shown.said.index("The demo") :]
        for method in demo.METHODS:
            metrics = read_json(shown.folder / method / "metrics.json")
            assert (metrics["final_ranks"], metrics["total_steps"]) == (26, 4)
            (line,) = re.findall(rf"^{method} +(\S+) +(\S+) ", table, re.M)
            assert line == (f"{metrics['test']['accuracy']:.3f}", "26")
        assert re.search(r"^majority +0.125", table, re.M)
        assert re.search(r"^untrained +0\.\d", table, re.M)

    def test_says_how_long_they_are_and_why(self, shown: Shown) -> None:
        words = " ".join(shown.said.split())
        assert re.search(r"measured \S+ s a step, \S+ s for the evaluations of a run", words)
        assert "steps 4 for each of 2 runs, as in the recipes; with evaluations about" in words

    def test_evaluates_the_untrained_model_once_for_both(self, shown: Shown, here: Path, unreported: None) -> None:
        cuts = ["cut"] * 4  # 13, 6, 3 and 1 of 26 ranks
        assert shown.evaluated == ["untrained", *[*cuts, "eval", "test"] * 2]
        both = [read_json(shown.folder / method / "metrics.json")["reference"] for method in demo.METHODS]
        assert both[0] == both[1]
        done("train", shown.folder / "lora" / "recipe.yaml", "--output", "alone")
        assert read_json(here / "alone/metrics.json")["reference"] == both[1]

    def test_prints_lines_that_load_the_adapter_whole_in_a_narrow_terminal(self, shown: Shown) -> None:
        code = shown.said[shown.said.index("from peft import") :]
        assert len(code.strip().splitlines()) == 5
        scope: dict[str, object] = {}
        exec(compile(code, "printed", "exec"), scope)  # as a user pastes it
        assert isinstance(scope["model"], PeftModel)

    def test_a_slow_machine_takes_fewer_steps(self, cases: dict[str, Path], here: Path) -> None:
        with prepared(cases) as patch:
            patch.setattr(fit, "measure", lambda recipe: Measured(26.0, 10.0, 0.125))
            said = done("demo", "--output", "both")
        assert "measured  26 s a step, 10 s for the evaluations of a run" in said
        assert "3 for each of 2 runs, as many as fit into 180 s of training; with evaluations about 176 s" in said
        assert [read_json(here / f"both/{m}/metrics.json")["total_steps"] for m in demo.METHODS] == [3, 3]

    def test_does_not_overwrite_what_is_no_run_and_says_so_at_once(self, here: Path) -> None:
        (here / "both" / "lora").mkdir(parents=True)
        (here / "both" / "lora" / "thesis.txt").write_text("years of work", encoding="utf-8")
        assert "both/lora exists and is not a run" in refused("demo", "--output", "both")
        assert not (here / "both" / "adalora").exists()


class TestSteps:
    """How many fit."""

    TIMES = st.floats(1e-3, 1e3)

    @given(step=TIMES, seconds=TIMES, runs=st.integers(1, 3))
    def test_all_runs_fit_into_the_time_unless_they_are_as_short_as_may_be(
        self, step: float, seconds: float, runs: int
    ) -> None:
        steps = steps_within(seconds, Measured(step, 7.0, 0.0), runs, least=30, most=300)
        assert 30 <= steps <= 300
        assert steps == 30 or runs * steps * step <= SLACK * seconds * (1 + 1e-9)
        assert steps == 300 or runs * (steps + 1) * step > SLACK * seconds * (1 - 1e-9)

    @pytest.mark.parametrize(("step", "steps"), [(0.01, 300), (0.5, 162), (0.85, 95), (2.0, 40), (10.0, 40)])
    def test_on_machines_of_every_speed(self, step: float, steps: int) -> None:
        assert steps_within(demo.SECONDS, Measured(step, 20 * step, 0.0), 2, demo.LEAST, 300) == steps

    def test_a_budget_of_the_demo_fits_into_the_fewest(self) -> None:
        words = ["--training.steps", str(demo.LEAST)]
        recipe = load_recipe(list_recipes()["demo/adalora"], words)
        assert recipe.training.steps == demo.LEAST

    @pytest.mark.parametrize(
        ("steps", "step", "why"),
        [
            (300, 0.1, "as in the recipes; with evaluations about 64 s"),
            (100, 0.7, "as many as fit into 180 s of training; with evaluations about 144 s"),
            (30, 5.0, "the fewest in which ranks can be allocated; with evaluations about 304 s"),
        ],
    )
    def test_why_is_said(self, steps: int, step: float, why: str, capsys: pytest.CaptureFixture[str]) -> None:
        fit.show_steps(steps, 180, Measured(step, 2.0, 0.1), runs=2, most=300)
        assert f"steps     {steps} for each of 2 runs, {why}" in capsys.readouterr().out

    def test_the_two_recipes_have_one_budget(self) -> None:
        both = {name: load_recipe(list_recipes()[f"demo/{name}"]) for name in demo.METHODS}
        assert both["adalora"].method.budget.average_rank == both["lora"].lora.r
        same = ("data", "model", "training", "task")
        assert all(getattr(both["adalora"], key) == getattr(both["lora"], key) for key in same)
