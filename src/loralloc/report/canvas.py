"""What all figures share: settings, axes, shaded phases, labels, and the way into a page or a PNG file.

Figures are drawn in the light palette; in the page every colour becomes a variable of the style sheet, which knows
both themes.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loralloc.report.palette import LIGHT
from loralloc.report.run_record import RunRecord, Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 4.0, 2.45  # inches; small, so that the text stays legible when a phone scales the figure down
LEFT = 0.105  # share of the width in front of the axes
PNG_DPI, PNG_LONGEST = 200, 12_000  # dots per inch, unless a side would get more pixels than any viewer shows


@contextmanager
def drawing() -> Iterator[None]:
    """Draw with our settings alone, whatever the user's matplotlibrc says; figures are the same bytes every time."""
    import matplotlib as mpl

    with mpl.rc_context(), warnings.catch_warnings():
        mpl.rcdefaults()
        mpl.rcParams.update(_SETTINGS)
        # A module name may hold characters that the bundled font lacks: the PNG shows a box, the page the character.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


_SETTINGS: Any = {
    "svg.hashsalt": "loralloc",
    "svg.fonttype": "none",
    "image.composite_image": False,
    "text.parse_math": False,
    "font.size": 8.5,
    "text.color": LIGHT["ink"],
    "figure.facecolor": LIGHT["card"],
    "axes.facecolor": "none",
    "axes.edgecolor": LIGHT["rule"],
    "axes.labelcolor": LIGHT["muted"],
    "axes.titlesize": 8.5,
    "axes.titlecolor": LIGHT["muted"],
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": LIGHT["rule"],
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "xtick.color": LIGHT["rule"],
    "xtick.labelcolor": LIGHT["muted"],
    "ytick.color": LIGHT["rule"],
    "ytick.labelcolor": LIGHT["muted"],
    "ytick.major.size": 0,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
}


def svg(figure: Figure, name: str, description: str) -> str:
    """Return a figure as an SVG element to put into a page.

    Args:
        figure: Drawn in the light palette, within `drawing()`.
        name: Prefix of the element ids, different for each figure of a page.
        description: What a screen reader says; already escaped.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # The style would hold for the whole page; the style sheet says the same for figures alone.
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    view = re.search(r'viewBox="[^"]*"', text)
    assert view is not None
    text = re.sub(r"<svg[^>]*>", f'<svg class="figure" role="img" aria-label="{description}" {view[0]}>', text, count=1)
    # The page's fonts and colours in place of the figure's.
    text = re.sub(r"(?<=[\" ])font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    text = re.sub(r" font-family: [^;\"]*;?", "", text)
    names = {colour: colour_name for colour_name, colour in LIGHT.items()}
    text = re.sub(
        r"(fill|stroke): (#[0-9a-f]{6})",
        lambda m: f"{m[1]}: var(--{names[m[2]]})" if m[2] in names else m[0],
        text,
    )
    return re.sub(r'( id="|url\(#|href="#)', rf"\1{name}-", text).strip()


def png(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG file, on the light background."""
    dpi = min(PNG_DPI, PNG_LONGEST / max(figure.get_size_inches()))
    figure.savefig(path, format="png", dpi=dpi, metadata={"Software": None})


def step_axes(run: RunRecord, title: str) -> tuple[Figure, Axes]:
    """A figure with one pair of axes, the steps of the run along x, and room for labels on the right."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(WIDTH, HEIGHT))
    axes = figure.add_axes((LEFT, 0.165, 0.86 - LEFT, 0.72))
    axes.set_title(title)
    axes.set_xlim(0, max(run.last_step, 1))
    axes.set_xlabel("step", loc="right", labelpad=1)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(lambda value, _: short(value, digits_apart(axes.yaxis.get_majorticklocs())))
    axes.margins(y=0.1)
    return figure, axes


def shade_phases(axes: Axes, trace: Trace, run: RunRecord, *, named: bool = False) -> None:
    """Shade warm-up, allocation and the final phase."""
    if trace.phases is None:
        return
    edges = [0, *trace.phases, max(run.last_step, trace.phases[1])]
    # Steps per point of the type size used here, to place the names without drawing them first.
    point = max(edges[-1], 1) / (axes.get_position().width * WIDTH * 72)
    taken = 0.0
    for i, label in enumerate(("warm-up", "allocation", "fixed")):
        left, right = edges[i], edges[i + 1]
        axes.axvspan(left, right, color=LIGHT[f"phase-{i + 1}"], linewidth=0, zorder=0)
        half = 2.2 * len(label) * point
        x = max((left + right) / 2, taken + half + 2 * point)
        if named and right - left >= half and x + half <= edges[-1]:
            axes.text(
                x, 0.965, label, transform=axes.get_xaxis_transform(), ha="center", va="top", size=7.5,
                color=LIGHT["muted"],
            )  # fmt: skip
            taken = x + half


def end_labels(axes: Axes, labels: Sequence[tuple[float, str, str]]) -> None:
    """Write labels beside the ends of their lines, moved apart where they would overlap."""
    if not labels:
        return
    room = 16 + 4.35 * max(len(text) for _, text, _ in labels)
    box = axes.get_position()
    axes.set_position((box.x0, box.y0, 1 - box.x0 - room / (72 * WIDTH), box.height))
    low, high = sorted(axes.get_ylim())
    gap = (high - low) * 0.068
    # Values in the order from the bottom of the picture to its top, whichever way the axis runs.
    sign = 1 if axes.get_ylim()[0] < axes.get_ylim()[1] else -1
    order = sorted(labels, key=lambda label: sign * label[0])
    heights = spread([sign * value for value, _, _ in order], gap, *sorted((sign * low, sign * high)))
    right = axes.get_xlim()[1]
    for (value, text, colour), height in zip(order, heights, strict=True):
        axes.plot(
            [1.005, 1.035], [value, sign * height], transform=axes.get_yaxis_transform(), clip_on=False,
            color=LIGHT[colour], linewidth=0.8, scalex=False, scaley=False,
        )  # fmt: skip
        axes.annotate(
            text, (right, sign * height), xytext=(11.5, 0), textcoords="offset points", va="center_baseline", size=8,
            color=LIGHT[colour], annotation_clip=False,
        )  # fmt: skip


def spread(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move ascending values apart until neighbours are `gap` from each other, within [low, high] if they fit.

    >>> spread([1.0, 1.0, 5.0], gap=1.0, low=0.0, high=10.0)
    [1.0, 2.0, 5.0]
    >>> spread([9.9, 10.0], gap=1.0, low=0.0, high=10.0)
    [9.0, 10.0]
    """
    moved = [min(max(value, low), high) for value in values]
    for i in range(1, len(moved)):
        moved[i] = max(moved[i], moved[i - 1] + gap)
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], high - gap * (len(moved) - 1 - i))
    return moved


def short(value: float, digits: int = 3) -> str:
    """Write a number in at most five characters or so.

    >>> short(288), short(0.25), short(442_368), short(12_500_000)
    ('288', '0.25', '442k', '12.5M')
    """
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 10 or (size > 1e3 and abs(value) >= size):
            return f"{value / size:.{digits}g}{unit}"
    return f"{value:,.0f}" if value == int(value) else f"{value:.{digits}g}"


def digits_apart(values: Iterable[float]) -> int:
    """Digits, three or more, with which the labels of an axis differ.

    >>> digits_apart([0.5, 0.75]), digits_apart([0.6931, 0.6933, 0.6935])
    (3, 4)
    """
    several = set(map(float, values))
    return next((n for n in range(3, 9) if len({short(value, n) for value in several}) == len(several)), 9)
