"""A Trainer's checkpoint whose save was cut off is refused before anything of it is loaded, and another one named."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from trainers import STEPS, build, train_until_killed

from loralloc import UserError
from loralloc.training.callback import MARKER, TENSORS

SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 8, "logging_steps": 1}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run that was killed after two checkpoints."""
    folder = tmp_path_factory.mktemp("two")
    train_until_killed(folder, 17, **SAVING)
    return folder


WRITTEN = [
    "adapter_model.safetensors",
    "gated_factors.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    TENSORS,
    MARKER,
]
"""Files of a checkpoint, in the order in which a save writes them."""


@pytest.mark.parametrize("last", [None, *WRITTEN])
def test_whatever_a_save_had_written_when_it_was_cut_off_the_one_to_give_is_named(
    last: str | None, two: Path, tmp_path: Path
) -> None:
    """The last file is half a file, and those after it are not there."""
    output = Path(shutil.copytree(two, tmp_path / "output"))
    newest, before = output / "checkpoint-16", str(output / "checkpoint-8")
    for name in WRITTEN[0 if last is None else WRITTEN.index(last) + 1 :]:
        (newest / name).unlink()
    if last is not None:
        os.truncate(newest / last, (newest / last).stat().st_size // 2)
    trainer, _ = build(output, **SAVING)
    cure = re.escape(f", in the same output_dir; the newest there is resume_from_checkpoint={before!r}")
    with pytest.raises(UserError, match=rf"checkpoint-16 has no usable rank-allocation state \(.*{cure}$"):
        trainer.train(resume_from_checkpoint=True)
    trainer.train(resume_from_checkpoint=before)
    assert trainer.state.global_step == STEPS


@pytest.mark.parametrize("name", WRITTEN)
def test_half_a_file_in_a_complete_checkpoint_is_refused(name: str, two: Path, tmp_path: Path) -> None:
    output = Path(shutil.copytree(two, tmp_path / "output"))
    path = output / "checkpoint-16" / name
    os.truncate(path, path.stat().st_size // 2)
    trainer, _ = build(output, **SAVING)
    with pytest.raises(UserError, match=r"checkpoint-16 has no usable rank-allocation state \("):
        trainer.train(resume_from_checkpoint=True)
