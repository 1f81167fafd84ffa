"""Controls: ranks that are fixed before training, at the same budget and scale as those that a method allocates.

A method's ranks are worth the effort only if they do better than ranks of the same cost that no method has chosen:

    uniform        the same rank everywhere
    random         ranks drawn at random
    depth_linear   rank proportional to the depth of the layer

Each control is a score per rank; the selection under the budget is the one that every method uses (`allocate`), so a
budget in ranks is met exactly, and one in parameters is never exceeded while no further rank fits. The scores define
only an order and cannot be added up: if ranks differ in cost, they are given out in this order, and a rank that does
not fit is skipped. Under a `max_rank`, a module keeps its first ranks in this order; other modules get the rest.

What makes them comparable: the capacity is `LoraConfig.r`, as for AdaLoRA, and the scale is lora_alpha / `LoraConfig.r`
whatever rank a module gets. (Plain LoRA at rank k would be scaled by lora_alpha / k: another learning rate, not another
allocation.) Ranks above a module's own are closed before the first step, for good.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from loralloc.allocate import keep_within, select
from loralloc.budget import Budget
from loralloc.gating import Site
from loralloc.methods.base import Method, modules_of, split_by_site
from loralloc.methods.guards import check_fresh
from loralloc.naming import places
from loralloc.schedule import ConstantSchedule
from loralloc.setting_types import Seed

Direction = Literal["increasing", "decreasing"]


@dataclass(frozen=True)
class FixedRanks(Method):
    """What the controls share: ranks chosen by `scores` before the first step."""

    budget: Budget

    @abstractmethod
    def scores(self, names: Sequence[str], ranks: Sequence[int]) -> Tensor:
        """Score every rank of modules with these names and capacities, [R]; the best are kept."""

    def schedule(self, total_steps: int, start: int, target: int) -> ConstantSchedule:
        """Return the target throughout."""
        del start
        return ConstantSchedule(total_steps, target, target)

    # The course of a run.

    def prepare(self, sites: Sequence[Site]) -> Sequence[Site]:
        """Close all ranks but those chosen, for good.

        Raises:
            UserError: The adapter has been trained already in ranks that would be closed.
        """
        modules = modules_of(sites)
        ranks, target = modules.ranks, self.budget.resolve(modules)
        scores = self.scores([site.name for site in sites], ranks)
        keep = select(scores, self.budget, modules, target, keep_within)
        chosen = split_by_site(keep, sites)
        cure = "start from a fresh adapter, or cut the trained one down with Truncate"
        check_fresh(sites, "closing ranks would change what it computes", cure, [~kept for kept in chosen])
        for site, kept in zip(sites, chosen, strict=True):
            site.freeze_gate()
            site.set_scale(kept)
        return sites

    def finish(self, state: Sequence[Site], target: int) -> Tensor:
        """Keep the ranks chosen at the start."""
        del target
        return torch.cat([(site.scale != 0).cpu() for site in state])


@dataclass(frozen=True)
class Uniform(FixedRanks):
    """The same rank everywhere; what does not divide evenly goes to modules spread over the depth of the model."""

    id: ClassVar[str] = "uniform"
    label: ClassVar[str] = "uniform ranks"

    def scores(self, names: Sequence[str], ranks: Sequence[int]) -> Tensor:
        """Score level by level, see `uniform_scores`."""
        del names
        return uniform_scores(ranks)


@dataclass(frozen=True)
class Random(FixedRanks):
    """Ranks drawn at random: every set of ranks that meets the budget is equally likely."""

    id: ClassVar[str] = "random"
    label: ClassVar[str] = "random ranks"

    rank_seed: Annotated[Seed, Field(description="seed of the draw of the ranks")] = 0

    def scores(self, names: Sequence[str], ranks: Sequence[int]) -> Tensor:
        """Draw a score for every rank, on the CPU, so that a seed means the same on every device."""
        del names
        generator = torch.Generator().manual_seed(self.rank_seed)
        return torch.rand(sum(ranks), dtype=torch.float64, generator=generator)


@dataclass(frozen=True)
class DepthLinear(FixedRanks):
    """Ranks proportional to depth: layer d of D (from 1 on) gets d parts, or D + 1 − d.

    Proportional as far as `LoraConfig.r` lets it: capacity twice the average rank is enough for a straight line.

    Raises:
        UserError: The direction is unknown.
    """

    id: ClassVar[str] = "depth_linear"
    label: ClassVar[str] = "ranks by depth"

    direction: Annotated[Direction, Field(description="whether the last layers or the first get most")] = "increasing"

    def scores(self, names: Sequence[str], ranks: Sequence[int]) -> Tensor:
        """Score by depth, see `depth_scores`."""
        return depth_scores(depths_of(names), ranks, self.direction)


def uniform_scores(ranks: Sequence[int]) -> Tensor:
    """Score ranks such that they are given out level by level: a first rank to every module, then a second, ...

    A level that is not full is spread: modules take turns by the reversed binary digits of their position (van der
    Corput's sequence: first, middle, quarters, ...).

    Args:
        ranks: Capacity of each module.

    Returns:
        [R], higher is better.

    >>> uniform_scores([2, 1, 2]).tolist()
    [-0.0, -1.0, -0.5, -0.25, -1.25]
    """
    turns = [int(f"{module:b}"[::-1], 2) / (1 << module.bit_length()) for module in range(len(ranks))]
    order = [level + turn for turn, r in zip(turns, ranks, strict=True) for level in range(r)]
    return -torch.tensor(order, dtype=torch.float64)


def depth_scores(depths: Sequence[int], ranks: Sequence[int], direction: Direction) -> Tensor:
    """Score ranks such that every module gets a number in proportion to its weight.

    The weight is depth + 1, or the number of layers − depth. A module's j-th rank is due when c · weight rounds to j,
    that is at c = (j − ½) / weight, and ranks are given out in the order in which they are due (Webster's method of
    apportionment). Ranks that a full module cannot take go to the others in the same proportion.

    Args:
        depths: Layer of each module, from 0 on.
        ranks: Capacity of each module.
        direction: Whether the last layer or the first gets most.

    Returns:
        [R], higher is better.

    >>> depth_scores([0, 1], [2, 2], "increasing").tolist()
    [-0.5, -1.5, -0.25, -0.75]
    """
    layers = max(depths) + 1
    weights = [depth + 1 if direction == "increasing" else layers - depth for depth in depths]
    due = [(level + 0.5) / weight for weight, r in zip(weights, ranks, strict=True) for level in range(r)]
    return -torch.tensor(due, dtype=torch.float64)


def depths_of(names: Sequence[str]) -> list[int]:
    """Number the layers in the model's order.

    A module outside of the layers is one by itself.

    >>> depths_of(["embed", "layers.0.q", "layers.0.v", "layers.1.q", "head"])
    [0, 1, 1, 2, 3]
    """
    layers = [
        name if place is None else (place.stack, place.layer) for name, place in zip(names, places(names), strict=True)
    ]
    order = {layer: depth for depth, layer in enumerate(dict.fromkeys(layers))}
    return [order[layer] for layer in layers]
