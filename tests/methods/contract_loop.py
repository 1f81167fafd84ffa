"""The loop that the contract tests train in, on the tiny models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from models import labelled_batch, tiny_peft
from peft import PeftModel
from torch import Tensor

from loralloc import Budget, attach
from loralloc.methods.base import Method

STEPS = 18
HALF = Budget(average_rank=2)  # of 4
NAN = float("nan")


def adamw(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.01)


def momentum(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01)


def with_data(method: Method, name: str) -> Method:
    """A method that looks at validation data, with batches of this model."""
    if "validation" not in {field.name for field in fields(method)}:  # type: ignore[arg-type]
        return method
    return replace(method, validation=[labelled_batch(name, seed=900 + i) for i in range(3)])  # type: ignore[type-var]


class Loop:
    """The loop of `attach`'s documentation, on batches that depend on the step alone."""

    def __init__(
        self,
        method: Callable[[Budget], Method],
        name: str,
        budget: Budget = HALF,
        *,
        seed: int = 0,
        optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] = adamw,
        dtype: torch.dtype = torch.float32,
        model: PeftModel | None = None,
    ) -> None:
        self.name = name
        self.model = tiny_peft(name, dtype=dtype) if model is None else model
        torch.manual_seed(seed)
        self.run = attach(self.model, with_data(method(budget), name), STEPS)
        self.events: list[dict[str, Any]] = []
        self.run.on_event = self.events.append
        self.trainable = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = optimizer(list(self.trainable.values()))
        self.losses: list[float] = []

    def backward(self, parts: int = 1) -> None:
        """One batch of 8 samples, or as many smaller ones whose losses are averaged."""
        self.optimizer.zero_grad()
        batch = batch_of_8(self.name, self.run.step)
        total = 0.0
        for part in zip(*(value.chunk(parts) for value in batch.values()), strict=True):
            loss = self.model(**dict(zip(batch, part, strict=True))).loss / parts
            loss.backward()
            total += loss.item()
        self.losses.append(total)

    def update(self) -> bool:
        sound = self.run.before_step(self.optimizer)
        self.optimizer.step()
        self.run.after_step(self.optimizer)
        return sound

    def stumble(self) -> Loop:
        """One step with a gradient that is not a number."""
        self.backward()
        next(iter(self.trainable.values())).grad.fill_(NAN)
        assert self.update() is False
        return self

    def walk(self, until: int = STEPS, parts: int = 1) -> Loop:
        while self.run.step < until:
            self.backward(parts)
            self.update()
        return self

    def open_gates(self) -> list[int]:
        return [int((site.gate * site.scale != 0).sum()) for site in self.run.sites]

    def snapshot(self) -> dict[str, Tensor]:
        """Every number that training moves: weights, optimizer state, scores."""
        tensors = {n: p.detach().clone() for n, p in self.trainable.items()}
        for n, parameter in self.trainable.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{n}.{key}"] = torch.as_tensor(value).clone()
        return tensors | {f"run.{n}": t.clone() for n, t in self.run.state_dict()[0].items()}


def batch_of_8(name: str, step: int) -> dict[str, Tensor]:
    parts = [labelled_batch(name, seed=10 * step + part) for part in range(3)]  # 3 samples each
    return {key: torch.cat([part[key] for part in parts])[:8] for key in parts[0]}


def same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def cost(loop: Loop, ranks: list[int]) -> int:
    return sum(rank * site.cost for rank, site in zip(ranks, loop.run.sites, strict=True))
