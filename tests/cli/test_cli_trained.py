"""A run that trained and whose export fails: what it trained is kept, and the command that the message names works."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from safetensors.torch import load_file

from loralloc.recipe import run as pipeline
from loralloc.recipe import stages
from loralloc.recipe.run_folder import RunFolder

from .command import done, files, read_json, refused
from .deaths import killed_in

pytestmark = pytest.mark.usefixtures("unreported")


@contextmanager
def export_fails(error: Exception) -> Iterator[None]:
    """Nothing can be exported at the end of a run."""

    def fail(*_: Any, **__: Any) -> None:
        raise error

    with patch.object(pipeline, "export_adapter", fail):
        yield


DIFFERS = RuntimeError("the reloaded export computes something else: logits differ by 0.125 (allowed 0.000156)")


def _adapter(folder: Path) -> dict[str, bytes]:
    tensors = load_file(folder / "adapter_model.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "words",
    [
        pytest.param([], id="adalora"),
        pytest.param(["--method", "{name: lora}"], id="lora"),
        *(
            pytest.param(["--method", method, "--lora.alpha", 4], id=name, marks=pytest.mark.slow)
            for name, method in {
                "ablora": "{name: ablora, validation: validation, budget: {average_rank: 2}}",
                "autolora": "{name: autolora, validation: 0.3, search: 0.5}",
                "allora": "{name: allora, eta: 1.41, mode: hybrid}",
                "compact": "{name: adalora, budget: {average_rank: 2}}",
            }.items()
        ),
    ],
)
def test_the_command_that_the_message_names_exports_what_was_trained(
    words: list[Any], recipe: Path, here: Path, request: pytest.FixtureRequest
) -> None:
    compact = ["--compact", "true"] if "compact" in request.node.name else []
    done("train", recipe, *words, *compact, "--output", "whole")
    with export_fails(DIFFERS):
        said = refused("train", recipe, *words, *compact)
    assert said.startswith(f"the run ended without an adapter: {DIFFERS}; what was trained is kept in run/trained: ")
    command = said.partition("run/trained: ")[2].removesuffix(" writes it from there")
    assert command == "loralloc export run"
    assert not (here / "run" / "adapter").exists()
    shown = done(*command.split()[1:])
    assert "(ragged, largest rank" in shown
    assert _adapter(here / "run" / "adapter") == _adapter(here / "whole" / "adapter")
    assert read_json(here / "run" / "ranks.json")["modules"] == read_json(here / "whole" / "ranks.json")["modules"]
    accuracy = read_json(here / "whole" / "metrics.json")["validation"]["accuracy"]
    assert f"{accuracy:.4f}" in done("evaluate", "run")


def test_other_profiles_go_to_their_own_folders(recipe: Path, here: Path) -> None:
    with export_fails(DIFFERS):
        refused("train", recipe)
    done("export", "run", "--profile", "uniform")
    assert RunFolder(Path("run")).weights == Path("run/trained")
    done("export", "run", "--to", "elsewhere")
    assert _adapter(here / "elsewhere").keys() < _adapter(here / "run" / "trained").keys()
    assert not (here / "run" / "adapter").exists()


def test_a_full_disk_is_no_reason_to_train_again(recipe: Path) -> None:
    with export_fails(OSError("No space left on device")):
        said = refused("train", recipe)
    assert "without an adapter: No space left on device; what was trained is kept in run/trained" in said
    done("export", "run")


def test_resume_names_the_command_too(recipe: Path) -> None:
    with export_fails(DIFFERS):
        refused("train", recipe)
    kept = "; what it trained is kept: loralloc export run"
    assert refused("train", recipe, "--resume").endswith(f"start over with --replace{kept}")
    assert refused("train", recipe, "--resume", "--batch_size", 4).endswith(f"another --output{kept}")
    done("export", "run")


def test_an_adapter_that_is_exported_is_named_where_the_run_cannot_go_on(recipe: Path, here: Path) -> None:
    done("train", recipe, "--output", "whole")
    with killed_in(pipeline, "final_metrics"):
        done("train", recipe)
    kept = "; its adapter is exported: loralloc evaluate run and loralloc report run look at it"
    assert refused("train", recipe, "--resume").endswith(f"start over with --replace{kept}")
    assert refused("train", recipe, "--resume", "--batch_size", 4).endswith(f"another --output{kept}")
    accuracy = read_json(here / "whole" / "metrics.json")["validation"]["accuracy"]
    assert f"{accuracy:.4f}" in done("evaluate", "run")
    done("report", "run")
    assert "kept" not in refused("train", recipe, "--output", "whole", "--resume", "--batch_size", 4)
    assert "its adapter" not in refused("train", recipe, "--output", "whole", "--resume", "--batch_size", 4)


def test_a_loss_that_diverged_is_not_worth_another_export(recipe: Path) -> None:
    with pytest.MonkeyPatch.context() as patched:
        trained = stages.Stage.train

        def diverge(stage: stages.Stage, checkpoint: Path | None) -> None:
            trained(stage, checkpoint)
            next(weight for weight in stage.model.parameters() if weight.requires_grad).data.fill_(float("nan"))

        patched.setattr(stages.Stage, "train", diverge)
        said = refused("train", recipe)
    assert said.endswith("the loss diverged: lower the learning rate")
    assert "loralloc export" not in said


def test_a_finished_run_keeps_its_adapter_only(recipe: Path, here: Path) -> None:
    done("train", recipe)
    assert not [name for name in files(here / "run") if name.startswith("trained")]
    assert RunFolder(Path("run")).exported("ragged") == Path("run/ragged")
    assert "kept" not in refused("train", recipe)


def test_what_was_trained_is_there_whole_or_not_at_all(recipe: Path) -> None:
    with killed_in(Path, "rename"):  # the last step of keeping it
        done("train", recipe)
    assert Path("run/trained.partial/adapter_model.safetensors").is_file()
    assert refused("export", "run").startswith("run has no adapter yet: the run has not finished")
    done("train", recipe, "--replace")


@pytest.mark.parametrize("method", ["{name: lora}", "{name: adalora, budget: {average_rank: 2}}"])
def test_bf16_on_a_cpu_trains(method: str, recipe: Path) -> None:
    with export_fails(DIFFERS):
        said = refused("train", recipe, "--method", method, "--bf16", "true", "--steps", 6)
    assert "run/trained" in said
    done("export", "run")
