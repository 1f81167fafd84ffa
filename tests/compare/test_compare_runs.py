"""Comparisons that are run: a tiny random encoder, and every way in which a run can end."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import pytest
from cli.command import RECIPE, done, examples, log_rows, read_json, refused, save_encoder, write_rows

pytestmark = pytest.mark.slow

COMMAND = [sys.executable, "-c", "from loralloc.cli.main import main; main()"]
CONTENDERS = ("lora", "adalora", "random", "truncate", "dora", "rslora", "eva")


def write_recipe(folder: Path) -> Path:
    for seed, (name, count) in enumerate({"train": 48, "validation": 20, "test": 30}.items()):
        write_rows(folder / f"{name}.jsonl", examples(count, seed))
    save_encoder(folder / "encoder")
    text = RECIPE.format(encoder=folder / "encoder", data=folder)
    text = text.replace("  text: text\n", f"  text: text\n  test: {folder}/test.jsonl\n")
    (folder / "recipe.yaml").write_text(text.replace("output: run", "output: out"), encoding="utf-8")
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder in which all contenders have been compared, with two seeds."""
    folder = tmp_path_factory.mktemp("whole")
    write_recipe(folder)
    with chdir(folder):
        said = done("compare", "recipe.yaml", "--seeds", 2, "--learning_rates", "1e-2", "--jobs", 2)
        (folder / "said").write_text(said)
        yield folder


