"""Tables and figure of the runs on planted ranks, from their records."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

Record = dict[str, Any]

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
    """Draw divergence relative to the true ranks against concentration: a panel for each budget, a line a method."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["svg.hashsalt"] = "loralloc"
    problems = {key: runs for key, runs in grouped(records, problem_of).items() if len(_concentrations(runs)) > 1}
    if not problems:
        raise SystemExit("there is nothing to draw: no problem has records at several concentrations")
    figure = Figure(figsize=(1.5 + 4 * len(problems), 3.6), layout="constrained")
    panels = figure.subplots(1, len(problems), squeeze=False)[0]
    for panel, (problem, runs) in zip(panels, problems.items(), strict=True):
        for number, method in enumerate(DRAWN):
            points = {c: _ratios(records, runs, method, c) for c in _concentrations(runs)}
            points = {c: list(ratios) for c, ratios in points.items() if ratios}
            if points:
                x, ratios = list(points), list(points.values())
                panel.plot(x, [mean(r) for r in ratios], marker="o", markersize=3, label=method, color=f"C{number}")
                panel.fill_between(x, list(map(min, ratios)), list(map(max, ratios)), color=f"C{number}", alpha=0.12)
        panel.axhline(1, color="grey", linewidth=0.6, linestyle=":")
        named = dict(zip(PROBLEM, problem, strict=True))
        panel.set_title(f"{named['base']}, {named['budget']:g} of the true {named['unit']}", fontsize="small")
        panel.set(xlabel="concentration of the truth", yscale="log")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("KL ÷ KL at the true ranks")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right", frameon=False, fontsize="x-small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def _concentrations(runs: Sequence[Record]) -> list[float]:
    return sorted({record["concentration"] for record in runs})


def _ratios(records: Sequence[Record], runs: Sequence[Record], method: str, concentration: float) -> list[float]:
    mine = [r for r in runs if r["method"] == method and r["concentration"] == concentration]
    return list(relative(at_best_rate(mine), reference(records, mine[0])).values()) if mine else []
