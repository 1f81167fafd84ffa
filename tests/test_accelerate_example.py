"""examples/accelerate_loop.py, as its page starts it: two processes train one adapter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "accelerate_loop.py"


@pytest.mark.slow
def test_two_processes_train_one_adapter_to_its_budget(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(EXAMPLE)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=900, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "296 ranks on 2 process(es)" in done.stdout
    assert (tmp_path / "runs" / "accelerate" / "adapter" / "adapter_model.safetensors").is_file()
