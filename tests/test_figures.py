"""docs/figures.py draws a figure for the page of every method, here from trainings of 24 steps."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import matplotlib.pyplot as plt
import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"
METHODS = [page.stem for page in sorted((DOCS / "methods").glob("*.md"))]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(DOCS)
    module = importlib.import_module("figures")
    monkeypatch.setattr(module, "STEPS", 24)
    monkeypatch.setattr(module, "SAMPLES", 4)
    yield module
    plt.close("all")


def test_there_is_one_for_every_page(figures: ModuleType) -> None:
    assert sorted(figures.FIGURES) == METHODS


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_it_is_drawn_from_a_training(name: str, figures: ModuleType) -> None:
    figure = figures.FIGURES[name](figures.Task.load())
    assert len(figure.axes) == 2
    assert all(axes.has_data() and axes.get_title() for axes in figure.axes)
