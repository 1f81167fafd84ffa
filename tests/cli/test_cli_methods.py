"""`loralloc train` with every method: the plan, the adapter and what is said; and `truncate` on what a run left."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from safetensors.torch import load_file

from .command import done, ranks, read_json, read_rows, refused

HALF = "budget: {average_rank: 2}"
METHODS = {
    "allora": ("{name: allora, eta: 1.41, mode: hybrid}", 4),
    "allora with adalora": (f"{{name: allora, mode: post, allocate: adalora, {HALF}}}", 2),
    "allora with ablora": (f"{{name: allora, mode: hybrid, allocate: ablora, validation: validation, {HALF}}}", 2),
    "uniform": (f"{{name: uniform, {HALF}}}", 2),
    "random": (f"{{name: random, rank_seed: 3, {HALF}}}", 2),
    "depth_linear": (f"{{name: depth_linear, direction: decreasing, {HALF}}}", 2),
    "truncate": (f"{{name: truncate, {HALF}}}", 2),
}
FAST = ("allora with adalora", "truncate")
CASES = [pytest.param(case, marks=() if case in FAST else pytest.mark.slow) for case in METHODS]


@pytest.mark.usefixtures("unreported")
@pytest.mark.parametrize("case", CASES)
def test_trains_allocates_and_exports(case: str, recipe: Path, here: Path) -> None:
    section, average = METHODS[case]
    said = done("train", recipe, "--method", section, "--lora.alpha", 2 if case.endswith("ablora") else 4)
    plan, found = read_json(here / "run" / "ranks.json"), ranks(here / "run")
    assert plan["method"] == case.partition(" ")[0]
    assert sum(found.values()) == 13 * average
    assert plan["provenance"]["settings"].get("rank_seed", 3) == 3
    tensors = load_file(here / "run" / "adapter" / "adapter_model.safetensors")
    stored = {name: len(tensor) for name, tensor in tensors.items() if ".lora_A." in name}
    assert stored == {f"base_model.model.{name}.lora_A.weight": rank for name, rank in found.items() if rank}
    events = [event["event"] for event in read_rows(here / "run" / "trace.jsonl")]
    assert (events[0], events[-1]) == ("start", "finish")
    assert f"{13 * average} over 13 modules" in said


@pytest.mark.slow
@pytest.mark.usefixtures("unreported")
def test_a_resumed_run_is_the_same_run(recipe: Path, here: Path) -> None:
    """ALLoRA has no state of its own: its scales come from the weights that were loaded."""
    words = ("--method", METHODS["allora"][0], "--lora.alpha", 4, "--save_every", 8)
    done("train", recipe, *words)
    adapter = here / "run" / "adapter" / "adapter_model.safetensors"
    whole = load_file(adapter)
    (here / "run" / "metrics.json").unlink()  # as if it had been killed after its last but one checkpoint
    (here / "run" / "checkpoints" / "checkpoint-16").rename(here / "later")
    adapter.unlink()
    done("train", recipe, *words, "--resume")
    resumed = load_file(adapter)
    assert whole.keys() == resumed.keys()
    assert all((whole[name] == resumed[name]).all() for name in whole)


@pytest.mark.usefixtures("unreported")
def test_alloras_warning_reaches_the_user(recipe: Path) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        done("train", recipe, "--method", "{name: allora}", "--lora.alpha", 4, "--steps", 4)
    assert sum("ALLoRA(mode=" in str(warning.message) for warning in said) == 1


@pytest.mark.usefixtures("unreported")
def test_a_share_of_the_base_model_with_a_cap(recipe: Path, here: Path) -> None:
    section = "{name: truncate, budget: {share_of_base: 0.2, max_rank: 1}}"
    said = done("train", recipe, "--method", section, "--steps", 6)
    assert "(budget: share of base 0.2, at most 1 rank a module)" in said
    assert set(ranks(here / "run").values()) == {1}, "the share is more than the cap allows"
    assert read_json(here / "run" / "ranks.json")["budget"] == {"share_of_base": 0.2, "max_rank": 1}


def test_the_adapter_of_a_run_is_truncated(run: Path, here: Path) -> None:
    said = done("truncate", run / "adapter", "--fraction", 0.5, "--output", here / "small")
    assert "50% of the start" in said or "49% of the start" in said or "48% of the start" in said
    assert f"the adapter of this run is {run / 'adapter'}" in refused(
        "truncate", run, "--total_rank", 3, "--output", "other"
    )
