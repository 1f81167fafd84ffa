from __future__ import annotations

import math
from itertools import pairwise

import pytest

from loralloc.report.palette import DARK, LIGHT, RAMP_STEPS, contrast, ramp, step_of, text_on, to_oklab


@pytest.mark.parametrize("theme", ["light", "dark"])
class TestRamp:
    def test_steps_are_equally_far_apart(self, theme: str) -> None:
        distances = [math.dist(a, b) for a, b in pairwise(to_oklab(colour) for colour in ramp(theme))]
        # Colours are rounded to whole numbers of 255ths, and a step around a corner of the path is a little shorter.
        assert max(distances) < 1.25 * min(distances)

    def test_lightness_alone_orders_the_ranks(self, theme: str) -> None:
        lightness = [to_oklab(colour)[0] for colour in ramp(theme)]
        assert lightness == sorted(lightness, reverse=theme == "light")
        assert abs(lightness[0] - lightness[-1]) > 0.5

    def test_text_is_legible_on_every_step(self, theme: str) -> None:
        assert min(contrast(text_on(colour), colour) for colour in ramp(theme)) >= 4.5


@pytest.mark.parametrize("table", [LIGHT, DARK], ids=["light", "dark"])
def test_text_is_legible_on_the_page(table: dict[str, str]) -> None:
    for name in ("ink", "muted", "accent", "good", "warn"):
        assert min(contrast(table[name], table[ground]) for ground in ("page", "card")) >= 4.5, name
    for name in (name for name in table if name.startswith("series-")):
        assert contrast(table[name], table["card"]) >= 3, name


def test_both_themes_define_the_same_colours() -> None:
    assert LIGHT.keys() == DARK.keys()


def test_figures_can_tell_the_light_colours_apart() -> None:
    assert len(set(LIGHT.values())) == len(LIGHT)


def test_highest_rank_takes_the_last_step() -> None:
    assert [step_of(rank, 8) for rank in (0, 4, 8)] == [0, RAMP_STEPS // 2, RAMP_STEPS]
