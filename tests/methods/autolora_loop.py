"""A small model and training loop for the tests of AutoLoRA: two layers and a head in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.func import functional_call

from loralloc import AutoLoRA, attach
from loralloc.methods.autolora.state import AutoLoRAState

F64 = torch.float64
RANK, STEPS = 4, 40


class Net(nn.Module):
    """6 -> 8 -> 5 -> head, with dropout; returns its loss as transformers' models do."""

    def __init__(self, dropout: float = 0.0, dtype: torch.dtype = F64) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8, dtype=dtype)
        self.second = nn.Linear(8, 5, dtype=dtype)
        self.head = nn.Linear(5, 2, dtype=dtype)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        hidden = torch.tanh(self.second(self.dropout(torch.tanh(self.first(x)))))
        return SimpleNamespace(loss=((self.head(hidden) - y) ** 2).mean())


def net(dropout: float = 0.0, seed: int = 0, dtype: torch.dtype = F64, **lora: Any) -> PeftModel:
    torch.manual_seed(seed)
    settings = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": ["first", "second"], "modules_to_save": ["head"]}
    return get_peft_model(Net(dropout, dtype), LoraConfig(**{**settings, **lora}))


def batch(seed: int, samples: int = 8, dtype: torch.dtype = F64) -> dict[str, Tensor]:
    """Inputs, and what a fixed function makes of them."""
    x = torch.randn(samples, 6, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    y = torch.stack([x[:, 0] * x[:, 1], torch.sin(3 * x[:, 2])], dim=1)
    return {"x": x, "y": y}


HELD_OUT = [batch(1000 + i) for i in range(4)]


def sgd(parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def adamw(parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.5)


class Loop:
    """A loop of one's own, as the documentation of `attach` has it."""

    def __init__(
        self,
        mode: str = "fast",
        model: PeftModel | None = None,
        optimizer: Callable[[Sequence[Tensor]], torch.optim.Optimizer] = sgd,
        method: AutoLoRA | None = None,
        **settings: Any,
    ) -> None:
        self.model = (net() if model is None else model).train()
        method = AutoLoRA(HELD_OUT, mode=mode, **settings) if method is None else method  # type: ignore[arg-type]
        self.run = attach(self.model, method, STEPS)
        self.optimizer = optimizer([p for p in self.model.parameters() if p.requires_grad])
        self.events: list[dict[str, Any]] = []
        self.run.on_event = self.events.append

    @property
    def state(self) -> AutoLoRAState:
        return self.run.state

    def backward(self) -> None:
        self.optimizer.zero_grad()
        self.model(**batch(self.run.step)).loss.backward()

    def update(self) -> None:
        self.run.before_step(self.optimizer)
        self.optimizer.step()
        self.run.after_step(self.optimizer)

    def walk(self, until: int) -> Loop:
        while self.run.step < until:
            self.backward()
            self.update()
        return self

    def last_gradient(self) -> Tensor:
        """The gradient of the logits in the only step that they have taken."""
        assert self.state.updates == 1
        return self.state.mean / (1 - self.run.method.beta1)  # type: ignore[attr-defined]


@dataclass
class Functions:
    """The losses of a loop's model as functions of (weights, gates), on a copy that nothing watches."""

    model: PeftModel
    names: list[str]
    gate_names: list[str]
    weights: list[Tensor]
    gates: list[Tensor]

    @classmethod
    def of(cls, loop: Loop) -> Functions:
        model = deepcopy(loop.model)
        for hooks in (model._forward_pre_hooks, model._forward_hooks):
            hooks.clear()
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        gates = [n for n in parameters if "lora_gate" in n]
        names = [n for n in parameters if n not in gates]
        values = {n: p.detach().clone() for n, p in parameters.items()}
        return cls(model, names, gates, [values[n] for n in names], [values[n] for n in gates])

    def loss(self, data: dict[str, Tensor]) -> Callable[[list[Tensor], list[Tensor]], Tensor]:
        def value(weights: list[Tensor], gates: list[Tensor]) -> Tensor:
            tensors = dict(zip([*self.names, *self.gate_names], [*weights, *gates], strict=True))
            return functional_call(self.model, tensors, kwargs=data).loss

        return value
