"""Run folders of strangers, reported on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from hypothesis import strategies as st

from drills.attempt import Place, attempts
from drills.grammar import FILES, as_json, damaged, mutated, put
from drills.outcome import Outcome
from drills.plans import NAMES, PLAN

COUNT = len(NAMES)
TRACE: list[Any] = [
    {
        "event": "start",
        "step": 0,
        "label": "AdaLoRA",
        "total_steps": 20,
        "sites": list(NAMES),
        "in": [8] * COUNT,
        "out": [8] * COUNT,
        "ranks": [4] * COUNT,
        "phases": [["warm-up", 1, 5], ["allocation", 6, 15], ["final", 16, 20]],
        "unit": "ranks",
        "costs": [1] * COUNT,
        "start_budget": 4 * COUNT,
        "target_budget": 2 * COUNT,
    },
    {"event": "allocate", "step": 10, "budget": 3 * COUNT, "ranks": [3] * COUNT, "parameters": 200},
    {"event": "bad_step", "step": 12},
    {"event": "freeze", "step": 15, "budget": 2 * COUNT, "ranks": [2] * COUNT, "parameters": 128},
    {"event": "finish", "step": 20, "ranks": [2] * COUNT, "parameters": 128},
]
LOG: list[Any] = [
    {"step": step, "loss": 1.0 / step, "learning_rate": 1e-3, "budget": 12, "grad_norm": 0.5} for step in (1, 5, 10, 20)
] + [{"step": 20, "eval_loss": 0.5}]
METRICS: dict[str, Any] = {
    "task": "sequence-classification",
    "metric": "accuracy",
    "validation": {"loss": 0.5, "accuracy": 0.8},
    "test": {"loss": 0.5, "accuracy": 0.8},
    "also": {"other": {"accuracy": 0.7}},
    "reference": {"majority": 0.5},
    "classes": {"good": 10, "bad": 5},
    "train_seconds": 12.5,
    "adapter_check": 1e-6,
    "adapter_check_allowed": 1e-5,
    "cuts": [{"average_rank": 1.0, "metrics": {"loss": 0.6}}],
    "generation": {"trained": {"bleu": 1.0}, "untrained": {"bleu": 0.5}, "samples": [{"prompt": "a", "after": "b"}]},
}
CONFIG: dict[str, Any] = {"id2label": {"0": "bad", "1": "good"}}
RECIPE = (
    "task: sequence-classification\nmodel:\n  name: base\ndata:\n  labels: [bad, good]\nmethod:\n  name: adalora\n",
    "a: &a [x, x]\nb: &b [*a, *a]\ntask: *b\n",
    "task: {" + "a: {" * 30 + "}" * 31 + "\n",
    "method: [1]\nmodel: 3\ntask: [a]\n",
)


class Case(NamedTuple):
    """The files of a run folder, each with what it is; and what `figures` is."""

    files: dict[str, tuple[bytes, str]]
    figures: str


def lines(rows: Sequence[Any]) -> str:
    """Return rows as JSONL."""
    return "".join(f"{as_json(row)}\n" for row in rows)


@st.composite
def _cases(draw: st.DrawFn) -> Case:
    texts = {
        "ranks.json": as_json(draw(mutated(PLAN, 2))),
        "trace.jsonl": lines(draw(mutated(TRACE, 2))),
        "log.jsonl": lines(draw(mutated(LOG, 2))),
        "metrics.json": as_json(draw(mutated(METRICS, 3))),
        "model/config.json": as_json(draw(mutated(CONFIG, 1))),
        "recipe.yaml": draw(st.sampled_from(RECIPE)),
    }
    spoiled = draw(st.sampled_from(list(texts)))  # else too few would ever be read to their ends
    files = {name: (text.encode("utf-8", "surrogatepass"), "as it is") for name, text in texts.items()}
    files = {name: file for name, file in files.items() if draw(st.integers(0, 5))}
    files[spoiled] = (draw(damaged(texts[spoiled])), draw(FILES))
    return Case(files, draw(st.sampled_from(["missing"] * 8 + ["link out", "link to a folder", "file", "links in it"])))


def _run(place: Place, case: Case) -> None:
    from loralloc.report import write_report

    for name, (content, kind) in case.files.items():
        put(place.inside / name, content, kind, place.outside)
    figures = place.inside / "figures"
    if case.figures == "link to a folder":
        figures.symlink_to(place.outside.parent)
    elif case.figures == "links in it":
        figures.mkdir()
        for name in ("ranks", "budget", "loss"):
            (figures / f"{name}.png").symlink_to(place.outside)
    elif case.figures == "file":
        figures.write_text("x")
    else:
        put(figures, b"", case.figures, place.outside)
    write_report(place.inside)


def drill(seed: int, cases: int) -> Outcome:
    """Write reports; nothing outside of the folder is read or written."""
    import matplotlib.figure
    import matplotlib.pyplot  # noqa: F401 - seconds, which are no attempt's

    import loralloc.report.page  # noqa: F401

    return attempts("run folders", _cases(), _run, cases, seed)
