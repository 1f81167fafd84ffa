"""ALoRA: Allocating Low-Rank Adaptation for Fine-tuning Large Language Models (NAACL 2024, arXiv 2403.16187).

Every rank has a gate that is open or closed. In a few rounds during training each open rank r is scored by ablation on
one validation batch (AB-LoRA, eq. 6),

    IS(r) = S(M) − S(M without r) + S(M with r alone)         S = −cross entropy, "alone": all other ranks off

the n_A ranks with the lowest scores are pruned, and as many new ones grow in modules that lost none (Algorithm 1). The
budget is met from the first step to the last.

Where we deviate, and why (`as_published` and the options reproduce the paper exactly):

* Scores: a naive round costs 2R + 1 forward passes for R ranks. `mode="exact"` computes the same numbers with about
  half of that; `fast` (the default) estimates all scores from two gradients (`scores.two_point_importance`) and ablates
  only ranks whose estimate could be on the wrong side of the boundary (`settle.settle`); `taylor` never ablates. The
  time saved buys a larger validation batch: two batches of the paper's 32 samples agree on few of the lowest ranks.
* Time: K₁ and K₂ are fractions of the run (or steps) instead of epochs.
* Shapes never change: `LoraConfig.r` is the capacity, and new ranks open in what is spare. A module that is full
  receives nothing; if all are, fewer ranks move.
* Budget: where every module would lose a rank, so that none is left to receive, fewer ranks move. In the paper as many
  as n_A are pruned all the same, none grows, and the budget shrinks (footnote 4): `keep_budget=False`.
* Scale: lora_alpha / (average starting rank), the same for all ranks and all the time. The paper's equation has none.
* New ranks start as LoRA's do, B = 0 and A uniform, so that growing changes no output, with optimizer moments of their
  own age. Ranks that close lose theirs.
* Budget in parameters: what is freed is given out as long as it fits. If the remainder is enough only for a rank of
  another module, that module gets it, even if it has lost one.
* Ablations of the paper: `score="gate"` (ALoRA-DNAS) trains gates α' = 2σ(a') together with A and B, on the training
  data rather than by bi-level optimisation; `score="sensitivity"` is AdaLoRA's, averaged over the steps since the
  last round.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from loralloc.budget import Budget
from loralloc.errors import UserError
from loralloc.files import finite
from loralloc.gating import Site
from loralloc.methods.ablora.moves import starting_ranks
from loralloc.methods.ablora.scores import Mode, score_ranks
from loralloc.methods.ablora.state import ABLoRAState, check_groups, check_room, rank_sensitivity
from loralloc.methods.base import Decision, Method, StepContext, agree, modules_of, ranks_by_site
from loralloc.methods.guards import FROM_THE_START, check_fresh
from loralloc.methods.validation import check_validation
from loralloc.naming import kind_of, places
from loralloc.schedule import RoundSchedule, round_schedule
from loralloc.setting_types import Count, Examples, Phase, Whole, is_number

Score = Literal["ablation", "gate", "sensitivity"]
Scope = Literal["global", "block"]

ABLATION: Score = "ablation"
"""The score that is made of losses on validation data; the others are made of the training's gradients."""

PUBLISHED_SAMPLES, DEFAULT_SAMPLES = 32, 256

logger = logging.getLogger("loralloc.methods.ablora")


