"""The benchmark itself, on a model of a few thousand weights: it refuses what is wrong, and makes its tables.

`benchmarks/` is a folder of scripts, not a package; its files are imported as they import each other.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from subprocess import CalledProcessError
from types import SimpleNamespace
from typing import Any

import pytest
from torch.utils import cpp_extension

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
MODULES = (
    "contenders",
    "counting",
    "gpu",
    "gpu_parts",
    "record",
    "shapes",
    "startup",
    "suites",
    "table",
    "timing",
    "run",
)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    before = set(sys.modules)
    monkeypatch.syspath_prepend(FOLDER)
    yield SimpleNamespace(**{name: __import__(name) for name in MODULES})
    for name in set(sys.modules) - before:
        if (FOLDER / f"{name}.py").exists():
            del sys.modules[name]


def test_a_run_leaves_a_record_that_says_how_it_was_made(bench: SimpleNamespace, tmp_path: Path) -> None:
    bench.run.main(["--shape", "tiny", "--rank", "4", "--turns", "2", "--suite", "steps", "--results", str(tmp_path)])
    (made,) = bench.record.read(tmp_path)
    for clock in ("wall", "processor"):
        ratios = made[f"{clock}_ratio"]
        assert ratios["peft-lora"] == {"median": 1.0, "low": 1.0, "high": 1.0}
        assert {"frozen", "full", "peft-adalora", "adalora"} <= set(ratios)
        assert ratios["adalora"]["low"] <= ratios["adalora"]["median"] <= ratios["adalora"]["high"]
    lora = made["parameters"]["peft-lora"]
    assert made["parameters"]["adalora"] == made["parameters"]["peft-adalora"] == lora + 4 * made["modules"]
    assert made["versions"]["torch"] == metadata.version("torch")
    assert len(made["commit"]) in (0, 40)
    assert made["machine"]["threads"] == 1


def test_our_allocator_makes_few_calls_however_many_modules_there_are(bench: SimpleNamespace) -> None:
    def calls(name: str, layers: int) -> dict[str, Any]:
        setting = bench.contenders.Setting(bench.shapes.SHAPES["tiny"].with_(layers=layers), 4)
        return bench.suites.allocator_calls(bench.contenders.build(name, setting))

    few, many = calls("adalora", 1), calls("adalora", 2)
    assert few == many
    assert many["allocating"]["calls"] <= 200
    assert many["plain"]["waits"] <= 2, "the verdict on the gradients, which on a CPU are at hand"
    theirs = calls("peft-adalora", 2)
    assert theirs["plain"]["calls"] == 2 * calls("peft-adalora", 1)["plain"]["calls"] > 0


def test_the_start_of_the_command_line_is_a_ratio(
    bench: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = "sum(range(10**7))"  # tenths of a second, beside the start of Python
    monkeypatch.setattr(bench.startup, "PROCESSES", {bench.startup.REFERENCE: "pass", "loralloc-help": more})
    bench.run.main(["--turns", "2", "--suite", "startup", "--results", str(tmp_path)])
    (made,) = bench.record.read(tmp_path)
    assert made["processor_ratio"][bench.startup.REFERENCE] == {"median": 1.0, "low": 1.0, "high": 1.0}
    ratio = made["processor_ratio"]["loralloc-help"]["median"]
    assert "shape" not in made
    assert f"| `loralloc --help` ÷ importing typer and rich | ≤ 3 | {ratio:.3f} (" in bench.table.render([made])


def test_a_command_line_that_fails_is_not_timed(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.startup, "PROCESSES", {"loralloc-help": "raise SystemExit(2)"})
    with pytest.raises(CalledProcessError):
        bench.startup.compare(1)


class TestChecks:
    def test_a_contender_that_does_not_learn_is_refused(
        self, bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Idle(bench.contenders.Step):
            def before_step(self) -> None:
                for parameter in self.model.parameters():
                    parameter.grad = None

        monkeypatch.setitem(bench.contenders.CONTENDERS, "idle", Idle)
        why = bench.contenders.build("idle", bench.contenders.Setting(bench.shapes.SHAPES["tiny"], 4))
        assert why.startswith("AssertionError: its loss does not fall")

    def test_the_peer_is_refused_without_its_allocator(
        self, bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Forgotten(bench.contenders.PeftAdaLoRA):
            def after_step(self) -> None:
                pass

        monkeypatch.setitem(bench.contenders.CONTENDERS, "forgotten", Forgotten)
        why = bench.contenders.build("forgotten", bench.contenders.Setting(bench.shapes.SHAPES["tiny"], 4))
        assert why == "AssertionError: update_and_allocate has not seen every factor of every layer"


class TestTables:
    @staticmethod
    def made(**changes: Any) -> dict[str, Any]:
        spread = {"median": 0.9, "low": 0.8, "high": 1.0}
        ratios = {"peft-lora": spread, "adalora": spread}
        setting = {"suite": "steps", "shape": "tiny", "layers": 2, "modules": 14, "tokens": 16, "rank": 4}
        kind = {"device": "cpu", "dtype": "float32", "adapter": "fp32", "failures": {"allora": "ImportError: none"}}
        figures = {f"{clock}_{kind}": ratios for clock in ("wall", "processor") for kind in ("ratio", "seconds")}
        return {**setting, **kind, **figures, "parameters": {"peft-lora": 100, "adalora": 112}, **changes}

    def test_show_the_newest_record_of_each_setting_and_every_failure(self, bench: SimpleNamespace) -> None:
        old = self.made(processor_ratio={"adalora": {"median": 7.0, "low": 7.0, "high": 7.0}}, commit="before")
        text = bench.table.render([old, self.made(), self.made(suite="rank", rank=8)])
        assert "0.900 (tiny r 4)" in text
        assert "7.0" not in text
        assert "steps, tiny r 4, allora: `ImportError: none`" in text
        assert "no GPU was at hand" in text
        assert "no GPU was at hand" not in bench.table.render([self.made(device="cuda")])

    def test_tell_what_grows_in_the_order_of_what_it_grows_with(self, bench: SimpleNamespace) -> None:
        records = [self.made(suite="modules", modules=modules) for modules in (448, 12)]
        rows = bench.table.targets(records).splitlines()
        (row,) = [row for row in rows if row.startswith("| AdaLoRA step ÷ PEFT LoRA step, layers of width 128")]
        assert row.endswith("| ≤ 1.00 | 0.900 (modules 12), 0.900 (modules 448) |")
        (absent,) = [row for row in rows if row.startswith("| AB-LoRA round `fast` on SmolLM2-135M")]
        assert absent.endswith("| not measured |")

    def test_tell_a_round_on_a_language_model(self, bench: SimpleNamespace) -> None:
        made = {"ranks": 1680, "modules": 210, "seconds": 30.4, "share_of_forwards": 1 / 90, "failures": {}}
        made |= {"share_of_seconds": 1 / 60, "examples": 16}
        made |= {"suite": "language-round", "device": "cpu", "held": 3 * 2**20, "held_before": 2**20}
        found = "1/90, of the time 1/60 (1,680 ranks in 210 modules, 16 examples, 30 s, +2 MiB at the peak)"
        assert f"| {found} |" in bench.table.render([made])

    def test_show_medians_over_the_runs_of_the_same_code(self, bench: SimpleNamespace) -> None:
        runs = [
            self.made(processor_ratio={"peft-lora": spread, "adalora": spread}, commit=commit)
            for commit, value in (("old", 0.1), ("old", 0.1), ("new", 0.5), ("new", 0.2), ("new", 0.6))
            for spread in [{"median": value, "low": value - 0.1, "high": value + 0.3}]
        ]
        (merged,) = bench.table.newest(runs)
        expected = {"median": 0.5, "low": 0.4, "high": 0.8}
        assert merged["processor_ratio"]["adalora"] == pytest.approx(expected)
        assert merged["wall_ratio"] == runs[-1]["wall_ratio"]

    def test_replace_what_stands_between_the_markers(
        self, bench: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        page = tmp_path / "README.md"
        page.write_text(f"before\n{bench.table.BEGIN}\nold\n{bench.table.END}\nafter\n", encoding="utf-8")
        monkeypatch.setattr(bench.table, "README", page)
        monkeypatch.setattr(bench.table, "plot", lambda records: None)
        bench.table.write([self.made()])
        text = page.read_text(encoding="utf-8")
        assert text.startswith("before\n")
        assert text.endswith("\nafter\n")
        assert "old" not in text
        assert "Numbers to reach" in text

    def test_the_page_is_the_one_that_the_records_give(self, bench: SimpleNamespace) -> None:
        page = (FOLDER / "README.md").read_text(encoding="utf-8")
        assert bench.table.render(list(bench.record.read(FOLDER / "results"))) in page

    def test_the_plot_has_a_panel_for_each_kind_of_growth(self, bench: SimpleNamespace, tmp_path: Path) -> None:
        kinds = ("rank", "modules", "tokens")
        records = [self.made(**{"suite": kind, kind: value}) for kind in kinds for value in (16, 32)]
        bench.table.plot(records, tmp_path / "plot.svg")
        assert "<svg" in (tmp_path / "plot.svg").read_text(encoding="utf-8")


class TestOnAGpu:
    @staticmethod
    def saying(text: str) -> list[str]:
        return [sys.executable, "-c", f"print({text!r})"]

    def test_a_missing_package_leaves_a_part_out_and_the_next_one_is_run(
        self, bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        lacking = bench.gpu.Part("nothing", 60, ("json", "no_such_package", "nor_this"))
        monkeypatch.setattr(bench.gpu, "PARTS", {"lacking": lacking, "whole": bench.gpu.Part("something", 60, ())})
        outcomes = bench.gpu.run_all(["lacking", "whole"], self.saying)
        assert outcomes["lacking"] == "left out: no_such_package, nor_this not installed"
        assert outcomes["whole"].startswith("done in ")
        printed = capfd.readouterr().out.splitlines()
        assert "== lacking: left out: no_such_package, nor_this not installed" in printed
        assert "whole" in printed
        assert "lacking" not in printed, "its process has not been started"

    def test_a_part_that_fails_or_hangs_does_not_stop_the_others(
        self, bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        work = {"fails": "raise SystemExit(3)", "hangs": "while True: pass", "works": "pass"}
        monkeypatch.setattr(bench.gpu, "PARTS", {name: bench.gpu.Part("", 60, ()) for name in work})
        monkeypatch.setattr(bench.gpu, "PARTS", {**bench.gpu.PARTS, "hangs": bench.gpu.Part("", 1, ())})
        monkeypatch.setattr(bench.gpu, "LEAST", 0)
        outcomes = bench.gpu.run_all(list(work), lambda name: [sys.executable, "-c", work[name]])
        assert outcomes["fails"].startswith("failed with exit status 3 after ")
        assert outcomes["hangs"] == "stopped after 1 s; what was printed is measured"
        assert outcomes["works"].startswith("done in ")

    def test_no_part_begins_when_the_time_is_used_up(self, bench: SimpleNamespace) -> None:
        assert bench.gpu.run_all(["eager"], self.saying, seconds=bench.gpu.LEAST / 2) == {
            "eager": "left out: the time is used up"
        }

    def test_the_parts_fit_into_eight_minutes_and_come_with_what_they_measure(self, bench: SimpleNamespace) -> None:
        assert sum(part.seconds for part in bench.gpu.PARTS.values()) <= bench.gpu.SECONDS == 8 * 60
        assert set(bench.gpu.PARTS) == {"tests", *bench.gpu_parts.PARTS}
        assert all((FOLDER.parent / test).exists() for test in bench.gpu.TESTS)

    def test_contenders_share_the_frozen_weights_and_nothing_else(self, bench: SimpleNamespace) -> None:
        shape = bench.gpu_parts.sharing(bench.shapes.SHAPES["tiny"])
        one, other = (bench.contenders.build(name, bench.contenders.Setting(shape, 4)) for name in ("adalora",) * 2)
        weights = [dict(step.model.named_parameters()) for step in (one, other)]
        shared = {n for n in weights[0] if weights[0][n].data_ptr() == weights[1][n].data_ptr()}
        assert shared == {n for n in weights[0] if "lora_" not in n}
        assert not any(weights[0][n].requires_grad for n in shared)

    @pytest.mark.slow
    def test_the_rehearsal_runs_its_parts(self, bench: SimpleNamespace, tmp_path: Path) -> None:
        """All but the compiled steps, which take a CPU minutes, and the tests, which are among these."""
        parts = [part for part in bench.gpu.PARTS if part not in ("compiled", "tests")]
        asked = [word for part in parts for word in ("--part", part)]
        command = [str(FOLDER / "gpu.sh"), "--rehearse", *asked, "--results", str(tmp_path)]
        environment = {**os.environ, "PYTHON": sys.executable, "XDG_CACHE_HOME": str(tmp_path / "cache")}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        for part in parts:
            assert f"\n{part}: done in " in done.stdout, part
        records = list(bench.record.read(tmp_path))
        compiles = shutil.which(cpp_extension.get_cxx_compiler()) is not None
        failures = {name for made in records for name in made["failures"]}
        assert failures == (set() if compiles else {"kernel in C++", "adalora-cpp", "allora-cpp"})
        for made in (made for made in records if compiles and made["suite"] == "kernel"):
            assert made["difference"]["torch.float32"] < 1e-5
            assert made["difference"]["torch.bfloat16"] < 1e-2
        suites = [made["suite"] for made in records]
        assert {name: suites.count(name) for name in suites} == {
            "kernel": 1,
            "steps": 3,
            "calls": 1,
            "memory": 2,
            "ablora": 1,
            "four-bit": 1,
        }


def test_records_are_lines_of_json(bench: SimpleNamespace, tmp_path: Path) -> None:
    setting = bench.contenders.Setting(bench.shapes.SHAPES["tiny"], 4)
    for number in range(2):
        made = bench.record.record("steps", setting, {"number": number}, {})
        bench.record.append(made, tmp_path / "new" / "speed-cpu.jsonl")
    lines = (tmp_path / "new" / "speed-cpu.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["number"] for line in lines] == [0, 1]
