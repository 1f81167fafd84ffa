"""What an ABLoRA run remembers between steps: the open ranks, their ages, and what their scores are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from loralloc.budget import total_cost
from loralloc.errors import UserError
from loralloc.gating import Site
from loralloc.methods.ablora.moves import Move, deal, reallocate
from loralloc.methods.adalora.importance import sensitivity
from loralloc.methods.base import agree, open_ranks, ranks_by_site, split_by_site


@dataclass(eq=False)
class ABLoRAState:
    """What changes during a run.

    Attributes:
        sites: The gated layers.
        room: Most ranks that each module can have.
        start: Average starting rank, which the scale is made for.
        open: Boolean [R] on the CPU; the ranks that take part.
        born: The round in which each rank was opened, [R] on the CPU; −1 for the start.
        limit: The budget.
        seed: Draws new ranks, and those on which `fast` checks its estimates. Drawn from torch's generator.
        sensitivity: Sum of sensitivities since the last round, [R].
        logits: a' of all gates before the step that is under way (`score="gate"`).
    """

    sites: Sequence[Site]
    room: Sequence[int]
    start: float
    open: Tensor
    born: Tensor
    limit: int
    seed: int = field(default_factory=lambda: int(torch.randint(2**31, ())))
    sensitivity: Tensor = field(init=False)
    logits: Sequence[Tensor] = ()

    def __post_init__(self) -> None:
        self.sensitivity = torch.zeros(len(self.open), device=self.sites[0].gate.device)

    def members(self, group: Sequence[int]) -> Tensor:
        """Boolean [R]: the ranks of some modules, open or not."""
        chosen = torch.zeros(len(self.sites), dtype=torch.bool)
        chosen[list(group)] = True
        return chosen.repeat_interleave(torch.tensor([site.rank for site in self.sites]))

    def spare(self, costs: Sequence[int]) -> int:
        """What is left of the budget."""
        return self.limit - total_cost(ranks_by_site(self.sites, self.open), costs)

    def generator(self, number: int) -> torch.Generator:
        """Random numbers of one round: the same on every device and in every process."""
        self.seed = int(agree(torch.tensor(self.seed, device=self.sites[0].gate.device)))
        return torch.Generator().manual_seed(self.seed + number)

    def apply(self) -> None:
        """Enable the open ranks and no others in the model, with the scale of the average starting rank."""
        for site, part in zip(self.sites, split_by_site(self.open, self.sites), strict=True):
            site.set_scale(part, factor=site.scaling_at(self.start) / site.scaling)

    def choose_move(
        self,
        scores: Tensor,
        candidates: Tensor,
        groups: Sequence[Sequence[int]],
        costs: Sequence[int],
        count: int,
        keep_budget: bool,
    ) -> Move:
        """Choose which ranks are pruned in a round, and where new ones grow.

        Args:
            scores: [R], NaN for closed ranks.
            candidates: Boolean [R], open ranks that may be pruned.
            groups: The modules among which ranks move.
            costs: What one rank of each module costs, in the unit of the budget.
            count: n_A, ranks to prune in each group.
            keep_budget: Whether fewer are pruned where no module would be left to receive.

        Returns:
            The move, in positions of all ranks and for all modules.
        """
        ranks, spare = open_ranks(self.sites), self.spare(costs)
        pruned: list[int] = []
        grown, lost = [0] * len(self.sites), 0
        for group in groups:  # the whole model, or each block by itself
            members = (self.members(group) & self.open).nonzero()[:, 0]
            module = [index for index, site in enumerate(group) for _ in range(ranks[site])]
            room, price = [self.room[site] - ranks[site] for site in group], [costs[site] for site in group]
            own, old_enough = scores[members], candidates[members]
            moved = reallocate(own, module, old_enough, count, room, price, spare, keep_budget)
            pruned += members[list(moved.pruned)].tolist()
            for site, new in zip(group, moved.grown, strict=True):
                grown[site] = new
            freed = sum(costs[group[module[rank]]] for rank in moved.pruned) - moved.lost
            spare += freed - sum(costs[site] * grown[site] for site in group)
            lost += moved.lost
            for rank in moved.pruned:
                ranks[group[module[rank]]] -= 1
        room = [most - have - new for most, have, new in zip(self.room, ranks, grown, strict=True)]
        extra = deal(range(len(room)), room, costs, spare)
        return Move(pruned, [a + b for a, b in zip(grown, extra, strict=True)], lost)

    @torch.no_grad()
    def apply_move(self, moved: Move, number: int) -> Tensor:
        """Close and open ranks; return those that opened, boolean [R]. Slots closed just now are used last."""
        before = self.open.clone()
        self.open[list(moved.pruned)] = False
        opened = torch.zeros_like(self.open)
        generator, first = self.generator(number), 0
        for site, count in zip(self.sites, moved.grown, strict=True):
            closed = ~self.open[first : first + site.rank]
            slots = torch.argsort(closed.int() + (closed & ~before[first : first + site.rank]).int(), descending=True)
            chosen = slots[:count]
            if count:
                bound = site.inputs**-0.5  # Kaiming-uniform with a = √5, as LoRA draws A
                drawn = (2 * torch.rand(count, site.inputs, generator=generator) - 1) * bound
                site.A[chosen.to(site.A.device)] = drawn.to(site.A)
                site.B[:, chosen.to(site.B.device)] = 0
                site.gate[chosen.to(site.gate.device)] = 1
                opened[first + chosen] = True
            first += site.rank
        self.open |= opened
        self.born[self.open & opened] = number
        self.apply()
        return opened

    def to_logits(self) -> None:
        """Turn the gates' gradients into ∂L/∂a' = ∂L/∂α' · α'(1 − α'/2), for the optimizer's step of their logits."""
        self.logits = [torch.logit(site.gate / 2, eps=1e-6) for site in self.sites]
        for site in self.sites:
            if site.gate.grad is not None:
                site.gate.grad *= site.gate * (1 - site.gate / 2)

    @torch.no_grad()
    def from_logits(self) -> None:
        """α' ← 2σ(a' + Δ), where the optimizer has moved α' = 2σ(a') by Δ."""
        for site, logit in zip(self.sites, self.logits, strict=False):
            moved = logit + (site.gate - 2 * torch.sigmoid(logit))
            site.gate.copy_(2 * torch.sigmoid(moved))
        self.logits = ()


def rank_sensitivity(sites: Sequence[Site]) -> Tensor:
    """Mean |w · ∂L/∂w| over the entries of A and over those of B, for each rank, [R]."""
    parts = []
    for site in sites:
        terms = [
            sensitivity(weight.detach(), weight.grad).float().mean(dim)
            for weight, dim in ((site.A, 1), (site.B, 0))
            if weight.grad is not None
        ]
        parts.append(sum(terms, torch.zeros(site.rank, device=site.A.device)).to(sites[0].gate.device))
    return torch.cat(parts)


def check_groups(sites: Sequence[Site], groups: Sequence[Sequence[int]]) -> None:
    """Refuse modules among which no rank could move.

    Raises:
        UserError: There is one module, or one in every block.
    """
    if groups:
        return
    raise UserError(
        'no rank could move: one module is adapted; adapt more of them (target_modules="all-linear")'
        if len(sites) == 1
        else 'with scope="block" no rank could move: each block has one adapted module; adapt more of them '
        '(target_modules="all-linear"), or use scope="global"'
    )


def check_room(sites: Sequence[Site], start: Sequence[int], room: Sequence[int], max_rank: int | None = None) -> None:
    """Refuse a budget that leaves no capacity to grow into.

    Args:
        sites: The gated layers.
        start: Ranks that are open at first, one a layer.
        room: Most ranks of each.
        max_rank: The budget's cap on each.

    Raises:
        UserError: All are open.
    """
    if start != room:
        return
    wider = any(site.rank < min(site.inputs, site.outputs) for site in sites)
    capped = max_rank is not None and any(site.rank > max_rank for site in sites)
    cure = (
        f"max_rank={max_rank} is the most a module may get: raise it, or give a budget of fewer ranks beside it"
        if capped
        else f"LoraConfig.r is the most a module may get: raise it to {2 * max(start)}, with lora_alpha in "
        "proportion or not (the scale is lora_alpha over the average starting rank)"
        if wider
        else f"no layer has dimensions for more: lower the budget, below {sum(start)} ranks"
    )
    raise UserError(
        f"the budget fills the whole capacity ({sum(start)} ranks in {len(sites)} modules), so no rank could "
        f"move; {cure}"
    )
