"""ALoRA: Allocating Low-Rank Adaptation for Fine-tuning Large Language Models (NAACL 2024, arXiv 2403.16187).

Every rank has a gate that is open or closed. In a few rounds during training each open rank r is scored by ablation on
one validation batch (AB-LoRA, eq. 6),

    IS(r) = S(M) − S(M without r) + S(M with r alone)         S = −cross entropy, "alone": all other ranks off

the n_A ranks with the lowest scores are pruned, and as many new ones grow in modules that lost none (Algorithm 1). The
budget is met from the first step to the last.

Where we deviate, and why (`as_published` and the options give the paper's letter):

* Scores: a naive round costs 2R + 1 forward passes for R ranks. `mode="exact"` computes the same numbers with about
  half of that; `fast` (the default) estimates all scores from two gradients (`scores.two_point_importance`) and ablates
  only ranks whose estimate could be on the wrong side of the boundary (`allocate.settle`); `taylor` never ablates. The
  time saved buys a larger validation batch: two batches of the paper's 32 samples agree on few of the lowest ranks.
* Time: K₁ and K₂ are fractions of the run (or steps) instead of epochs.
* Shapes never change: `LoraConfig.r` is the capacity, and new ranks open in what is spare. A module that is full
  receives nothing; if all are, fewer ranks move.
* Budget: where every module would lose a rank, so that none is left to receive, fewer ranks move. In the paper as many
  as n_A are pruned all the same, none grows, and the budget shrinks (footnote 4): `keep_budget=False`.
* Scale: lora_alpha / (average starting rank), the same for all ranks and all the time. The paper's equation has none.
* New ranks start as LoRA's do, B = 0 and A uniform, so that growing changes no output, with optimizer moments of their
  own age. Ranks that close lose theirs.
* Parameters as a budget: what is freed is shared out as long as it fits; a remainder that buys a rank only elsewhere
  goes there, be it to a module that lost one.
* Ablations of the paper: `score="gate"` (ALoRA-DNAS) trains gates α' = 2σ(a') together with A and B, on the training
  data rather than by bi-level optimisation; `score="sensitivity"` is AdaLoRA's, averaged over the steps since the
  last round.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from loralloc.allocate import Move, deal, reallocate
from loralloc.budget import Budget, RoundSchedule, round_schedule
from loralloc.errors import UserError, check_choice
from loralloc.files import finite
from loralloc.gating import Site
from loralloc.methods.ablation_scores import Mode, score_ranks
from loralloc.methods.base import Decision, Moment, agree, open_ranks, ranks_by_site
from loralloc.methods.guards import FROM_THE_START, check_fresh
from loralloc.methods.validation import check_validation
from loralloc.scores import sensitivity

Score = Literal["ablation", "gate", "sensitivity"]
Scope = Literal["global", "block"]

PUBLISHED_SAMPLES, DEFAULT_SAMPLES = 32, 256

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ABLoRA:
    """Move ranks between modules by ablation scores, at a constant budget.

    Attributes:
        budget: What the adapter may cost, from start to end. `LoraConfig.r` is the most a module may get; twice the
            average rank is usual. A `fraction` is one of that capacity.
        validation: What ranks are scored on, held out of the training data: a data set in a Trainer; batches by index
            (mappings of what the model takes, labels included) in a loop of your own. Not needed for other scores than
            `ablation`.
        warmup: K₁, steps (int) or fraction of the run (float below 1) before the first round.
        interval: K₂, likewise: between rounds.
        rounds: N_A.
        n_prune: n_A, ranks pruned in a round (in each block with `scope="block"`); None for the number of module types.
        scope: Whether ranks move within the whole model or within each block; the paper can be read either way. A
            module that is alone in its block, such as a pooler, then keeps its ranks.
        mode: How ablation scores are computed: `fast`, `exact` (the paper) or `taylor`, see the module's docstring.
        score: `ablation`, or the paper's ablations `gate` and `sensitivity`.
        samples: Validation samples that ranks are scored on; None for 256, in mode `exact` for the paper's 32.
        resample: Whether each round looks at other samples.
        protect_rounds: Rounds in which a new rank cannot be pruned again.
        keep_budget: Whether fewer ranks are pruned where every module would lose one. False is the paper's footnote 4:
            then none grows, and the budget shrinks, which trace, log and plan tell.

    Raises:
        UserError: A number is out of its range, or there are no validation data.
    """

    id: ClassVar[str] = "ablora"

    budget: Budget
    validation: Any = field(default=None, repr=False)
    warmup: float = 0.2
    interval: float = 0.05
    rounds: int = 8
    n_prune: int | None = None
    scope: Scope = "global"
    mode: Mode = "fast"
    score: Score = "ablation"
    samples: int | None = None
    resample: bool = False
    protect_rounds: int = 0
    keep_budget: bool = True

    def __post_init__(self) -> None:
        for name, kinds in {"scope": Scope, "mode": Mode, "score": Score}.items():
            check_choice(name, getattr(self, name), get_args(kinds))
        for name, least in {"rounds": 0, "n_prune": 1, "samples": 1, "protect_rounds": 0}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name} must be at least {least}, got {value}")
        if self.score == "ablation":
            check_validation("ABLoRA", self.validation)

    @classmethod
    def as_published(cls, budget: Budget, validation: Any, **settings: Any) -> ABLoRA:
        """Return ABLoRA to the paper's letter.

        Exact scores on 32 samples, K₁ = 1 and K₂ = 0.25 of the paper's 10 epochs, and a budget that shrinks in a round
        in which every module lost a rank.
        """
        published: dict[str, Any] = {"mode": "exact", "warmup": 0.1, "interval": 0.025, "keep_budget": False}
        return cls(budget, validation, **{**published, **settings})

    @property
    def compacts(self) -> bool:
        """After the last round."""
        return True

    @property
    def opens_ranks(self) -> bool:
        """In every round: the optimizer must be one whose first steps of a new rank are right."""
        return self.rounds > 0

    def schedule(self, total_steps: int, start: int, target: int) -> RoundSchedule:
        """Return the rounds; the budget is the target from the start."""
        del start
        return round_schedule(total_steps, self.warmup, self.interval, self.rounds, target)

    # The five verbs.

    def prepare(self, sites: Sequence[Site]) -> ABLoRAState:
        """Open the starting ranks, as even as the budget allows, and keep the rest of the capacity closed.

        Raises:
            UserError: An adapter has been trained already, or the budget leaves no capacity to grow into.
        """
        if not self._groups(sites):
            raise UserError(
                'no rank could move: one module is adapted; adapt more of them (target_modules="all-linear")'
                if len(sites) == 1
                else 'with scope="block" no rank could move: each block has one adapted module; adapt more of them '
                '(target_modules="all-linear"), or use scope="global"'
            )
        room = [min(site.rank, site.inputs, site.outputs) for site in sites]
        costs = self._costs(sites)
        limit = self.budget.resolve([site.rank for site in sites], [site.cost for site in sites])
        start = deal(range(len(sites)), room, costs, limit)
        check_fresh(sites, "ABLoRA would close a part of it", FROM_THE_START)
        if start == room:
            wider = any(site.rank < min(site.inputs, site.outputs) for site in sites)
            cure = (
                f"LoraConfig.r is the most a module may get: raise it to {2 * max(start)}, with lora_alpha in "
                "proportion or not (the scale is lora_alpha over the average starting rank)"
                if wider
                else f"no layer has dimensions for more: lower the budget, below {sum(start)} ranks"
            )
            raise UserError(
                f"the budget fills the whole capacity ({sum(start)} ranks in {len(sites)} modules), so no rank could "
                f"move; {cure}"
            )
        counts = torch.tensor(start).repeat_interleave(torch.tensor([site.rank for site in sites]))
        place = torch.cat([torch.arange(site.rank) for site in sites])
        state = ABLoRAState(sites, room, sum(start) / len(sites), place < counts, torch.full_like(place, -1), limit)
        state.apply()
        for site in sites if self.score != "gate" else ():
            site.freeze_gate()
        return state

    def on_gradients(self, state: ABLoRAState, now: Moment) -> None:
        """Look whether ablations will be possible; for `gate` and `sensitivity`, see to what these scores need."""
        if self.score == "ablation" and now.step == 0:
            assert now.probe is not None
            now.probe.check_scoring()
        elif self.score == "gate":
            state.to_logits()
        elif self.score == "sensitivity" and now.step <= now.schedule.final + 1:
            new = _rank_sensitivity(state.sites)
            state.sensitivity = state.sensitivity.to(new.device) + new  # the model may have been moved

    def on_step(self, state: ABLoRAState, now: Moment) -> Decision | None:
        """Score, prune and grow when a round is due."""
        if now.learning_rate is None:
            raise UserError(
                "ABLoRA clears the optimizer's memory of ranks that it replaces, so it has to see the optimizer (one "
                "that holds the adapter): run.after_step(optimizer)"
            )
        if self.score == "gate":
            state.from_logits()
        assert isinstance(now.schedule, RoundSchedule)
        number = now.schedule.round_after(now.step)
        if number is None:
            return None
        scores, measured = self._scores(state, now, number)
        moved = self._move(state, scores, number)
        state.limit -= moved.lost
        fresh = int((state.born[moved.pruned] >= 0).sum())
        closed = torch.zeros_like(state.open)
        closed[moved.pruned] = True
        opened = state.apply_move(moved, number)
        details = {
            "round": number,
            "pruned": ranks_by_site(state.sites, closed),
            "grown": ranks_by_site(state.sites, opened),
            "churn": fresh / max(1, len(moved.pruned)),
            "lost": moved.lost,
            **measured,
        }
        if moved.lost:
            logger.warning(
                "round %d of ABLoRA: every module that could have grown lost a rank, so the budget fell by %d %s to %d "
                "(keep_budget=True prunes fewer ranks instead)",
                number + 1, moved.lost, self.budget.unit, state.limit,
            )  # fmt: skip
        last = number == now.schedule.rounds - 1
        return Decision(state.open, state.limit, last, closed, opened, details=details)

    def finish(self, state: ABLoRAState, target: int) -> Tensor:
        """Return the open ranks: they have met the budget all along (or what `keep_budget=False` has left of it)."""
        del target
        return state.open

    def state_dict(self, state: ABLoRAState) -> dict[str, Tensor]:
        """Open ranks, the rounds they were born in, the budget, the seed, and sensitivities."""
        numbers = {"limit": torch.tensor(state.limit), "seed": torch.tensor(state.seed)}
        return {"open": state.open, "born": state.born, "sensitivity": state.sensitivity, **numbers}

    def load_state_dict(self, state: ABLoRAState, tensors: Mapping[str, Tensor]) -> None:
        """Restore them, and what the model computes with."""
        state.open, state.born = tensors["open"].cpu().bool(), tensors["born"].cpu()
        state.limit, state.seed = int(tensors["limit"]), int(tensors["seed"])
        state.sensitivity.copy_(tensors["sensitivity"])
        state.apply()

    def resized(self, state: ABLoRAState) -> None:
        """Nothing to do: after the last round only `finish` looks at the ranks, when all are back."""
        del state

    def _costs(self, sites: Sequence[Site]) -> list[int]:
        """What one rank of each module costs, in the unit of the budget."""
        return [1 if self.budget.unit == "ranks" else site.cost for site in sites]

    def _groups(self, sites: Sequence[Site]) -> list[list[int]]:
        """Modules among which ranks move."""
        blocks: dict[str, list[int]] = {}
        for index, site in enumerate(sites):
            blocks.setdefault(block_of(site.name) if self.scope == "block" else "", []).append(index)
        return [group for group in blocks.values() if len(group) > 1]

    def _count(self, sites: Sequence[Site]) -> int:
        """n_A."""
        return self.n_prune or len({type_of(site.name) for site in sites})

    def _candidates(self, state: ABLoRAState, number: int) -> Tensor:
        """Open ranks that are old enough to be pruned, boolean [R]."""
        protected = (state.born >= 0) & (number - state.born <= self.protect_rounds)
        return state.open & ~protected

    def _scores(self, state: ABLoRAState, now: Moment, number: int) -> tuple[Tensor, dict[str, Any]]:
        """Scores of all ranks, [R] on the CPU, NaN for closed ones; and what the trace should tell about them."""
        measured: dict[str, Any] = {}
        if self.score == "gate":
            scores = torch.cat([site.gate.detach() for site in state.sites])
        elif self.score == "sensitivity":
            scores = state.sensitivity.clone()
            state.sensitivity.zero_()
        else:
            scores, measured = self._ablation_scores(state, now, number)
        scores = agree(scores.to(state.sites[0].gate.device)).double().cpu()
        return scores.masked_fill(~state.open, torch.nan), dict(finite(measured))

    def _ablation_scores(self, state: ABLoRAState, now: Moment, number: int) -> tuple[Tensor, dict[str, Any]]:
        """IS of every open rank, up to a constant."""
        assert now.probe is not None
        samples = self.samples or (PUBLISHED_SAMPLES if self.mode == "exact" else DEFAULT_SAMPLES)
        candidates, count = self._candidates(state, number), self._count(state.sites)
        counts = [(state.members(group) & candidates, count) for group in self._groups(state.sites)]
        ablations = now.probe.scoring(samples, number if self.resample else 0)
        gates = state.open.to(state.sites[0].gate)
        return score_ranks(self.mode, ablations, gates, counts, state.generator(number))

    def _move(self, state: ABLoRAState, scores: Tensor, number: int) -> Move:
        """What leaves and what comes, in positions of all ranks and for all modules."""
        candidates, ranks = self._candidates(state, number), open_ranks(state.sites)
        costs, spare = self._costs(state.sites), state.spare(self._costs(state.sites))
        pruned: list[int] = []
        grown, lost = [0] * len(state.sites), 0
        count = self._count(state.sites)
        for group in self._groups(state.sites):
            members = (state.members(group) & state.open).nonzero()[:, 0]
            module = [index for index, site in enumerate(group) for _ in range(ranks[site])]
            room, price = [state.room[site] - ranks[site] for site in group], [costs[site] for site in group]
            own, old_enough = scores[members], candidates[members]
            moved = reallocate(own, module, old_enough, count, room, price, spare, self.keep_budget)
            pruned += members[list(moved.pruned)].tolist()
            for site, new in zip(group, moved.grown, strict=True):
                grown[site] = new
            freed = sum(costs[group[module[rank]]] for rank in moved.pruned) - moved.lost
            spare += freed - sum(costs[site] * grown[site] for site in group)
            lost += moved.lost
            for rank in moved.pruned:
                ranks[group[module[rank]]] -= 1
        room = [most - have - new for most, have, new in zip(state.room, ranks, grown, strict=True)]
        extra = deal(range(len(room)), room, costs, spare)
        return Move(pruned, [a + b for a, b in zip(grown, extra, strict=True)], lost)


def block_of(name: str) -> str:
    """The part of a module's name up to its first number; all of it where there is none.

    >>> block_of("model.layers.11.mlp.up_proj"), block_of("classifier")
    ('model.layers.11', 'classifier')
    """
    found = re.match(r"(?:.*?\.)?\d+(?=\.|$)", name)
    return name if found is None else found[0]


def type_of(name: str) -> str:
    """A module's name without the numbers in it.

    >>> type_of("model.layers.11.mlp.up_proj")
    'model.layers.mlp.up_proj'
    """
    return ".".join(part for part in name.split(".") if not part.isdigit())


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
        used = zip(ranks_by_site(self.sites, self.open), costs, strict=True)
        return self.limit - sum(rank * cost for rank, cost in used)

    def generator(self, number: int) -> torch.Generator:
        """Random numbers of one round: the same on every device and in every process."""
        self.seed = int(agree(torch.tensor(self.seed, device=self.sites[0].gate.device)))
        return torch.Generator().manual_seed(self.seed + number)

    def apply(self) -> None:
        """Let the open ranks, and no others, take part in the model: at lora_alpha over the starting rank."""
        for site, part in zip(self.sites, self.open.split([site.rank for site in self.sites]), strict=True):
            site.set_scale(part.to(site.gate.device), factor=site.scaling_at(self.start) / site.scaling)

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
        """∂L/∂a' = ∂L/∂α' · α'(1 − α'/2): what the optimizer does to the gates next is meant for their logits."""
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


def _rank_sensitivity(sites: Sequence[Site]) -> Tensor:
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
