from __future__ import annotations

from pathlib import Path

import pytest
from recipe_texts import Write


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> Path:
        Path("recipe.yaml").write_text(text, encoding="utf-8")
        return Path("recipe.yaml")

    return write
