"""One round of AB-LoRA against the naive loop: two forward passes for every rank, and one for all."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from contenders import ABLoRA, Setting
from peft.tuners.lora import LoraLayer
from torch import Tensor

WARMUP = 5
"""Steps before the round, so that ranks have something to lose."""


@dataclass(frozen=True)
class Round:
    """What one round took.

    Attributes:
        ranks: Ranks that were scored.
        forwards: Forward passes of the scoring batch that it cost, or their equivalent.
        seconds: Wall clock.
        processor: Processor time.
        pruned: Ranks pruned in each module.
    """

    ranks: int
    forwards: float
    seconds: float
    processor: float
    pruned: list[int]


class BeforeTheRound(ABLoRA):
    """AB-LoRA one step before its first round."""

    mode = "fast"

    def method(self, loralloc: Any) -> Any:
        samples = self.setting.shape.batch
        self.settings = {"warmup": WARMUP, "interval": 1, "rounds": 1, "samples": samples, "mode": self.mode}
        return super().method(loralloc)


def naive_round(step: BeforeTheRound) -> Round:
    """Score every rank exactly as the paper does, on PEFT's layers, and count what would be pruned in each module."""
    factors = [m.lora_B["default"].weight for m in step.model.modules() if isinstance(m, LoraLayer)]
    places = [(index, rank) for index in range(len(factors)) for rank in range(step.setting.rank)]

    @torch.no_grad()
    def score() -> Tensor:
        whole, trained = _loss(step), [B.detach().clone() for B in factors]
        without, alone = [], []
        for index, rank in places:
            factors[index][:, rank] = 0
            without.append(_loss(step))
            factors[index].copy_(trained[index])
        for B in factors:
            B.zero_()
        for index, rank in places:
            factors[index][:, rank] = trained[index][:, rank]
            alone.append(_loss(step))
            factors[index][:, rank] = 0
        for B, before in zip(factors, trained, strict=True):
            B.copy_(before)
        return -whole + torch.stack(without) - torch.stack(alone)  # S is minus the loss

    scores, seconds, processor = _timed(score, step.setting.device)
    pruned = [0] * len(factors)
    for place in scores.argsort()[: step.run.method.n_prune or _types(step)]:
        pruned[places[int(place)][0]] += 1
    return Round(len(places), 2 * len(places) + 1, seconds, processor, pruned)


def our_round(step: BeforeTheRound) -> Round:
    """Time the end of the pending step, which makes the round."""
    _, seconds, processor = _timed(step.after_step, step.setting.device)
    (event,) = [event for event in step.events if "pruned" in event]
    return Round(sum(event["ranks"]), event["forwards"], seconds, processor, event["pruned"])


def compare(setting: Setting, modes: Sequence[str]) -> tuple[Round, dict[str, Round]]:
    """Return (the naive round, ours by mode), all on the same weights and the same samples."""
    steps = {mode: _before_the_round(setting, mode) for mode in modes}
    naive = naive_round(steps[modes[0]])
    return naive, {mode: our_round(step) for mode, step in steps.items()}


def _before_the_round(setting: Setting, mode: str) -> BeforeTheRound:
    step = type("BeforeTheRound", (BeforeTheRound,), {"mode": mode})(setting)
    for _ in range(WARMUP - 1):
        step.step()
    step.loss().backward()
    step.before_step()
    step.optimizer.step()
    return step


def _loss(step: BeforeTheRound) -> Tensor:
    return step.model(**step.validation).loss.double()


def _types(step: BeforeTheRound) -> int:
    """The number of kinds of adapted layers: the paper prunes as many ranks in a round."""
    names = [name for name, m in step.model.named_modules() if isinstance(m, LoraLayer)]
    return len({".".join(part for part in name.split(".") if not part.isdigit()) for name in names})


def _timed(part: Callable[[], Any], device: str) -> tuple[Any, float, float]:
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    wait()
    wall, processor = time.perf_counter(), time.process_time()
    result = part()
    wait()
    return result, time.perf_counter() - wall, time.process_time() - processor
