"""A run as large as they come gives a page that can be opened."""

from __future__ import annotations

from pathlib import Path

import pytest

from loralloc.report.page import write_report

from .dom import check_page, read_page
from .large import EXPERTS, LAYERS, ROWS, write_large


def test_modules_that_are_too_many_to_read_are_a_picture(tmp_path: Path) -> None:
    path = write_report(write_large(tmp_path, experts=13, events=5, rows=100))
    check_page(read_page(path))
    page = path.read_text(encoding="utf-8")
    assert '<table class="heat"' not in page
    assert "A row for each layer, a column for each type; the strongest colour is rank " in page
    assert "40 more, in ranks.json" in page
    assert "All modules" in page
    assert "1,040" in page
    few = write_report(write_large(tmp_path / "few", experts=2, events=5, rows=100)).read_text(encoding="utf-8")
    assert '<table class="heat"' in few
    assert "more, in ranks.json" not in few


@pytest.mark.slow
def test_twenty_thousand_modules_are_a_page_of_a_megabyte(tmp_path: Path) -> None:
    page = write_report(write_large(tmp_path))
    assert page.stat().st_size < 1e6
    text = page.read_text(encoding="utf-8")
    assert f"{2 * LAYERS * EXPERTS:,}" in text
    assert f"{ROWS:,}" in text
