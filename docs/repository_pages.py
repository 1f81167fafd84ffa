"""Files of the repository that pages link to become pages themselves, so that the site is whole without a network.

A hook of MkDocs. A page in `docs/` links to code as `../src/loralloc/kernel.py`, which is right in a checkout and on a
forge, and leads out of the site. Here such a file becomes the page `repository/src/loralloc/kernel.py`: Markdown as it
is, code as a listing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
FOLDER = "repository"

FENCE = re.compile(r"(^```.*?^```[^\n]*$)", re.M | re.S)
LINK = re.compile(r"(?<=\]\()(?P<path>[^)\s#:]+)(?P<anchor>#[^)\s]*)?(?=\))")
LISTINGS = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".cff": "yaml", "": "text"}
IN_NAVIGATION = ("SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add every file that a page links to, and what those link to."""
    waiting = {*IN_NAVIGATION}
    for file in files.documentation_pages():
        waiting |= linked(f"docs/{file.src_uri}", file.content_string)
    done: set[str] = set()
    while waiting - done:
        path = min(waiting - done)
        done.add(path)
        if not (ROOT / path).is_file():  # MkDocs says so
            continue
        file = _generated(path, config)
        files.append(file)
        if path.endswith(".md"):
            waiting |= linked(path, file.content_string)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point the links of a page at the pages that were made of files."""
    del config, files
    here = page.file.src_uri
    origin = here.removeprefix(f"{FOLDER}/") if here.startswith(f"{FOLDER}/") else f"docs/{here}"

    def moved(link: re.Match[str]) -> str:
        target = os.path.relpath(place(resolved(origin, link["path"])), PurePosixPath(here).parent)
        return target + (link["anchor"] or "")

    return "".join(part if part.startswith("```") else LINK.sub(moved, part) for part in FENCE.split(markdown))


def linked(origin: str, text: str) -> set[str]:
    """The files outside `docs/` that a Markdown file of the repository links to, as paths from its root."""
    return {path for path in _targets(origin, text) if not path.startswith("docs/")}


def _targets(origin: str, text: str) -> Iterator[str]:
    for part in FENCE.split(text):
        if not part.startswith("```"):
            yield from (resolved(origin, link["path"]) for link in LINK.finditer(part))


def resolved(origin: str, target: str) -> str:
    """A path from the root of the repository, of a link that is relative to a file.

    >>> resolved("docs/methods/adalora.md", "../../src/loralloc/kernel.py")
    'src/loralloc/kernel.py'
    """
    return os.path.normpath(PurePosixPath(origin).parent / target)


def place(path: str) -> str:
    """Where a file of the repository is in the site, before it is built.

    >>> place("docs/frontier.md"), place("SECURITY.md"), place("src/loralloc/kernel.py")
    ('frontier.md', 'repository/SECURITY.md', 'repository/src/loralloc/kernel.py.md')
    """
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"{FOLDER}/{path}.md" if PurePosixPath(path).suffix in LISTINGS else f"{FOLDER}/{path}"


def _generated(path: str, config: MkDocsConfig) -> File:
    """A page or a picture made of a file; a link to nothing stays one, and MkDocs says so."""
    source, language = ROOT / path, LISTINGS.get(PurePosixPath(path).suffix)
    if language is None:
        return File.generated(config, place(path), content=source.read_bytes())
    listing = (
        f"---\nsearch: {{exclude: true}}\n---\n\n# {path}\n\n```{language}\n{source.read_text(encoding='utf-8')}```\n"
    )
    return File.generated(config, place(path), content=listing)