def table(out: Path) -> list[dict[str, str]]:
    with (out / "compare.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_everybody_trains_and_costs_the_same(whole: Path) -> None:
    rows = table(whole / "out")
    assert [row["state"] for row in rows] == ["finished"] * 16, [row["reason"] for row in rows]
    assert {row["contender"] for row in rows} == {*CONTENDERS, "plan-of-adalora"}
    allowed = int(rows[0]["parameters_allowed"])
    for row in rows:
        if row["contender"] != "dora":
            assert 0 <= allowed - int(row["parameters"]) < 48, "one rank of the widest module"
    magnitudes = 16 * 9 + 32 * 2 + 16 * 2
    assert {int(row["parameters"]) - allowed for row in rows if row["contender"] == "dora"} == {magnitudes}
    said = (whole / "said").read_text()
    assert "  14 runs\n" in said
    assert "  2 runs\n" in said
    assert "page      out/compare.html" in said


def test_the_plan_is_that_of_the_winner_with_the_same_seed(whole: Path) -> None:
    for seed in (0, 1):
        theirs, ours = (
            read_json(whole / "out/runs" / f"r2-{name}-lr0.01-s{seed}" / "ranks.json")["modules"]
            for name in ("adalora", "plan-of-adalora")
        )
        assert {name: module["rank"] for name, module in ours.items()} == {
            name: module["rank"] for name, module in theirs.items() if module["rank"]
        }


def test_peers_are_pefts_own(whole: Path) -> None:
    said = {
        name: read_json(whole / f"out/runs/r2-{name}-lr0.01-s0/adapter/adapter_config.json") for name in CONTENDERS[4:]
    }
    assert said["dora"]["use_dora"]
    assert said["rslora"]["use_rslora"]
    assert (said["eva"]["init_lora_weights"], said["eva"]["eva_config"]["rho"]) == ("eva", 1.0)
    assert {config["r"] for config in said.values()} == {2}


def test_what_eva_looks_at_is_a_part_of_its_cost(whole: Path) -> None:
    looked = {
        name: read_json(whole / f"out/runs/r2-{name}-lr0.01-s0/metrics.json").get("search") for name in CONTENDERS[4:]
    }
    assert looked["eva"]["processor_seconds"] > 0
    assert looked["dora"] is looked["rslora"] is None


def test_what_has_finished_is_kept_and_more_seeds_can_be_added(whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (whole / "out/runs").glob("*/metrics.json")}
    said = done("compare", "recipe.yaml", "--seeds", 2, "--learning_rates", "1e-2")
    assert "14 runs, 14 of them run before" in said
    assert {path: path.stat().st_mtime_ns for path in before} == before
    first = (whole / "out/compare.html").read_bytes()
    done("compare", "recipe.yaml", "--seeds", 1, "--learning_rates", "1e-2")
    assert b"One seed cannot tell" in (whole / "out/compare.html").read_bytes()
    done("compare", "recipe.yaml", "--seeds", 2, "--learning_rates", "1e-2")
    assert (whole / "out/compare.html").read_bytes() == first


def test_two_runs_of_a_cell_are_identical(whole: Path) -> None:
    for name in ("r2-adalora-lr0.01-s1", "r2-eva-lr0.01-s1"):
        run, kept = whole / "out/runs" / name, whole / "kept" / name
        shutil.copytree(run, kept)
        shutil.rmtree(run)
    done("compare", "recipe.yaml", "--seeds", 2, "--learning_rates", "1e-2")
    for kept in (whole / "kept").iterdir():
        run = whole / "out/runs" / kept.name
        assert log_rows(run) == log_rows(kept)
        for file in ("adapter/adapter_model.safetensors", "losses.json", "ranks.json"):
            assert (run / file).read_bytes() == (kept / file).read_bytes()


def test_another_recipe_and_another_comparison_are_refused(whole: Path) -> None:
    assert refused("compare", "recipe.yaml", "--steps", 8, "--seeds", 2) == (
        "output: out holds the comparison of another recipe, which says steps: 16, not steps: 8; only the section "
        "compare may differ. Name another folder with --output"
    )
    assert refused("compare", "recipe.yaml", "--output", "out/runs/r2-lora-lr0.01-s0") == (
        "output: out/runs/r2-lora-lr0.01-s0 holds a run; name a folder for the comparison with --output"
    )
    assert refused("compare", "recipe.yaml", "--output", "encoder") == (
        "output: encoder exists and is no comparison; name another folder with --output"
    )
    assert refused("compare", "recipe.yaml", "--seeds", 2, "--learning_rates", "1e-2", "--capacity", 1.5).startswith(
        "out/runs/r2-adalora-lr0.01-s0 was run with other settings than this comparison has; delete the folder"
    )


def test_the_same_seed_sees_the_same_examples_in_the_same_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a learning rate of next to nothing, the losses of all steps are those of the examples."""
    monkeypatch.chdir(tmp_path)
    recipe, config = write_recipe(tmp_path), tmp_path / "encoder/config.json"
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config.write_text(json.dumps(json.loads(config.read_text()) | still))
    done("compare", recipe, "--seeds", 1, "--learning_rates", "1e-30", "--log_every", 1)
    seen = {}
    for name in CONTENDERS:
        rows = log_rows(tmp_path / f"out/runs/r2-{name}-lr1e-30-s0")
        seen[name] = [round(row["loss"], 4) for row in rows if "loss" in row]
    assert len(seen["lora"]) == 16
    assert {name: losses for name, losses in seen.items() if losses != seen["lora"]} == {}


def test_a_run_that_diverges_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path)
    words = ["--seeds", 1, "--peers", "[]", "--learning_rates", "[1e-2, 1e30]"]
    said = done("compare", recipe, *words)
    rows = table(tmp_path / "out")
    failed = {row["contender"] for row in rows if row["state"] == "failed"}
    assert {row["learning_rate"] for row in rows if row["contender"] in failed and row["state"] == "failed"} == {
        "1e+30"
    }
    assert "lora" in failed
    assert "r2-lora-lr1e+30-s0  failed: " in said
    assert "Failed runs" in (tmp_path / "out/compare.html").read_text(encoding="utf-8")
    again = done("compare", recipe, *words)
    assert "failed: " not in again, "it would fail again"
    assert "r2-lora-lr1e+30-s0  failed: " in done("compare", recipe, *words, "--retry")


def test_a_killed_comparison_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path)
    words = ["--seeds", "1", "--peers", "[]", "--learning_rates", "1e-2", "--steps", "60", "--save_every", "5"]
    process = subprocess.Popen([*COMMAND, "compare", str(recipe), *words], start_new_session=True)
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("out/runs/*/metrics.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)
    while not list(tmp_path.glob("out/runs/r2-adalora-lr0.01-s0/checkpoints/*/manifest*")):
        time.sleep(0.05)
        assert time.monotonic() < deadline
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    first = tmp_path / "out/runs/r2-lora-lr0.01-s0/metrics.json"
    before = first.stat().st_mtime_ns
    done("compare", recipe, *words)
    assert first.stat().st_mtime_ns == before
    assert {row["state"] for row in table(tmp_path / "out")} == {"finished"}
    done("compare", recipe, *words, "--output", "uninterrupted")
    for name in ("lora", "adalora", "random", "truncate"):
        resumed, whole = (tmp_path / out / f"runs/r2-{name}-lr0.01-s0" for out in ("out", "uninterrupted"))
        assert (resumed / "losses.json").read_bytes() == (whole / "losses.json").read_bytes()


def test_a_signal_ends_the_runs_too(tmp_path: Path) -> None:
    words = [str(write_recipe(tmp_path)), "--seeds", "1", "--peers", "[]", "--steps", "100000"]
    process = subprocess.Popen(
        [*COMMAND, "compare", *words], cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("out/runs/*/log.jsonl")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[1]
    assert process.returncode == 143
    assert said.endswith("stopped by SIGTERM; the same command goes on with the runs that are left\n")
    while lives(process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def lives(group: int) -> bool:
    """Whether any process of a group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


CLUSTER = """
import sys
import ray
from ray.cluster_utils import Cluster
from loralloc.cli.main import main

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
cluster.add_node(num_cpus=1)
sys.argv = ["loralloc", "compare", *sys.argv[1:], "--ray", cluster.address]
try:
    main()
finally:
    ray.shutdown()
    cluster.shutdown()
"""


def test_a_ray_cluster_of_two_nodes_gives_the_same(whole: Path) -> None:
    words = ["recipe.yaml", "--seeds", "2", "--learning_rates", "1e-2", "--output", "by-ray"]
    ended = subprocess.run(
        [sys.executable, "-c", CLUSTER, *words], capture_output=True, text=True, timeout=900, check=False
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert {row["state"] for row in table(whole / "by-ray")} == {"finished"}
    for here in (whole / "out/runs").iterdir():
        there = whole / "by-ray/runs" / here.name
        assert (here / "losses.json").read_bytes() == (there / "losses.json").read_bytes(), here.name


def test_there_is_no_cluster(whole: Path) -> None:
    assert refused("compare", "recipe.yaml", "--ray", "127.0.0.1:1", "--jobs", 2) == (
        "--jobs is for this machine, and a Ray cluster schedules its runs itself: give one of them"
    )
