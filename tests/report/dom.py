"""Reports, and just enough of a DOM to ask what they show, and whether they are well formed and self-contained."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

from loralloc.report import write_report

VOID = {"meta", "link", "br", "wbr", "col", "img", "hr", "input"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    children: list[Element | str] = field(default_factory=list)

    def walk(self) -> Iterator[Element]:
        yield self
        for child in self.children:
            if isinstance(child, Element):
                yield from child.walk()

    def all(self, tag: str, kind: str | None = None) -> list[Element]:
        """Elements of a tag, with a class if one is given."""
        found = (element for element in self.walk() if element.tag == tag)
        return [e for e in found if kind is None or kind in e.attributes.get("class", "").split()]

    def one(self, tag: str, kind: str | None = None) -> Element:
        (element,) = self.all(tag, kind)
        return element

    def section(self, name: str) -> Element:
        (element,) = (e for e in self.walk() if e.tag == "section" and e.attributes.get("id") == name)
        return element

    @property
    def text(self) -> str:
        parts = (child if isinstance(child, str) else child.text for child in self.children)
        return "".join(parts)


class _Builder(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open = [Element("document", {})]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].children.append(Element(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def read_page(path: Path) -> Element:
    """Parse a page; every element must be closed in order."""
    builder = _Builder()
    builder.feed(path.read_text(encoding="utf-8"))
    builder.close()
    assert len(builder.open) == 1, f"<{builder.open[-1].tag}> is never closed"
    return builder.open[0]


def check_page(page: Element) -> None:
    """What holds for every report: nothing loads from elsewhere, nothing runs, ids are unique, references resolve."""
    elements = list(page.walk())
    names = [e.attributes["id"] for e in elements if "id" in e.attributes]
    assert len(names) == len(set(names))
    assert not {e.tag for e in elements} & {"script", "iframe", "object", "embed", "img", "base", "form"}
    for element in elements:
        for name, value in element.attributes.items():
            assert not name.startswith("on"), f"<{element.tag} {name}>"
            if name in ("src", "srcset", "href", "xlink:href", "data", "action", "poster"):
                assert value.startswith(("#", "data:")), f"<{element.tag} {name}={value[:40]}>"
                assert not value.startswith("#") or value[1:] in names
            for target in re.findall(r"url\(([^)]*)\)", value):
                assert target.startswith("#")
                assert target[1:] in names
    (style,) = page.all("style")
    assert "@import" not in style.text
    assert "url(" not in style.text
    policy = next(e for e in elements if "http-equiv" in e.attributes)
    assert policy.attributes["content"].startswith("default-src 'none'")


def heat_cells(page: Element) -> dict[str, tuple[int, int]]:
    """Module name to (rank, start), from the position of each cell: its row's layer, its column's type."""
    cells: dict[str, tuple[int, int]] = {}
    for table in page.section("ranks").all("table", "heat"):
        heads = [th.text for th in table.all("th") if th.attributes.get("scope") == "col"]
        stack = ""
        for row in table.one("tbody").all("tr"):
            (head,) = row.all("th")
            if row.attributes.get("class") == "stack":
                stack = head.text + " "
                continue
            columns = [c for c in row.children if isinstance(c, Element)]
            for at, cell in enumerate(columns):
                if "cell" in cell.attributes.get("class", ""):
                    rank, start = cell.text.split("/")
                    name = head.text if not heads else f"{stack}{head.text} {heads[at]}"
                    assert name not in cells
                    cells[name] = (int(rank), int(start))
    return cells


def report(run: Path) -> Element:
    """Write a report and check what holds for all of them."""
    path = write_report(run)
    assert path == run / "report.html"
    page = read_page(path)
    check_page(page)
    return page


def words(element: Element) -> str:
    return re.sub(r"\s+", " ", element.text)


def pictures(run: Path) -> set[str]:
    for path in (run / "figures").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
    return {path.name for path in (run / "figures").iterdir()}


def tile(page: Element, label: str) -> str:
    (found,) = (words(li) for li in page.all("li", "tile") if li.all("span", "label")[0].text == label)
    return found
