"""The page: reads a run folder, draws its figures, and writes `report.html` as one self-contained file.

What the page says is computed here and in the modules beside it, as plain text and numbers; all markup is in the
templates, which escape every value.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from loralloc.files import write_atomically
from loralloc.report import figures, wording
from loralloc.report.answers import samples, score_table
from loralloc.report.charts import charts, notes, side_charts
from loralloc.report.drawing import png, report_settings, svg
from loralloc.report.grid import Grid, arrange
from loralloc.report.headline import headline, summary
from loralloc.report.null_control import null_control
from loralloc.report.palette import RAMP_STEPS, theme_colours
from loralloc.report.run_record import RunRecord, read_run
from loralloc.report.tables import class_table, heat_map, metric_table, module_table, provenance_table, type_means

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN_BAD_STEPS = 40


def write_report(run: Path) -> Path:
    """Write RUN/report.html and the figures RUN/figures/*.png.

    The page loads nothing from anywhere else. The same run folder gives the same bytes. Pieces that are not in the
    folder (yet) are named on the page.

    Args:
        run: The folder that `loralloc train` wrote, or a run without a recipe; the run may still be going on.

    Returns:
        The path of the page.

    Raises:
        UserError: The folder is not a run, or one of its files is damaged.
    """
    record = read_run(Path(run))
    grid = arrange(record.plan.modules)
    highest = max(max(module.rank, module.start) for module in record.plan.modules.values())
    with report_settings():
        drawn, beside = charts(record, grid, highest), side_charts(record)
        files = {"ranks": figures.heat_figure(record, grid, highest)} | {chart.name: chart.figure for chart in drawn}
        _write_pngs(record, files)
        pictures = {chart.name: svg(chart.figure, chart.name, chart.heading) for chart in (*drawn, *beside)}
    values = _values(record, grid, highest) | {"charts": drawn, "side_charts": beside, "pictures": pictures}
    path = record.path / "report.html"
    write_atomically(path, templates().get_template("page.html").render(values))
    return path


def _write_pngs(run: RunRecord, drawn: dict[str, Figure]) -> None:
    """Write the figures that are also PNG files; outdated files of an earlier report are removed."""
    folder = run.path / "figures"
    folder.mkdir(exist_ok=True)
    for name in ("ranks", "budget", "loss"):
        path = folder / f"{name}.png"
        if name in drawn:
            png(drawn[name], path)
        else:
            path.unlink(missing_ok=True)


def templates(package: str = "loralloc.report") -> Environment:
    """Return the templates of a package, and those of the report, which they include.

    A name without a value is an error.
    """
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(name) for name in dict.fromkeys((package, "loralloc.report"))]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"counted": wording.count, "thousands": "{:,}".format, "pieces": _pieces}
    return environment


def _pieces(name: str) -> list[str]:
    """A name in the pieces between which a line may break.

    >>> _pieces("self_attn.qProj")
    ['self_', 'attn.', 'q', 'Proj']
    """
    return re.split(r"(?<=[._])|(?<=[a-z])(?=[A-Z])", name)


def _values(run: RunRecord, grid: Grid, highest: int) -> dict[str, Any]:
    """Everything the page shows, but for the figures."""
    return {
        "light": theme_colours("light"),
        "dark": theme_colours("dark"),
        "ramp_steps": RAMP_STEPS,
        "folder": run.path.resolve().name,
        "method": wording.method_name(run),
        "task": wording.task_name(run),
        "model": wording.model_name(run),
        "summary": summary(run),
        "absent": run.absent,
        "headline": headline(run),
        "type_means": type_means(run, grid),
        "closed": sum(module.rank == 0 for module in run.plan.modules.values()),
        "heat_map": heat_map(run, grid, highest),
        "highest": highest,
        "noise": null_control(run),
        "notes": notes(run),
        "adapter": wording.adapter_path(run),
        "exported": (run.path / "adapter").is_dir(),
        "loading_code": wording.loading_code(run),
        "bad_steps": run.bad_steps,
        "listed_bad_steps": run.trace.bad_steps if run.trace else (),
        "shown_bad_steps": SHOWN_BAD_STEPS,
        "modules": module_table(run),
        "module_count": len(run.plan.modules),
        "metrics": metric_table(run),
        "scores": score_table(run),
        "samples": samples(run),
        "classes": class_table(run),
        "class_count": len(run.classes),
        "recipe": run.recipe_text,
        "provenance": provenance_table(run),
        "version": run.plan.provenance.get("loralloc", ""),
    }
