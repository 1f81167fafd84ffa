"""Steps with a gradient that is not finite: skipped with every method, told while they happen and at the end."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from loralloc.training import bad_steps
from loralloc.training.trainer import PlainTrainer

from .command import PLAIN, RECIPE, done, loralloc, read_json, read_rows, refused
from .deaths import differences, killed_at

Write = Callable[[str], Path]

SEARCH = PLAIN.replace("name: lora", "name: autolora\n  check_every: 2")
TOO_HIGH = 0.5
"""The learning rate from which gradients are not finite, where a test says so."""

pytestmark = pytest.mark.usefixtures("unreported")


@contextmanager
def poisoned(steps: Collection[int], only_above: float = 0.0) -> Iterator[None]:
    """One entry of the gradients of some steps is infinite, at learning rates above a limit."""
    alive = PlainTrainer.training_step

    def step(self: PlainTrainer, model: torch.nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        loss = alive(self, model, *args, **kwargs)
        if self.state.global_step in steps and self.args.learning_rate > only_above:
            next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[0] = torch.inf
        return loss

    with patch.object(PlainTrainer, "training_step", step):
        yield


@pytest.mark.parametrize("text", [RECIPE, PLAIN], ids=["adalora", "lora"])
def test_are_told_at_once_then_once_in_a_while_and_counted(text: str, write: Write) -> None:
    with poisoned({1, 3, 4, 5, 6}):
        said = done("train", write(text), "--steps", 12, "--log_every", 4)
    told = [line.strip() for line in said.splitlines() if "skipped" in line]
    assert told[:3] == [
        "step 1 was skipped: a gradient was not finite",
        "step 5 was skipped (4 so far): a gradient was not finite",
        "5 of 12 steps were skipped: their gradients were not finite",
    ]
    assert re.fullmatch(r"time +\d+ s for 12 steps, 5 of them skipped \(gradients not finite\)", told[3])
    assert read_json(Path("run/metrics.json"))["bad_steps"] == 5
    assert read_json(Path("run/ranks.json"))["provenance"]["bad_steps"] == 5
    events = read_rows(Path("run/trace.jsonl"))
    assert [event["step"] for event in events if event["event"] == "bad_step"] == [1, 3, 4, 5, 6]


def test_a_sound_run_says_nothing_of_them(write: Write) -> None:
    assert "skipped" not in done("train", write(PLAIN), "--steps", 4)
    assert read_json(Path("run/metrics.json"))["bad_steps"] == 0
    assert [event["event"] for event in read_rows(Path("run/trace.jsonl"))] == ["start", "finish"]


@pytest.mark.parametrize("text", [RECIPE, PLAIN], ids=["adalora", "lora"])
def test_more_than_half_is_a_failed_run_that_keeps_what_it_trained(text: str, write: Write, encoder: Path) -> None:
    recipe = write(text)
    with poisoned({0, 2, 3}, only_above=TOO_HIGH):
        message = refused("train", recipe, "--steps", 4, "--learning_rate", 1)
        assert message == (
            "the training failed: 3 of 4 steps were skipped because their gradients were not finite, and more than "
            "half is too many; lower training.learning_rate, which is 1, and start over with --replace; what was "
            "trained is kept in run/trained"
        )
        assert not Path("run/adapter").exists()
        assert not Path("run/metrics.json").exists()
        assert read_json(Path("run/ranks.json"))["provenance"]["bad_steps"] == 3
        base = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2)
        kept = PeftModel.from_pretrained(base, "run/trained")
        assert any(tensor.any() for name, tensor in kept.state_dict().items() if ".lora_B." in name)
        done("train", recipe, "--steps", 4, "--learning_rate", TOO_HIGH, "--replace")
    assert Path("run/adapter/adapter_model.safetensors").exists()
    assert not Path("run/trained").exists()


def test_half_is_not_more_than_half(write: Write) -> None:
    with poisoned({0, 2}):
        done("train", write(PLAIN), "--steps", 4)


@pytest.mark.slow
def test_a_search_that_failed_is_no_search(write: Write) -> None:
    recipe = write(SEARCH)
    with poisoned({0, 2, 3}, only_above=TOO_HIGH):
        message = refused("train", recipe, "--search", 4, "--learning_rate", 1)
        assert message.startswith("the training failed: 3 of 4 steps")
        assert not Path("run/search/ranks.json").exists()
        done("train", recipe, "--search", 4, "--learning_rate", TOO_HIGH, "--replace")
    assert read_json(Path("run/metrics.json"))["bad_steps"] == 0


class TestPlainLoRA:
    """Without an allocation, which has such a guard of its own."""

    @staticmethod
    def moves(monkeypatch: pytest.MonkeyPatch, recipe: Path) -> list[bool]:
        """Whether each of six steps, the third of them poisoned, moved any parameter."""
        seen: list[list[Tensor]] = []
        alive = PlainTrainer.training_step

        def step(self: PlainTrainer, model: torch.nn.Module, *args: Any, **kwargs: Any) -> Tensor:
            seen.append([p.detach().clone() for p in model.parameters() if p.requires_grad])
            return alive(self, model, *args, **kwargs)

        monkeypatch.setattr(PlainTrainer, "training_step", step)
        with poisoned({2}):
            done("train", recipe, "--steps", 6, "--training.warmup", 0)
        return [not all(map(torch.equal, before, after)) for before, after in pairwise(seen)]

    @pytest.mark.parametrize("waits", [True, False])
    def test_a_bad_step_moves_nothing_and_the_others_do(
        self, waits: bool, write: Write, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(bad_steps, "on_host", lambda device: waits)
        assert self.moves(monkeypatch, write(PLAIN)) == [True, True, False, True, True]

    @pytest.mark.slow
    def test_a_resumed_run_counts_those_before_it(self, write: Write) -> None:
        words = ["train", write(PLAIN), "--steps", 12, "--save_every", 2]
        with poisoned({1, 9}):
            done(*words, "--output", "whole")
            with killed_at(5):
                loralloc(*words)
            done(*words, "--resume")
        assert read_json(Path("run/metrics.json"))["bad_steps"] == 2
        assert differences(Path("run"), Path("whole")) == ["recipe.yaml"], "it names the folder"
