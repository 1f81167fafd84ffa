"""Run folders of strangers, and their plans: `report` reads nothing else, writes nowhere else, and takes no bait."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli.command import done, refused

import loralloc.report.page  # noqa: F401 - imported before a clock runs
from drills import plans, runs
from drills.grammar import as_json
from loralloc import RankPlan, UserError
from loralloc.report.null_control import null_control
from loralloc.report.run_record import read_run
from loralloc.trace import MOST_PHASES, read_trace

from .sent import NO_FILES, quickly, run

FILES = ("ranks.json", "trace.jsonl", "log.jsonl", "metrics.json", "recipe.yaml", "model/config.json")


def test_what_is_right_is_reported(tmp_path: Path) -> None:
    assert "wrote" in done("report", run(tmp_path / "run"))


@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize("file", FILES)
def test_files_that_are_none(file: str, kind: str, tmp_path: Path) -> None:
    folder = run(tmp_path / "run")
    put, said = NO_FILES[kind]
    put(folder / file)
    with quickly():
        message = refused("report", folder)
    assert re.search(said, message)
    assert str(folder / file) in message
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize("file", FILES)
def test_a_link_out_of_the_folder_tells_nothing(file: str, tmp_path: Path) -> None:
    folder = run(tmp_path / "run")
    (tmp_path / "mine").write_text("the secret of this machine")
    (folder / file).unlink()
    (folder / file).symlink_to(tmp_path / "mine")
    message = refused("report", folder)
    assert f"{folder / file} is a link out of its folder, to {tmp_path / 'mine'}; put a copy" in message
    assert "secret" not in message


class TestFigures:
    def test_a_folder_elsewhere_is_not_written_into(self, tmp_path: Path) -> None:
        folder = run(tmp_path / "run")
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "ranks.png").write_text("a picture")
        (folder / "figures").symlink_to(tmp_path / "mine")
        assert "figures is a link out of its folder" in refused("report", folder)
        assert [path.read_text() for path in (tmp_path / "mine").iterdir()] == ["a picture"]

    def test_a_file_elsewhere_is_not_written_over(self, tmp_path: Path) -> None:
        folder = run(tmp_path / "run")
        (tmp_path / "mine").write_text("a thesis")
        (folder / "figures").mkdir()
        links = [folder / "report.html", *(folder / "figures" / f"{name}.png" for name in ("ranks", "budget", "loss"))]
        for link in links:
            link.symlink_to(tmp_path / "mine")
        done("report", folder)
        assert (tmp_path / "mine").read_text() == "a thesis"
        assert not any(link.is_symlink() for link in links)
        assert all(link.stat().st_size > 1000 for link in links)


Change = Callable[[dict[str, Any]], Any]


def start(**changes: Any) -> str:
    return runs.lines([{**runs.TRACE[0], **changes}, *runs.TRACE[1:]])


TRACES: dict[str, tuple[str, str]] = {
    "a rank below zero": (start(ranks=[-1, 4, 4, 4]), "-1 is not a whole number from 0 to 9007199254740992"),
    "a rank that is none": (start(ranks=[4, "4", 4, 4]), "'4' is not a whole number"),
    "an infinite rank": (start(ranks=[math.inf, 4, 4, 4]), "inf is not a whole number"),
    "half a rank": (start(ranks=[4.5, 4, 4, 4]), "4.5 is not a whole number"),
    "sizes of nothing": (start(**{"in": [0, 8, 8, 8]}), "0 is not a whole number from 1 to"),
    "sizes of other sites": (start(**{"in": [8], "out": [8]}), "1 sizes and 4 costs of 4 sites"),
    "costs of other sites": (start(costs=[1]), "4 sizes and 1 costs of 4 sites"),
    "a target of 10³⁰⁰": (start(target_budget=1e300), "1e+300 is not a whole number"),
    "steps without an end": (start(total_steps=10**30), "0 is not a whole number from 0 to"),
    "a site twice": (start(sites=["q"] * 4), "sites must be names of modules, each once, got"),
    "a site that is none": (start(sites=["q", 3, "a", "b"]), "each once, got 3"),
    "a site that a terminal would act on": (start(sites=["q\x1b[2J", "a", "b", "c"]), "got 'q\\\\x1b[2J'"),
    "a site with half a character": (start(sites=["q", "a", "b", "\ud800"]), "line 1: not a JSON object with a step"),
    "sites that are a text": (start(sites="qabc"), "each once, got 'qabc'"),
    "phases without end": (start(phases=[["a", 1, 2]] * 100_000), "100,000 phases, but at most 16 are allowed"),
    "phases that are none": (start(phases=[3]), "cannot unpack"),
    "a unit of a million letters": (start(unit="x" * 10**6), "is no name"),
    "deep": ("[" * 100_000 + "\n" + start(), "line 1: not a JSON object with a step: '[[["),
}


@pytest.mark.parametrize("name", TRACES)
def test_traces(name: str, tmp_path: Path) -> None:
    folder = run(tmp_path / "run")
    text, said = TRACES[name]
    (folder / "trace.jsonl").write_text(text)
    with quickly():
        message = refused("report", folder)
    assert said in message
    assert str(folder / "trace.jsonl") in message
    assert len(message) < 1000


def test_a_schedule_has_few_phases(tmp_path: Path) -> None:
    (tmp_path / "trace.jsonl").write_text(start(phases=[["a", 1, 2]] * MOST_PHASES))
    trace = read_trace(tmp_path / "trace.jsonl")
    assert trace is not None
    assert len(trace.phases) == MOST_PHASES


STRANGE: dict[str, Change] = {
    "numbers that no float holds": lambda m: m.update(train_seconds=10**400, adapter_check=-(10**400)),
    "metrics that are a list": lambda m: m.update(validation=[1], test="x", also=[{}], reference=3, classes=[1]),
    "metrics that are texts": lambda m: m["validation"].update(loss="low", accuracy=None),
    "cuts that are none": lambda m: m.update(cuts=[3, {"metrics": 3}, {"average_rank": math.nan}, {"metrics": {}}]),
    "sizes below zero": lambda m: m.update(cuts=[{"average_rank": -1.0, "metrics": {"loss": 0.5}}] * 3),
    "answers that are none": lambda m: m.update(generation={"samples": 3, "trained": [], "untrained": 1}),
    "a search that is none": lambda m: m.update(search=[1]),
    "classes without number": lambda m: m.update(classes={"a": math.inf, "b": -1, "c": "x", "d": 10**400}),
}
"""Values of metrics.json that the page leaves out or shows as they are."""


@pytest.mark.parametrize("name", STRANGE)
def test_metrics_that_are_none_are_left_out(name: str, tmp_path: Path) -> None:
    folder = run(tmp_path / "run")
    metrics = json.loads(as_json(runs.METRICS))
    STRANGE[name](metrics)
    (folder / "metrics.json").write_text(as_json(metrics))
    assert "wrote" in done("report", folder)


class TestRecipes:
    def test_an_alias_bomb_is_text(self, tmp_path: Path) -> None:
        """Read as YAML, its task would be a list of 2⁴⁰ x."""
        folder = run(tmp_path / "run")
        bomb = "\n".join(["a0: &a0 [x, x]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 40))])
        (folder / "recipe.yaml").write_text(f"{bomb}\ntask: *a39\n")
        (folder / "metrics.json").unlink()
        record = read_run(folder)
        assert record.recipe == {}
        assert record.recipe_text is not None
        done("report", folder)

    @pytest.mark.parametrize("text", ["[" * 50_000, "- " * 50_000, "a: " + "9" * 5000, 'a: "\\ud800"'])
    def test_what_is_none_is_text(self, text: str, tmp_path: Path) -> None:
        (run(tmp_path / "run") / "recipe.yaml").write_text(text)
        with quickly():
            assert read_run(tmp_path / "run").recipe == {}

    def test_an_alias_bomb_is_refused_as_a_recipe(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        Path("recipe.yaml").write_text("a: &a [x, x]\nb: [*a, *a]\n")
        with quickly():
            assert 'aliases such as "*a" are not supported in recipes' in refused("train", "recipe.yaml")

    @pytest.mark.parametrize("kind", NO_FILES)
    def test_files_that_are_none(self, kind: str, tmp_path: Path) -> None:
        put, said = NO_FILES[kind]
        put(tmp_path / "recipe.yaml")
        with quickly():
            assert re.search(said, refused("train", tmp_path / "recipe.yaml"))

    def test_a_number_that_no_float_holds(self, tmp_path: Path) -> None:
        (tmp_path / "recipe.yaml").write_text(f"task: causal-lm\nlora:\n  alpha: 1{'0' * 400}\n")
        assert "recipe.yaml:3: lora.alpha must be a finite number, got 1000" in refused(
            "train", tmp_path / "recipe.yaml"
        )


class TestPlans:
    @pytest.mark.parametrize("kind", NO_FILES)
    def test_files_that_are_none(self, kind: str, tmp_path: Path) -> None:
        put, said = NO_FILES[kind]
        put(tmp_path / "ranks.json")
        with quickly(), pytest.raises(UserError, match=said):
            RankPlan.load(tmp_path / "ranks.json")

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            (
                {"rank": 10**9, "start": 10**9, "in": 10**12, "out": 8},
                '"q" has 1,000,000,000,000 features, more than any layer',
            ),
            ({"rank": 10**9}, '"q" must have whole numbers with 0 <= rank, start <= max(in, out), got rank=1000000000'),
            ({"scale": 10**400}, 'the scale of module "q" must be a positive finite number, got 1000'),
        ],
    )
    def test_numbers(self, changes: dict[str, Any], said: str, tmp_path: Path) -> None:
        entry = {"rank": 2, "start": 4, "in": 8, "out": 8, "scale": 2.0, **changes}
        (tmp_path / "ranks.json").write_text(as_json({**plans.PLAN, "modules": {"q": entry}}))
        with quickly(), pytest.raises(UserError, match=re.escape(said)):
            RankPlan.load(tmp_path / "ranks.json")

    @pytest.mark.parametrize("name", ["", "x" * 513, "q\x1b[2J", "q\nq", "x." * 40, "\N{RIGHT-TO-LEFT OVERRIDE}q"])
    def test_names(self, name: str, tmp_path: Path) -> None:
        entry = {"rank": 2, "start": 4, "in": 8, "out": 8, "scale": 2.0}
        (tmp_path / "ranks.json").write_text(as_json({**plans.PLAN, "modules": {name: entry}}))
        with pytest.raises(UserError, match=rf"{re.escape(repr(name[:80]))} is not the name of a module$"):
            RankPlan.load(tmp_path / "ranks.json")

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"budget": {"average_rank": math.nan}}, '"budget.average_rank" must be a finite number, got nan'),
            ({"budget": {"total_rank": "8"}}, "\"budget.total_rank\" must be a finite number, got '8'"),
            ({"budget": {"total_rank": 10**400}}, '"budget.total_rank" must be a finite number, got 1000'),
            ({"method": ["adalora"]}, "\"method\" must be text, got ['adalora']"),
            ({"cost": {"peak": {"ranks": -1}}}, '"cost.peak" must be {"ranks": N}, got'),
            ({"cost": {"peak": {"ranks": 10**30}}}, '"cost.peak" must be {"ranks": N}, got'),
        ],
    )
    def test_records(self, changes: dict[str, Any], said: str, tmp_path: Path) -> None:
        (tmp_path / "ranks.json").write_text(as_json({**plans.PLAN, **changes}))
        with pytest.raises(UserError, match=re.escape(said)):
            RankPlan.load(tmp_path / "ranks.json")

    def test_noise_is_not_drawn_for_ranks_that_take_the_memory(self, tmp_path: Path) -> None:
        """2 · 10⁴ draws of 10⁹ ranks would be 160 terabytes."""
        folder = run(tmp_path / "run")
        entry = {"rank": 10**9, "start": 10**9, "in": 2**31 - 1, "out": 8, "scale": 2.0}
        plan = {**plans.PLAN, "method": "autolora", "budget": {}, "modules": {"layers.0.q": entry}}
        (folder / "ranks.json").write_text(as_json(plan))
        with quickly():
            assert null_control(read_run(folder)) is None
        plan["modules"] = {"layers.0.q": {**entry, "rank": 4, "start": 8}}
        (folder / "ranks.json").write_text(as_json(plan))
        assert null_control(read_run(folder)) is not None
