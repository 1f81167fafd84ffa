"""Equal runs write equal files: in processes that hash names differently, byte by byte."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from models import tiny_peft

from loralloc.naming import sort_names

TESTS = Path(__file__).resolve().parents[1]

WRITE = """
import sys, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
from models import BUILDERS, lora_config, train_adapter
from peft import get_peft_model
from loralloc import AdaLoRA, Budget, attach, export_adapter, truncate_adapter
from loralloc.adapter.export import save_adapter

folder = Path(sys.argv[1])
names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
torch.manual_seed(0)
model = get_peft_model(BUILDERS["llama"](), lora_config("llama", target_modules=names, exclude_modules=["x", "y", "z"]))
run = attach(model, AdaLoRA(Budget(average_rank=2)), 10)
model.save_pretrained(str(folder / "checkpoint"))
run.finish()
train_adapter(model)
export_adapter(model, folder / "ragged")
export_adapter(model, folder / "uniform", "uniform")
save_adapter(model, folder / "saved")
truncate_adapter(folder / "ragged", folder / "truncated", Budget(fraction=0.5))
"""


def written(folder: Path, seed: int) -> dict[str, str]:
    """SHA-256 of every file that a process writes whose hashes of names begin with a seed."""
    done = subprocess.run(
        [sys.executable, "-c", WRITE.format(tests=str(TESTS)), str(folder)],
        env={**os.environ, "PYTHONHASHSEED": str(seed)},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.slow
def test_an_allocation_writes_the_same_files_in_any_process(tmp_path: Path) -> None:
    first, second = (written(tmp_path / str(seed), seed) for seed in (1, 2))
    assert first == second
    configs = [path for path in first if path.endswith("adapter_config.json")]
    assert len(configs) == 5
    for path in configs:
        config = json.loads((tmp_path / "1" / path).read_text())
        assert config["target_modules"] == sorted(config["target_modules"])
        assert len(config["target_modules"]) == 7


def test_names_are_put_in_order_and_patterns_stay() -> None:
    config = tiny_peft("llama", target_modules=["v_proj", "q_proj", "up_proj"], exclude_modules=".*lm_head").peft_config
    sort_names(config["default"])
    assert config["default"].target_modules == ["q_proj", "up_proj", "v_proj"]
    assert config["default"].exclude_modules == ".*lm_head"
