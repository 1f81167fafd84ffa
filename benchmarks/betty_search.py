"""AutoLoRA's search as published, driven by the betty package (`betty-ml`): the peer of our AutoLoRA.

The settings are those of the published code: the outer problem is the logits, on validation data; the inner one the
LoRA weights, on training data, with the finite difference of DARTS, one unrolled step, and roll-back. betty declares
Python < 3.11 but runs on later ones; it is installed with --ignore-requires-python.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from contenders import Setting, Step
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn


class Logits(nn.Module):
    """One vector of logits for each adapted layer."""

    def __init__(self, layers: int, rank: int, device: str) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.zeros(layers, rank, device=device))


class BettySearch(Step):
    """LoRA whose rank-one parts are weighted by softmax(logits)."""

    def prepare(self) -> None:
        logging.getLogger("betty").disabled = True  # it logs to stdout
        from betty.configs import Config, EngineConfig
        from betty.engine import Engine
        from betty.problems import ImplicitProblem

        class Trainable(ImplicitProblem):
            """Only what requires a gradient, as in the copy of betty that the published code carries."""

            def trainable_parameters(self) -> list[nn.Parameter]:
                return [p for p in self.module.parameters() if p.requires_grad]

        self.layers = [m for m in self.model.modules() if isinstance(m, LoraLayer)]
        self.logits = Logits(len(self.layers), self.setting.rank, self.setting.device)
        for index, layer in enumerate(self.layers):
            layer.lora_A["default"].register_forward_hook(self._weigh(index))
        batches = {name: [self.setting.shape.inputs(self.setting.device, seed=s)] for name, s in (("t", 0), ("v", 2))}
        problems = {}
        weights = [p for p in self.model.parameters() if p.requires_grad]
        for name, module, parameters, config in (
            ("v", self.logits, self.logits.parameters(), Config(retain_graph=True)),
            ("t", self.model, weights, Config(type="darts", unroll_steps=1)),
        ):
            problem = type(name, (Trainable,), {"training_step": lambda _, batch: self.model(**batch).loss})
            optimizer = torch.optim.Adam(parameters, lr=3e-4)
            problems[name] = problem(
                name=name, config=config, module=module, optimizer=optimizer, train_data_loader=batches[name]
            )
        outer, inner = problems["v"], problems["t"]
        self.engine = Engine(
            config=EngineConfig(train_iters=1, roll_back=True, strategy=_strategy(self.setting.device)),
            problems=[outer, inner],
            dependencies={"u2l": {outer: [inner]}, "l2u": {inner: [outer]}},
        )
        self.engine.train()

    def _weigh(self, index: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return output * torch.softmax(self.logits.values[index], 0).to(output.dtype)

        return hook

    def step(self) -> Tensor:
        self.engine.global_step += 1
        self.engine.train_step()
        return torch.zeros(())

    def check(self, steps: int = 5) -> None:
        logits, losses = self.logits.values.detach().clone(), []
        for _ in range(steps):
            with torch.no_grad():
                losses.append(self.loss().item())
            self.step()
        if not losses[-1] < losses[0] or abs(losses[0] - self.base_loss.item()) > 5e-2:
            raise AssertionError(f"the loss starts at {self.base_loss.item()} and does not fall: {losses}")
        moved = (self.logits.values.detach() != logits).any(1)
        if not moved.all():
            raise AssertionError(f"the logits of {int((~moved).sum())} layers do not move")


def _strategy(device: str) -> str:
    return "gpu" if device == "cuda" else "cpu"


def build(setting: Setting) -> Step:
    """Return the contender; raises where betty is not installed."""
    return BettySearch(setting)
