"""The pages of `compare` and `frontier` in a real browser, on a phone and on a screen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from compare.fabricate import SHAPES, cells_of, fabricate, noisy, recipe_for

from loralloc.compare.page import write_page as write_comparison
from loralloc.compare.results import read_row
from loralloc.frontier.budgets import compare_points, recommend
from loralloc.frontier.page import write_page as write_frontier
from loralloc.frontier.point import Measured, Point
from loralloc.frontier.result import Frontier, Recovery
from loralloc.frontier.source import Source

from .browser import LEGIBLE, WIDTH_AND_SMALLEST_TEXT, load, measured


def comparison(folder: Path) -> Path:
    """A comparison of several methods at two budgets, with a run that has failed."""
    recipe = recipe_for(folder, "--budgets", "[1, 2]", "--methods", "[adalora, ablora, allora]")
    losses = noisy({"adalora": 0.3}, rows=0.02)
    failing = cells_of(recipe)[3]
    made = fabricate(recipe, lambda cell: "a very long reason " * 20 if cell == failing else losses(cell))
    write_comparison(made, recipe, SHAPES, [read_row(made, cell) for cell in cells_of(recipe)])
    return made.page


def frontier(folder: Path) -> Path:
    """A frontier of twelve sizes."""
    draw = np.random.default_rng(0)

    def losses(mean: float) -> Measured:
        return Measured({"accuracy": 1 - mean / 10}, tuple(draw.normal(mean, 0.1, 20)), 1.0)

    points = [
        Point(
            4000 >> place, 5_000_000 >> place, 20_000_000 >> place, 64, losses(1 + place / 10), losses(1 + place / 20)
        )
        for place in range(12)
    ]
    worse = compare_points([point.best.array for point in points])
    best = recommend([point.ranks for point in points], worse)
    source = Source(folder / ("a_long_name" * 8), recipe_for(folder), folder, None, {}, 36, 100, 60.0)
    recovery = Recovery(0.2, 0.3, 20)
    return write_frontier(Frontier(source, "singular_value", recovery, "accuracy", points, worse, best, 36), folder)


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("make", [comparison, frontier])
def test_it_shows_legibly_and_without_scrolling_sideways(make: object, width: int, tmp_path: Path) -> None:
    page = make(tmp_path)  # type: ignore[operator]
    _, console = load(page, tmp_path)
    assert console == []
    wide, smallest_text = measured(page, tmp_path, width, WIDTH_AND_SMALLEST_TEXT).split("|")
    assert int(wide) <= width
    assert float(smallest_text) >= LEGIBLE
