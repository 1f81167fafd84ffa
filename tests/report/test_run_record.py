from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from loralloc.errors import UserError
from loralloc.report.run_record import read_run

from .fabricate import Fabricated, bert, lines


@pytest.fixture
def made() -> Fabricated:
    return Fabricated(bert(2), bad_steps=(17, 90))


@pytest.fixture
def run(made: Fabricated, tmp_path: Path) -> Path:
    return made.write(tmp_path / "run")


def test_everything_written_is_read(made: Fabricated, run: Path) -> None:
    read = read_run(run)
    assert read.plan.ranks == dict(zip(made.modules, made.ranks, strict=True))
    assert read.finished
    assert read.absent == ()
    assert read.trace is not None
    assert read.trace.sites == tuple(made.modules)
    assert read.trace.falling == (45, 165)
    assert read.trace.events[0].ranks == (12,) * 12
    assert read.trace.events[0].budget == 144
    assert read.trace.events[-1].ranks == tuple(made.ranks)
    assert read.trace.bad_steps == (17, 90)
    assert (len(read.train), len(read.evaluations)) == (60, 6)
    assert read.last_step == read.reached == 300
    assert read.section("method") == {"name": "adalora"}


def test_an_unfinished_run_takes_its_ranks_from_the_trace(made: Fabricated, tmp_path: Path) -> None:
    run = made.write(tmp_path / "run", without=["ranks.json", "metrics.json"])
    rows = [row for row in made.trace() if row["step"] <= 100]
    (run / "trace.jsonl").write_text(lines(rows))
    (run / "log.jsonl").write_text(lines(made.log()[:20]))
    read = read_run(run)
    assert not read.finished
    assert list(read.plan.ranks.values()) == rows[-1]["ranks"]
    assert {module.start for module in read.plan.modules.values()} == {12}
    assert read.plan.method == "adalora"
    assert (read.reached, read.last_step) == (100, 300)
    assert [sentence.split(":")[0] for sentence in read.absent] == ["ranks.json", "metrics.json"]


class TestJsonLines:
    def test_half_a_last_line_is_skipped(self, run: Path) -> None:
        before = read_run(run).train
        with (run / "log.jsonl").open("a") as file:
            file.write('{"step": 305, "lo')
        assert read_run(run).train == before

    def test_a_damaged_line_elsewhere_is_named(self, run: Path) -> None:
        rows = (run / "log.jsonl").read_text().splitlines(keepends=True)
        (run / "log.jsonl").write_text("".join([rows[0], '{"step": 305, "lo\n', *rows[1:]]))
        with pytest.raises(UserError, match=r"log\.jsonl, line 2: not a JSON object with a step"):
            read_run(run)

    def test_after_a_resume_the_later_rows_count(self, made: Fabricated, run: Path) -> None:
        killed = [
            {"step": 5, "loss": 2.0},
            {"step": 10, "loss": 1.9},
            {"step": 15, "loss": 9.0},
            {"step": 20, "loss": 9.0},
        ]
        (run / "log.jsonl").write_text(lines([*killed, {"step": 10, "loss": 1.5}, {"step": 15, "loss": 1.4}]))
        assert read_run(run).train == ((5, 2.0), (10, 1.5), (15, 1.4))

    def test_a_bad_step_that_was_repeated_counts_once(self, made: Fabricated, run: Path) -> None:
        rows = [row for row in made.trace() if row["step"] <= 90]
        (run / "trace.jsonl").write_text(lines([*rows, rows[-1]]))
        assert rows[-1]["event"] == "bad_step"
        assert read_run(run).bad_steps == 2

    def test_losses_that_are_no_numbers_are_nan(self, run: Path) -> None:
        (run / "log.jsonl").write_text(
            '{"step": 1, "loss": NaN}\n{"step": 2, "loss": "inf"}\n{"step": 3, "loss": null}\n'
        )
        assert [math.isnan(loss) for _, loss in read_run(run).train] == [True, True, True]


class TestNotARun:
    def test_an_empty_folder(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"is not a run folder: it has neither ranks\.json nor a trace\.jsonl"):
            read_run(tmp_path)

    def test_a_folder_that_does_not_exist(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="nowhere is not a run folder"):
            read_run(tmp_path / "nowhere")

    def test_a_file(self, run: Path) -> None:
        with pytest.raises(UserError, match="is not a run folder"):
            read_run(run / "ranks.json")

    def test_a_recipe_alone(self, tmp_path: Path) -> None:
        (tmp_path / "recipe.yaml").write_text("task: causal-lm\n")
        with pytest.raises(UserError, match="is not a run folder"):
            read_run(tmp_path)

    def test_a_plan_without_modules(self, run: Path) -> None:
        plan = json.loads((run / "ranks.json").read_text()) | {"modules": {}}
        (run / "ranks.json").write_text(json.dumps(plan))
        text = f"{run / 'ranks.json'}: the plan keeps no rank in any module; restore the file, or train again"
        with pytest.raises(UserError, match=f"^{re.escape(text)}$"):
            read_run(run)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("ranks.json", "{", r"ranks\.json: not JSON"),
        ("ranks.json", '{"format": 7, "modules": {}}', '"format": 1'),
        ("metrics.json", "{", r"metrics\.json: not JSON"),
        ("metrics.json", "[]", r"metrics\.json: expected a JSON object, got list"),
        ("trace.jsonl", '{"event": "start", "step": 0}\n', r"trace\.jsonl: an event lacks a field .*sites"),
        (
            "trace.jsonl",
            '{"event": "start", "step": 0, "sites": ["a"], "in": [2], "out": [2], "ranks": [1]}\n'
            '{"event": "finish", "step": 3, "ranks": [1, 1]}\n',
            "2 ranks for 1 sites at step 3",
        ),
    ],
)
def test_damage_is_reported_with_its_file(run: Path, name: str, text: str, message: str) -> None:
    (run / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_run(run)


def test_text_that_is_not_utf8_is_reported(run: Path) -> None:
    (run / "log.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"log\.jsonl: cannot be read as UTF-8"):
        read_run(run)


def test_a_recipe_that_is_not_yaml_is_still_shown(run: Path) -> None:
    (run / "recipe.yaml").write_text("task: [")
    read = read_run(run)
    assert (read.recipe_text, read.recipe) == ("task: [", {})
