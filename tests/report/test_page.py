from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from loralloc.errors import UserError
from loralloc.report import write_report
from loralloc.report.run_record import read_run
from loralloc.report.tables import class_table

from .dom import Element, heat_cells, pictures, report, tile, words
from .fabricate import Fabricated, Shapes, bert, gpt2, layered, llama

PNGS = ("budget.png", "loss.png", "ranks.png")


@pytest.fixture(scope="module")
def made() -> Fabricated:
    return Fabricated(bert(3), bad_steps=(17, 90))


@pytest.fixture(scope="module")
def run(made: Fabricated, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.write(tmp_path_factory.mktemp("contents") / "my-run")


@pytest.fixture(scope="module")
def page(run: Path) -> Element:
    return report(run)


class TestContents:
    def test_title_names_method_task_and_model(self, page: Element) -> None:
        assert page.one("title").text == "AdaLoRA, sequence classification, demo:minilm"
        assert page.one("h1").text == "AdaLoRA on sequence classification"
        header = words(page.one("header"))
        assert "my-run" in header
        assert "Started with 216 ranks and kept 144 of them, over 18 modules in 300 steps." in header
        assert "Not in this run folder" not in header

    def test_headline_figures(self, page: Element, made: Fabricated) -> None:
        accuracy = tile(page, "Accuracy")
        assert "0.620on the validation data; majority class 0.125, untrained 0.120" in accuracy
        assert "144 of 2168 per module; budget: average rank 8" in tile(page, "Ranks")
        start, final = made.parameters([12] * 18), made.parameters(made.ranks)
        parameters = tile(page, "LoRA parameters")
        assert f"{final:,}" in parameters
        assert f"from {start:,} at the start" in parameters
        assert "3 min 12 s300 steps, 0.641 s each" in tile(page, "Training time")
        assert "3.1e-07✓" in tile(page, "Adapter check")

    def test_every_rank_is_in_its_cell(self, page: Element, made: Fabricated) -> None:
        expected = {}
        for name, rank in zip(made.modules, made.ranks, strict=True):
            layer, kind = name.removeprefix("bert.encoder.layer.").split(".", 1)
            before, _, last = kind.rpartition(".")
            expected[f"{layer} {before}{last}"] = (rank, 12)
        assert heat_cells(page) == expected

    def test_cells_say_the_full_name(self, page: Element, made: Fabricated) -> None:
        titles = [cell.attributes["title"] for cell in page.section("ranks").all("td", "cell")]
        assert titles[5] == f"bert.encoder.layer.0.output.dense: rank {made.ranks[5]}, 12 at the start, 1,536 × 384"  # noqa: RUF001

    def test_sums_of_layers_and_types_equal_the_plan(self, page: Element, made: Fabricated) -> None:
        table = page.section("ranks").one("table", "heat")
        layers = [int(row.one("td", "sum").text.split("/")[0]) for row in table.one("tbody").all("tr")]
        assert layers == [sum(made.ranks[6 * i : 6 * i + 6]) for i in range(3)]
        *types, total = [int(cell.text.split("/")[0]) for cell in table.one("tfoot").all("td", "sum")]
        assert types == [sum(made.ranks[i::6]) for i in range(6)]
        assert total == sum(types) == sum(layers) == sum(made.ranks) == 144

    def test_colours_follow_the_ranks(self, page: Element) -> None:
        for cell in page.section("ranks").all("td", "cell"):
            rank = int(cell.text.split("/")[0])
            assert cell.attributes["class"] == f"cell r{2 * rank}"

    def test_every_module_is_in_the_table(self, page: Element, made: Fabricated) -> None:
        table = page.one("table", "modules")
        rows = [[cell.text for cell in row.all("td")] for row in table.one("tbody").all("tr")]
        assert rows == [
            [name, f"{rank}", "12", f"{a:,}", f"{b:,}", f"{rank * (a + b):,}"]
            for rank, (name, (a, b)) in zip(made.ranks, made.modules.items(), strict=True)
        ]
        total = [cell.text for cell in table.one("tfoot").all("td")]
        assert total == ["total", "144", "216", "", "", f"{made.parameters(made.ranks):,}"]

    def test_figures_are_inline_and_in_files(self, page: Element, run: Path) -> None:
        headings = [figure.one("h3").text for figure in page.all("figure")]
        assert headings[:4] == ["Budget", "Ranks by module type", "Ranks of every module", "Loss"]
        assert headings[4:] == ["Learning rate", "Gradient norm", "Speed", "Memory"]
        assert len(page.all("svg")) == 8
        assert pictures(run) == set(PNGS)
        assert "216 ranks until step 45, 144 from step 165" in words(page.all("figure")[0])

    def test_code_loads_the_adapter_with_stock_peft(self, page: Element, run: Path) -> None:
        code = page.section("load").one("pre").text
        compile(code, "load", "exec")
        assert "from transformers import AutoModelForSequenceClassification" in code
        assert 'AutoModelForSequenceClassification.from_pretrained("demo:minilm", num_labels=3)' in code
        assert code.endswith(f'model = PeftModel.from_pretrained(base, "{run}/adapter")')

    def test_bad_steps_are_listed(self, page: Element) -> None:
        assert "2 steps had gradients that were not finite" in words(page.section("bad-steps"))
        assert "Steps 17, 90." in words(page.section("bad-steps"))

    def test_recipe_is_shown_as_written(self, page: Element, run: Path) -> None:
        assert (run / "recipe.yaml").read_text() in [pre.text for pre in page.section("details").all("pre")]

    def test_provenance_is_shown(self, page: Element) -> None:
        assert "settings.warmup0.15" in words(page.section("details"))
        assert "Run by loralloc 0.1.0." in words(page.one("footer"))

    def test_classes_with_counts_commonest_first(self, page: Element) -> None:
        assert "Classes (3)" in words(page.section("details"))
        (table,) = (table for table in page.all("table") if "training examples" in table.text)
        rows = [[cell.text for cell in row.all("td")] for row in table.all("tr")[1:]]
        assert rows == [['"pos"', "119", "59.5%"], ['"neg"', "80", "40.0%"], ['" pos"', "1", "0.5%"]]

    def test_many_classes(self, made: Fabricated, tmp_path: Path) -> None:
        run = made.write(tmp_path / "run")
        counts = {f"<class {i}>": 1000 - i for i in range(1000)}
        (run / "metrics.json").write_text(json.dumps(made.metrics() | {"classes": counts}))
        table = class_table(read_run(run))
        assert table is not None
        assert [row[0] for row in table.rows] == [f'"<class {i}>"' for i in range(100)]
        assert table.foot[:2] == ("900 more", "405,450")
        assert "<td>900 more</td><td>405,450</td>" in write_report(run).read_text(encoding="utf-8")

    @pytest.mark.parametrize("classes", [None, {}, [1], {"pos": None}])
    def test_runs_that_did_not_count_classes(self, classes: Any, made: Fabricated, tmp_path: Path) -> None:
        run = made.write(tmp_path / "run")
        metrics = {name: value for name, value in made.metrics().items() if name != "classes"}
        (run / "metrics.json").write_text(json.dumps(metrics if classes is None else metrics | {"classes": classes}))
        assert class_table(read_run(run)) is None
        assert "Classes" not in report(run).section("details").text

    def test_bytes_are_the_same_every_time(self, run: Path, page: Element, tmp_path: Path) -> None:
        files = [run / "report.html", *(run / "figures" / name for name in PNGS)]
        before = [path.read_bytes() for path in files]
        write_report(run)
        assert [path.read_bytes() for path in files] == before

    def test_themes_and_paper_are_in_the_style(self, page: Element) -> None:
        style = page.one("style").text
        assert "@media screen and (prefers-color-scheme: dark)" in style
        assert "@media print" in style
        used = set(re.findall(r"var\((--[\w-]+)\)", style + (page.text)))
        used |= {
            name for e in page.walk() for v in e.attributes.values() for name in re.findall(r"var\((--[\w-]+)\)", v)
        }
        assert used - {"--columns"} <= set(re.findall(r"(--[\w-]+):", style))


class TestModels:
    @pytest.mark.parametrize(
        ("modules", "heads"),
        [
            (llama(2), ["self_attnq_proj", "self_attnk_proj", "self_attnv_proj", "self_attno_proj"]),
            (gpt2(2), ["attnc_attn", "attnc_proj", "mlpc_fc", "mlpc_proj"]),
        ],
        ids=["llama", "gpt2"],
    )
    def test_other_names_fit_the_grid(self, modules: Shapes, heads: list[str], tmp_path: Path) -> None:
        made = Fabricated(modules, task="causal-lm", model="org/model")
        page = report(made.write(tmp_path / "run"))
        cells = heat_cells(page)
        assert [rank for rank, _ in cells.values()] == made.ranks
        assert list(cells)[:4] == [f"0 {head}" for head in heads]
        assert 'AutoModelForCausalLM.from_pretrained("org/model")' in page.section("load").text
        assert "lower is better" in tile(page, "Perplexity")

    def test_modules_outside_the_layers_are_listed(self, tmp_path: Path) -> None:
        made = Fabricated(gpt2(2) | {"lm_head": (768, 5000), "score": (768, 2)})
        page = report(made.write(tmp_path / "run"))
        cells = heat_cells(page)
        assert len(cells) == 10
        assert [cells["lm_head"][0], cells["score"][0]] == made.ranks[-2:]
        assert "outside the layers" in words(page.section("ranks"))

    def test_two_stacks_have_a_heading_each(self, tmp_path: Path) -> None:
        types = {"layer.0.SelfAttention.q": (64, 64), "layer.1.DenseReluDense.wi": (64, 256)}
        modules = layered("encoder.block", 3, types) | layered("decoder.block", 3, types)
        made = Fabricated(modules)
        cells = heat_cells(report(made.write(tmp_path / "run")))
        assert [rank for rank, _ in cells.values()] == made.ranks
        assert list(cells)[-1] == "decoder.block 2 layer.1.DenseReluDensewi"

    def test_one_module(self, tmp_path: Path) -> None:
        made = Fabricated({"classifier": (384, 8)}, start=4, average=2, steps=20)
        page = report(made.write(tmp_path / "run"))
        assert heat_cells(page) == {"classifier": (2, 4)}
        assert "over 1 module in 20 steps" in words(page.one("header"))

    def test_hundreds_of_modules(self, tmp_path: Path) -> None:
        made = Fabricated(llama(64))
        run = made.write(tmp_path / "run")
        page = report(run)
        assert [rank for rank, _ in heat_cells(page).values()] == made.ranks
        assert len(made.ranks) == 448
        assert (run / "report.html").stat().st_size < 500_000

    def test_ranks_that_were_all_closed(self, tmp_path: Path) -> None:
        made = Fabricated(bert(1), average=0)
        assert made.ranks == [0] * 6
        run = made.write(tmp_path / "run")
        text = f"{run / 'ranks.json'}: the plan keeps no rank in any module; restore the file, or train again"
        with pytest.raises(UserError, match=f"^{re.escape(text)}$"):
            report(run)
        assert not (run / "report.html").exists()


def test_a_folder_that_is_no_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run folder"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []
