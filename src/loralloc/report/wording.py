"""Names and numbers of a run in words, and the lines of code that load it: plain text, which the page escapes."""

from __future__ import annotations

import json
import math

from loralloc.budget import in_words
from loralloc.reading import read_object
from loralloc.report.run_record import RunRecord, mapping, number
from loralloc.tasks.spec import TASKS


def method_name(run: RunRecord) -> str:
    """Return the method as its paper writes it."""
    return str(run.plan.provenance.get("label") or run.plan.method or "LoRA")


def task_name(run: RunRecord) -> str:
    """Return the task in words."""
    task = _task(run)
    return TASKS[task].label if task in TASKS else (task.replace("-", " ") or "task unknown")


def model_name(run: RunRecord) -> str:
    """Return the base model as the run names it."""
    return str(run.section("model").get("name") or run.plan.provenance.get("base_model") or "model unknown")


def _task(run: RunRecord) -> str:
    return str(run.metrics.get("task") or run.recipe.get("task") or "")


def count(number: int, noun: str) -> str:
    """Return a number and its noun.

    >>> count(1, "module"), count(1200, "step")
    ('1 module', '1,200 steps')
    """
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def rounded(value: float) -> str:
    """Return a measured value with as many digits as can be compared.

    >>> rounded(0.62), rounded(12.345), rounded(1234.5), rounded(float("nan"))
    ('0.620', '12.35', '1,234.5', 'not finite')
    """
    if not math.isfinite(value):
        return "not finite"
    digits = 3 if abs(value) < 10 else 2 if abs(value) < 1000 else 1
    return f"{value:,.{digits}f}"


def percent_change(start: float, final: float) -> str:
    r"""Return how much a number grew or shrank.

    >>> percent_change(432, 288), percent_change(10, 10), percent_change(0, 1)
    ('−33\xa0%', '±0\xa0%', '')
    """
    if not start:
        return ""
    percent = round(100 * (final / start - 1))
    sign = "+" if percent > 0 else "\N{MINUS SIGN}" if percent < 0 else "±"
    return f"{sign}{abs(percent)}\N{NO-BREAK SPACE}%"


def duration(seconds: float) -> str:
    """Return a time in words.

    >>> duration(0.42), duration(42), duration(192), duration(7500)
    ('0.4 s', '42 s', '3 min 12 s', '2 h 05 min')
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def budget(run: RunRecord) -> str:
    """Return the budget as the user gave it, for example `average rank 8`, or as the trace records it."""
    if not run.finished and run.trace and run.trace.target is not None:
        return f"{run.trace.target:,} {run.trace.unit}"
    return in_words(run.plan.budget) or "none"


def loading_code(run: RunRecord) -> str:
    """Return the lines that load the adapter with PEFT alone.

    The names stand in the code as JSON strings, which are Python strings too.
    """
    auto = TASKS[_task(run)].model_class if _task(run) in TASKS else "AutoModel"
    base = str(run.plan.provenance.get("base_model") or run.section("model").get("name") or "BASE_MODEL")
    lines = ["from peft import PeftModel", f"from transformers import {auto}", ""]
    if base.startswith("demo:"):
        lines.append(f"# {base} came with a package; write the folder or hub name of the same model here.")
    lines.append(f"base = {auto}.from_pretrained({json.dumps(base)}{_labels_argument(run)})")
    lines.append(f"model = PeftModel.from_pretrained(base, {json.dumps(adapter_path(run))})")
    return "\n".join(lines)


def adapter_path(run: RunRecord) -> str:
    """Return the adapter's folder, as the user named the run."""
    return (run.path / "adapter").as_posix()


def _labels_argument(run: RunRecord) -> str:
    """The argument that sizes a classification head, from the configuration that the run keeps, or from its recipe."""
    if _task(run) not in TASKS or not TASKS[_task(run)].labelled:
        return ""
    labels = run.section("data").get("labels")
    config = run.path / "model" / "config.json"
    if config.exists():
        labels = list(mapping(read_object(config).get("id2label")))
    if labels is None:
        return ""
    return f", num_labels={len(labels) if isinstance(labels, list) else 1}"


def metric_values(run: RunRecord) -> dict[str, float]:
    """Return the run's metric on the test data, on the validation data, and its reference values, in this order.

    What was not measured is left out.
    """
    metric = str(run.metrics.get("metric", ""))
    values = {}
    for data in ("test", "validation"):
        results = run.metrics.get(data)
        if isinstance(results, dict) and metric in results:
            values[data] = number(results[metric])
    references = run.metrics.get("reference")
    if isinstance(references, dict):
        values |= {name: number(value) for name, value in references.items() if value is not None}
    return values
