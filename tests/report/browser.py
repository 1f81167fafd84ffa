"""A page in a real browser: what it ends up as, what the console says, what a script finds in it."""

from __future__ import annotations

import html
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

DARK_THEME = "--blink-settings=preferredColorScheme=0"
LEGIBLE = 7.5
"""Least size of a text in a figure, in pixels."""
WIDTH_AND_SMALLEST_TEXT = (
    "[page.documentElement.scrollWidth, Math.min(...[...page.querySelectorAll('figure text')]"
    ".map(e => parseFloat(getComputedStyle(e).fontSize) * e.getScreenCTM().d))].join('|')"
)
"""How wide a page is that is not to scroll sideways, and its smallest text in a figure: a script for `measured`."""


def browser() -> str:
    """The browser's program; where there is none the test is skipped, and fails in CI."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        message = "no chromium, chromium-browser or google-chrome on PATH; install one to check reports in a browser"
        pytest.fail(message) if os.environ.get("CI") == "true" else pytest.skip(message)
    return found


def load(page: Path, folder: Path, *flags: str) -> tuple[str, list[str]]:
    """Load a page; return the DOM it ends up with, and what the console says."""
    quiet = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    quiet += ["--disable-component-update", "--disable-sync", f"--user-data-dir={folder / 'profile'}"]
    command = [browser(), "--headless", "--no-sandbox", *quiet, "--enable-logging=stderr", *flags, "--dump-dom"]
    done = subprocess.run(
        [*command, page.as_uri()], capture_output=True, text=True, encoding="utf-8", check=True, timeout=600
    )
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def measured(page: Path, folder: Path, width: int, script: str, *flags: str) -> str:
    """Show a page in a frame of some width, and return what a script finds there.

    The script stands outside: the page itself forbids any. Headless windows cannot be narrower than 500 pixels.
    """
    frame = (
        f'<title></title><iframe style="width: {width}px; height: 900px; border: 0" '
        f'srcdoc="{html.escape(page.read_text(encoding="utf-8"))}"></iframe>'
        "<script>addEventListener('load', () => { const frame = document.querySelector('iframe');"
        f"const page = frame.contentDocument; document.title = String({script}); }})</script>"
    )
    outer = folder / "frame.html"
    outer.write_text(f"<!DOCTYPE html><meta charset='utf-8'>{frame}", encoding="utf-8")
    dom, _ = load(outer, folder, *flags)
    found = re.search("<title>(.*?)</title>", dom)
    assert found is not None
    return html.unescape(found[1])
