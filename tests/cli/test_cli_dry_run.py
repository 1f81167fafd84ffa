"""`loralloc train --dry-run` refuses what the run would refuse, and a run that never made a step leaves no run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loralloc import UserError
from loralloc.compare import cell
from loralloc.recipe import evaluations
from loralloc.recipe import run as pipeline
from loralloc.recipe.schema import load_recipe
from loralloc.training import callback, processes
from loralloc.training.trainer import PlainTrainer

from .command import PLAIN, RECIPE, done, files, loralloc, read_json, refused
from .deaths import killed_at, killed_in

Write = Callable[[str], Path]

SEARCH = PLAIN.replace("name: lora", "name: autolora\n  check_every: 2")
REFUSALS: dict[str, tuple[str, list[Any], str]] = {
    "a device without bf16": (RECIPE, ["--bf16", "true"], "training: Your setup doesn't support bf16/gpu"),
    "ranks that never leave": (PLAIN, ["--compact", "true"], "training.compact: plain LoRA closes no ranks"),
    "a budget": (RECIPE, ["--total_rank", 53], "asks for 53 ranks"),
    "a short run": (RECIPE, ["--steps", 1], "at least 3 optimizer steps"),
    "a metric": (
        RECIPE,
        ["--evaluate.metric", "pearson"],
        "evaluate.metric: this run has no metric pearson; it has loss",
    ),
    "a metric after a search": (
        SEARCH,
        ["--evaluate.metric", "pearson"],
        "this run has no metric pearson; it has loss",
    ),
    "a metric for the best": (
        RECIPE,
        ["--metric_for_best_model", "acuracy", "--eval_every", 4],
        "training.trainer.metric_for_best_model: a run has no metric acuracy; it has loss, accuracy",
    ),
    "an engine": (RECIPE, [], "no such engine"),
    "an engine of the search": (SEARCH, [], "no such engine"),
    "a folder": (RECIPE, ["--output", "own"], "own exists and is not a run"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_the_run_and_its_rehearsal_refuse_alike(
    case: str, write: Write, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, words, message = REFUSALS[case]
    recipe = write(text)
    (here / "own").mkdir()
    (here / "own" / "thesis.txt").write_text("years of work", encoding="utf-8")
    if case == "a device without bf16":
        monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: False)
        monkeypatch.setattr(processes, "on_cpu", lambda: False)
    if "engine" in case:  # what the callback refuses, it refuses when training begins

        def refuse(*_: Any) -> None:
            raise UserError("no such engine")

        monkeypatch.setattr(callback, "refuse_engines", refuse)
    before = files(here)
    told = refused("train", recipe, *words, "--dry-run")
    assert message in told
    assert files(here) == before
    assert not (here / "run").exists()
    assert refused("train", recipe, *words) == told


def test_a_run_of_a_comparison_refuses_a_metric_that_it_will_not_have(write: Write, here: Path) -> None:
    recipe = write(RECIPE + "evaluate:\n  metric: pearson\n")
    with pytest.raises(UserError, match=r"^evaluate.metric: this run has no metric pearson; it has loss, accuracy"):
        cell.train(recipe, None)
    assert not (here / "run" / "recipe.yaml").exists()


def test_a_rehearsal_makes_no_step(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    alive = PlainTrainer.training_step

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        steps.append(self.state.global_step)
        return alive(self, *args, **kwargs)

    monkeypatch.setattr(PlainTrainer, "training_step", noted)
    monkeypatch.setattr(pipeline, "write_report", lambda folder: folder / "report.html")
    done("train", write(PLAIN), "--steps", 3, "--dry-run")
    assert steps == []
    done("train", write(PLAIN), "--steps", 3)
    assert steps == [0, 1, 2]


def test_an_earlier_run_is_left_to_the_flags_that_decide_over_it(run: Path, recipe: Path) -> None:
    before = files(run)
    assert "run holds a run already" in refused("train", recipe, "--dry-run")
    assert "run has finished" in refused("train", run / "recipe.yaml", "--dry-run", "--resume")
    done("train", recipe, "--dry-run", "--replace")
    assert files(run) == before


@pytest.mark.usefixtures("unreported")
@pytest.mark.parametrize("act", [pipeline.run, pipeline.rehearse])
def test_a_python_caller_under_a_launcher_joins_the_other_processes(
    act: Any, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it each process would train an adapter of its own."""

    class JoinedError(Exception): ...

    def join() -> None:
        raise JoinedError

    monkeypatch.setattr(pipeline.processes, "join", join)
    with pytest.raises(JoinedError):
        act(load_recipe(recipe))


class TestARunThatNeverMadeAStep:
    """It is none: the folder may be used again."""

    @staticmethod
    def starts_anew(recipe: Path) -> None:
        done("train", recipe, "--steps", 4)
        assert read_json(Path("run/metrics.json"))["total_steps"] == 4

    def test_refused(self, recipe: Path) -> None:
        refused("train", recipe, "--total_rank", 53)
        self.starts_anew(recipe)

    @pytest.mark.parametrize(
        "text", [RECIPE, pytest.param(PLAIN, marks=pytest.mark.slow), pytest.param(SEARCH, marks=pytest.mark.slow)]
    )
    def test_interrupted_before_the_first_step(self, text: str, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
        recipe = write(text)

        def press(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(PlainTrainer, "training_step", press)
            assert loralloc("train", recipe).code == 130
        assert Path("run/recipe.yaml").exists()
        self.starts_anew(recipe)

    def test_killed_while_the_untrained_model_was_evaluated(self, recipe: Path) -> None:
        with killed_in(evaluations, "evaluate"):
            done("train", recipe)
        self.starts_anew(recipe)

    def test_but_one_that_has_logged_a_step_is_a_run(self, recipe: Path) -> None:
        with killed_at(5):
            done("train", recipe)
        before = files(Path("run"))
        assert "holds a run already" in refused("train", recipe)
        assert files(Path("run")) == before

    @pytest.mark.parametrize("name", ["thesis.txt", "adapter/adapter_model.safetensors", "checkpoints/checkpoint-1/x"])
    def test_but_a_folder_that_holds_anything_else_is_not_free(self, name: str, recipe: Path) -> None:
        (Path("run") / name).parent.mkdir(parents=True)
        (Path("run") / name).write_text("years of work", encoding="utf-8")
        assert "run exists and is not a run" in refused("train", recipe)
        assert (Path("run") / name).read_text(encoding="utf-8") == "years of work"
