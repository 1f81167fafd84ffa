"""Tables and figure of the runs on planted ranks, from their records."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Record = dict[str, Any]
Measure = Callable[[dict[int, Record], dict[int, Record]], list[float]]
"""From the runs of a method and those at the true ranks, each by seed, to a value a seed."""

FIGURE = Path(__file__).parent.parent / "docs" / "figures" / "planted.svg"
TRUE = "true ranks"
PROBLEM = ("base", "labels", "average", "capacity", "strength", "steps", "batch", "tokens", "unit", "budget")
"""What the runs of a table have in common, beside the concentration."""

HEAD = (
    "method",
    "KL ÷ that of the true ranks",
    "KL",
    "planted ranks found",
    "rank correlation",
    "learning rate",
    "seeds",
)
DRAWN = (
    "uniform",
    "random",
    "AdaLoRA",
    "AB-LoRA, taylor",
    "AutoLoRA",
    "truncation",
    "cut and recover",
    "full capacity",
)
"""Methods of the figure."""


def grouped(records: Iterable[Record], key: Callable[[Record], Any]) -> dict[Any, list[Record]]:
    """Group records by a key, in the order in which the keys occur."""
    groups: dict[Any, list[Record]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return groups


def problem_of(record: Record) -> tuple[Any, ...]:
    """The settings that decide in which table a record stands, without the concentration."""
    return tuple(record[name] for name in PROBLEM)


def at_best_rate(runs: Sequence[Record]) -> dict[int, Record]:
    """Choose, of one method's runs on one problem, those at the learning rate with the lowest validation divergence.

    Rates are compared by the mean over the seeds that all of them have.

    Returns:
        Records by seed.
    """
    by_rate = {rate: {r["seed"]: r for r in at} for rate, at in grouped(runs, lambda r: r["rate"]).items()}
    common = set.intersection(*(set(at) for at in by_rate.values()))
    best = min(by_rate, key=lambda rate: mean(by_rate[rate][seed]["validation"] for seed in common or by_rate[rate]))
    return by_rate[best]


def tables(records: Sequence[Record]) -> str:
    """Every table, in Markdown: one for each problem, budget and concentration."""
    parts = []
    for runs in grouped(records, lambda r: (*problem_of(r), r["concentration"])).values():
        of = runs[0]
        told = ", ".join(f"{name} {of[name]}" for name in PROBLEM if name not in ("base", "unit", "budget"))
        title = f"**{of['base']}, {of['budget']:g} of the true {of['unit']}, concentration {of['concentration']:g}**"
        parts.append(f"{title} ({told})\n\n{table(runs, reference(records, of))}")
    return "\n\n".join(parts)


def reference(records: Sequence[Record], of: Record) -> dict[int, Record]:
    """The runs at the true ranks with their full budget, on the same problem, by seed."""
    same = [name for name in (*PROBLEM, "concentration") if name != "budget"]
    wanted = {**{name: of[name] for name in same}, "method": TRUE, "budget": 1.0}
    found = [record for record in records if wanted.items() <= record.items()]
    return at_best_rate(found) if found else {}


def table(runs: Sequence[Record], right: dict[int, Record]) -> str:
    """One table: a row for each method, from the lowest divergence to the highest, as shares of the true ranks'.

    Shares are of the same seed, so that methods with fewer seeds are not placed by the problems they have not seen.

    Args:
        runs: Records of one problem, budget and concentration.
        right: Runs at the true ranks, by seed.
    """
    by_method = {method: at_best_rate(of) for method, of in grouped(runs, lambda r: r["method"]).items()}
    lines = [f"| {' | '.join(HEAD)} |", f"|{'---|' * len(HEAD)}"]

    def share(item: tuple[str, dict[int, Record]]) -> float:
        ratios = relative(item[1], right).values()
        return mean(ratios or (record["divergence"] for record in item[1].values()))

    for method, by_seed in sorted(by_method.items(), key=share):
        chosen = list(by_seed.values())
        cells = (
            method,
            spread(list(relative(by_seed, right).values()), 2),
            spread([r["divergence"] for r in chosen], 4),
            spread([r["recovered"] for r in chosen], 2),
            spread([r["correlation"] for r in chosen], 2),
            f"{chosen[0]['rate']:g}",
            str(len(chosen)),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def relative(by_seed: dict[int, Record], right: dict[int, Record]) -> dict[int, float]:
    """Divergence ÷ that of the run at the true ranks, by seed."""
    return {s: r["divergence"] / right[s]["divergence"] for s, r in by_seed.items() if s in right}


DRAWN_MEASURES: dict[str, Measure] = {
    "KL ÷ KL at the true ranks": lambda by_seed, right: list(relative(by_seed, right).values()),
    "planted ranks found": lambda by_seed, right: [r["recovered"] for r in by_seed.values()],
    "rank correlation": lambda by_seed, right: [r["correlation"] for r in by_seed.values()],
}
"""The rows of the figure."""


def spread(values: Sequence[float], digits: int) -> str:
    """The mean over seeds, with the lowest and the highest.

    >>> spread([1.0, 2.0], 1), spread([1.5], 2), spread([], 2)
    ('1.5 (1.0 to 2.0)', '1.50', '')
    """
    if not values:
        return ""
    middle, low, high = (f"{value:.{digits}f}" for value in (mean(values), min(values), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


def plot(records: Sequence[Record], path: Path = FIGURE) -> None:
    """Draw every measure against concentration: a column for each budget, a row for each measure, a line a method."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["svg.hashsalt"] = "loralloc"
    groups = sorted(grouped(records, problem_of).items())  # smallest budget first
    problems = {key: runs for key, runs in groups if len(_concentrations(runs)) > 1}
    if not problems:
        raise SystemExit("there is nothing to draw: no problem has records at several concentrations")
    figure = Figure(figsize=(1.5 + 3.6 * len(problems), 2.6 * len(DRAWN_MEASURES)), layout="constrained")
    grid = figure.subplots(len(DRAWN_MEASURES), len(problems), squeeze=False, sharex=True, sharey="row")
    for column, (problem, runs) in zip(grid.T, problems.items(), strict=True):
        for panel, measure in zip(column, DRAWN_MEASURES.values(), strict=True):
            _draw(panel, records, runs, measure)
        named = dict(zip(PROBLEM, problem, strict=True))
        column[0].set_title(f"{named['base']}, {named['budget']:g} of the true {named['unit']}", fontsize="small")
        column[0].axhline(1, color="grey", linewidth=0.6, linestyle=":")
        column[-1].set_xlabel("concentration of the truth")
    for panel, name in zip(grid[:, 0], DRAWN_MEASURES, strict=True):
        panel.set_ylabel(name)
    grid[0, 0].set_yscale("log")
    grid[0, 0].yaxis.set_major_formatter("{x:g}")
    grid[0, 0].yaxis.set_minor_formatter("{x:g}")
    legend = {line.get_label(): line for panel in grid.flat for line in panel.get_lines()[: len(DRAWN)]}
    lines = [legend[method] for method in DRAWN if method in legend]
    figure.legend(lines, [line.get_label() for line in lines], loc="outside right", frameon=False, fontsize="x-small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def _draw(panel: Axes, records: Sequence[Record], runs: Sequence[Record], measure: Measure) -> None:
    for number, method in enumerate(DRAWN):
        points = {c: _measured(records, runs, method, c, measure) for c in _concentrations(runs)}
        points = {c: values for c, values in points.items() if values}
        if points:
            x, values = list(points), list(points.values())
            panel.plot(x, [mean(v) for v in values], marker="o", markersize=3, label=method, color=f"C{number}")
            panel.fill_between(x, list(map(min, values)), list(map(max, values)), color=f"C{number}", alpha=0.12)
    panel.spines[["top", "right"]].set_visible(False)


def _concentrations(runs: Sequence[Record]) -> list[float]:
    return sorted({record["concentration"] for record in runs})


def _measured(
    records: Sequence[Record], runs: Sequence[Record], method: str, concentration: float, measure: Measure
) -> list[float]:
    mine = [r for r in runs if r["method"] == method and r["concentration"] == concentration]
    return measure(at_best_rate(mine), reference(records, mine[0])) if mine else []
