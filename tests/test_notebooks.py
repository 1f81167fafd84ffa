"""The notebooks in examples/, every cell, on tiny settings: what they show is there, and nothing is kept in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from cli.command import save_decoder
from nbclient import NotebookClient

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NOTEBOOKS = sorted(path.name for path in EXAMPLES.glob("*.ipynb"))


def executed(name: str, folder: Path, **settings: Any) -> nbformat.NotebookNode:
    """Run a notebook with other values in the cell of its parameters."""
    book = nbformat.read(EXAMPLES / name, as_version=4)
    (parameters,) = (cell for cell in book.cells if "parameters" in cell.metadata.get("tags", ()))
    unknown = [key for key in settings if f"{key} = " not in parameters.source]
    assert not unknown
    parameters.source += "".join(f"\n{key} = {value!r}" for key, value in settings.items())
    return NotebookClient(book, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()


def shown(book: nbformat.NotebookNode, kind: str) -> list[str]:
    """What the cells have shown, of a kind."""
    outputs = (output for cell in book.cells for output in cell.get("outputs", ()))
    return [output.data[kind] for output in outputs if kind in output.get("data", {})]


def printed(book: nbformat.NotebookNode) -> str:
    outputs = (output for cell in book.cells for output in cell.get("outputs", ()))
    return "".join(output.text for output in outputs if output.get("name") == "stdout")


@pytest.fixture
def as_users(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what makes the libraries quiet in tests: progress bars are one of the things to be seen."""
    monkeypatch.delenv("TRANSFORMERS_VERBOSITY", raising=False)


@pytest.mark.slow
@pytest.mark.usefixtures("as_users")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
class TestExecuted:
    def test_the_first_adapter(self, tmp_path: Path) -> None:
        book = executed("first_adapter.ipynb", tmp_path, STEPS=6, ROWS=64)
        assert "296 ranks in 37 layers, " in printed(book)  # 8 for each on average
        assert any("<progress" in page and "Validation Loss" in page for page in shown(book, "text/html"))
        assert len(shown(book, "image/png")) == 1
        assert (tmp_path / "runs/first-adapter/report.html").is_file()
        assert (tmp_path / "runs/first-adapter/adapter/adapter_model.safetensors").is_file()

    def test_a_chat_model(self, tmp_path: Path) -> None:
        model = save_decoder(tmp_path / "model", width=128)
        book = executed("chat_adapter.ipynb", tmp_path, MODEL=str(model), STEPS=4, ROWS=16)
        assert " in 14 layers, " in printed(book)
        assert any("<progress" in page for page in shown(book, "text/html"))
        assert len(shown(book, "image/png")) == 1
        assert "adapter_model.safetensors" in shown(book, "text/plain")[-1]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_no_output_is_kept(name: str) -> None:
    """What a machine has shown changes with every run, and tells of that machine."""
    book = nbformat.read(EXAMPLES / name, as_version=4)
    nbformat.validate(book)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert code
    assert not any(cell.outputs or cell.execution_count for cell in code)
