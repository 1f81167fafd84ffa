"""The hook of the site makes pages of the repository's files, and points links at them."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]

mkdocs = pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "docs")
    return importlib.import_module("repository_pages")


def test_its_examples_hold(hook: ModuleType) -> None:
    assert doctest.testmod(hook) == (0, 2)


def test_what_a_page_links_to_outside_of_its_folder_is_found(hook: ModuleType) -> None:
    text = "[a](../src/x.py#L1) [b](other.md) [c](https://x.invalid/y.py) ![d](figures/e.svg)\n```\n[f](../g.py)\n```\n"
    assert hook.linked("docs/page.md", text) == {"src/x.py"}
    assert hook.linked("SECURITY.md", "[a](docs/page.md) [b](src/x.py)") == {"src/x.py"}


def test_the_site_has_a_page_for_every_file_that_is_linked(hook: ModuleType) -> None:
    from mkdocs.config import load_config
    from mkdocs.structure.files import get_files
    from mkdocs.structure.pages import Page

    config = load_config(str(ROOT / "mkdocs.yml"), plugins=["search"])
    config.plugins._current_plugin = "repository_pages"  # as when MkDocs calls the hook
    files = hook.on_files(get_files(config), config)
    names = {file.src_uri for file in files}
    assert {"repository/SECURITY.md", "repository/src/loralloc/kernel.py.md"} <= names
    page = Page(None, files.get_file_from_path("papers.md"), config)
    moved = hook.on_page_markdown(page.file.content_string, page, config, files)
    assert "](repository/src/loralloc/kernel.py.md)" in moved
    assert "](../src/" not in moved
    security = Page(None, files.get_file_from_path("repository/benchmarks/README.md"), config)
    moved = hook.on_page_markdown("[a](../docs/frontier.md#at) [b](run.py)", security, config, files)
    assert moved == "[a](../../frontier.md#at) [b](run.py.md)"
