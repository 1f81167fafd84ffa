"""A small model and training loop for the tests of methods: three layers side by side, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from loralloc import AdaLoRA, Budget, attach
from loralloc.methods.base import Method

SHAPES = [(6, 8), (8, 5), (5, 9)]  # in, out
RANK, ALL, TARGET = 4, 12, 6
STEPS, WARMUP, FINAL = 30, 5, 20
FROZEN = FINAL + 1  # the step after which closed ranks are closed for good
SCALING = 2.0

F64 = torch.float64


class Parallel(nn.Module):
    """Linear layers side by side, so that each has a loss of its own."""

    def __init__(self, shapes: Sequence[tuple[int, int]], dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, o, bias=False, dtype=dtype) for i, o in shapes)

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        return [layer(x) for layer, x in zip(self.layers, inputs, strict=True)]


def model_of(shapes: Sequence[tuple[int, int]] = SHAPES, r: int = RANK, seed: int = 0, **lora: Any) -> PeftModel:
    torch.manual_seed(seed)
    config = {"r": r, "lora_alpha": SCALING * r, "target_modules": [str(k) for k in range(len(shapes))], **lora}
    return get_peft_model(Parallel(shapes, F64), LoraConfig(**config))


def method_of(budget: Budget | int = TARGET, published: bool = False, **settings: Any) -> AdaLoRA:
    budget = budget if isinstance(budget, Budget) else Budget(total_rank=budget)
    settings = {"warmup": WARMUP, "cooldown": STEPS - FINAL, "interval": 1, **settings}
    return AdaLoRA.as_published(budget, **settings) if published else AdaLoRA(budget, **settings)


def adam(parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.01)


def sgd(parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01)


class Loop:
    """A training loop towards fixed goals, on inputs that depend on the step alone."""

    def __init__(
        self,
        method: Method,
        model: PeftModel | None = None,
        optimizer: Callable[[Sequence[Tensor]], torch.optim.Optimizer] = adam,
        weights: Sequence[float] | None = None,
    ) -> None:
        self.model = model_of() if model is None else model
        self.run = attach(self.model, method, STEPS)
        self.sites = self.run.sites
        self.optimizer = optimizer([p for p in self.model.parameters() if p.requires_grad])
        generator = torch.Generator().manual_seed(1)
        self.goals = [torch.randn(s.outputs, s.inputs, generator=generator, dtype=F64) for s in self.sites]
        self.weights = [1.0] * len(self.sites) if weights is None else weights

    def inputs(self, step: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(100 + step)
        return [torch.randn(8, s.inputs, generator=generator, dtype=F64) for s in self.sites]

    def loss(self, step: int) -> Tensor:
        inputs = self.inputs(step)
        losses = [
            weight * ((y - x @ goal.T) ** 2).mean()
            for weight, y, x, goal in zip(self.weights, self.model(inputs), inputs, self.goals, strict=True)
        ]
        return torch.stack(losses).sum()

    def backward(self) -> None:
        self.optimizer.zero_grad()
        self.loss(self.run.step).backward()

    def step(self) -> None:
        self.backward()
        self.run.before_step(self.optimizer)
        self.optimizer.step()
        self.run.after_step(self.optimizer)

    def walk(self, until: int = STEPS) -> Loop:
        """Step on until `until` steps are done."""
        while self.run.step < until:
            self.step()
        return self

    @torch.no_grad()
    def outputs(self) -> list[Tensor]:
        return self.model(self.inputs(999))

    def living(self) -> list[list[bool]]:
        return [(site.gate != 0).tolist() for site in self.sites]

    def factors(self) -> list[Tensor]:
        return [leaf.detach().clone() for site in self.sites for leaf in (site.B, site.gate, site.A)]


def count(mask: list[list[bool]]) -> int:
    return sum(sum(row) for row in mask)


def close_to(actual: Any, expected: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
