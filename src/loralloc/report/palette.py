"""Colours of the report, for light and dark pages: one table, used by the style sheet and by the figures alike."""

from __future__ import annotations

import math
from itertools import pairwise

RAMP_STEPS = 24
"""Steps of the heat map between no rank and the highest rank of the run."""

SERIES = 8
"""Lines that can be told apart in one figure; every line is also labelled in words."""

LIGHT = {
    "page": "#fbfbfa",
    "card": "#fefefe",
    "ink": "#1b2027",
    "muted": "#59636e",
    "rule": "#e2e5e8",
    "accent": "#1f5fa8",
    "good": "#0a7050",
    "warn": "#9a4a00",
    "phase-1": "#f1f2f3",
    "phase-2": "#e7eff8",
    "phase-3": "#f2f3f4",
    "area": "#bcd3ec",
    "series-1": "#1764ab",
    "series-2": "#c4501b",
    "series-3": "#0b8262",
    "series-4": "#a34d8c",
    "series-5": "#a27200",
    "series-6": "#2b8ab3",
    "series-7": "#6b52ae",
    "series-8": "#6f767e",
}
DARK = {
    "page": "#14171b",
    "card": "#1b1f24",
    "ink": "#e8eaed",
    "muted": "#a0a8b2",
    "rule": "#2e343b",
    "accent": "#7db4f0",
    "good": "#5fcfa2",
    "warn": "#f0a860",
    "phase-1": "#20252b",
    "phase-2": "#1c2a3a",
    "phase-3": "#21262c",
    "area": "#2f5078",
    "series-1": "#69adf0",
    "series-2": "#f08a58",
    "series-3": "#4cc79e",
    "series-4": "#dd90c8",
    "series-5": "#dcb14a",
    "series-6": "#7ccbe8",
    "series-7": "#ab97ec",
    "series-8": "#a5acb4",
}
# From a pale grey over blue-green to a deep blue (light), from a dim one to a pale one (dark): more contrast with the
# page, more rank. As lightness alone orders the colours, every kind of colour vision sees the order, and so does paper.
RAMP_STOPS = {
    "light": ("#f0f3f4", "#a6d0d8", "#4a94c0", "#1c4a86"),
    "dark": ("#262c32", "#29566f", "#4b98bd", "#aedced"),
}


def ramp(theme: str) -> list[str]:
    """Return the heat map's colours from lowest to highest, at equal distances along a path in OKLab.

    Args:
        theme: "light" or "dark".

    >>> ramp("light")[0], ramp("light")[-1], len(ramp("light")) == RAMP_STEPS + 1
    ('#f0f3f4', '#1c4a86', True)
    """
    stops = [to_oklab(stop) for stop in RAMP_STOPS[theme]]
    lengths = [math.dist(a, b) for a, b in pairwise(stops)]
    colours = []
    for step in range(RAMP_STEPS + 1):
        part, way = 0, step / RAMP_STEPS * sum(lengths)
        while part + 1 < len(lengths) and way > lengths[part]:
            way -= lengths[part]
            part += 1
        share = way / lengths[part]
        colours.append(_to_hex([a + (b - a) * share for a, b in zip(stops[part], stops[part + 1], strict=True)]))
    return colours


def text_on(background: str) -> str:
    """Return the text colour, black or white, that contrasts more with a background.

    >>> text_on("#f0f3f4"), text_on("#1c4a86")
    ('#000000', '#ffffff')
    """
    return max("#000000", "#ffffff", key=lambda text: contrast(text, background))


def contrast(one: str, other: str) -> float:
    """Return the WCAG contrast ratio of two colours, from 1 to 21.

    >>> round(contrast("#000000", "#ffffff"), 1)
    21.0
    """
    dark, light = sorted(_luminance(colour) for colour in (one, other))
    return (light + 0.05) / (dark + 0.05)


def step_of(rank: int, top: int) -> int:
    """Return the ramp's step for a rank when `top` is the highest of the run.

    >>> step_of(0, 12), step_of(6, 12), step_of(12, 12), step_of(0, 0)
    (0, 12, 24, 0)
    """
    return round(rank / top * RAMP_STEPS) if top else 0


def style_variables() -> str:
    """Return the CSS that defines every colour and the classes `r0` (no rank) to `r24` (the highest rank)."""
    light, dark = (_declarations(theme, table) for theme, table in (("light", LIGHT), ("dark", DARK)))
    cells = "\n".join(
        f".r{step} {{ background: var(--ramp-{step}); color: var(--on-ramp-{step}) }}" for step in range(RAMP_STEPS + 1)
    )
    # Paper is white: the dark table is for screens only.
    return f":root {{ {light} }}\n@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n{cells}\n"


def _declarations(theme: str, table: dict[str, str]) -> str:
    colours = dict(table)
    for step, colour in enumerate(ramp(theme)):
        colours |= {f"ramp-{step}": colour, f"on-ramp-{step}": text_on(colour)}
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())


def _linear(colour: str) -> list[float]:
    """Linear-light red, green and blue of `#rrggbb`."""
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    return [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]


def _luminance(colour: str) -> float:
    red, green, blue = _linear(colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def to_oklab(colour: str) -> list[float]:
    """Return lightness, green-red and blue-yellow of `#rrggbb` in OKLab, where equal distances look equal.

    >>> [round(value, 3) + 0.0 for value in to_oklab("#ffffff")]
    [1.0, 0.0, 0.0]
    """
    red, green, blue = _linear(colour)
    long = (0.4122214708 * red + 0.5363325363 * green + 0.0514459929 * blue) ** (1 / 3)
    middle = (0.2119034982 * red + 0.6806995451 * green + 0.1073969566 * blue) ** (1 / 3)
    short = (0.0883024619 * red + 0.2817188376 * green + 0.6299787005 * blue) ** (1 / 3)
    return [
        0.2104542553 * long + 0.7936177850 * middle - 0.0040720468 * short,
        1.9779984951 * long - 2.4285922050 * middle + 0.4505937099 * short,
        0.0259040371 * long + 0.7827717662 * middle - 0.8086757660 * short,
    ]


def _to_hex(lab: list[float]) -> str:
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
