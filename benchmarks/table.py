"""The tables of benchmarks/README.md and the plot, made from records."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from record import Record

README = Path(__file__).parent / "README.md"
FIGURE = Path(__file__).parent / "speed.svg"
BEGIN, END = "<!-- tables: python benchmarks/run.py --table -->", "<!-- end of tables -->"
KEY = ("suite", "shape", "layers", "modules", "tokens", "rank", "device", "dtype", "adapter")
REFERENCE = "peft-lora"
NONE = "not measured"
NAMES = {
    "frozen": "frozen model, forward and input gradient (limit)",
    "full": "full fine-tuning",
    "peft-lora": "PEFT LoRA",
    "peft-adalora": "PEFT AdaLoRA",
    "adalora": "AdaLoRA",
    "adalora-compact": "AdaLoRA, compact, in its last phase",
    "allora": "ALLoRA",
    "ablora": "AB-LoRA between rounds",
    "adalora-cpp": "AdaLoRA, kernel in C++",
    "allora-cpp": "ALLoRA, kernel in C++",
    "ablora-cpp": "AB-LoRA between rounds, kernel in C++",
    "autolora-fast": "AutoLoRA `fast`",
    "autolora-fast-cpp": "AutoLoRA `fast`, kernel in C++",
    "autolora-paper": "AutoLoRA `paper`",
    "betty": "betty-ml, published formulation",
}
GROWING = {
    "frozen": "frozen model (limit)",
    "peft-adalora": "PEFT AdaLoRA",
    "adalora": "AdaLoRA",
    "allora": "ALLoRA",
    "ablora": "AB-LoRA between rounds",
    "adalora-cpp": "AdaLoRA, kernel in C++",
    "allora-cpp": "ALLoRA, kernel in C++",
    "ablora-cpp": "AB-LoRA, kernel in C++",
}
"""What is shown against rank, modules and tokens."""


def newest(records: Iterable[Record]) -> list[Record]:
    """Return one record for each setting, of the code that was measured last, in the order of first occurrence.

    If several runs measured the same code, the record holds the medians over them: where tensors lie in memory differs
    between processes, and changes the second decimal of a ratio.
    """
    kept: dict[tuple[Any, ...], list[Record]] = {}
    for made in records:
        runs = kept.setdefault(tuple(made.get(key) for key in KEY), [])
        if runs and any(runs[-1].get(key) != made.get(key) for key in ("commit", "changed")):
            runs.clear()
        runs.append(made)
    return [_medians(runs) for runs in kept.values()]


def _medians(runs: Sequence[Record]) -> Record:
    """The last of some records of one setting, with each number of its times replaced by the median over all."""
    merged = dict(runs[-1])
    for field in ("wall_ratio", "processor_ratio", "wall_seconds", "processor_seconds"):
        found = [run[field] for run in runs if field in run]
        if found:
            merged[field] = {name: _median_spread([f[name] for f in found if name in f]) for name in found[-1]}
    return merged


def _median_spread(spreads: Sequence[dict[str, float]]) -> dict[str, float]:
    return {end: median(spread[end] for spread in spreads) for end in spreads[-1]}


def write(records: Sequence[Record]) -> None:
    """Replace what stands between the two markers of the README, and redraw the figure."""
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    README.write_text(f"{before}{BEGIN}\n\n{render(records)}\n{END}{after}", encoding="utf-8")
    plot(records)


def render(records: Sequence[Record]) -> str:
    """All tables, as Markdown."""
    found = newest(records)
    sections = {
        "Numbers to reach": targets(found),
        "A training step ÷ PEFT LoRA's, same starting rank": _steps(found, "steps"),
        "The same, every block compiled": _steps(found, "compiled"),
        "The same over a base model in 4 bits": _steps(found, "four-bit"),
        "AutoLoRA's search step ÷ PEFT LoRA's step": _steps(found, "search"),
        "AdaLoRA from rank 64 to 16, its last phase ÷ PEFT LoRA's step at rank 16": _steps(found, "compact"),
        "Growth": _growth(found),
        "A round of AB-LoRA ÷ the naive loop": _rounds(found),
        "Halving the rank of a trained adapter": _conversions(found),
        "What could not be measured": _failures(found),
    }
    return "\n".join(f"### {title}\n\n{body}\n" for title, body in sections.items() if body)


def targets(found: Sequence[Record]) -> str:
    """What has to hold, and what was measured."""
    cpu = [r for r in found if r["device"] == "cpu"]
    cuda = [r for r in found if r["device"] == "cuda"]
    counts = next((r["calls"] for r in cpu if r["suite"] == "calls"), {})
    rows = [
        ("AdaLoRA step ÷ PEFT LoRA step, CPU", "≤ 0.96", _ratios(cpu, "steps", "adalora")),
        ("the same, PEFT AdaLoRA", "peer", _ratios(cpu, "steps", "peft-adalora")),
        ("AdaLoRA step ÷ PEFT LoRA step, GPU", "≤ 1.00", _ratios(cuda, "steps", "adalora")),
        ("calls by the allocator in a step, 112 modules", "≤ 200", _calls(counts, "adalora", "calls")),
        ("the same, PEFT AdaLoRA", "peer", _calls(counts, "peft-adalora", "calls")),
        ("calls for which the host waits, by the allocator", "0", _calls(counts, "adalora", "waits")),
        ("ALLoRA step ÷ PEFT LoRA step", "≤ 1.05", _ratios(cpu + cuda, "steps", "allora")),
        ("peak memory ÷ PEFT LoRA, AdaLoRA", "≤ 1.00", _memory(found, "adalora")),
        ("peak memory ÷ PEFT LoRA, ALLoRA", "≤ 1.00", _memory(found, "allora")),
        ("AB-LoRA round `fast` ÷ naive, forward passes", "≤ 1/20; 1/50 at 1,000", _round(found, "fast", "forwards")),
        ("AB-LoRA round `exact` ÷ naive, time", "≤ 0.55", _round(found, "exact", "processor")),
        ("AB-LoRA round `fast` on SmolLM2-135M ÷ the paper's, forward passes", "≤ 1/60", _language_rounds(found)),
        ("AutoLoRA search step ÷ PEFT LoRA step, `fast`", "≤ 2.5", _ratios(found, "search", "autolora-fast")),
        ("the same, kernel in C++", "≤ 2.5", _ratios(found, "search", "autolora-fast-cpp")),
        ("AutoLoRA search step ÷ PEFT LoRA step, `paper`", "≤ 5.0", _ratios(found, "search", "autolora-paper")),
        ("`loralloc --help` ÷ importing typer and rich", "≤ 3", _start(found)),
        (
            "step after compaction to 25 % ÷ PEFT LoRA's of that rank",
            "≤ 1",
            _ratios(found, "compact", "adalora-compact"),
        ),
        ("AdaLoRA step ÷ PEFT LoRA step, layers of width 128", "≤ 1.00", _grown(cpu, "modules", "adalora")),
        ("the same, PEFT AdaLoRA", "peer", _grown(cpu, "modules", "peft-adalora")),
        ("the same, ALLoRA", "≤ 1.00", _grown(cpu, "modules", "allora")),
        ("the same, AB-LoRA between rounds", "≤ 1.00", _grown(cpu, "modules", "ablora")),
        ("the same, AdaLoRA, kernel in C++", "≤ 1.00", _grown(cpu, "modules", "adalora-cpp")),
        ("the same, ALLoRA, kernel in C++", "≤ 1.00", _grown(cpu, "modules", "allora-cpp")),
        ("the same, AB-LoRA, kernel in C++", "≤ 1.00", _grown(cpu, "modules", "ablora-cpp")),
        ("AdaLoRA step ÷ PEFT LoRA step, both compiled", "≤ 1.00", _ratios(cpu, "compiled", "adalora")),
        ("AdaLoRA step ÷ PEFT LoRA step, high ranks", "≤ 1.00 at 64, 1.05 at 256", _grown(cpu, "rank", "adalora")),
    ]
    return _markdown(("number", "to reach", "measured"), [[name, goal, value or NONE] for name, goal, value in rows])


def _clock(record: Record) -> str:
    """Processor time on a CPU, which other processes disturb less; on a GPU the wall clock."""
    return "wall" if record["device"] == "cuda" else "processor"


def _where(record: Record) -> str:
    where = f"{record['shape']} r {record['rank']}"
    where += f", {record['tokens']:,} tokens" if record["device"] == "cuda" else ""
    return where if record["dtype"] == "float32" else f"{where}, {record['dtype']}, {record['adapter']} adapter"


def _ratios(found: Sequence[Record], suite: str, name: str) -> str:
    parts = []
    for made in found:
        spread = made.get(f"{_clock(made)}_ratio", {}).get(name)
        if made["suite"] == suite and spread:
            parts.append(f"{spread['median']:.3f} ({_where(made)})")
    return ", ".join(parts)


def _grown(found: Sequence[Record], suite: str, name: str) -> str:
    """A contender's ratios against what a suite varies, as modules or the rank."""
    found = [made for made in found if made["suite"] == suite]
    ratios = {made[suite]: made[f"{_clock(made)}_ratio"].get(name) for made in found}
    return ", ".join(f"{ratios[at]['median']:.3f} ({suite} {at})" for at in sorted(ratios) if ratios[at])


