"""What a run says is text on the page, whatever is in it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from jinja2 import UndefinedError

from loralloc.report.page import templates

from .dom import report, words
from .fabricate import Fabricated, lines


class TestEscaping:
    EVIL = "<script>alert('1')</script>&\"'><img src=x onerror=alert(2)>"

    def test_names_from_a_run_are_text(self, tmp_path: Path) -> None:
        modules = {
            f"layers.0.{self.EVIL}": (8, 8),
            f"layers.1.{self.EVIL}": (8, 8),
            f"{self.EVIL}.2.q": (8, 8),
            f"head {self.EVIL}": (8, 8),
        }
        made = Fabricated(modules, start=4, average=2, method=self.EVIL, task=self.EVIL, model=self.EVIL)
        run = made.write(tmp_path / "run")
        metrics = {
            "task": self.EVIL,
            "metric": self.EVIL,
            "validation": {self.EVIL: 0.5},
            "reference": {self.EVIL: 0.25},
            "classes": {self.EVIL: 3},
            "adapter_check": self.EVIL,
        }
        (run / "metrics.json").write_text(json.dumps(metrics))
        plan = made.plan()
        plan["budget"] = {self.EVIL: 8}
        plan["provenance"] = {self.EVIL: {self.EVIL: self.EVIL}, "loralloc": self.EVIL, "bad_steps": self.EVIL}
        (run / "ranks.json").write_text(json.dumps(plan))
        trace = made.trace()
        trace[0]["unit"] = self.EVIL
        (run / "trace.jsonl").write_text(lines(trace))
        (run / "recipe.yaml").write_text(f"task: {json.dumps(self.EVIL)}\nnote: </pre></style>{self.EVIL}\n")
        page = report(run)
        shown = page.text
        for name in modules:
            assert name in shown
        assert f"</pre></style>{self.EVIL}" in shown
        places = [page.one(tag) for tag in ("title", "h1", "header", "footer")] + page.all("details")
        places += [page.one("ul", "tiles"), page.section("ranks"), page.section("history")]
        assert len(page.all("details")) == 5
        for place in places:
            assert self.EVIL in place.text.replace('\\"', '"'), words(place)[:80]
        compile(page.section("load").one("pre").text, "load", "exec")

    def test_a_folder_name_is_text(self, tmp_path: Path) -> None:
        run = Fabricated({"layers.0.q": (8, 8)}, start=4, average=2).write(tmp_path / 'a<b>"$title"')
        page = report(run)
        assert 'a<b>"$title"' in page.one("header").text
        compile(page.section("load").one("pre").text, "load", "exec")


class TestTemplates:
    def test_a_value_that_is_not_given_is_an_error(self) -> None:
        with pytest.raises(UndefinedError, match="'method' is undefined"):
            templates().get_template("page.html").render()

    def test_a_value_is_text_unless_a_template_says_otherwise(self) -> None:
        assert templates().from_string("{{ name }}").render(name="<script>") == "&lt;script&gt;"
        environment = templates()
        sources = [Path(str(environment.get_template(name).filename)) for name in ("macros.html", "page.html")]
        unescaped = [name for path in sources for name in re.findall(r"(\S+) *\| *safe", path.read_text("utf-8"))]
        assert unescaped == ['join("<wbr>"', "pictures[chart.name]"]