@dataclass(frozen=True)
class ABLoRA(Method):
    """Move ranks between modules by ablation scores, at a constant budget.

    `LoraConfig.r` is the most that a module may get, or the budget's `max_rank` if that is less; twice the average rank
    is usual. `Budget(fraction=...)` is a fraction of the capacity `LoraConfig.r`. Ranks are scored on `validation`,
    held out of the training data: in a Trainer a data set; in your own loop a sequence of batches (mappings of the
    model's inputs, labels included). Scores other than `ablation` need no validation data. With `scope="block"` a
    module that is alone in its block, such as a pooler, keeps its ranks; the paper can be read either way.

    Raises:
        UserError: A number is out of its range, or there are no validation data.
    """

    id: ClassVar[str] = "ablora"
    label: ClassVar[str] = "AB-LoRA"
    paper: ClassVar[str] = "arXiv 2403.16187"

    budget: Budget
    validation: Annotated[
        Any,
        Examples("data that ablations are scored on: validation, or a fraction cut from train", default="validation"),
    ] = field(default=None, repr=False, compare=False)
    warmup: Annotated[Phase, Field(description="before the first round: fraction of the run, or steps")] = 0.2
    interval: Annotated[Phase, Field(description="between rounds: fraction of the run, or steps")] = 0.05
    rounds: Annotated[Whole, Field(description="rounds of pruning and growing")] = 8
    n_prune: Annotated[
        Count | None, Field(description="ranks that move in a round; null: as many as there are types of modules")
    ] = None
    scope: Annotated[Scope, Field(description="where ranks move: anywhere, or in a block")] = "global"
    mode: Annotated[
        Mode, Field(description="ablate ranks near the threshold (fast), all ranks (exact, the paper) or none (taylor)")
    ] = "fast"
    score: Annotated[
        Score,
        Field(description="score of a rank; gate and sensitivity, the paper's comparisons, look at no validation"),
    ] = ABLATION
    samples: Annotated[
        Count | None,
        Field(description="examples that ranks are scored on; null: 256, with mode exact the paper's 32"),
    ] = None
    resample: Annotated[bool, Field(description="score each round on other examples")] = False
    protect_rounds: Annotated[Whole, Field(description="rounds in which a new rank cannot be pruned again")] = 0
    keep_budget: Annotated[
        bool,
        Field(
            description="prune fewer where every module would lose a rank; false: the budget shrinks then, as in the "
            "paper"
        ),
    ] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score == ABLATION:
            check_validation("ABLoRA", self.validation)

    @classmethod
    def as_published(cls, budget: Budget, validation: Any, **settings: Any) -> ABLoRA:
        """Return ABLoRA exactly as in the paper.

        Exact scores on 32 samples, K₁ = 1 and K₂ = 0.25 of the paper's 10 epochs, and a budget that shrinks in a round
        in which every module lost a rank.
        """
        published: dict[str, Any] = {"mode": "exact", "warmup": 0.1, "interval": 0.025, "keep_budget": False}
        return cls(budget, validation, **{**published, **settings})

    @property
    def examples(self) -> Any:
        """What ranks are scored on; None for a score that needs no validation data."""
        return self.validation if self.score == ABLATION else None

    @property
    def compacts(self) -> bool:
        """After the last round, if there are any."""
        return self.rounds > 0

    @property
    def opens_ranks(self) -> bool:
        """In every round, if there are any; not every optimizer supports this (`training.updates`)."""
        return self.rounds > 0

    @classmethod
    def broken_rules(cls, value: Callable[..., Any]) -> Iterator[tuple[tuple[str, ...], str]]:
        """A module must have capacity to grow into."""
        capacity, target = value("lora", "r"), value("method", "budget", "average_rank")
        if is_number(capacity) and capacity == target:
            yield (
                ("method", "budget", "average_rank"),
                f"method.budget.average_rank is {target} and so is lora.r, the most a layer may get: no rank could "
                f"move. Set lora.r to {2 * capacity} (and lora.alpha as before: the scale is lora.alpha / "
                "average_rank)",
            )

    @classmethod
    def looks_at_examples(cls, value: Callable[..., Any]) -> bool:
        """For ablations only."""
        return value("method", "score") in (None, ABLATION)

    def schedule(self, total_steps: int, start: int, target: int) -> RoundSchedule:
        """Return the rounds; the budget is the target from the start."""
        del start
        return round_schedule(total_steps, self.warmup, self.interval, self.rounds, target)

    # The course of a run.

    def prepare(self, sites: Sequence[Site]) -> ABLoRAState:
        """Open the starting ranks, as even as the budget allows, and keep the rest of the capacity closed.

        Raises:
            UserError: An adapter has been trained already, or the budget leaves no capacity to grow into.
        """
        check_groups(sites, self._groups(sites))
        modules = modules_of(sites)
        limit = self.budget.resolve(modules)
        most = modules.capped(self.budget.max_rank)
        room = [min(rank, site.inputs, site.outputs) for rank, site in zip(most, sites, strict=True)]
        # The budget is met from the start, by R_target / N_mod ranks in every module.
        start = starting_ranks(self.budget, modules, room)
        check_fresh(sites, "ABLoRA would close a part of it", FROM_THE_START)
        check_room(sites, start, room, self.budget.max_rank)
        counts = torch.tensor(start).repeat_interleave(torch.tensor([site.rank for site in sites]))
        place = torch.cat([torch.arange(site.rank) for site in sites])
        state = ABLoRAState(sites, room, sum(start) / len(sites), place < counts, torch.full_like(place, -1), limit)
        state.apply()  # eq. 3: gates of 1 and 0, which are not trained
        for site in sites if self.score != "gate" else ():
            site.freeze_gate()
        return state

    def on_gradients(self, state: ABLoRAState, now: StepContext) -> None:
        """Check in the first step that ablations are possible; for `gate` and `sensitivity`, prepare these scores."""
        if self.score == ABLATION and now.step == 0:
            assert now.data is not None
            now.data.check_scoring()
        elif self.score == "gate":  # eq. 5, ALoRA-DNAS: the optimizer trains a', the model computes with 2σ(a')
            state.to_logits()
        elif self.score == "sensitivity" and now.step < now.schedule.steps_until_final:
            new = rank_sensitivity(state.sites)
            state.sensitivity = state.sensitivity.to(new.device) + new  # the model may have been moved

    def on_step(self, state: ABLoRAState, now: StepContext) -> Decision | None:
        """Score, prune and grow when a round is due."""
        if now.learning_rate is None:
            raise UserError(
                "ABLoRA clears the optimizer's state of ranks that it replaces, so it needs the optimizer (one "
                "that holds the adapter): run.after_step(optimizer)"
            )
        if self.score == "gate":
            state.from_logits()
        assert isinstance(now.schedule, RoundSchedule)
        # Algorithm 1: after K₁ steps, every K₂ steps, N_A times.
        number = now.schedule.round_after(now.step)
        if number is None:
            return None
        # Eq. 6: IS(r) of every open rank, on one batch of validation data.
        scores, measured = self._scores(state, now, number)
        # The n_A lowest are pruned, and as many grow in modules that lost none, those with the best average first.
        candidates, groups = self._candidates(state, number), self._groups(state.sites)
        costs = modules_of(state.sites).costs(self.budget.unit)
        moved = state.choose_move(scores, candidates, groups, costs, self._count(state.sites), self.keep_budget)
        state.limit -= moved.lost  # footnote 4: where no module is left to receive
        fresh = int((state.born[moved.pruned] >= 0).sum())
        closed = torch.zeros_like(state.open)
        closed[moved.pruned] = True
        opened = state.apply_move(moved, number)  # by new rows of A and columns of B, with B = 0
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
        state.logits = ()  # of a step that was interrupted
        state.apply()

    def resized(self, state: ABLoRAState) -> None:
        """Nothing to do: after the last round only `finish` looks at the ranks, when all are back."""
        del state

    def _groups(self, sites: Sequence[Site]) -> list[list[int]]:
        """Modules among which ranks move."""
        names = [site.name for site in sites]
        groups: dict[object, list[int]] = {}
        for index, (name, place) in enumerate(zip(names, places(names), strict=True)):
            block = name if place is None else (place.stack, place.layer)
            groups.setdefault(block if self.scope == "block" else "", []).append(index)
        return [group for group in groups.values() if len(group) > 1]

    def _count(self, sites: Sequence[Site]) -> int:
        """n_A."""
        return self.n_prune or len({kind_of(site.name) for site in sites})

    def _candidates(self, state: ABLoRAState, number: int) -> Tensor:
        """Open ranks that are old enough to be pruned, boolean [R]."""
        protected = (state.born >= 0) & (number - state.born <= self.protect_rounds)
        return state.open & ~protected

    def _scores(self, state: ABLoRAState, now: StepContext, number: int) -> tuple[Tensor, dict[str, Any]]:
        """Scores of all ranks, [R] on the CPU, NaN for closed ones; and what the trace should tell about them."""
        measured: dict[str, Any] = {}
        if self.score == "gate":
            scores = torch.cat([site.gate.detach().cpu() for site in state.sites])
        elif self.score == "sensitivity":
            scores = state.sensitivity.clone()
            state.sensitivity.zero_()
        else:  # AB-LoRA
            scores, measured = self._ablation_scores(state, now, number)
        scores = agree(scores.to(state.sites[0].gate.device)).double().cpu()
        return scores.masked_fill(~state.open, torch.nan), dict(finite(measured))

    def _ablation_scores(self, state: ABLoRAState, now: StepContext, number: int) -> tuple[Tensor, dict[str, Any]]:
        """IS of every open rank, up to a constant."""
        assert now.data is not None
        samples = self.samples or (PUBLISHED_SAMPLES if self.mode == "exact" else DEFAULT_SAMPLES)
        candidates, count = self._candidates(state, number), self._count(state.sites)
        counts = [(state.members(group) & candidates, count) for group in self._groups(state.sites)]
        ablations = now.data.scoring(samples, number if self.resample else 0)
        gates = state.open.to(state.sites[0].gate)
        return score_ranks(self.mode, ablations, gates, counts, state.generator(number))
