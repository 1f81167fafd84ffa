"""The archive of a study comes back as it was, and tells of nothing else; pages have the tables of the records."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def studies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    import studies

    monkeypatch.setattr(studies, "RESULTS", tmp_path / "kept")
    yield studies
    for name in ("studies", "language", "frontier_sweep", "frontier_orders", "tasks"):
        sys.modules.pop(name, None)


def write(folder: Path) -> dict[str, bytes]:
    """A study with a finished run and one that is not."""
    files = {"compare.yaml": b"compare", "runs/a/metrics.json": b"{}", "runs/a/losses.json": b"[1]"}
    others = {"runs/a/report.html": b"page", "runs/b/log.jsonl": b"{}", "compare.html": b"page"}
    weights = {"runs/a/adapter/adapter_model.safetensors": b"12345678"}
    for name, content in (files | others | weights).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return files | dict.fromkeys(weights, bytes(8))


def test_finished_runs_come_back_without_weights(studies: Any, tmp_path: Path) -> None:
    kept = write(tmp_path / "study")
    studies.keep("study", tmp_path / "study")
    studies.restore("study", tmp_path / "again")
    found = {
        str(path.relative_to(tmp_path / "again")): path.read_bytes()
        for path in (tmp_path / "again").rglob("*")
        if path.is_file()
    }
    assert found == kept


def test_equal_studies_are_equal_archives(studies: Any, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(tmp_path / name)
        studies.keep(name, tmp_path / name)
    one, two = (tmp_path / "kept" / f"{name}.tar.xz" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_another_model_does_not_take_the_place_of_one_that_is_in_use(studies: Any, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    for _ in range(2):
        assert studies.link(one, tmp_path / "base").resolve() == one
    with pytest.raises(SystemExit, match=r"base is another model, of other studies: name another folder with --runs$"):
        studies.link(two, tmp_path / "base")
    assert (tmp_path / "base").resolve() == one


def test_runs_that_are_there_are_left_alone(studies: Any, tmp_path: Path) -> None:
    write(tmp_path / "study")
    studies.keep("study", tmp_path / "study")
    (tmp_path / "study/runs/a/metrics.json").write_text("newer")
    studies.restore("study", tmp_path / "study")
    assert (tmp_path / "study/runs/a/metrics.json").read_text() == "newer"


def test_the_page_has_the_tables_that_the_records_give(studies: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(studies, "RESULTS", FOLDER / "results" / "studies")
    assert studies.tables() in (FOLDER.parent / "docs" / "how-to-choose.md").read_text(encoding="utf-8")


@pytest.mark.usefixtures("studies")
def test_the_page_of_the_frontier_has_the_tables_of_its_records() -> None:
    import frontier_orders
    import frontier_sweep

    page = (FOLDER.parent / "docs" / "frontier.md").read_text(encoding="utf-8")
    assert frontier_sweep.tables() in page
    assert frontier_orders.table(frontier_orders.records()) in page
