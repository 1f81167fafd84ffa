"""The page in a real browser: it loads without a word on the console, in both themes and on a phone."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from loralloc.report import write_report
from loralloc.report.palette import DARK, LIGHT

from .browser import DARK_THEME, LEGIBLE, WIDTH_AND_SMALLEST_TEXT, load, measured
from .fabricate import Fabricated, bert, gpt2


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = Fabricated(bert(6) | {"classifier.<script>document.title='owned'</script>": (384, 8)}, bad_steps=(17,))
    run = made.write(tmp_path_factory.mktemp("browser") / "run")
    (run / "metrics.json").write_text(json.dumps(made.metrics() | {"generation": made.generation()}))
    return write_report(run)


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
    width, smallest_text = measured(page, tmp_path, 390, WIDTH_AND_SMALLEST_TEXT).split("|")
    assert int(width) <= 390
    assert float(smallest_text) >= LEGIBLE
