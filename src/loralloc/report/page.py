"""The page: reads a run folder, draws its figures, and writes `report.html` as one self-contained file."""

from __future__ import annotations

import math
import string
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from loralloc.files import write_atomically
from loralloc.report import figures
from loralloc.report.drawing import png, report_settings, svg
from loralloc.report.grid import Grid, arrange
from loralloc.report.headline import tiles
from loralloc.report.null_control import null_control
from loralloc.report.palette import style_variables
from loralloc.report.run_record import RunRecord, Trace, read_run
from loralloc.report.tables import class_table, heat_map, measure_table, module_table, provenance_table
from loralloc.report.wording import (
    adapter_path,
    count,
    loading_code,
    method_name,
    model_name,
    task_name,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN_BAD_STEPS = 40


@dataclass(frozen=True)
class Chart:
    """A figure with its heading and the sentences below it, which are HTML."""

    name: str
    heading: str
    caption: str
    figure: Figure


def write_report(run: Path) -> Path:
    """Write RUN/report.html and the figures RUN/figures/*.png.

    The page loads nothing from anywhere else. The same run folder gives the same bytes. Pieces that are not in the
    folder (yet) are named on the page.

    Args:
        run: The folder that `loralloc train` wrote; the run may still be going on.

    Returns:
        The path of the page.

    Raises:
        UserError: The folder is not a run, or one of its files is damaged.
    """
    folder = read_run(Path(run))
    grid = arrange(folder.plan.modules)
    top = max(max(module.rank, module.start) for module in folder.plan.modules.values())
    with report_settings():
        charts = _charts(folder, top)
        _write_pngs(
            folder,
            {chart.name: chart.figure for chart in charts} | {"ranks": figures.heat_figure(folder, grid, top)},
        )
        history = _history(folder, charts)
    sections = (
        _header(folder),
        tiles(folder),
        _ranks(folder, grid, top),
        null_control(folder),
        history,
        _loading(folder),
        _bad_steps(folder),
        _details(folder),
        _footer(folder),
    )
    source = files("loralloc.report")
    page = string.Template(source.joinpath("page.html").read_text(encoding="utf-8")).substitute(
        title=escape(f"{method_name(folder)}, {task_name(folder)}, {model_name(folder)}"),
        style=style_variables() + source.joinpath("style.css").read_text(encoding="utf-8"),
        body="\n".join(section for section in sections if section),
    )
    path = folder.path / "report.html"
    write_atomically(path, page)
    return path


def _write_pngs(run: RunRecord, drawn: dict[str, Figure]) -> None:
    """Write the figures that are also files; one that an earlier report left and that no longer holds is removed."""
    folder = run.path / "figures"
    folder.mkdir(exist_ok=True)
    for name in ("ranks", "budget", "loss"):
        path = folder / f"{name}.png"
        if name in drawn:
            png(drawn[name], path)
        else:
            path.unlink(missing_ok=True)


def _header(run: RunRecord) -> str:
    modules = run.plan.modules.values()
    start, final = sum(module.start for module in modules), run.plan.total_rank
    moved = sum(max(0, module.rank - module.start) for module in modules)
    steps = f" in {count(run.last_step, 'step')}" if run.last_step else ""
    where = f"{count(len(modules), 'module')}{steps}"
    if not run.finished:
        summary = (
            f"Training has not finished: <strong>{final:,} of {start:,} ranks</strong> are in use over {where} planned."
        )
    elif all(module.rank == module.start for module in modules):
        summary = (
            f"Trained <strong>{count(final, 'rank')}</strong> over {where}; every module kept the rank it started with."
        )
    elif moved and final == start:
        summary = (
            f"Trained <strong>{count(final, 'rank')}</strong> over {where}; {moved:,} of them moved to another module."
        )
    else:
        summary = f"Started with {count(start, 'rank')} and kept <strong>{final:,}</strong> of them, over {where}."
    method = method_name(run)
    notice = ""
    if run.absent:
        items = "".join(f"<li>{escape(sentence)}</li>" for sentence in run.absent)
        notice = f'\n<aside class="notice"><strong>Not in this run folder</strong><ul>{items}</ul></aside>'
    return (
        f'<header>\n<p class="eyebrow">{escape(run.path.resolve().name)}</p>\n'
        f"<h1>{escape(method[0].upper() + method[1:])} on {escape(task_name(run))}</h1>\n"
        f'<p class="lede"><code>{escape(model_name(run))}</code><br>{summary}</p>{notice}\n</header>'
    )


def _ranks(run: RunRecord, grid: Grid, top: int) -> str:
    legend = (
        '<div class="legend"><span>rank 0</span><span class="scale"></span>'
        f'<span class="top">{top}</span><span>each cell: rank kept / rank at the start</span></div>'
    )
    return (
        f'<section id="ranks">\n<h2>Where the ranks are</h2>\n{_ranks_summary(run, grid)}\n'
        f"{heat_map(run, grid, top)}\n{legend}\n</section>"
    )


def _ranks_summary(run: RunRecord, grid: Grid) -> str:
    """The extremes among the module types, and the modules that were closed altogether."""
    modules = run.plan.modules
    means = {
        kind: sum(modules[n].rank for n in names) / len(names) for kind in grid.types if (names := grid.column(kind))
    }
    sentences = []
    if means and min(means.values()) < max(means.values()):
        for word, kind in (
            ("Most", max(means, key=lambda k: means[k])),
            ("fewest", min(means, key=lambda k: means[k])),
        ):
            sentences.append(f"{word} went to <code>{escape(kind)}</code> (mean {means[kind]:.1f})")
        sentences = [", ".join(sentences) + "."]
    elif means:
        sentences.append(f"Every module type has the same mean rank, {next(iter(means.values())):.3g}.")
    if closed := sum(module.rank == 0 for module in modules.values()):
        sentences.append(f"{count(closed, 'module')} {'has' if closed == 1 else 'have'} no rank left.")
    return f'<p class="muted">{" ".join(sentences)}</p>' if sentences else ""


def _charts(run: RunRecord, top: int) -> list[Chart]:
    charts = []
    if run.trace and not (run.trace.constant and run.trace.phases is None):
        grid = arrange(run.trace.sites)
        charts += [
            Chart("budget", "Budget", _budget_caption(run.trace), figures.budget_figure(run, run.trace)),
            Chart(
                "types",
                "Ranks by module type",
                _types_caption(grid),
                figures.types_figure(run, run.trace, grid),
            ),
            Chart(
                "timeline",
                "Ranks of every module",
                "A row for each module, first layer on top, coloured as in the table above.",
                figures.timeline_figure(run, run.trace, grid, top),
            ),
        ]
    if run.train or run.evaluations:
        charts.append(Chart("loss", "Loss", _loss_caption(run), figures.loss_figure(run)))
    return charts


def _budget_caption(trace: Trace) -> str:
    start, unit = trace.used(trace.events[0]), trace.unit
    if trace.phases is None or trace.target is None:
        return f"From {start:,} to {trace.used(trace.events[-1]):,} {escape(unit)}."
    warmup, final = trace.phases
    return (
        f"{start:,} {escape(unit)} until step {warmup:,}, {trace.target:,} from step {final:,}; "
        "dashed: the budget. All figures shade the three phases alike."
    )


def _types_caption(grid: Grid) -> str:
    types = len(grid.types) + bool(grid.others)
    hidden = types - figures.SERIES
    return "Mean over the layers." + (
        f" The highest and the lowest are named; {hidden} in between are grey." if hidden > 0 else ""
    )


def _loss_caption(run: RunRecord) -> str:
    sentences = []
    losses = [value for _, value in run.train]
    if len(losses) >= figures.SMOOTH_FROM:
        sentences.append("Pale: as logged; strong: smoothed.")
    elif len(losses) == 1:
        sentences.append("Only one training loss has been logged.")
    elif not losses:
        sentences.append("No training losses have been logged.")
    if not run.evaluations:
        sentences.append("No evaluation has been logged during training.")
    broken = sum(not math.isfinite(value) for _, value in (*run.train, *run.evaluations))
    if broken:
        words = "loss was not finite and is" if broken == 1 else "losses were not finite and are"
        sentences.append(f"{broken:,} logged {words} left out.")
    return " ".join(sentences) or "As logged."


def _history(run: RunRecord, charts: list[Chart]) -> str:
    notes = []
    if run.search_steps:
        notes.append(
            f"Steps 1 to {run.search_steps:,} are the search for the ranks; after it, what is exported was trained "
            "anew at the ranks found."
        )
    if run.trace is None:
        notes.append("There is no trace.jsonl, so the development of the ranks cannot be shown.")
    elif run.trace.constant and run.trace.phases is None:
        notes.append("The ranks are constant: this method allocates none, so there is no budget to follow.")
    if not run.train and not run.evaluations:
        notes.append("No losses have been logged.")
    items = "\n".join(
        f"<figure>\n<figcaption><h3>{chart.heading}</h3><p>{chart.caption}</p></figcaption>\n"
        f"{svg(chart.figure, chart.name, chart.heading)}\n</figure>"
        for chart in charts
    )
    text = f'<p class="muted">{" ".join(notes)}</p>\n' if notes else ""
    return f'<section id="history">\n<h2>How it went</h2>\n{text}<div class="figures">\n{items}\n</div>\n</section>'


def _loading(run: RunRecord) -> str:
    if (run.path / "adapter").is_dir():
        sentence = "A plain LoRA adapter: stock PEFT loads it, and so does everything that loads PEFT adapters."
    else:
        folder = f"<code>{escape(adapter_path(run))}</code>"
        sentence = f"{folder} is not there yet; once it is, these lines load it with stock PEFT."
    return (
        f'<section id="load">\n<h2>Load it</h2>\n<p class="muted">{sentence}</p>\n'
        f"<pre><code>{escape(loading_code(run))}</code></pre>\n</section>"
    )


def _bad_steps(run: RunRecord) -> str:
    if not run.bad_steps:
        return ""
    known = run.trace.bad_steps if run.trace else ()
    listed = ", ".join(f"{step:,}" for step in known[:SHOWN_BAD_STEPS])
    more = f" and {len(known) - SHOWN_BAD_STEPS:,} more" if len(known) > SHOWN_BAD_STEPS else ""
    return (
        '<section id="bad-steps">\n<h2>Bad steps</h2>\n'
        f'<p><strong class="warn">{count(run.bad_steps, "step")}</strong> had gradients that were not finite. '
        "They were skipped: no weight, score or budget saw them."
        + (f" Steps {listed}{more}." if listed else "")
        + "</p>\n</section>"
    )


def _details(run: RunRecord) -> str:
    parts = {
        f"Every module <span class='muted'>({len(run.plan.modules):,})</span>": module_table(run),
        "Every measure": measure_table(run),
        f"Classes <span class='muted'>({len(run.classes):,})</span>": class_table(run),
        "Recipe <span class='muted'>(recipe.yaml)</span>": (
            f"<pre><code>{escape(run.recipe_text)}</code></pre>" if run.recipe_text is not None else ""
        ),
        "Where the plan comes from": provenance_table(run),
    }
    items = "\n".join(
        f"<details><summary>{summary}</summary>\n{content}\n</details>" for summary, content in parts.items() if content
    )
    return f'<section id="details">\n<h2>Details</h2>\n{items}\n</section>'


def _footer(run: RunRecord) -> str:
    version = run.plan.provenance.get("loralloc")
    by = f"loralloc {version}" if version else "loralloc"
    return (
        f"<footer><p>Run by {escape(by)}. Parameters are those of the LoRA matrices, rank · (in + out) per module; "
        "scales fold into them, and heads are not counted.</p></footer>"
    )
