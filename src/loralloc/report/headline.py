"""The headline figures."""

from __future__ import annotations

import math
from html import escape

from loralloc.report.run_record import RunRecord, number
from loralloc.report.wording import budget_words, change, count, duration, measure, metric_values

LOWER_IS_BETTER = {"perplexity", "loss"}


def tiles(run: RunRecord) -> str:
    """Return the headline figures as a list: the metric with its references, ranks, parameters, time, adapter check."""
    items = "\n".join((_metric(run), _ranks(run), _parameters(run), _time(run), _adapter_check(run)))
    return f'<ul class="tiles">\n{items}\n</ul>'


def _tile(label: str, value: str, note: str, extra: str = "", *, wide: bool = False) -> str:
    """One figure; all arguments are HTML."""
    return (
        f'<li class="tile{" wide" if wide else ""}"><span class="label">{label}</span>'
        f'<span class="value">{value}</span><span class="note">{note}</span>{extra}</li>'
    )


def _metric(run: RunRecord) -> str:
    name = escape(str(run.metrics.get("metric") or "metric").replace("_", " ").capitalize())
    values = metric_values(run)
    own = [where for where in ("test", "validation") if where in values]
    if not own:
        return _tile(name, "&ndash;", "Measured when training has finished.", wide=True)
    where = own[0]
    references = [f"{escape(_reference(key))} {measure(values[key])}" for key in values if key not in own]
    note = f"on the {where} data; {', '.join(references) or 'nothing to compare with'}"
    if run.metrics.get("metric") in LOWER_IS_BETTER:
        note += "; lower is better"
    return _tile(name, measure(values[where]), note, _bars(values, own), wide=True)


def _reference(name: str) -> str:
    return {"majority": "majority class"}.get(name, name.replace("_", " "))


def _bars(values: dict[str, float], own: list[str]) -> str:
    """The metric beside its references, on a scale from 0 to 1, or to the largest if that is more."""
    finite = {key: value for key, value in values.items() if math.isfinite(value)}
    if len(finite) < 2:
        return ""
    top = max(1.0, *finite.values())
    rows = "".join(
        f'<span class="muted">{escape(_reference(key))}</span>'
        f'<span class="track"><span class="bar{" ours" if key in own else ""}" '
        f'style="width: {max(0.0, 100 * value / top):.1f}%"></span></span>'
        f"<span>{measure(value)}</span>"
        for key, value in finite.items()
    )
    return f'<div class="bars" aria-hidden="true">{rows}</div>'


def _ranks(run: RunRecord) -> str:
    modules = run.plan.modules.values()
    start, final = sum(module.start for module in modules), run.plan.total_rank
    note = f"{final / len(modules):.3g} per module"
    note += f"; budget: {escape(budget_words(run) or 'none')}"
    return _tile("Ranks" if run.finished else "Ranks so far", f"{final:,} <small>of {start:,}</small>", note)


def _parameters(run: RunRecord) -> str:
    start, final = run.plan.start_parameters, run.plan.parameters
    before = "as at the start" if final == start else f"{change(start, final)} from {start:,} at the start"
    note = f"{before}; heads not counted"
    return _tile("LoRA parameters", f"{final:,}", note)


def _time(run: RunRecord) -> str:
    seconds, steps = number(run.metrics.get("train_seconds")), run.last_step
    search = run.metrics.get("search")
    before = number(search.get("seconds")) if isinstance(search, dict) else 0.0
    seconds += before
    if not math.isfinite(seconds):
        return _tile("Training time", "&ndash;", f"{count(steps, 'step')} planned" if steps else "Not recorded.")
    note = f"{count(steps, 'step')}, {seconds / steps:.3g} s each" if steps else "number of steps not recorded"
    note += f"; {duration(before)} of it for the search" if before else ""
    return _tile("Training time", duration(seconds), note)


def _adapter_check(run: RunRecord) -> str:
    value = run.metrics.get("adapter_check")
    if value is None:
        return _tile("Adapter check", "&ndash;", "The exported adapter has not been compared with the trained model.")
    difference, allowed = number(value), number(run.metrics.get("adapter_check_allowed"))
    verdict = (
        '<span class="good">✓ reloads as trained:</span>'
        if difference <= allowed
        else f'<span class="warn">✗ above {allowed:.1e}, what rounding explains:</span>'
    )
    verdict += " largest difference of the logits"
    return _tile("Adapter check", f"{difference:.1e}" if math.isfinite(difference) else "not finite", verdict)