def _language_rounds(found: Sequence[Record]) -> str:
    """Rounds on a real language model: shares of the paper's passes and of their time, and what was held in memory."""
    parts = []
    for made in (made for made in found if made["suite"] == "language-round"):
        passes, time = (f"1/{1 / made[share]:.0f}" for share in ("share_of_forwards", "share_of_seconds"))
        where = f"{made['ranks']:,} ranks in {made['modules']} modules, {made['examples']} examples"
        memory = (made["held"] - made["held_before"]) / 2**20
        cost = f"{made['seconds']:.0f} s, {memory:+.0f} MiB at the peak"
        parts.append(f"{passes}, of the time {time} ({where}, {cost})")
    return "; ".join(parts)


def _start(found: Sequence[Record]) -> str:
    spreads = [made["processor_ratio"]["loralloc-help"] for made in found if made["suite"] == "startup"]
    return ", ".join(map(_spread, spreads))


def _calls(counts: dict[str, Any], name: str, key: str) -> str:
    if name not in counts:
        return ""
    plain, allocating = counts[name]["plain"][key], counts[name]["allocating"][key]
    return f"{plain:,}; {allocating:,} in a step that allocates"


def _memory(found: Sequence[Record], name: str) -> str:
    parts = []
    for made in found:
        peaks = made.get("peak_bytes", {})
        if name in peaks and REFERENCE in peaks:
            parts.append(f"{peaks[name] / peaks[REFERENCE]:.3f} ({_where(made)})")
    return ", ".join(parts)


