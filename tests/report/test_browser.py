"""The page in a real browser: it loads without a word on the console, in both themes and on a phone."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from loralloc.report import write_report
from loralloc.report.palette import DARK, LIGHT

from .fabricate import Fabricated, bert, gpt2

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DARK_THEME = "--blink-settings=preferredColorScheme=0"


@pytest.fixture(scope="module", autouse=True)
def browser_is_there() -> None:
    if BROWSER is None:
        message = "no chromium, chromium-browser or google-chrome on PATH; install one to check reports in a browser"
        pytest.fail(message) if os.environ.get("CI") == "true" else pytest.skip(message)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = Fabricated(bert(6) | {"classifier.<script>document.title='owned'</script>": (384, 8)}, bad_steps=(17,))
    run = made.write(tmp_path_factory.mktemp("browser") / "run")
    (run / "metrics.json").write_text(json.dumps(made.metrics() | {"generation": made.generation()}))
    return write_report(run)


def load(page: Path, folder: Path, *flags: str) -> tuple[str, list[str]]:
    """Load a page; return the DOM it ends up with, and what the console says."""
    quiet = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    quiet += ["--disable-component-update", "--disable-sync", f"--user-data-dir={folder / 'profile'}"]
    command = [str(BROWSER), "--headless", "--no-sandbox", *quiet, "--enable-logging=stderr", *flags, "--dump-dom"]
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


def test_page_renders_without_a_word_on_the_console(page: Path, tmp_path: Path) -> None:
    dom, console = load(page, tmp_path)
    assert console == []
    assert "<title>AdaLoRA, sequence classification, demo:minilm</title>" in dom
    assert len(re.findall(r'<td class="cell r\d+"', dom)) == 37
    assert dom.count("<svg") == 8
    assert dom.rstrip().endswith("</html>")


def test_the_console_would_tell_of_anything_loaded_from_elsewhere(page: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    source = page.read_text(encoding="utf-8")
    broken.write_text(source.replace("<header>", '<header><img src="https://invalid.invalid/x.png">'), encoding="utf-8")
    _, console = load(broken, tmp_path)
    assert any("Content Security Policy" in line for line in console)


@pytest.mark.parametrize(
    ("flags", "table", "picture"), [((), LIGHT, "light"), ((DARK_THEME,), DARK, "dark")], ids=["light", "dark"]
)
def test_theme_follows_the_system(
    page: Path, tmp_path: Path, flags: tuple[str, ...], table: dict[str, str], picture: str
) -> None:
    script = (
        "[getComputedStyle(page.body).backgroundColor, getComputedStyle(page.querySelector('figure text')).fill,"
        "[...page.querySelectorAll('#timeline-light, #timeline-dark')]"
        ".filter(e => getComputedStyle(e).display != 'none').map(e => e.id)].join('|')"
    )
    background, ink, shown = measured(page, tmp_path, 490, script, *flags).split("|")
    assert (background, ink) == (rgb(table["page"]), rgb(table["muted"]))
    assert shown == f"timeline-{picture}"


def test_the_picture_of_a_large_model_follows_the_system_too(tmp_path: Path) -> None:
    page = write_report(Fabricated(bert(170)).write(tmp_path / "run"))
    script = (
        "[...page.querySelectorAll('#ranks-light, #ranks-dark')]"
        ".filter(e => getComputedStyle(e).display != 'none').map(e => e.id).join('|')"
    )
    assert measured(page, tmp_path, 490, script) == "ranks-light"
    assert measured(page, tmp_path, 490, script, DARK_THEME) == "ranks-dark"


def rgb(colour: str) -> str:
    return f"rgb({', '.join(str(int(colour[at : at + 2], 16)) for at in (1, 3, 5))})"


@pytest.mark.parametrize("model", ["bert", "gpt2"])
def test_a_phone_shows_it_legibly_and_without_scrolling_sideways(model: str, tmp_path: Path) -> None:
    modules = {"bert": bert(6), "gpt2": gpt2(2) | {"a_very." * 20 + "long_name": (64, 64)}}[model]
    made = Fabricated(modules, model="/home/somebody/" + "models/" * 20)
    page = write_report(made.write(tmp_path / "run"))
    script = (
        "[page.documentElement.scrollWidth, Math.min(...[...page.querySelectorAll('figure text')]"
        ".map(e => parseFloat(getComputedStyle(e).fontSize) * e.getScreenCTM().d))].join('|')"
    )
    width, smallest_text = measured(page, tmp_path, 390, script).split("|")
    assert int(width) <= 390
    assert float(smallest_text) >= 7.5
