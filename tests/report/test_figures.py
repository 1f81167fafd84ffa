from __future__ import annotations

import math
import re
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import matplotlib as mpl
import pytest

from loralloc.naming import short_names
from loralloc.report import write_report
from loralloc.report.axes import spread
from loralloc.report.drawing import PNG_LONGEST, png, report_settings, svg
from loralloc.report.figures import (
    budget_figure,
    heat_figure,
    loss_figure,
    smoothed,
    timeline_figure,
    types_figure,
)
from loralloc.report.grid import arrange
from loralloc.report.run_record import RunRecord, Trace, read_run

from .fabricate import BERT_TYPES, LLAMA_TYPES, Fabricated, bert, layered, lines


def read(made: Fabricated, folder: Path) -> tuple[RunRecord, Trace]:
    run = read_run(made.write(folder))
    assert run.trace is not None
    return run, run.trace


def labels(figure: mpl.figure.Figure) -> list[str]:  # type: ignore[name-defined]
    return [text.get_text() for text in figure.axes[0].texts]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunRecord, Trace]:
    return read(Fabricated(bert(3)), tmp_path_factory.mktemp("figures"))


class TestThemes:
    def test_every_colour_follows_the_theme(self, run: tuple[RunRecord, Trace]) -> None:
        folder, trace = run
        grid = arrange(trace.sites)
        with report_settings():
            figures = [
                budget_figure(folder, trace),
                types_figure(folder, trace, grid),
                timeline_figure(folder, trace, grid, highest=12),
                loss_figure(folder),
            ]
            texts = [svg(figure, f"figure{i}", "a figure") for i, figure in enumerate(figures)]
        for text in texts:
            without_pictures = re.sub(r'"data:image/png;base64,[^"]*"', '""', text)
            assert not re.search(r"#[0-9a-fA-F]{6}\b", without_pictures)
            assert "var(--" in text
            assert "font-family" not in text
            assert "DejaVu" not in text

    def test_the_timeline_has_a_picture_for_each(self, run: tuple[RunRecord, Trace]) -> None:
        folder, trace = run
        with report_settings():
            text = svg(timeline_figure(folder, trace, arrange(trace.sites), highest=12), "timeline", "a figure")
        assert len(re.findall('id="timeline-(?:light|dark)"', text)) == text.count("<image") == 2

    def test_ids_carry_the_name_of_the_figure(self, run: tuple[RunRecord, Trace]) -> None:
        with report_settings():
            text = svg(loss_figure(run[0]), "loss", "a figure")
        assert all(name.startswith("loss-") for name in re.findall(r' id="([^"]*)"', text))
        assert all(name.startswith("loss-") for name in re.findall(r"url\(#([^)]*)\)", text))

    def test_names_and_descriptions_are_text_whatever_is_in_them(self, tmp_path: Path) -> None:
        modules = {f"layers.{layer}.</svg><script>&": (8, 8) for layer in range(2)}
        folder, trace = read(Fabricated(modules, start=4, average=2), tmp_path / "run")
        with report_settings():
            text = svg(types_figure(folder, trace, arrange(trace.sites)), "types", '"<script>')
            budget = svg(budget_figure(folder, replace(trace, unit="</svg>\x01")), "budget", "a figure")
        root = ElementTree.XML(text)
        assert root.get("aria-label") == '"<script>'
        assert "2.0 </svg><script>&" in list(root.itertext())
        assert "</svg>\N{REPLACEMENT CHARACTER}" in list(ElementTree.XML(budget).itertext())
        assert root.findall(".//script") == root.findall(".//style") == root.findall(".//metadata") == []


