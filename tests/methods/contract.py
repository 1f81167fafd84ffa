"""The methods under contract, and the training loop in which they are held to it.

A new method is a new row of `METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import labelled_batch, logits, tiny_peft
from peft import PeftModel
from torch import Tensor

from loralloc import ABLoRA, AdaLoRA, ALLoRA, AutoLoRA, Budget, DepthLinear, Random, Truncate, Uniform, attach
from loralloc.gating import Site
from loralloc.methods.base import Method
from loralloc.peft_layers import PREFIX

STEPS, WARMUP, COOLDOWN = 18, 2, 7
FREEZE = STEPS - COOLDOWN + 1  # the first step of the final phase
HALF = Budget(average_rank=2)  # of 4
PHASES: dict[str, Any] = {"warmup": WARMUP, "cooldown": COOLDOWN, "interval": 1}

UNSEEN = [{}]
"""Stands for validation batches, which depend on the model: see `made`."""

ROUNDS: dict[str, Any] = {"warmup": 3, "interval": 5, "rounds": 3, "samples": 12}  # after steps 2, 7 and FREEZE

METHODS: Mapping[str, Callable[[Budget], Method]] = {
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
    "allora-truncate": lambda budget: ALLoRA(allocate=Truncate(budget)),
    "autolora": lambda budget: AutoLoRA(UNSEEN, logit_learning_rate=0.01),
    "autolora-published": lambda budget: AutoLoRA.as_published(UNSEEN, logit_learning_rate=0.01),
    "autolora-budget": lambda budget: AutoLoRA(UNSEEN, budget, mode="first_order", check_every=3),
    "uniform": Uniform,
    "random": lambda budget: Random(budget, rank_seed=4),
    "depth_linear": DepthLinear,
    "truncate": Truncate,
}
DECIDES = {
    "adalora": "while training",
    "ablora": "while training",
    "allora": "never",
    "autolora": "by a search",
    "truncate": "at the end",
}
"""When a method chooses ranks, by its id; before the first step unless it is named here.

A search keeps all ranks open, trains their gates itself and tells as it goes what it would keep; the end closes the
ranks of the lowest gates.
"""

INF, NAN = float("inf"), float("nan")
MODELS = ("llama", "bert")  # causal language model and sequence classification


def allocator(method: Method) -> Method:
    """The method that chooses the ranks: where one composes with another, the other one."""
    inner = getattr(method, "allocate", None)
    return method if inner is None else allocator(inner)


def decides(method: Method) -> str:
    return DECIDES.get(allocator(method).id, "at the start")


def made(method: Callable[[Budget], Method], budget: Budget, name: str) -> Method:
    """The method, with validation batches of the model where it looks at any."""
    built: Any = method(budget)
    inner: Any = allocator(built)
    if getattr(inner, "validation", None) is None:
        return built
    seeing = replace(inner, validation=[batch_of_8(name, 100 + index) for index in range(3)])
    return seeing if inner is built else replace(built, allocate=seeing)


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


def marks(row: str) -> Any:
    return pytest.mark.slow if row in SLOW else ()


FREEZING = [pytest.param(row, marks=marks(row)) for row in METHODS if decides(METHODS[row](HALF)) == "while training"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every method on some model, those with most to get wrong on both."""
    asked = [name for name in ("method", "name") if name in metafunc.fixturenames]
    cases = []
    for number, (method, make) in enumerate(METHODS.items()):
        models = MODELS if method in ON_BOTH_MODELS else (MODELS[number % 2],)
        for model in models if asked == ["method", "name"] else (None,):
            values = (make,) if model is None else (make, model)
            cases.append(pytest.param(*values, id="-".join(filter(None, (method, model))), marks=marks(method)))
    if asked[:1] == ["method"]:
        metafunc.parametrize(asked, cases)


def adamw(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.01)


def momentum(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01)


def fresh_model(
    method: Callable[[Budget], Method], name: str, budget: Budget = HALF, *, dtype: torch.dtype = torch.float32
) -> PeftModel:
    """A tiny model for a method; ALLoRA takes no scaling factor, and ABLoRA's is relative to the starting ranks."""
    built = method(budget)
    alpha: float = 6
    if built.id == "allora":
        inner = attach(tiny_peft(name), allocator(built), STEPS).state if allocator(built).id == "ablora" else None
        alpha = 4 if inner is None else inner.start
    return tiny_peft(name, lora_alpha=alpha, dtype=dtype)


@torch.no_grad()
def redraw(model: PeftModel) -> None:
    """Draw every A anew, from the generator as it stands."""
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            torch.nn.init.kaiming_uniform_(parameter, a=5**0.5)


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
        steps: int = STEPS,
    ) -> None:
        self.name = name
        self.model = fresh_model(method, name, budget, dtype=dtype) if model is None else model
        torch.manual_seed(seed)
        if seed:
            redraw(self.model)  # the base stays: what differs then comes from the adapter and the method's own draws
        self.run = attach(self.model, made(method, budget, name), steps)
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

    @property
    def decides(self) -> str:
        return decides(self.run.method)

    @property
    def has_threshold(self) -> bool:
        """Whether the ranks that stay are those above a threshold, however many: there is no budget."""
        return self.decides == "by a search" and self.run.method.budget is None

    @property
    def by_the_optimizer(self) -> list[str]:
        """What the optimizer moves: all that is trained, but for gates that are a search's."""
        return [n for n in self.trainable if self.decides != "by a search" or "lora_gate" not in n]

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


def totals(loop: Loop) -> range:
    """How many ranks may stay of 4 in every module, with a budget of half of them."""
    least, most = (1, 4) if loop.has_threshold else (4, 4) if loop.decides == "never" else (2, 2)
    return range(least * len(loop.run.sites), most * len(loop.run.sites) + 1)


def cost(loop: Loop, ranks: list[int]) -> int:
    return sum(rank * site.cost for rank, site in zip(ranks, loop.run.sites, strict=True))


def meets(loop: Loop, ranks: list[int], limit: int) -> bool:
    """In ranks exactly; in parameters never above, and no further rank fits."""
    if loop.run.unit == "ranks":
        return sum(ranks) == limit
    spare = limit - cost(loop, ranks)
    cheapest = min(
        (site.cost for site, rank in zip(loop.run.sites, ranks, strict=True) if rank < site.rank), default=spare + 1
    )
    return 0 <= spare < cheapest


def may_stay(loop: Loop, ranks: list[int]) -> bool:
    """Whether these ranks may be a run's last: they meet its target; a threshold leaves some in every module."""
    if loop.has_threshold:
        return all(1 <= rank <= site.rank for rank, site in zip(ranks, loop.run.sites, strict=True))
    return meets(loop, ranks, loop.run.target)


def without_lowest_gates(loop: Loop, ranks: Mapping[str, int]) -> Tensor:
    """Logits of the model with so many ranks, those of the highest gates, in every module; on a copy."""
    model = deepcopy(loop.model)
    for site in loop.run.sites:
        copied = Site(site.name, model.get_submodule(PREFIX + site.name), site.adapter)
        copied.gate.data[copied.gate.argsort()[: site.rank - ranks[site.name]]] = 0
    return logits(model)
