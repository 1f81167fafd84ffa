"""What the pages in docs/ and the README point at exists: files, headings, symbols that papers.md names, and messages.

Pages of methods show code, troubleshooting.md messages of it. The site's own build, `make docs`, checks links again.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import loralloc

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
PAPERS = ROOT / "docs" / "papers.md"

FENCE = re.compile(r"^```.*?^```", re.M | re.S)
LINK = re.compile(r"\[(?P<label>[^\]]*)\]\((?P<target>[^)\s]+)\)")
TEST = re.compile(r"`((?:[\w.]+/)*\w+\.py)((?:::\w+)*)`")
MESSAGE = re.compile(r"^\*\*`(.+)`\*\*$", re.M)
SYMBOL = re.compile(r"`(\w+)\.([\w.]+)`")


def links(page: Path) -> Iterator[tuple[str, str]]:
    """Yield (label, target) of the links of a page into the repository; code blocks have none."""
    for found in LINK.finditer(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if not re.match(r"\w+:", found["target"]):
            yield found["label"], found["target"]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    """Targets that are no file of the repository, or no heading of the file."""
    broken = []
    for _, target in links(page):
        place, _, anchor = target.partition("#")
        file = page.parent / place if place else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    return broken


@functools.cache
def symbols(path: Path) -> frozenset[str]:
    """Functions, classes and constants of a module, and the methods and attributes of its classes as Class.name."""

    def names(body: list[ast.stmt]) -> Iterator[str]:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node.name
            elif isinstance(node, ast.ClassDef):
                yield node.name
                yield from (f"{node.name}.{name}" for name in names(node.body))
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                yield from (target.id for target in targets if isinstance(target, ast.Name))

    return frozenset(names(ast.parse(path.read_text(encoding="utf-8")).body))


def unknown_symbols(page: Path) -> list[str]:
    """Links to code whose label is not `module.symbol` with a symbol of that module."""
    unknown = []
    for label, target in links(page):
        if target.endswith(".py"):
            file, named = page.parent / target, SYMBOL.fullmatch(label)
            if named is None or named[1] != file.stem or named[2] not in symbols(file):
                unknown.append(f"{label} in {target}")
    return unknown


@functools.cache
def texts() -> tuple[str, ...]:
    """Every text in the package's code, with `…` for what is put into it."""

    def text(node: ast.expr) -> str:
        if isinstance(node, ast.JoinedStr):
            return "".join(map(text, node.values))
        return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "…"

    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "src").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    return tuple(text(node) for node in nodes if isinstance(node, ast.JoinedStr | ast.Constant))


def is_message(quoted: str) -> bool:
    """Whether a text of the package has these words in this order; `...` stands for what differs."""
    words = re.compile(".*".join(re.escape(part) for part in quoted.split("...")), re.S)
    return any(words.search(text) for text in texts())


def test_every_message_that_troubleshooting_quotes_is_one() -> None:
    quoted = MESSAGE.findall((ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"))
    assert len(quoted) > 40
    assert [message for message in quoted if not is_message(message)] == []
    assert not is_message("the optimizer does not hold the doors of ... modules")
    assert not is_message("... modules the optimizer does not hold the gates of")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_into_the_repository_lead_somewhere(page: Path) -> None:
    assert broken_links(page) == []


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    pages = [str(page.relative_to(ROOT / "docs")) for page in PAGES if page.is_relative_to(ROOT / "docs")]
    assert len(pages) > 25
    assert [page for page in pages if page not in navigation] == []


def test_every_public_name_is_on_the_page_of_the_api() -> None:
    shown = re.findall(r"^::: loralloc\.(\w+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.M)
    assert sorted(shown) == sorted(set(loralloc.__all__) - {"__version__"})


def test_the_chart_asks_what_the_table_beside_it_asks() -> None:
    names = ("how-to-choose.md", "figures/choose.svg")
    page, chart = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in names)
    words = " ".join(re.findall(r"<text[^>]*>([^<]+)", chart))
    asked = re.findall(r"([A-Z][^?]*\?) yes (.*?) no", words)
    table = re.findall(r"^\| ([^|]*\?) \| ([^|]*) \|", page, re.MULTILINE)
    assert asked == [(question, answer.replace("`", "")) for question, answer in table]
    assert len(asked) == 5


def test_every_figure_stands_near_the_command_that_makes_it() -> None:
    for page in sorted((ROOT / "docs" / "methods").glob("*.md")):
        figure = f"../figures/method-{page.stem}.svg"
        assert f"({figure})\n\n```sh\npython docs/figures.py {page.stem}\n```" in page.read_text(encoding="utf-8")


def test_every_symbol_that_papers_names_exists() -> None:
    assert unknown_symbols(PAPERS) == []
    assert sum(target.endswith(".py") for _, target in links(PAPERS)) > 60  # the pattern still finds them


def test_wrong_links_and_symbols_are_found(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("LIMIT: int = 3\nclass Thing:\n    size = 1\n    def run(self): ...\n")
    page = tmp_path / "page.md"
    good = ("`code.LIMIT`", "`code.Thing`", "`code.Thing.size`", "`code.Thing.run`")
    bad = ("`code.run`", "`code.Thing.walk`", "`other.Thing`", "Thing")
    page.write_text("# A heading\n" + "\n".join(f"[{label}](code.py)" for label in good + bad))
    assert unknown_symbols(page) == [f"{label} in code.py" for label in bad]
    page.write_text(
        "# A heading\n[a](code.py) [b](#a-heading) [c](https://nowhere.invalid) [d](page.md#a-heading)\n"
        "[e](gone.py) [f](#no-heading)\n```\n[g](in_code.py)\n```\n"
    )
    assert broken_links(page) == ["gone.py", "#no-heading"]


def test_every_promise_of_security_has_its_test() -> None:
    found = TEST.findall((ROOT / "SECURITY.md").read_text(encoding="utf-8"))
    assert len(found) > 15
    for path, inner in found:
        (file,) = [ROOT / path] if "/" in path else ROOT.glob(f"tests/strangers/{path}")
        name = inner.removeprefix("::").replace("::", ".")
        assert not name or name in symbols(file), (path, name)