class TestIsolation:
    def test_settings_of_the_user_neither_matter_nor_change(self, tmp_path: Path) -> None:
        page = write_report(Fabricated(bert(2)).write(tmp_path / "run"))
        before = page.read_bytes()
        with mpl.rc_context({"font.size": 30, "axes.facecolor": "red", "axes.grid": True}):
            own = dict(mpl.rcParams)
            write_report(tmp_path / "run")
            assert dict(mpl.rcParams) == own
        assert page.read_bytes() == before

    def test_pyplot_and_torch_stay_out(self, tmp_path: Path) -> None:
        run = Fabricated(bert(1)).write(tmp_path / "run")
        code = (
            "import sys; from pathlib import Path; from loralloc.report import write_report\n"
            "assert 'matplotlib' not in sys.modules\n"
            f"write_report(Path({str(run)!r}))\n"
            "assert not {'matplotlib.pyplot', 'torch'} & set(sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=600)
        assert done.returncode == 0, done.stderr


class TestBudget:
    def test_an_exact_budget_is_one_label(self, run: tuple[RunRecord, Trace]) -> None:
        with report_settings():
            assert labels(budget_figure(*run)) == ["144, the budget", "warm-up", "budget falls", "final ranks"]

    def test_a_budget_that_is_not_filled_has_its_own_label(self, tmp_path: Path) -> None:
        made = Fabricated(bert(3))
        rows = made.trace()
        rows[0] |= {"unit": "parameters", "start_budget": 248_832, "target_budget": 150_000}
        run = made.write(tmp_path / "run")
        (run / "trace.jsonl").write_text(
            lines(row if row["event"] == "start" else row | {"budget": None} for row in rows)
        )
        folder = read_run(run)
        assert folder.trace is not None
        used = folder.trace.used(folder.trace.events[-1])
        assert used == made.parameters(made.ranks)
        with report_settings():
            written = labels(budget_figure(folder, folder.trace))
        assert written[:2] == ["150k, the budget", f"{used / 1000:.0f}k, in use"]

    def test_what_is_used_is_counted_at_the_costs_that_the_trace_names(self, tmp_path: Path) -> None:
        """Bytes, of which a rank has other numbers than inputs and outputs."""
        made = Fabricated(bert(1))
        rows = made.trace()
        rows[0] |= {"unit": "bytes", "costs": [4 * (a + b) for a, b in made.modules.values()], "target_budget": 1}
        run = made.write(tmp_path / "run")
        (run / "trace.jsonl").write_text(lines(rows))
        trace = read_run(run).trace
        assert trace is not None
        assert trace.used(trace.events[-1]) == 4 * made.parameters(made.ranks)

    def test_an_unfinished_run_ends_where_it_is(self, tmp_path: Path) -> None:
        made = Fabricated(bert(3))
        run = made.write(tmp_path / "run", without=["ranks.json", "log.jsonl"])
        (run / "trace.jsonl").write_text(lines([row for row in made.trace() if row["step"] <= 100]))
        folder = read_run(run)
        assert folder.trace is not None
        with report_settings():
            axes = budget_figure(folder, folder.trace).axes[0]
        assert axes.get_xlim() == (0, 300)
        assert max(axes.lines[0].get_xdata()) == max(axes.lines[1].get_xdata()) == 100  # type: ignore[call-overload]


class TestTypes:
    def test_lines_are_the_means_of_the_types(self, run: tuple[RunRecord, Trace]) -> None:
        folder, trace = run
        with report_settings():
            axes = types_figure(folder, trace, arrange(trace.sites)).axes[0]
        final = dict(zip(trace.sites, trace.events[-1].ranks, strict=True))
        means = {sum(rank for name, rank in final.items() if name.split(".", 4)[4] == kind) / 3 for kind in BERT_TYPES}
        drawn = {float(line.get_ydata()[-1]) for line in axes.lines if len(line.get_xdata()) > 2}  # type: ignore[index,arg-type]
        assert drawn == means

    def test_with_many_types_the_extremes_are_named(self, tmp_path: Path) -> None:
        types = {f"part_{letter}.proj": (64, 64) for letter in "abcdefghijklm"}
        folder, trace = read(Fabricated(layered("layers", 3, types)), tmp_path / "run")
        with report_settings():
            written = labels(types_figure(folder, trace, arrange(trace.sites)))
        means = [float(label.split()[0]) for label in written]
        assert len(written) == 8
        assert means == sorted(means)

    def test_short_names_tell_the_types_apart(self) -> None:
        for types in (tuple(BERT_TYPES), tuple(LLAMA_TYPES), ("x", "x.y", "y.x", "a.x.b"), ("one",)):
            short = short_names(types)
            assert len(set(short.values())) == len(types)
        assert list(short_names(tuple(LLAMA_TYPES)).values())[:2] == ["q_proj", "k_proj"]


class TestLoss:
    def test_smoothing_keeps_a_straight_line(self) -> None:
        line = [3.0 - 0.01 * i for i in range(200)]
        assert smoothed(line) == pytest.approx(line)

    def test_smoothing_leaves_gaps_and_nothing_else(self) -> None:
        values = [1.0] * 100
        values[40] = math.nan
        smooth = smoothed(values)
        assert math.isnan(smooth[40])
        assert [value for i, value in enumerate(smooth) if i != 40] == [1.0] * 99

    def test_nothing_finite_draws_nothing_and_labels_nothing(self, tmp_path: Path) -> None:
        made = Fabricated(bert(1))
        run = made.write(tmp_path / "run")
        (run / "log.jsonl").write_text(lines([{"step": step, "loss": math.nan} for step in (5, 10)]))
        with report_settings():
            assert labels(loss_figure(read_run(run))) == []


def test_labels_are_spread_without_changing_their_order() -> None:
    values = sorted([0.0, 0.1, 0.1, 5.0, 9.8, 9.9, 10.0])
    moved = spread(values, gap=1.0, low=0.0, high=10.0)
    assert all(b - a >= 1 - 1e-9 for a, b in pairwise(moved))
    assert min(moved) >= 0
    assert max(moved) <= 10


def test_dollar_signs_are_no_mathematics(tmp_path: Path) -> None:
    modules = {f"layers.{layer}.$x{{$.価": (8, 8) for layer in range(2)}
    assert write_report(Fabricated(modules, start=4, average=2).write(tmp_path / "run")).is_file()


def test_the_heat_map_of_a_huge_model_stays_a_picture_one_can_open(tmp_path: Path) -> None:
    folder, _ = read(Fabricated(layered("layers", 400, {"q": (8, 8)}), start=2, average=1), tmp_path / "run")
    with report_settings():
        figure = heat_figure(folder, arrange(folder.plan.modules), highest=2)
        png(figure, tmp_path / "heat.png")
    header = (tmp_path / "heat.png").read_bytes()[16:24]
    assert max(int.from_bytes(header[:4], "big"), int.from_bytes(header[4:], "big")) <= PNG_LONGEST
