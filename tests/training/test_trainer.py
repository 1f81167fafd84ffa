"""Promises 4 and 7: a run that is killed and resumed is the run that was not, bit for bit, and nothing is unpickled."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from cli.command import (
    RECIPE,
    done,
    examples,
    files,
    log_rows,
    read_json,
    read_rows,
    save_encoder,
    write_rows,
)
from cli.deaths import differences, killed_at, killed_in
from safetensors import safe_open
from safetensors.torch import load_file
from transformers.trainer_utils import get_last_checkpoint

from loralloc.files import read_jsonl
from loralloc.recipe import run as pipeline
from loralloc.training import checkpoint as checkpoints
from loralloc.training import trainer as trainers
from loralloc.training.manifest import read_manifest, write_manifest
from loralloc.training.trainer import PlainTrainer

STEPS = 20
SAVED = f"checkpoints/checkpoint-{STEPS}"
EVERYWHERE = ["--steps", STEPS, "--save_every", 2, "--log_every", 3, "--lora.dropout", 0.1]
"""Steps 0 to 3 are warm-up, from step 12 on the ranks are final; an epoch is 6 steps; logging cuts across saving."""
VARIANTS: dict[str, list[Any]] = {
    "adalora": [],
    "lora": ["--method", "{name: lora}"],
    "constant": ["--schedule", "constant"],
    "parameters": ["--parameters", 900],
    "reference": ["--order", "reference", "--penalty", "paper"],
    "published": ["--parity", "none", "--importance", "sensitivity", "--interval", 3],
    "accumulated": ["--batch_size", 4, "--accumulation", 3],
    "compact": ["--compact", "true"],
    "evaluated": ["--eval_every", 3],
    "epochs": ["--steps", "null", "--epochs", 3.4],
}
Whole = Callable[[str], Path]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of model, data and recipe."""
    folder = tmp_path_factory.mktemp("home")
    save_encoder(folder / "encoder")
    write_rows(folder / "train.jsonl", examples(48, 0))
    write_rows(folder / "validation.jsonl", examples(21, 1))
    (folder / "recipe.yaml").write_text(RECIPE.format(encoder=folder / "encoder", data=folder), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with the recipe; no figures are drawn, which takes longer than to train."""
    shutil.copy(home / "recipe.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline, "write_report", lambda folder: folder / "report.html")
    return tmp_path


@pytest.fixture(scope="module")
def whole(home: Path) -> Whole:
    """Runs a variant without interruption, once."""

    def run(variant: str) -> Path:
        folder = home / variant
        if not folder.exists():
            folder.mkdir()
            with chdir(folder):
                train(variant, recipe=home / "recipe.yaml")
        return folder / "run"

    return run


def train(variant: str, *more: str, recipe: Path | str = "recipe.yaml") -> str:
    return done("train", recipe, *EVERYWHERE, *VARIANTS[variant], *more)


def check_same(run: Path, other: Path) -> None:
    """Parameters, moments, scores, plan, losses and trace are the same."""
    assert differences(run, other) == []


def newest() -> str:
    """The checkpoint that a run would be resumed from."""
    found = checkpoints.newest_whole(Path("run/checkpoints")).checkpoint
    return "" if found is None else found.name


class TestResume:
    @pytest.mark.parametrize(
        ("variant", "step", "resumed"),
        [
            pytest.param("adalora", 1, "", marks=pytest.mark.slow),
            ("adalora", 3, "checkpoint-2"),  # in the warm-up
            ("adalora", 9, "checkpoint-8"),  # while the budget falls
            pytest.param("adalora", 13, "checkpoint-12", marks=pytest.mark.slow),  # between two epochs
            ("adalora", 17, "checkpoint-16"),  # at the final ranks
            ("lora", 9, "checkpoint-8"),
            pytest.param("lora", 20, "checkpoint-18", marks=pytest.mark.slow),
            *(pytest.param(name, 9, "checkpoint-8", marks=pytest.mark.slow) for name in list(VARIANTS)[2:]),
            *(pytest.param(name, 17, "checkpoint-16", marks=pytest.mark.slow) for name in list(VARIANTS)[2:]),
        ],
    )
    def test_is_the_run_that_was_not_killed(self, variant: str, step: int, resumed: str, whole: Whole) -> None:
        with killed_at(step):
            train(variant)
        assert newest() == resumed
        train(variant, "--resume")
        check_same(Path("run"), whole(variant))

    def test_there_is_something_to_compare(self, whole: Whole) -> None:
        run = whole("adalora")
        for name in ("adapter_model", "optimizer", "loralloc", "gated_factors"):
            tensors = load_file(run / SAVED / f"{name}.safetensors")
            assert all(tensor.isfinite().all() for tensor in tensors.values())
            assert any(tensor.any() for tensor in tensors.values())
        moments = load_file(run / SAVED / "optimizer.safetensors")
        assert {name.partition(".")[2] for name in moments} == {"step", "exp_avg", "exp_avg_sq"}
        assert any("lora_gate" in name for name in load_file(run / SAVED / "gated_factors.safetensors"))
        assert not any("lora_gate" in name for name in load_file(run / SAVED / "adapter_model.safetensors"))
        assert "final" in load_file(run / SAVED / "loralloc.safetensors")
        losses = [row["loss"] for row in log_rows(run) if "loss" in row]
        assert len(set(losses)) == len(losses) == 6

    def test_counts_the_time_before_it(self) -> None:
        with killed_at(9):
            train("lora")
        window = Path("run/checkpoints/checkpoint-8/window.json")
        record = read_json(window)
        assert 0 < record["seconds"] < 1e6
        window.write_text(json.dumps({**record, "seconds": 1e6}), encoding="utf-8")  # longer than any test takes
        write_manifest(window.parent, read_manifest(window.parent))  # or it would count as damaged
        train("lora", "--resume")
        assert 1e6 < read_json(Path("run/metrics.json"))["train_seconds"] < 2e6

    @pytest.mark.slow
    def test_twice(self, whole: Whole) -> None:
        with killed_at(5):
            train("adalora")
        with killed_at(14):
            train("adalora", "--resume")
        train("adalora", "--resume")
        check_same(Path("run"), whole("adalora"))

    @pytest.mark.slow
    def test_with_the_recipe_of_the_run(self, whole: Whole) -> None:
        with killed_at(9):
            train("adalora")
        done("train", "run/recipe.yaml", "--resume")
        check_same(Path("run"), whole("adalora"))

    @pytest.mark.parametrize(
        ("module", "name"),
        [
            (checkpoints, "save_random_state"),
            pytest.param(checkpoints, "save_optimizer", marks=pytest.mark.slow),
            pytest.param(trainers, "write_manifest", marks=pytest.mark.slow),
        ],
    )
    def test_falls_back_when_killed_while_saving(self, module: Any, name: str, whole: Whole) -> None:
        with killed_in(module, name, step=10):
            train("adalora")
        assert get_last_checkpoint("run/checkpoints") == "run/checkpoints/checkpoint-10", "there, but not complete"
        assert newest() == "checkpoint-8"
        train("adalora", "--resume")
        check_same(Path("run"), whole("adalora"))

    @pytest.mark.slow
    def test_begins_again_when_killed_in_the_first_save(self, whole: Whole) -> None:
        with killed_in(checkpoints, "save_optimizer", step=2):
            train("adalora")
        assert newest() == ""
        train("adalora", "--resume")
        check_same(Path("run"), whole("adalora"))

    @pytest.mark.slow
    def test_a_skipped_step_stays_skipped(self) -> None:
        step = PlainTrainer.training_step

        def poisoned(self: PlainTrainer, model: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = step(self, model, *args, **kwargs)
            if self.state.global_step in (5, 10):
                next(p for p in model.parameters() if p.grad is not None).grad.fill_(torch.inf)
            return loss

        with patch.object(PlainTrainer, "training_step", poisoned):
            train("adalora", "--output", "whole")
            with killed_at(9):
                train("adalora")
            train("adalora", "--resume")
        assert [row["step"] for row in read_rows(Path("run/trace.jsonl")) if row["event"] == "bad_step"] == [5, 10]
        assert read_json(Path("run/ranks.json"))["provenance"]["bad_steps"] == 2
        assert differences(Path("run"), Path("whole")) == ["recipe.yaml"], "it names the folder"

    def test_the_mean_loss_of_the_run(self, whole: Whole) -> None:
        with killed_at(9):
            train("adalora")
        train("adalora", "--resume")
        ours, theirs = (
            [row["train_loss"] for row in log_rows(run) if "train_loss" in row]
            for run in (Path("run"), whole("adalora"))
        )
        assert ours == theirs

    @pytest.mark.parametrize("variant", [pytest.param("adalora", marks=pytest.mark.slow), "constant"])
    def test_killed_after_the_last_step(self, variant: str, whole: Whole) -> None:
        with killed_in(pipeline, "export_adapter"):
            train(variant)
        assert newest() == f"checkpoint-{STEPS}"
        with patch.object(PlainTrainer, "training_step", None):
            train(variant, "--resume")
        check_same(Path("run"), whole(variant))

    def test_a_line_that_was_cut_off(self, whole: Whole) -> None:
        with killed_at(9):
            train("adalora")
        for name in ("trace.jsonl", "log.jsonl"):
            with Path("run", name).open("a", encoding="utf-8") as file:
                file.write('{"step": 9, "eve')
        train("adalora", "--resume")
        check_same(Path("run"), whole("adalora"))

    @pytest.mark.slow
    def test_killed_by_the_system(self, whole: Whole) -> None:
        words = ["train", "recipe.yaml", *map(str, EVERYWHERE)]
        code = "from loralloc.cli.main import main; main()"
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen([sys.executable, "-c", code, *words], env=environment, stdout=subprocess.DEVNULL)
        marker = Path("run/checkpoints/checkpoint-6") / "manifest.json"
        while process.poll() is None and not marker.exists():
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not Path("run/metrics.json").exists()
        train("adalora", "--resume")
        check_same(Path("run"), whole("adalora"))


class TestCheckpoints:
    def test_two_are_kept(self, whole: Whole) -> None:
        kept = sorted(path.name for path in (whole("adalora") / "checkpoints").iterdir())
        assert kept == ["checkpoint-18", "checkpoint-20"]

    @pytest.mark.parametrize("variant", ["adalora", "lora"])
    def test_hold_tensors_and_text_only(self, variant: str, whole: Whole) -> None:
        for path in whole(variant).rglob("*"):
            if path.is_dir():
                continue
            content = path.read_bytes()
            if path.suffix == ".safetensors":
                with safe_open(path, "pt") as tensors:
                    assert tensors.keys()
            elif path.suffix == ".json":
                json.loads(content)
            else:
                assert path.suffix in (".md", ".jsonl", ".yaml")
                content.decode("utf-8")
            assert not content.startswith((b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"))

    def test_a_checkpoint_says_that_it_is_not_finished(self, whole: Whole) -> None:
        checkpoints = whole("adalora") / "checkpoints"
        said = {path.parent.name: read_json(path)["finished"] for path in checkpoints.glob("*/loralloc.json")}
        assert said == {f"checkpoint-{STEPS - 2}": False, f"checkpoint-{STEPS}": True}
        assert not (whole("adalora") / "adapter" / "loralloc.json").exists()

    def test_nothing_is_unpickled(self, whole: Whole) -> None:
        with killed_at(9):
            train("adalora")
        with no_pickles():
            train("adalora", "--resume")
            for verb in ("evaluate", "export"):
                done(verb, "run")
        check_names = {name for name in files(Path("run")) if name.startswith("checkpoints/")}
        assert not [name for name in check_names if name.endswith((".pt", ".pth", ".bin", ".pkl"))]

    def test_the_watch_over_pickles_sees_them(self) -> None:
        with no_pickles(), pytest.raises(AssertionError, match="unpickled"):
            pickle.loads(pickle.dumps(Path()))


_watching = False


def _watch(event: str, args: tuple[Any, ...]) -> None:
    if _watching and event == "pickle.find_class":
        raise AssertionError(f"unpickled {args}")


sys.addaudithook(_watch)  # there is no way to take it back, hence the switch


@contextmanager
def no_pickles() -> Iterator[None]:
    """Whatever looks up a class for a pickle fails, in Python or in C, and so does torch.load."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("unpickled by torch.load")

    global _watching
    _watching = True
    try:
        with patch.object(torch, "load", refuse):
            yield
    finally:
        _watching = False


class TestFiles:
    def test_random_states_come_back(self, tmp_path: Path) -> None:
        def draw() -> list[Any]:
            numbers = [
                random.random(),
                random.gauss(0, 1),
                np.random.rand(),
                np.random.normal(),
                torch.rand(3).tolist(),
            ]
            return [*numbers, torch.randn(3).tolist(), np.random.randint(9, size=4).tolist()]

        draw()  # each gauss leaves a second number behind, which is part of the state
        checkpoints.save_random_state(tmp_path / "random.json")
        expected = draw()
        assert draw() != expected
        checkpoints.load_random_state(tmp_path / "random.json")
        assert draw() == expected

    @pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
    def test_optimizers_come_back(self, kind: Any, tmp_path: Path) -> None:
        def build() -> tuple[list[torch.nn.Parameter], Any, Any]:
            weights = [torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(4))]
            momentum = {"momentum": 0.9} if kind is torch.optim.SGD else {}
            optimizer = kind(
                [{"params": weights[:1]}, {"params": weights[1:], "weight_decay": 0.1}], lr=0.3, **momentum
            )
            return weights, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

        def walk(weights: list[torch.nn.Parameter], optimizer: Any, scheduler: Any, steps: int) -> None:
            for step in range(steps):
                for weight in weights:
                    weight.grad = (weight * (step + 1)).detach().sin()
                optimizer.step()
                scheduler.step()

        ours, theirs = build(), build()
        walk(*ours, steps=3)
        checkpoints.save_optimizer(tmp_path, ours[1], ours[2])
        for mine, other in zip(ours[0], theirs[0], strict=True):
            other.data.copy_(mine.data)
        checkpoints.load_optimizer(tmp_path, theirs[1], theirs[2])
        assert theirs[2].get_last_lr() == ours[2].get_last_lr()
        for pair in (ours, theirs):
            walk(*pair, steps=3)
        assert all(torch.equal(mine, other) for mine, other in zip(ours[0], theirs[0], strict=True))
        assert {path.suffix for path in tmp_path.iterdir() if "optimizer" in path.name} == {".json", ".safetensors"}

    @pytest.mark.parametrize(("kept", "left"), [(9, {"checkpoint-2", "checkpoint-9"}), (None, set())])
    def test_checkpoints_of_steps_that_come_again_go(self, kept: int | None, left: set[str], tmp_path: Path) -> None:
        for name in ("checkpoint-2", "checkpoint-9", "checkpoint-10", "checkpoint-mine", "runs"):
            (tmp_path / name).mkdir()
        checkpoints.drop_after(tmp_path, None if kept is None else tmp_path / f"checkpoint-{kept}")
        assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == left | {"checkpoint-mine", "runs"}

    def test_a_log_that_was_cut_off(self, tmp_path: Path) -> None:
        path = tmp_path / "log.jsonl"
        assert read_jsonl(path) == []
        path.write_text('{"step": 1}\n{"step": 2, "lo', encoding="utf-8")
        assert read_jsonl(path) == [{"step": 1}]


def test_a_loss_that_is_no_number_is_null_in_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    step = PlainTrainer.training_step
    monkeypatch.setattr(PlainTrainer, "training_step", lambda *args, **kwargs: step(*args, **kwargs) * torch.nan)
    train("lora")
    lines = Path("run/log.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON")) for line in lines]
    assert [row["loss"] for row in rows if "loss" in row] == [None] * 6
