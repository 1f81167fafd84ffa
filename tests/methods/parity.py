"""How far the first optimizer steps move the weights, of plain LoRA and of any method: what parity tests share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from itertools import islice
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from loralloc import attach
from loralloc.methods.base import Method
from loralloc.training.run import AllocationRun

Optimizer = Callable[[Sequence[Tensor]], torch.optim.Optimizer]
Layers = Sequence[tuple[int, int]]  # in, out


class Parallel(nn.Module):
    """One layer of every shape, side by side; returns its loss as transformers' models do."""

    def __init__(self, shapes: Layers) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.layers = nn.ModuleList(nn.Linear(i, o, bias=False) for i, o in shapes)
        for layer in self.layers:
            draw = torch.randn(layer.weight.shape, generator=generator)
            layer.weight.data = draw / math.sqrt(layer.in_features)

    def forward(self, inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Any:
        outputs = [layer(x) for layer, x in zip(self.layers, inputs, strict=True)]
        return SimpleNamespace(loss=sum(((y - target) ** 2).mean() for y, target in zip(outputs, targets, strict=True)))


def batches(shapes: Layers, seed: int) -> Iterator[dict[str, list[Tensor]]]:
    """Batches of 32 towards weights 30 % away: gradients are noisy, and ten steps do not reach the goal."""
    generator = torch.Generator().manual_seed(100 + seed)
    goals = [0.3 * torch.randn(o, i, generator=generator) / math.sqrt(i) for i, o in shapes]
    base = [layer.weight.detach() for layer in Parallel(shapes).layers]
    while True:
        inputs = [torch.randn(32, i, generator=generator) for i, _ in shapes]
        yield {"inputs": inputs, "targets": [x @ (W + goal).T for x, W, goal in zip(inputs, base, goals, strict=True)]}


def regression(shapes: Layers, seed: int) -> Callable[[PeftModel], Tensor]:
    """The loss of a model on one batch after the other."""
    endless = batches(shapes, seed)
    return lambda model: model(**next(endless)).loss


def made(method: Method, shapes: Layers, seed: int, steps: int) -> Method:
    """The method, with batches that come after the steps where it looks at any."""
    if "validation" not in {field.name for field in fields(method)}:  # type: ignore[arg-type]
        return method
    return replace(method, validation=list(islice(batches(shapes, seed), steps, steps + 4)))  # type: ignore[type-var]


@torch.no_grad()
def updates(model: PeftModel, run: AllocationRun | None) -> Tensor:
    """‖ΔW‖ of every layer."""
    norms = []
    for k, layer in enumerate(model.base_model.model.layers):
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        scale = layer.scaling["default"] if run is None else run.sites[k].gate * run.sites[k].scale
        norms.append(torch.linalg.matrix_norm((B * scale) @ A))
    return torch.stack(norms)


def first_steps(
    shapes: Layers,
    rank: int,
    method: Method | None,
    optimizer: Optimizer,
    at: Sequence[int],
    seed: int = 1,
    scaling: float = 2.0,
) -> Tensor:
    """‖ΔW‖, [steps, layers], of plain LoRA (no method) or an allocation."""
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=scaling * rank, target_modules=r"layers\.\d+")  # type: ignore[arg-type]
    model = get_peft_model(Parallel(shapes), config)  # type: ignore[arg-type]
    assert isinstance(model, PeftModel)
    run = None if method is None else attach(model, made(method, shapes, seed, max(at)), 1000)
    optim, loss, norms = optimizer([p for p in model.parameters() if p.requires_grad]), regression(shapes, seed), []
    for t in range(max(at)):
        optim.zero_grad()
        loss(model).backward()
        if run is not None:
            run.before_step(optim)
        optim.step()
        if run is not None:
            run.after_step(optim)
        if t + 1 in at:
            norms.append(updates(model, run))
    return torch.stack(norms)
