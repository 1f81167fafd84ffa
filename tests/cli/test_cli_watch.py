"""What a run tells while it trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .command import LANGUAGE, RECIPE, done, read_rows

Write = Callable[[str], Path]


@pytest.mark.usefixtures("unreported")
@pytest.mark.parametrize(("text", "unit"), [(RECIPE, "examples"), (LANGUAGE, "tokens")])
def test_every_row_with_a_loss_has_speed_and_memory(text: str, unit: str, write: Write, here: Path) -> None:
    done("train", write(text), "--eval_every", 8)
    rows = read_rows(here / "run" / "log.jsonl")
    logged = [row for row in rows if "loss" in row]
    assert [row["step"] for row in logged] == [4, 8, 12, 16]
    for row in logged:
        assert row[f"{unit}_per_second"] > 0
        assert row["memory_mib"] > 0
        assert {"learning_rate", "grad_norm"} <= row.keys()
    assert not any("memory_mib" in row for row in rows if "loss" not in row)
