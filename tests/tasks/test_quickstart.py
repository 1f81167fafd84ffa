"""examples/quickstart.py, as it stands: fast on a tiny model and a few rows, slow on what it names."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from peft import PeftConfig

QUICKSTART = Path(__file__).resolve().parents[2] / "examples" / "quickstart.py"


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
def test_it_trains_allocates_and_exports(
    encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": f"the film is {word}", "label": word} for word in ("good", "bad")] * 8
    monkeypatch.setattr("loralloc.tasks.docstrings.build", lambda: {"train": rows})
    monkeypatch.setattr("loralloc.tasks.locations.model_folder", {"demo:minilm": Path(encoder)}.__getitem__)
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(QUICKSTART))
    said = capsys.readouterr().out
    assert str(names["allocation"].plan.ranks) in said
    assert said.endswith("runs/quickstart/adapter has 104 ranks\n")  # 8 for each of 13 layers
    assert PeftConfig.from_pretrained("runs/quickstart/adapter").task_type == "SEQ_CLS"


@pytest.mark.slow
def test_it_runs_offline_on_the_demos_encoder(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, QUICKSTART], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=1200
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("runs/quickstart/adapter has 296 ranks\n")  # 8 for each of 37 layers
