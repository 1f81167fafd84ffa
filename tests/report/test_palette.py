"""The colours are constants. What they have to satisfy, and how the ramps were made, stands here."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from loralloc.report.palette import DARK, LIGHT, RAMP, RAMP_STEPS, SERIES, TEXT_ON_RAMP, step_of

# A pale grey over blue-green to a deep blue (light), a dim one to a pale one (dark).
STOPS = {
    "light": ("#f0f3f4", "#a6d0d8", "#4a94c0", "#1c4a86"),
    "dark": ("#262c32", "#29566f", "#4b98bd", "#aedced"),
}


def linear(colour: str) -> list[float]:
    """Linear-light red, green and blue of `#rrggbb`."""
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    return [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]


def contrast(one: str, other: str) -> float:
    """The WCAG contrast ratio of two colours, from 1 to 21."""
    dark, light = sorted(luminance(colour) for colour in (one, other))
    return (light + 0.05) / (dark + 0.05)


def luminance(colour: str) -> float:
    red, green, blue = linear(colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def to_oklab(colour: str) -> list[float]:
    """Lightness, green-red and blue-yellow of `#rrggbb` in OKLab, where equal distances look equal."""
    red, green, blue = linear(colour)
    long = (0.4122214708 * red + 0.5363325363 * green + 0.0514459929 * blue) ** (1 / 3)
    middle = (0.2119034982 * red + 0.6806995451 * green + 0.1073969566 * blue) ** (1 / 3)
    short = (0.0883024619 * red + 0.2817188376 * green + 0.6299787005 * blue) ** (1 / 3)
    return [
        0.2104542553 * long + 0.7936177850 * middle - 0.0040720468 * short,
        1.9779984951 * long - 2.4285922050 * middle + 0.4505937099 * short,
        0.0259040371 * long + 0.7827717662 * middle - 0.8086757660 * short,
    ]


def to_hex(lab: list[float]) -> str:
    lightness, a, b = lab
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    middle = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    channels = (
        4.0767416621 * long - 3.3077115913 * middle + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * middle - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * middle + 1.7076147010 * short,
    )
    encoded = (12.92 * c if c <= 0.0031308 else 1.055 * c ** (1 / 2.4) - 0.055 for c in (max(0.0, c) for c in channels))
    return "#" + "".join(f"{round(min(1.0, c) * 255):02x}" for c in encoded)


def derived_ramp(theme: str) -> list[str]:
    """Colours at equal distances along the path through the stops in OKLab."""
    stops = [to_oklab(stop) for stop in STOPS[theme]]
    lengths = [math.dist(a, b) for a, b in pairwise(stops)]
    colours = []
    for step in range(RAMP_STEPS + 1):
        part, way = 0, step / RAMP_STEPS * sum(lengths)
        while part + 1 < len(lengths) and way > lengths[part]:
            way -= lengths[part]
            part += 1
        share = way / lengths[part]
        colours.append(to_hex([a + (b - a) * share for a, b in zip(stops[part], stops[part + 1], strict=True)]))
    return colours


def text_on(background: str) -> str:
    """Black or white, whichever contrasts more."""
    return max("#000000", "#ffffff", key=lambda text: contrast(text, background))


@pytest.mark.parametrize("theme", ["light", "dark"])
class TestRamp:
    def test_colours_are_the_derived_ones(self, theme: str) -> None:
        assert derived_ramp(theme) == RAMP[theme]
        assert (RAMP[theme][0], RAMP[theme][-1]) == (STOPS[theme][0], STOPS[theme][-1])
        assert [text_on(colour) for colour in RAMP[theme]] == TEXT_ON_RAMP[theme]

    def test_steps_are_equally_far_apart(self, theme: str) -> None:
        distances = [math.dist(a, b) for a, b in pairwise(to_oklab(colour) for colour in RAMP[theme])]
        # Colours are rounded to whole numbers of 255ths, and a step around a corner of the path is a little shorter.
        assert max(distances) < 1.25 * min(distances)

    def test_lightness_alone_orders_the_ranks(self, theme: str) -> None:
        lightness = [to_oklab(colour)[0] for colour in RAMP[theme]]
        assert lightness == sorted(lightness, reverse=theme == "light")
        assert abs(lightness[0] - lightness[-1]) > 0.5

    def test_text_is_legible_on_every_step(self, theme: str) -> None:
        assert min(map(contrast, TEXT_ON_RAMP[theme], RAMP[theme])) >= 4.5


@pytest.mark.parametrize("table", [LIGHT, DARK], ids=["light", "dark"])
def test_text_is_legible_on_the_page(table: dict[str, str]) -> None:
    for name in ("ink", "muted", "accent", "good", "warn"):
        assert min(contrast(table[name], table[ground]) for ground in ("page", "card")) >= 4.5, name
    series = [name for name in table if name.startswith("series-")]
    assert len(series) == SERIES
    for name in series:
        assert contrast(table[name], table["card"]) >= 3, name


def test_both_themes_define_the_same_colours() -> None:
    assert LIGHT.keys() == DARK.keys()


def test_figures_can_tell_the_light_colours_apart() -> None:
    assert len(set(LIGHT.values())) == len(LIGHT)


def test_highest_rank_takes_the_last_step() -> None:
    assert [step_of(rank, 8) for rank in (0, 4, 8)] == [0, RAMP_STEPS // 2, RAMP_STEPS]


def test_black_and_white_are_at_the_ends_of_every_scale() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert to_oklab("#ffffff") == pytest.approx([1, 0, 0], abs=1e-3)
    assert [text_on("#f0f3f4"), text_on("#1c4a86")] == ["#000000", "#ffffff"]
