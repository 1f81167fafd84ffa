"""`loralloc train --resume`: from the newest whole checkpoint, of the same run; and what a finished one still lacks."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from loralloc.recipe import run as pipeline
from loralloc.training import checkpoint as checkpoints
from loralloc.training import fingerprints
from loralloc.training.manifest import MANIFEST, UNFINISHED
from loralloc.training.trainer import RunTrainer

from .command import RECIPE, done, files, read_json, read_rows, refused, write_rows
from .deaths import METHODS, killed_at, killed_in, unlike, words

pytestmark = pytest.mark.usefixtures("unreported")

KILLED = 9
"""The checkpoints then are of steps 4 and 8; a search of twelve steps comes first with AutoLoRA."""
Killed = Callable[[str], Path]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, encoder: Path, data: Path) -> Killed:
    """A folder for every method: `run` has been killed after step 9, `whole` has not."""
    home = tmp_path_factory.mktemp("runs")

    @functools.cache
    def make(method: str) -> Path:
        folder = home / method
        folder.mkdir()
        (folder / "recipe.yaml").write_text(RECIPE.format(encoder=encoder, data=data), encoding="utf-8")
        with chdir(folder), pytest.MonkeyPatch.context() as patched:
            patched.setattr(pipeline, "write_report", lambda root: root / "report.html")
            done(*words(method))
            Path("run").rename("whole")
            with killed_at(KILLED):
                done(*words(method))
        return folder

    return make


@pytest.fixture
def killed(runs: Killed, here: Path) -> Killed:
    """Puts the recipe and the killed run of a method into the current directory; returns the run that was not."""

    def copy(method: str = "adalora") -> Path:
        shutil.copytree(runs(method), here, dirs_exist_ok=True)
        return here / "whole"

    return copy


def saved(method: str, step: int = 8) -> Path:
    """A checkpoint of a killed run."""
    return Path("run", *(["search"] if method == "autolora" else []), "checkpoints", f"checkpoint-{step}")


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))


def resume(*more: Any, method: str = "adalora") -> str:
    """What a resumed run says, on one line."""
    return " ".join(done(*words(method), "--resume", *more).split())


KINDS = [
    *("adapter_config.json", "adapter_model.safetensors", "gated_factors.safetensors", "loralloc.json"),
    *("loralloc.safetensors", "manifest.json", "optimizer.json", "optimizer.safetensors", "random-0.json"),
    *("README.md", "trainer_state.json", "training_args.bin", "window.json", "bad_steps.json"),
]
"""Files of checkpoints, more than one method has."""

OWN = ("loralloc.json", "loralloc.safetensors", "bad_steps.json")
DAMAGED = [
    *(("adalora", name) for name in KINDS),
    *((method, name) for method in METHODS if method != "adalora" for name in OWN),
]
"""Every file of one method's checkpoints, and of the others' those that differ from method to method."""


class TestDamage:
    def test_these_are_the_files(self, killed: Killed) -> None:
        for method in METHODS:
            killed(method)
            found = {path.name for path in saved(method).iterdir()}
            assert found <= set(KINDS), method
            shutil.rmtree("run")
            shutil.rmtree("whole")

    @pytest.mark.slow
    @pytest.mark.parametrize(("method", "name"), DAMAGED)
    def test_a_flipped_bit_in_any_file(self, method: str, name: str, killed: Killed) -> None:
        whole = killed(method)
        if not (saved(method) / name).exists():
            pytest.skip("has no such file")
        flip(saved(method) / name)
        said = resume(method=method)
        assert f"{saved(method)} is not whole: " in said
        assert unlike(Path("run"), whole) == []

    @pytest.mark.parametrize(
        ("damage", "reason"),
        [
            (flip, "has other content than was written"),
            (lambda path: path.unlink(), "is missing"),
            (lambda path: path.write_bytes(path.read_bytes()[:99]), "has 99 bytes instead of"),
        ],
    )
    def test_falls_back_and_says_why(self, damage: Callable[[Path], None], reason: str, killed: Killed) -> None:
        whole = killed()
        damage(saved("adalora") / "optimizer.safetensors")
        said = resume()
        assert f"run/checkpoints/checkpoint-8 is not whole: optimizer.safetensors {reason}" in said
        assert "; it is passed over" in said
        assert unlike(Path("run"), whole) == []

    def test_a_whole_one_is_taken_without_a_word(self, killed: Killed) -> None:
        whole = killed()
        said = resume()
        assert "whole" not in said
        assert "starts over" not in said
        assert unlike(Path("run"), whole) == []

    def test_nothing_is_trained_anew_unasked_where_all_are_damaged(self, killed: Killed) -> None:
        killed()
        for step in (4, 8):
            flip(saved("adalora", step) / "window.json")
        before = files(Path("run"))
        message = refused(*words("adalora"), "--resume")
        other = "window.json has other content than was written"
        assert message == (
            f"no checkpoint is whole any more: run/checkpoints/checkpoint-8 is not whole: {other}; "
            f"run/checkpoints/checkpoint-4 is not whole: {other}. Start over with --replace"
        )
        assert files(Path("run")) == before
        done(*words("adalora"), "--replace")

    def test_without_a_checkpoint_it_says_that_it_starts_anew(self, killed: Killed) -> None:
        whole = killed()
        shutil.rmtree("run/checkpoints")
        assert "there is no checkpoint in run/checkpoints to resume from: the training starts over" in resume()
        assert unlike(Path("run"), whole) == []

    @pytest.mark.parametrize("late", [True, False], ids=["before its manifest", "before the state of the trainer"])
    def test_one_that_was_cut_off_is_none(self, late: bool, killed: Killed) -> None:
        whole = killed()
        for step in (4, 8):
            (saved("adalora", step) / MANIFEST).rename(saved("adalora", step) / UNFINISHED)
            if not late:
                (saved("adalora", step) / "trainer_state.json").unlink()
        said = resume()
        assert "it has no manifest.json: its writing was cut off; it is passed over" in said
        assert "the training starts over" in said
        assert unlike(Path("run"), whole) == []

    @pytest.mark.parametrize("of_before", [False, True], ids=["the manifest is lost", "of a version without manifests"])
    def test_one_that_was_whole_is_not_deleted(self, killed: Killed, of_before: bool) -> None:
        killed()
        for step in (4, 8):
            (saved("adalora", step) / MANIFEST).unlink()
            if of_before:
                (saved("adalora", step) / "trainer_state.json").rename(saved("adalora", step) / "complete.json")
        before = files(Path("run"))
        assert refused(*words("adalora"), "--resume").startswith("no checkpoint is whole any more: ")
        assert files(Path("run")) == before

    def test_half_written_files_go(self, killed: Killed, here: Path) -> None:
        killed()
        theirs = [here / "run" / ".thesis.txt.77", here / "run" / "notes" / ".metrics.json.77"]
        theirs += [here / "run" / ".adapter.old" / "weights", here / "run" / ".model.bak"]
        ours = [here / "run" / ".metrics.json.77", saved("adalora", 8) / ".window.json.77"]
        ours += [here / "run" / ".adapter.x7f0_9ab" / "export" / "adapter_model.safetensors"]
        ours += [here / "run" / "trained.partial" / "adapter_model.safetensors"]
        for path in (*theirs, *ours):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        resume()
        assert [path.exists() for path in theirs] == [True] * 4
        assert [path.exists() for path in ours] == [False] * 4
        assert not (here / "run" / ".adapter.x7f0_9ab").exists()


class TestChanges:
    @pytest.fixture
    def own(self, killed: Killed, data: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A killed run on data of its own, in `train.jsonl`."""
        killed()
        shutil.copy(data / "train.jsonl", here)
        with killed_at(KILLED):
            done(*words("adalora"), "--data.train", "train.jsonl", "--replace")
        return here / "train.jsonl"

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda rows: rows[:40], "data.train has 40 examples and had 48"),
            (lambda rows: rows[::-1], "data.train has as many examples as before, but different ones or another order"),
            (
                lambda rows: [{**rows[0], "label": "bad"}, *rows[1:]],
                "data.train has as many examples as before, but different ones or another order",
            ),
        ],
    )
    def test_of_the_data_are_refused_unless_they_are_allowed(self, change: Any, said: str, own: Path) -> None:
        write_rows(own, change(read_rows(own)))
        before = files(Path("run"))
        message = refused(*words("adalora"), "--data.train", own.name, "--resume")
        assert message == (
            f"run/checkpoints/checkpoint-8 belongs to a different run: {said}. Resume with what that run began with, "
            "or say that they may differ: --allow-changed data, or start over with --replace"
        )
        assert files(Path("run")) == before
        assert f"{said}, as --allow-changed says it may" in resume("--data.train", own.name, "--allow-changed", "data")
        assert read_json(Path("run/metrics.json"))["total_steps"] == 12

    def test_of_where_the_data_lie_are_none(self, own: Path) -> None:
        own.rename("moved.jsonl")
        said = resume("--data.train", "moved.jsonl")
        assert "the recipe differs in keys that may change: data.train is moved.jsonl and was train.jsonl" in said
        assert "train: moved.jsonl" in Path("run/recipe.yaml").read_text(encoding="utf-8")

    def test_of_the_base_weights_are_refused(self, killed: Killed, encoder: Path, here: Path) -> None:
        killed()
        base = shutil.copytree(encoder, here / "base")
        with killed_at(KILLED):
            done(*words("adalora"), "--model.name", "base", "--replace")
        tensors = load_file(base / "model.safetensors")
        scaled = {name: 1.1 * tensor for name, tensor in tensors.items()}
        save_file(scaled, base / "model.safetensors", metadata={"format": "pt"})
        message = refused(*words("adalora"), "--model.name", "base", "--resume")
        assert message == (
            "run/checkpoints/checkpoint-8 belongs to a different run: the base model has other weights. "
            "Resume with what that run began with, or start over with --replace"
        )
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
        resume("--model.name", "base")

    def test_of_versions_are_refused_unless_they_are_allowed(
        self, killed: Killed, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        killed()
        newer = {**fingerprints.versions(), "torch": "9.9"}
        monkeypatch.setattr("loralloc.recipe.fingerprints.versions", lambda: newer)
        message = refused(*words("adalora"), "--resume")
        was = fingerprints.versions()["torch"]
        assert f"belongs to a different run: torch is 9.9 and was {was}. Resume with" in message
        assert "say that they may differ: --allow-changed versions" in message
        assert f"torch is 9.9 and was {was}, as --allow-changed says" in resume("--allow-changed", "versions")

    @pytest.mark.parametrize(
        ("more", "said"),
        [
            (["--learning_rate", 0.5], "training.learning_rate is 0.5 and was 0.01"),
            (["--steps", 13, "--seed", 3], "training.steps is 13 and was 12; training.seed is 3 and was"),
            (["--data.max_length", 8], "data.max_length is 8 and was 16"),
        ],
    )
    def test_of_the_recipe_are_refused_by_name(self, more: list[Any], said: str, killed: Killed) -> None:
        killed()
        message = refused(*words("adalora"), "--resume", *more)
        assert message.startswith(f"run/recipe.yaml differs from the recipe given: {said}")
        assert "; resume with the same settings, or choose another --output" in message

    def test_of_a_recipe_written_by_hand_are_found_by_the_checkpoint(self, killed: Killed) -> None:
        killed()
        path = Path("run/recipe.yaml")
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace("learning_rate: 0.01", "learning_rate: 0.5"), encoding="utf-8")
        message = refused("train", path, "--resume")
        assert "belongs to a different run: training.learning_rate is 0.5 and was 0.01" in message

    def test_of_logging_and_evaluation_are_free_and_said(self, killed: Killed) -> None:
        whole = killed()
        more = ["--log_every", 4, "--eval_every", 6, "--save_every", 6, "--evaluate.cuts", 2]
        said = resume(*more)
        for change in ("training.log_every is 4 and was 3", "training.eval_every is 6 and was not set"):
            assert change in said
        for name in ("adapter/adapter_model.safetensors", "ranks.json", "trace.jsonl"):
            assert Path("run", name).read_bytes() == (whole / name).read_bytes()
        assert "log_every: 4" in Path("run/recipe.yaml").read_text(encoding="utf-8")

    def test_of_evaluation_are_not_free_where_it_decides(self, recipe: Path) -> None:
        keep = [*words("adalora"), "--early_stopping", 3, "--eval_every", 4]
        with killed_at(KILLED):
            done(*keep)
        message = refused(*keep[:-1], 2, "--resume")
        assert "differs from the recipe given: training.eval_every is 2 and was 4" in message

    def test_of_a_plan_are_refused(self, killed: Killed, here: Path) -> None:
        killed("lora")
        shutil.copy("whole/ranks.json", "plan.json")
        planned = [*words("lora"), "--plan", "plan.json"]
        with killed_at(KILLED):
            done(*planned, "--replace")
        plan = read_json(here / "plan.json")
        next(iter(plan["modules"].values()))["scale"] = 3.0
        (here / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
        assert "a different run: the plan has other ranks or scales" in refused(*planned, "--resume")

    def test_several_are_told_together(self, own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_rows(own, read_rows(own)[1:])
        monkeypatch.setattr("loralloc.recipe.fingerprints.versions", lambda: {"torch": "9.9"})
        go_on = [*words("adalora"), "--data.train", own.name, "--resume"]
        message = refused(*go_on)
        assert "data.train has 47 examples and had 48; " in message
        assert "torch is 9.9" in message
        assert "--allow-changed data --allow-changed versions" in message
        assert "--allow-changed data" not in refused(*go_on, "--allow-changed", "data")
        done(*go_on, "--allow-changed", "data", "--allow-changed", "versions")

    def test_only_what_can_be_allowed_is(self, recipe: Path) -> None:
        assert refused("train", recipe, "--allow-changed", "data") == (
            "--allow-changed says what may differ in a run that goes on: give it with --resume"
        )
        message = refused("train", recipe, "--resume", "--allow-changed", "dat")
        assert message == '--allow-changed must be one of data, versions; got "dat". Did you mean "data"?'


class TestFinished:
    @pytest.fixture
    def page(self, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
        """Pages that are written, quickly."""
        written: list[Path] = []

        def write(folder: Path) -> Path:
            written.append(folder)
            (folder / "report.html").write_text("<!doctype html>", encoding="utf-8")
            return folder / "report.html"

        monkeypatch.setattr(pipeline, "write_report", write)
        return written

    def test_only_the_report_is_missing(self, killed: Killed, page: list[Path]) -> None:
        whole = killed()
        shutil.rmtree("run")
        whole.rename("run")
        before = files(Path("run"))
        said = resume()
        assert "the run had finished; what was missing is written now: run/report.html" in said
        assert page == [Path("run")]
        assert files(Path("run")).items() - before.items() == {("report.html", b"<!doctype html>")}
        assert "run has finished; there is nothing to resume" in refused(*words("adalora"), "--resume")

    @pytest.mark.parametrize("missing", ["export_adapter", "final_metrics", "write_card"])
    def test_what_comes_after_training_is_made_up_for(
        self, missing: str, killed: Killed, page: list[Path], recipe: Path
    ) -> None:
        whole = killed()
        shutil.rmtree("run")
        with killed_in(pipeline, missing):
            done(*words("adalora"))
        assert not Path("run/metrics.json").exists()
        with pytest.MonkeyPatch.context() as patched:  # nothing is trained again
            patched.setattr(RunTrainer, "training_step", None)
            resume()
        assert unlike(Path("run"), whole) == ["report.html"]
        assert not Path("run/trained").exists()

    def test_the_last_checkpoint_is_enough(self, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        once = ["--steps", 6, "--save_every", 6]
        with killed_in(pipeline, "export_adapter"):
            done("train", recipe, *once)
        monkeypatch.setattr(RunTrainer, "training_step", None)
        assert "starts over" not in done("train", recipe, *once, "--resume")
        assert read_json(Path("run/metrics.json"))["total_steps"] == 6

    def test_it_needs_no_checkpoints_for_that(self, recipe: Path, page: list[Path]) -> None:
        with killed_in(pipeline, "write_report"):
            done("train", recipe, "--steps", 4)
        done("train", recipe, "--steps", 4, "--resume")
        assert page == [Path("run")]


class TestBest:
    def test_a_run_that_lost_its_best_state_does_not_go_on_as_if_it_had_none(self, recipe: Path) -> None:
        keep = [*words("adalora"), "--keep_best", "true", "--eval_every", 2, "--save_every", 2, "--steps", 24]
        with killed_at(23):
            done(*keep)
        manifests = {path.parent.name: read_json(path) for path in Path("run/checkpoints").glob(f"*/{MANIFEST}")}
        best = {manifest["best"] for manifest in manifests.values()}
        assert best & manifests.keys()
        (name,) = best & manifests.keys()
        flip(Path("run/checkpoints", name, "adapter_model.safetensors"))
        message = refused(*keep, "--resume")
        assert f"run/checkpoints/{name} is not whole: adapter_model.safetensors has other content" in message

    def test_a_best_state_that_is_damaged_is_not_exported(self, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        bring_back = RunTrainer._load_best_model

        def spoil(trainer: RunTrainer) -> None:
            flip(Path(trainer.state.best_model_checkpoint or "", "adapter_model.safetensors"))
            bring_back(trainer)

        monkeypatch.setattr(RunTrainer, "_load_best_model", spoil)
        keep = ["--keep_best", "true", "--eval_every", 2, "--save_every", 2, "--steps", 24]
        message = refused("train", recipe, *keep)
        assert "which is not whole any more: adapter_model.safetensors has other content" in message
        assert "the last state is a plain adapter in run/checkpoints/checkpoint-24" in message
        assert not Path("run/adapter").exists()

    def test_older_checkpoints_go_once_the_new_one_is_whole(self, recipe: Path) -> None:
        one = [*words("adalora"), "--training.trainer", "{save_total_limit: 1}"]
        with killed_in(checkpoints, "save_random_state", step=8):
            done(*one)
        assert {path.name for path in Path("run/checkpoints").iterdir()} == {"checkpoint-4", "checkpoint-8"}
        assert checkpoints.newest_whole(Path("run/checkpoints")).checkpoint is not None
        done(*one, "--resume")
        assert {path.name for path in Path("run/checkpoints").iterdir()} == {"checkpoint-12"}
