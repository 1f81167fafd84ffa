"""A run as large as they come: 20,000 modules, 500 changes of the ranks, 300,000 logged rows."""

from __future__ import annotations

import json
from pathlib import Path

from .fabricate import Fabricated, layered, lines

LAYERS, EXPERTS, EVENTS, ROWS = 40, 250, 500, 300_000


def write_large(folder: Path, experts: int = EXPERTS, events: int = EVENTS, rows: int = ROWS) -> Path:
    """Write its folder; a mixture of experts, every expert with two matrices."""
    kinds = {f"mlp.experts.{at}.{kind}": (64, 128) for at in range(experts) for kind in ("up_proj", "down_proj")}
    run = Fabricated(layered("model.layers", LAYERS, kinds), start=4, average=2, steps=rows, method="lora")
    run.write(folder, without=["trace.jsonl", "log.jsonl"])
    count = len(run.modules)
    opening = run.trace()[0] | {
        "label": "AdaLoRA",
        "unit": "ranks",
        "start_budget": 4 * count,
        "target_budget": 2 * count,
    }
    opening["phases"] = [["warm-up", 0, rows // 5], ["budget falls", rows // 5 + 1, rows]]
    with (folder / "trace.jsonl").open("w", encoding="utf-8") as file:
        file.write(json.dumps(opening) + "\n")
        for at in range(1, events + 1):
            changed = 2 * count * at // events  # of as many closings, so many are done
            ranks = [4 - changed // count - (place < changed % count) for place in range(count)]
            row = run.event("allocate", rows // 5 + at * (rows - rows // 5) // events, ranks)
            file.write(json.dumps(row | {"budget": sum(ranks)}) + "\n")
        file.write(json.dumps(run.event("finish", rows, run.ranks)) + "\n")
    run.steps = 5 * rows  # Fabricated logs every fifth step
    every = [row | {"step": row["step"] // 5} for row in run.log() if "loss" in row]
    (folder / "log.jsonl").write_text(lines(every), encoding="utf-8")
    return folder
