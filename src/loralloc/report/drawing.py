"""How figures are drawn, and how they get into a page or a PNG file.

Figures are drawn in the light palette; in the page every colour becomes a variable of the style sheet, which knows
both themes.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from loralloc.report.palette import LIGHT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PNG_DPI, PNG_LONGEST = 200, 12_000  # dots per inch, unless a side would get more pixels than any viewer shows
VARIABLES = {colour: f"var(--{name})" for name, colour in LIGHT.items()}
BEFORE_IDS = {"id": "", "href": "#", "clip-path": "url(#"}  # what stands before an id, by attribute
NOT_IN_XML = dict.fromkeys([*range(9), 11, 12, *range(14, 32), 0xFFFE, 0xFFFF], "\N{REPLACEMENT CHARACTER}")

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


@contextmanager
def report_settings() -> Iterator[None]:
    """Draw with our settings alone, whatever the user's matplotlibrc says; figures are the same bytes every time."""
    import matplotlib as mpl

    with mpl.rc_context(), warnings.catch_warnings():
        mpl.rcdefaults()
        mpl.rcParams.update(_SETTINGS)
        # A module name may hold characters that the bundled font lacks: the PNG shows a box, the page the character.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def png(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG file, on the light background."""
    dpi = min(PNG_DPI, PNG_LONGEST / max(figure.get_size_inches()))
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi, metadata={"Software": None})
    path.unlink(missing_ok=True)  # a link is replaced, and what it leads to stays
    path.write_bytes(file.getvalue())


def svg(figure: Figure, name: str, description: str) -> str:
    """Return a figure as an SVG element to put into a page.

    Args:
        figure: Drawn in the light palette, within `report_settings()`.
        name: Prefix of the element ids, different for each figure of a page.
        description: What a screen reader says.
    """
    file = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=metadata)  # type: ignore[arg-type]
    root = ElementTree.XML(file.getvalue().translate(NOT_IN_XML))
    for element in root.iter():
        element.tag = _local(element.tag)  # HTML knows SVG without namespaces
        element.attrib = {_local(key): _for_page(_local(key), value, name) for key, value in element.items()}
    for definitions in root.findall("defs"):
        if definitions.find("style") is not None:
            root.remove(definitions)  # it would style the whole page; the page's style sheet has the same for figures
    root.attrib = {"class": "figure", "role": "img", "aria-label": description, "viewBox": root.attrib["viewBox"]}
    return ElementTree.tostring(root, encoding="unicode").strip()


def _local(name: str) -> str:
    """The name of an element or attribute without its namespace."""
    return name.rpartition("}")[2]


def _for_page(attribute: str, value: str, prefix: str) -> str:
    """An attribute with the page's colours and fonts, and with the figure's own ids."""
    if attribute == "style":
        return page_style(value)
    before = BEFORE_IDS.get(attribute)
    if before is None or not value.startswith(before):
        return value
    return f"{before}{prefix}-{value.removeprefix(before)}"


def page_style(style: str) -> str:
    """Return the declarations of a figure's element for use in a page, which has its own font.

    >>> page_style("font: 8px 'DejaVu Sans', sans-serif; text-anchor: end; fill: #59636e")
    'font-size: 8px; text-anchor: end; fill: var(--muted)'
    """
    declarations = []
    for declaration in style.split(";"):
        name, _, value = (part.strip() for part in declaration.partition(":"))
        if name == "font":  # matplotlib before 3.11 writes the size and the family as one
            name, value = "font-size", next(word for word in value.split() if word.endswith("px"))
        if name and name != "font-family":
            declarations.append(f"{name}: {VARIABLES.get(value, value)}")
    return "; ".join(declarations)
