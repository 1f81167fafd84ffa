"""The state of an allocation is looked at before it is taken up: what no run can have written is refused in words."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from models import tiny_peft
from torch import Tensor

from loralloc import ABLoRA, AdaLoRA, AutoLoRA, Budget, UserError, attach
from loralloc.methods.base import Method
from loralloc.training.run import AllocationRun

STEPS = 24
BUDGET = Budget(average_rank=2)
BATCH = {"input_ids": torch.tensor([[1, 2, 3, 4]]), "labels": torch.tensor([[1, 2, 3, 4]])}
METHODS: Mapping[str, Method] = {
    "adalora": AdaLoRA(BUDGET),
    "ablora": ABLoRA(BUDGET, [BATCH]),
    "autolora": AutoLoRA([BATCH]),
}
State = tuple[dict[str, Tensor], dict[str, Any]]


def fresh(method: str = "adalora") -> AllocationRun:
    return attach(tiny_peft("llama"), METHODS[method], total_steps=STEPS)


def state(method: str = "adalora") -> State:
    """A state as a file would bring it."""
    tensors, numbers = fresh(method).state_dict()
    return {name: tensor.clone() for name, tensor in tensors.items()}, json.loads(json.dumps(numbers))


def refusal(tensors: Mapping[str, Tensor], numbers: Mapping[str, Any], method: str = "adalora") -> str:
    with pytest.raises(UserError) as refused:
        fresh(method).load_state_dict(tensors, numbers)
    return str(refused.value)


def damaged(reason: str) -> str:
    return f"the allocation's state is damaged: {reason}; resume from another checkpoint"


@pytest.mark.parametrize("method", METHODS)
def test_a_state_as_it_was_written_is_taken_up(method: str) -> None:
    run = fresh(method)
    run.load_state_dict(*state(method))
    assert run.step == 0


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("step", 10**9, "step is 1000000000 and should be a whole number from 0 to 24"),
        ("step", -1, "step is -1 and should be a whole number from 0 to 24"),
        ("step", 3.0, "step is 3.0 and should be a whole number from 0 to 24"),
        ("step", True, "step is True and should be a whole number from 0 to 24"),
        ("bad_steps", 9, "bad_steps is 9 and should be a whole number from 0 to 5"),
        ("bad_in_a_row", 4, "bad_in_a_row is 4 and should be a whole number from 0 to 3"),
        ("ranks", [4], "it does not have one rank for each of 6 modules"),
        ("ranks", None, "it does not have one rank for each of 6 modules"),
        ("peak", 25, "peak is 25 and should be a whole number from 24 to 24"),
        ("budget", -3, "budget is -3 and should be a whole number at least 0"),
        ("budget", float("nan"), "budget is nan and should be a whole number at least 0"),
    ],
)
def test_numbers_out_of_range(key: str, value: Any, reason: str) -> None:
    tensors, numbers = state()
    assert refusal(tensors, {**numbers, "step": 5, "bad_steps": 3, key: value}) == damaged(reason)


@pytest.mark.parametrize("rank", [5, -1, None])
def test_a_rank_above_the_capacity_of_its_module(rank: Any) -> None:
    tensors, numbers = state()
    name = next(iter(numbers["sites"]))
    reason = f"the rank of {name} is {rank!r} and should be a whole number from 0 to 4"
    assert refusal(tensors, {**numbers, "ranks": [rank, *numbers["ranks"][1:]]}) == damaged(reason)


@pytest.mark.parametrize("key", ["step", "ranks", "tensors", "schedule"])
def test_a_number_that_is_missing(key: str) -> None:
    tensors, numbers = state()
    del numbers[key]
    assert refusal(tensors, numbers) == damaged(f"it lacks {key}")


@pytest.mark.parametrize("drawn", [None, {}, {"drawn": -1}])
def test_the_place_in_the_validation_data(drawn: Any) -> None:
    tensors, numbers = state("autolora")
    assert "the number of batches drawn is" in refusal(tensors, {**numbers, "data": drawn}, "autolora")


@pytest.mark.parametrize(
    ("method", "name", "spoil", "reason"),
    [
        ("adalora", "0.mean", lambda t: None, "the tensor 0.mean is missing"),
        ("adalora", "9.mean", lambda t: torch.ones(2), "the tensor 9.mean is unexpected"),
        ("adalora", "0.mean", lambda t: t.fill_(torch.nan), "0.mean holds numbers that are not finite"),
        ("adalora", "0.uncertainty", lambda t: t.fill_(torch.inf), "0.uncertainty holds numbers that are not finite"),
        ("adalora", "0.mean", lambda t: t[:1], "0.mean is float32 [1, 4, 16], and was written as float32"),
        ("ablora", "open", lambda t: t[:1], "open is bool [1], and was written as bool [24]"),
        ("ablora", "born", lambda t: t.float(), "born is float32 [24], and was written as int64 [24]"),
        ("autolora", "logits", lambda t: t[:1], "logits is float32 [1], and was written as float32 [24]"),
        ("autolora", "mean", lambda t: t.fill_(torch.nan), "mean holds numbers that are not finite"),
    ],
)
def test_tensors_that_are_not_as_they_were_written(
    method: str, name: str, spoil: Callable[[Any], Any], reason: str
) -> None:
    tensors, numbers = state(method)
    spoilt = spoil(tensors.get(name))
    changed = {key: tensor for key, tensor in {**tensors, name: spoilt}.items() if tensor is not None}
    assert refusal(changed, numbers, method).startswith(damaged(reason).partition(";")[0].removesuffix("float32"))


def test_tensors_of_another_shape_than_the_run_has_do_not_spread_over_its_own() -> None:
    """Of a record that fits them, too: copying would broadcast."""
    tensors, numbers = state()
    tensors["0.mean"] = tensors["0.mean"][:, :1]
    numbers["tensors"]["0.mean"][1] = list(tensors["0.mean"].shape)
    assert re.search(
        r"0\.mean is float32 \[\d+, 1, 16\], and this run has float32 \[\d+, 4, 16\]", refusal(tensors, numbers)
    )
