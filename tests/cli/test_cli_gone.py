"""One of two processes is killed by the system: the other one ends too, soon, and the run can be resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from .command import read_json
from .test_cli_processes import SAVING, _torchrun, home

__all__ = ["home"]  # pytest finds fixtures by name

pytestmark = pytest.mark.slow

TRAIN = ["train", "recipe.yaml", "--batch_size", 8, "--steps", 8, *SAVING]


def both(home: Path, commands: dict[str, list[Any]], check: bool = True) -> Any:
    """Run commands in two processes."""
    (home / "commands.json").write_text(json.dumps(commands, default=str), encoding="utf-8")
    return _torchrun(Path(__file__).with_name("two_processes.py"), home, check=check)


def test_a_killed_process_ends_the_others_and_the_run_goes_on(home: Path) -> None:
    # Launched processes get ten minutes here; a collective of gloo would wait half an hour for the one that is gone.
    result = both(home, {"gone": [*TRAIN, "--output", "gone"]}, check=False)
    assert result.returncode != 0
    left = home / "0.json"
    assert not left.exists() or read_json(left)["gone"]["code"] != 0, "nobody came to the end"
    assert not (home / "gone" / "adapter").exists()
    resumed = [*TRAIN, "--output", "gone", "--resume"]
    both(home, {"whole": [*TRAIN, "--output", "whole"], "resumed": resumed})
    for found in (read_json(home / f"{rank}.json") for rank in range(2)):
        assert found["resumed"]["code"] == 0, found["resumed"]["err"]
        assert found["resumed"]["checksum"] == found["whole"]["checksum"]
