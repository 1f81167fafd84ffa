"""What AutoLoRA's threshold keeps of noise, and where the page says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loralloc.report import write_report
from loralloc.report.null_control import thresholded_noise
from loralloc.report.run_record import read_run

from .fabricate import Fabricated, bert, lines


@pytest.mark.parametrize(
    ("spread", "mean", "deviation"),
    [(0.001, 4.00, 0.85), (0.1, 3.87, 0.85), (0.5, 3.38, 0.88)],
)
def test_noise_has_the_known_moments(spread: float, mean: float, deviation: float) -> None:
    found = thresholded_noise(8, spread)
    assert found == pytest.approx((mean, deviation), abs=0.05)
    assert found == thresholded_noise(8, spread), "it is seeded"


def test_one_rank_always_stays() -> None:
    assert thresholded_noise(1, 0.5) == (1.0, 0.0)
    assert thresholded_noise(2, 0.1)[0] == pytest.approx(1.0, abs=1e-3)


def searched(folder: Path, method: str = "autolora", **settings: object) -> Path:
    """A run whose ranks were searched for in 100 steps before 300 steps of training."""
    made = Fabricated(bert(2), method=method)
    made.write(folder)
    plan = made.plan() | {"budget": {}, **settings}
    (folder / "ranks.json").write_text(json.dumps(plan), encoding="utf-8")
    trace = [row for row in made.trace() if row["step"] <= 100 and row["event"] != "freeze"]
    trace[0] |= {
        "total_steps": 100,
        "schedule": {"cut": 100},
        "phases": [["all ranks", 0, 99]],
        "target_budget": None,
    }
    trace = [{k: v for k, v in row.items() if k != "budget"} for row in trace]
    trace.append(made.event("finish", 100, made.ranks))
    (folder / "search").mkdir()
    for place in (folder, folder / "search"):
        (place / "trace.jsonl").write_text(lines(trace), encoding="utf-8")
    rows = [{"step": step, "loss": 2.0} for step in range(10, 101, 10)]
    (folder / "search" / "log.jsonl").write_text(lines(rows), encoding="utf-8")
    metrics = made.metrics() | {"search": {"steps": 100, "seconds": 61.0, "examples": 7, "held_out": 3}}
    (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    return folder


def test_the_page_sets_the_ranks_beside_it(tmp_path: Path) -> None:
    page = write_report(searched(tmp_path / "run")).read_text(encoding="utf-8")
    section = page[page.index('id="null-control"') :]
    assert "<td>learned, 12 modules</td><td>12</td><td>8.00</td>" in section
    assert f"<td>12</td><td>{thresholded_noise(12, 0.1)[0]:.2f}</td>" in section
    assert f"<td>{thresholded_noise(12, 0.5)[0]:.2f}</td>" in section


@pytest.mark.parametrize("settings", [{"method": "adalora"}, {"budget": {"average_rank": 8}}])
def test_other_plans_need_no_such_control(tmp_path: Path, settings: dict[str, object]) -> None:
    page = write_report(searched(tmp_path / "run", **settings)).read_text(encoding="utf-8")  # type: ignore[arg-type]
    assert "null-control" not in page


def test_search_and_training_stand_on_one_time_axis(tmp_path: Path) -> None:
    run = read_run(searched(tmp_path / "run"))
    assert run.search_steps == 100
    steps = [step for step, _ in run.train]
    assert steps == [*range(10, 101, 10), *range(105, 401, 5)]
    assert [step for step, _ in run.evaluations] == [150, 200, 250, 300, 350, 400]
    assert run.last_step == 400
    page = write_report(run.path).read_text(encoding="utf-8")
    assert "Steps 1 to 100 are the search for the ranks" in page
    assert "4 min 13 s" in page  # 192.4 + 61
    assert "1 min 01 s of it for the search" in page


def test_a_search_that_goes_on_can_be_looked_at(tmp_path: Path) -> None:
    folder = searched(tmp_path / "run")
    for name in ("ranks.json", "trace.jsonl", "log.jsonl", "metrics.json"):
        (folder / name).unlink()
    run = read_run(folder)
    assert not run.finished
    assert run.train[-1] == (100, 2.0)
    write_report(folder)
