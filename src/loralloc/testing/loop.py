"""The training loop in which methods are held to their contract, and what may be expected of a run in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor

from loralloc.budget import Budget
from loralloc.gating import Site
from loralloc.methods.base import Method
from loralloc.methods.settings import settings
from loralloc.peft_layers import PREFIX
from loralloc.testing.models import labelled_batch, logits, on_device_of
from loralloc.training.run import attach

STEPS, COOLDOWN = 18, 7
FREEZE = STEPS - COOLDOWN + 1  # the first step of the final phase, where there is one
HALF = Budget(average_rank=2)  # of 4

UNSEEN = [{}]
"""Stands for examples that a method looks at: `with_examples` puts batches of the model in their place."""

Decides = Literal["at the start", "while training", "at the end", "as it goes", "by a search", "never"]
"""When a method chooses ranks.

* at the start: before the first step
* while training: on its schedule; the ranks are final before the run ends
* at the end: when the run is finished; all ranks are open until then
* as it goes: gates become 0, and may come back, in any step, which it tells by a decision; the end closes what is 0, or
  all but the largest gates under a budget
* by a search: it trains the gates itself and tells as it goes what it would keep; the end closes the lowest gates
* never: every rank stays
"""


def adamw(parameters: list[Tensor]) -> torch.optim.Optimizer:
    """Adam with the defaults that most runs have."""
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.01)


def momentum(parameters: list[Tensor]) -> torch.optim.Optimizer:
    """Gradient descent with momentum, which moves weights even if their gradient is zero."""
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01)


def batch_of_8(name: str, step: int) -> dict[str, Tensor]:
    """The batch of a step, which depends on nothing else."""
    parts = [labelled_batch(name, seed=10 * step + part) for part in range(3)]  # 3 samples each
    return {key: torch.cat([part[key] for part in parts])[:8] for key in parts[0]}


def with_examples(method: Method, name: str) -> Method:
    """Give a method batches of the model to look at, where it looks at any."""
    given: dict[str, Any] = {}
    for setting in settings(type(method)):
        value = getattr(method, setting.name)
        if setting.examples is not None and value is not None:
            given[setting.name] = [batch_of_8(name, 100 + index) for index in range(3)]
        elif setting.allocator and value is not None:
            given[setting.name] = with_examples(value, name)
    return replace(method, **given) if given else method  # type: ignore[type-var]


@torch.no_grad()
def redraw(model: PeftModel) -> None:
    """Draw every A anew, from the generator as it stands."""
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            torch.nn.init.kaiming_uniform_(parameter, a=5**0.5)


class Loop:
    """The loop of `attach`'s documentation, on batches that depend on the step alone.

    Args:
        method: The method.
        model: A model with a fresh adapter.
        name: Its name in `TINY`, which its batches are for.
        decides: When the method chooses ranks.
        least_rank: The fewest ranks that it leaves to a module where no budget says how many stay.
        seed: Of the adapter and of the method's own draws; the base model is the same for all.
        optimizer: Makes the optimizer of what is trained.
        steps: Steps that the run is planned for.
    """

    def __init__(
        self,
        method: Method,
        model: PeftModel,
        name: str,
        *,
        decides: Decides,
        least_rank: int = 0,
        seed: int = 0,
        optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] = adamw,
        steps: int = STEPS,
    ) -> None:
        self.model, self.name, self.decides, self.least_rank = model, name, decides, least_rank
        torch.manual_seed(seed)
        if seed:
            redraw(model)
        self.run = attach(model, method, steps)
        self.events: list[dict[str, Any]] = []
        self.run.on_event = self.events.append
        self.trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.optimizer = optimizer(list(self.trainable.values()))
        self.losses: list[float] = []

    def backward(self, parts: int = 1) -> None:
        """Go through one batch of 8 samples, or as many smaller ones whose losses are averaged."""
        self.optimizer.zero_grad()
        batch = on_device_of(self.model, batch_of_8(self.name, self.run.step))
        total = 0.0
        for part in zip(*(value.chunk(parts) for value in batch.values()), strict=True):
            loss = self.model(**dict(zip(batch, part, strict=True))).loss / parts
            loss.backward()
            total += loss.item()
        self.losses.append(total)

    def update(self) -> bool:
        """Make the step of the gradients that there are; return whether it was sound."""
        sound = self.run.before_step(self.optimizer)
        self.optimizer.step()
        self.run.after_step(self.optimizer)
        assert sound is not None
        return sound

    def stumble(self) -> Loop:
        """Make one step with a gradient that is not a number."""
        self.backward()
        first = next(iter(self.trainable.values()))
        first.grad = torch.full_like(first, float("nan"))
        assert self.update() is False
        return self

    def walk(self, until: int = STEPS, parts: int = 1) -> Loop:
        """Train until so many steps have been made."""
        while self.run.step < until:
            self.backward(parts)
            self.update()
        return self

    @property
    def has_threshold(self) -> bool:
        """Whether the ranks that stay are those above a threshold, however many: there is no budget."""
        return self.decides in ("as it goes", "by a search") and self.run.method.budget is None

    @property
    def by_the_optimizer(self) -> list[str]:
        """What the optimizer moves: everything that is trained, except the gates of a search."""
        return [n for n in self.trainable if self.decides != "by a search" or "lora_gate" not in n]

    def open_gates(self) -> list[int]:
        """Count the ranks of each module that compute something."""
        return [int((site.gate * site.scale != 0).sum()) for site in self.run.sites]

    def snapshot(self) -> dict[str, Tensor]:
        """Copy every number that training moves: weights, optimizer state, scores."""
        tensors = {n: p.detach().clone() for n, p in self.trainable.items()}
        for n, parameter in self.trainable.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{n}.{key}"] = torch.as_tensor(value).clone()
        return tensors | {f"run.{n}": t.clone() for n, t in self.run.state_dict()[0].items()}


def same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    """Whether two snapshots agree bit for bit."""
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def totals(loop: Loop) -> range:
    """How many ranks may stay of 4 in every module, with a budget of half of them."""
    least, most = (loop.least_rank, 4) if loop.has_threshold else (4, 4) if loop.decides == "never" else (2, 2)
    return range(max(1, least * len(loop.run.sites)), most * len(loop.run.sites) + 1)


def _price(site: Site, unit: str) -> int:
    """What one rank costs, counted at its factors."""
    A, B = site.A, site.B
    return {
        "ranks": 1,
        "parameters": A.shape[1] + B.shape[0],
        "bytes": A.shape[1] * A.element_size() + B.shape[0] * B.element_size(),
    }[unit]


def cost(loop: Loop, ranks: list[int]) -> int:
    """Parameters of so many ranks in every module."""
    return sum(rank * site.cost for rank, site in zip(ranks, loop.run.sites, strict=True))


def meets(loop: Loop, ranks: list[int], limit: int) -> bool:
    """Whether ranks meet a budget: in ranks exactly; in parameters and bytes never above, and no further rank fits.

    No module has more than `max_rank` as soon as the limit is one that they can have under it.
    """
    sites, prices = loop.run.sites, [_price(site, loop.run.unit) for site in loop.run.sites]
    cap = getattr(loop.run.method.budget, "max_rank", None)
    most = [site.rank if cap is None else min(site.rank, cap) for site in sites]
    if sum(rank * price for rank, price in zip(most, prices, strict=True)) < limit:
        most = [site.rank for site in sites]
    spare = limit - sum(rank * price for rank, price in zip(ranks, prices, strict=True))
    rows = list(zip(ranks, most, prices, strict=True))
    cheapest = 1 if loop.run.unit == "ranks" else min((p for rank, m, p in rows if rank < m), default=spare + 1)
    return 0 <= spare < cheapest and all(rank <= m for rank, m, _ in rows)


def may_be_open(loop: Loop, ranks: list[int], limit: int) -> bool:
    """Whether so many ranks may be open under the schedule's budget; methods that decide as they go may have fewer."""
    if loop.decides == "as it goes":
        used = zip(ranks, loop.run.sites, strict=True)
        return 0 < sum(rank * _price(site, loop.run.unit) for rank, site in used) <= limit
    return meets(loop, ranks, limit)


def may_stay(loop: Loop, ranks: list[int]) -> bool:
    """Whether these ranks may be a run's last: they meet its target, or are what a threshold may leave."""
    if loop.has_threshold:
        bounds = zip(ranks, loop.run.sites, strict=True)
        return sum(ranks) > 0 and all(loop.least_rank <= rank <= site.rank for rank, site in bounds)
    return meets(loop, ranks, loop.run.target)


def without_lowest_gates(loop: Loop, ranks: Mapping[str, int]) -> Tensor:
    """Logits of the model with so many ranks, those of the largest gates, in every module; on a copy."""
    model = deepcopy(loop.model)
    for site in loop.run.sites:
        copied = Site(site.name, model.get_submodule(PREFIX + site.name), site.adapter)
        copied.gate.data[copied.gate.abs().argsort()[: site.rank - ranks[site.name]]] = 0
    return logits(model)