def _round(found: Sequence[Record], mode: str, key: str) -> str:
    parts = []
    for made in found:
        case = made.get("rounds", {}).get(mode)
        if case:
            ratio = case["ours"][key] / case["naive"][key]
            text = f"1/{1 / ratio:.0f}" if key == "forwards" else f"{ratio:.3f}"
            same = "same" if case["same_pruned"] else "ANOTHER"
            parts.append(f"{text} ({case['naive']['ranks']} ranks, {same} pruned set)")
    return ", ".join(parts)


def _steps(found: Sequence[Record], suite: str) -> str:
    rows = []
    for made in (r for r in found if r["suite"] == suite):
        for name, spread in made.get(f"{_clock(made)}_ratio", {}).items():
            wall = made["wall_ratio"][name]
            milliseconds = 1000 * made[f"{_clock(made)}_seconds"][name]["median"]
            row = [_where(made), NAMES[name], _spread(spread), _spread(wall), f"{milliseconds:.0f} ms"]
            rows.append([*row, f"{made['parameters'][name]:,}"])
    head = ("model", "contender", "processor time (GPU: wall)", "wall clock", "a step", "trained parameters")
    return _markdown(head, rows) if rows else ""


def _growth(found: Sequence[Record]) -> str:
    rows = []
    for suite in ("rank", "modules", "tokens"):
        for made in sorted((r for r in found if r["suite"] == suite), key=_by(suite)):
            ratios = made.get(f"{_clock(made)}_ratio", {})
            cells = [_spread(ratios[name]) if name in ratios else "" for name in GROWING]
            rows.append([suite, f"{made[suite]:,}", _where(made), *cells])
    head = ("against", "value", "model", *GROWING.values())
    return _markdown(head, rows) if rows else ""


