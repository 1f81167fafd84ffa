"""One JSON record for each measured setting: what was run, on what, by what command, and what came out."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from contenders import Setting

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("loralloc", "torch", "transformers", "peft", "betty-ml")

Record = dict[str, Any]


def record(suite: str, setting: Setting | None, figures: dict[str, Any], failures: dict[str, str]) -> Record:
    """Put a record together; the setting is None if no model is involved."""
    device = "cpu" if setting is None else setting.device
    return {
        "suite": suite,
        **({} if setting is None else _described(setting)),
        "device": device,
        **figures,
        "failures": failures,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "changed": _git("status", "--porcelain", "--", "src", "benchmarks/*.py").splitlines(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "machine": machine(device),
        "command": " ".join(["python", "benchmarks/run.py", *sys.argv[1:]]),
    }


def _described(setting: Setting) -> dict[str, Any]:
    shape = setting.shape
    return {
        "shape": shape.name,
        "hidden": shape.hidden,
        "layers": shape.layers,
        "tokens": shape.batch * shape.tokens,
        "rank": setting.rank,
        "dtype": str(shape.dtype).removeprefix("torch."),
        "adapter": setting.adapter,
    }


def append(made: Record, path: Path) -> None:
    """Add a record to a file of JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(made) + "\n")


def read(folder: Path) -> Iterator[Record]:
    """All records of speed in a folder, in the order of their files and lines."""
    for path in sorted(folder.glob("speed*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            yield json.loads(line)


def machine(device: str) -> dict[str, Any]:
    """The properties of the machine that decide speed."""
    found = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
    }
    if device == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
