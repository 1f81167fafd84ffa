"""What every method promises (`loralloc.testing`), over one table of methods and two kinds of models.

A new method is a new row of `METHODS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from models import tiny_peft

from loralloc import ABLoRA, AdaLoRA, ALLoRA, AutoLoRA, Budget, DepthLinear, Random, Truncate, Uniform, attach
from loralloc.methods.base import Method
from loralloc.testing import MethodContract
from loralloc.testing.contract import BUDGETS
from loralloc.testing.hooks import Make, allocator
from loralloc.testing.loop import COOLDOWN, FREEZE, HALF, STEPS, UNSEEN

pytestmark = pytest.mark.filterwarnings("ignore:ALLoRA.*AdamW")  # tests/methods/test_allora.py is about it

PHASES: dict[str, Any] = {"warmup": 2, "cooldown": COOLDOWN, "interval": 1}
ROUNDS: dict[str, Any] = {"warmup": 3, "interval": 5, "rounds": 3, "samples": 12}  # after steps 2, 7 and FREEZE
RECOVERY = STEPS - FREEZE - 1

METHODS: Mapping[str, Make] = {
    "adalora": lambda budget: AdaLoRA(budget, **PHASES),
    "adalora-reference": lambda budget: AdaLoRA(budget, order="reference", **PHASES),
    "adalora-published": lambda budget: AdaLoRA.as_published(budget, penalty="paper", **PHASES),
    "ablora": lambda budget: ABLoRA(budget, UNSEEN, **ROUNDS),
    "ablora-published": lambda budget: ABLoRA.as_published(budget, UNSEEN, **ROUNDS),
    "ablora-taylor": lambda budget: ABLoRA(budget, UNSEEN, mode="taylor", scope="block", n_prune=2, **ROUNDS),
    "ablora-gate": lambda budget: ABLoRA(budget, score="gate", **ROUNDS),
    "ablora-sensitivity": lambda budget: ABLoRA(budget, score="sensitivity", **ROUNDS),
    "allora": lambda budget: ALLoRA(),
    "allora-hybrid": lambda budget: ALLoRA(mode="hybrid"),
    "allora-post": lambda budget: ALLoRA(mode="post"),
    "allora-adalora": lambda budget: ALLoRA(mode="hybrid", allocate=AdaLoRA(budget, **PHASES)),
    "allora-ablora": lambda budget: ALLoRA(mode="post", allocate=ABLoRA(budget, UNSEEN, **ROUNDS)),
    "allora-truncate": lambda budget: ALLoRA(allocate=Truncate(budget, recover=RECOVERY)),
    "autolora": lambda budget: AutoLoRA(UNSEEN, logit_learning_rate=0.01),
    "autolora-published": lambda budget: AutoLoRA.as_published(UNSEEN, logit_learning_rate=0.01),
    "autolora-budget": lambda budget: AutoLoRA(UNSEEN, budget, mode="first_order", check_every=3),
    "uniform": Uniform,
    "random": lambda budget: Random(budget, rank_seed=4),
    "depth_linear": DepthLinear,
    "truncate": lambda budget: Truncate(budget, recover=RECOVERY),
    "truncate-at-end": lambda budget: Truncate(budget, recover=0),
}
DECIDES = {
    "adalora": "while training",
    "ablora": "while training",
    "allora": "never",
    "autolora": "by a search",
    "truncate": "while training",
}
"""When a method chooses ranks, by its id; before the first step unless it is named here."""
AT_THE_END = "truncate-at-end"

MODELS = ("llama", "bert")  # causal language model and sequence classification
ON_BOTH_MODELS = ("adalora", "adalora-reference", "adalora-published")
SLOW = (
    "adalora-reference",
    "adalora-published",
    "ablora-published",
    "ablora-taylor",
    "ablora-gate",
    "ablora-sensitivity",
    "allora-hybrid",
    "allora-post",
    "allora-ablora",
    "allora-truncate",
    "autolora-published",
    "autolora-budget",
    "uniform",
    "depth_linear",
)
"""Rows that differ from a neighbour by little: they run with the slow tests."""


class TestContract(MethodContract):
    methods = METHODS

    @pytest.fixture(autouse=True)
    def _on_device(self, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(TestContract, "device", device)

    def models(self, row: str) -> Sequence[str]:
        """One model in turn; those with most to get wrong on both."""
        return MODELS if row in ON_BOTH_MODELS else (MODELS[list(METHODS).index(row) % 2],)

    def marks(self, row: str) -> Any:
        return pytest.mark.slow if row in SLOW else ()

    def lora_alpha(self, method: Method) -> float:
        """ALLoRA takes no scaling factor, and ABLoRA's is relative to the starting ranks."""
        if method.id != "allora":
            return super().lora_alpha(method)
        inner = allocator(method)
        return attach(tiny_peft("llama"), inner, STEPS).state.start if inner.id == "ablora" else 4

    def refusal(self, method: Method, budget: Budget) -> str | None:
        """ABLoRA moves ranks, and needs room for that."""
        cures = {"all": "raise it to 8", "max_rank": "max_rank=2 .* give a budget of fewer ranks beside it"}
        full = next((cure for name, cure in cures.items() if budget is BUDGETS[name]), None)
        moves = allocator(method).id == "ablora"
        return f"the budget fills the whole capacity .*{full}" if moves and full is not None else None

    def least_rank(self, method: Method) -> int:
        """AutoLoRA keeps what has an equal share of a module's at least, which some rank always has."""
        return 1 if method.id == "autolora" else 0


def test_when_methods_choose_ranks_is_told_by_the_methods_themselves() -> None:
    made = {row: make(HALF) for row, make in METHODS.items()}
    told = {row: TestContract().decides(method) for row, method in made.items()}
    expected = {row: DECIDES.get(allocator(method).id, "at the start") for row, method in made.items()}
    assert told == expected | {AT_THE_END: "at the end"}