def _rounds(found: Sequence[Record]) -> str:
    rows = []
    for made in found:
        for mode, case in made.get("rounds", {}).items():
            ours, naive = case["ours"], case["naive"]
            passes = f"{ours['forwards']:g} ÷ {naive['forwards']:g}"
            times = [f"{ours[key]:.2f} s ÷ {naive[key]:.2f} s" for key in ("processor", "seconds")]
            same = "the same" if case["same_pruned"] else "another"
            rows.append([_where(made), f"{naive['ranks']:,}", f"`{mode}`", passes, *times, same])
    head = ("model", "ranks", "mode", "forward passes", "processor time", "wall clock", "pruned set")
    return _markdown(head, rows) if rows else ""


def _conversions(found: Sequence[Record]) -> str:
    rows = [
        [_where(made), name, f"{figures['processor']:.2f} s", f"{figures['seconds']:.2f} s", f"{figures['error']:.4f}"]
        for made in found
        for name, figures in made.get("conversion", {}).items()
    ]
    head = ("model", "by", "processor time", "wall clock", "relative error of ΔW")
    return _markdown(head, rows) if rows else ""


def _failures(found: Sequence[Record]) -> str:
    lines = [
        f"- {made['suite']}, {_where(made)}, {name}: `{why.splitlines()[0]}`"
        for made in found
        for name, why in made["failures"].items()
    ]
    if not any(made["device"] == "cuda" for made in found):
        lines.insert(0, "- everything on a GPU: no GPU was at hand, so that the CUDA path has never run")
    return "\n".join(lines)


def _spread(spread: dict[str, float]) -> str:
    return f"{spread['median']:.3f} ({spread['low']:.3f} to {spread['high']:.3f})"


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def plot(records: Sequence[Record], path: Path = FIGURE) -> None:
    """Draw how the cost of a step grows: ratio to PEFT LoRA against rank, modules and tokens, with quartiles."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["svg.hashsalt"] = "loralloc"
    titles = {"rank": "starting rank", "modules": "adapted modules", "tokens": "tokens in a step"}
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    panels = figure.subplots(1, len(titles), sharey=False)
    for panel, (suite, title) in zip(panels, titles.items(), strict=True):
        chosen = sorted((r for r in newest(records) if r["suite"] == suite), key=_by(suite))
        for colour, (name, label) in enumerate(GROWING.items()):  # the same in every panel
            points = [
                (r[suite], r[f"{_clock(r)}_ratio"][name]) for r in chosen if name in r.get(f"{_clock(r)}_ratio", {})
            ]
            if points:
                x, spreads = zip(*points, strict=True)
                medians = [s["median"] for s in spreads]
                panel.plot(x, medians, marker="o", markersize=3, label=label, color=f"C{colour}")
                low, high = ([s[end] for s in spreads] for end in ("low", "high"))
                panel.fill_between(x, low, high, color=f"C{colour}", alpha=0.15, linewidth=0)
        panel.axhline(1, color="grey", linewidth=0.6, linestyle=":")
        panel.set(xscale="log", xlabel=title)
        values = [record[suite] for record in chosen]
        panel.set_xticks(values, [f"{value:,}" for value in values])
        panel.minorticks_off()
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("step ÷ PEFT LoRA's step")
    if panels[0].lines[:-1]:  # the last is the grey one
        panels[0].legend(frameon=False, fontsize="x-small")
    figure.savefig(path, metadata={"Date": None})


def _by(key: str) -> Callable[[Record], Any]:
    return lambda record: record[key]
