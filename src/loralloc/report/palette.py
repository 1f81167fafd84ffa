"""Colours of the report, for light and dark pages: one table, used by the style sheet and by the figures alike.

The tests recompute the ramps, and check the contrast of every colour.
"""

from __future__ import annotations

RAMP_STEPS = 24
"""Steps of the heat map between no rank and the highest rank of the run."""

SERIES = 8
"""Lines that can be told apart in one figure; every line is also labelled in words."""

_COLOURS = {
    # name: (light, dark)
    "page": ("#fbfbfa", "#14171b"),
    "card": ("#fefefe", "#1b1f24"),
    "ink": ("#1b2027", "#e8eaed"),
    "muted": ("#59636e", "#a0a8b2"),
    "rule": ("#e2e5e8", "#2e343b"),
    "accent": ("#1f5fa8", "#7db4f0"),
    "good": ("#0a7050", "#5fcfa2"),
    "warn": ("#9a4a00", "#f0a860"),
    "phase-1": ("#f1f2f3", "#20252b"),
    "phase-2": ("#e7eff8", "#1c2a3a"),
    "phase-3": ("#f2f3f4", "#21262c"),
    "area": ("#bcd3ec", "#2f5078"),
    "series-1": ("#1764ab", "#69adf0"),
    "series-2": ("#c4501b", "#f08a58"),
    "series-3": ("#0b8262", "#4cc79e"),
    "series-4": ("#a34d8c", "#dd90c8"),
    "series-5": ("#a27200", "#dcb14a"),
    "series-6": ("#2b8ab3", "#7ccbe8"),
    "series-7": ("#6b52ae", "#ab97ec"),
    "series-8": ("#6f767e", "#a5acb4"),
}
LIGHT = {name: light for name, (light, _) in _COLOURS.items()}
DARK = {name: dark for name, (_, dark) in _COLOURS.items()}

# From no rank to the highest. On both pages a higher rank contrasts more with the page, and lightness alone orders the
# colours: every kind of colour vision sees the order, and so does paper.
_LIGHT_RAMP = [
    "#f0f3f4", "#e3edef", "#d7e7ea", "#cae1e6", "#bddbe1", "#b1d5dc", "#a4cfd8", "#9ac8d5", "#8fc1d2",
    "#85bad0", "#7ab3cd", "#6facca", "#65a5c7", "#599ec4", "#4e96c1", "#478fbc", "#4187b6", "#3c7fb0",
    "#3777aa", "#3370a4", "#2e689e", "#296198", "#255992", "#20518c", "#1c4a86",
]  # fmt: skip
_DARK_RAMP = [
    "#262c32", "#27333b", "#283945", "#29404f", "#2a4759", "#2a4e63", "#29556e", "#2c5c76", "#30637f",
    "#346b88", "#387291", "#3c7a9a", "#3f82a3", "#4389ac", "#4791b5", "#4d99be", "#58a0c3", "#63a8c8",
    "#6eafce", "#79b6d3", "#84bed8", "#8ec5dd", "#99cde3", "#a3d4e8", "#aedced",
]  # fmt: skip
RAMP = {"light": _LIGHT_RAMP, "dark": _DARK_RAMP}
TEXT_ON_RAMP = {"light": ["#000000"] * 18 + ["#ffffff"] * 7, "dark": ["#ffffff"] * 12 + ["#000000"] * 13}


def step_of(rank: int, highest: int) -> int:
    """Return the ramp's step for a rank when `highest` is the highest of the run.

    >>> step_of(0, 12), step_of(6, 12), step_of(12, 12), step_of(0, 0)
    (0, 12, 24, 0)
    """
    return round(rank / highest * RAMP_STEPS) if highest else 0


def theme_colours(theme: str) -> dict[str, str]:
    """Return every colour of a theme by its name in the style sheet, the ramp's from `ramp-0` to `ramp-24`."""
    colours = dict(LIGHT if theme == "light" else DARK)
    for step, (colour, text) in enumerate(zip(RAMP[theme], TEXT_ON_RAMP[theme], strict=True)):
        colours |= {f"ramp-{step}": colour, f"on-ramp-{step}": text}
    return colours
