"""What `loralloc frontier` does: cut a trained adapter at many budgets, let each cut recover, and recommend one.

The recoveries are a chain: each starts from the recovered adapter of the next larger size whose recovery lowered the
loss, not from the run's adapter. So a small size has been trained at every such size above it. That costs nothing more,
and gives lower losses (docs/frontier.md).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from loralloc._version import __version__
from loralloc.adapter.export import save_adapter
from loralloc.adapter.terms import Terms
from loralloc.allocate import keep_top
from loralloc.errors import UserError
from loralloc.frontier.budgets import chosen, compare_points, recommend, spread
from loralloc.frontier.orders import Order
from loralloc.frontier.point import Measured, Point, PointFolder
from loralloc.frontier.result import Frontier, Recovery
from loralloc.frontier.scoring import digest_of, scores_of
from loralloc.frontier.source import Source
from loralloc.methods.truncate import Part, balanced
from loralloc.plain_lora import check_plain, plain_sites
from loralloc.plan import ModuleRank, RankPlan
from loralloc.quantized import leave_memory
from loralloc.recipe import evaluations, stages
from loralloc.recipe.from_recipe import load_adapter, task_data
from loralloc.recipe.run_folder import RunFolder
from loralloc.recipe.screen import Screen
from loralloc.tasks.base import TaskData
from loralloc.training import processes
from loralloc.training.trainer import RunTrainer

DEFAULT_RECOVERY = 0.2
"""Share of a run's steps that each cut is trained on."""

DEFAULT_RATE = 0.3
"""Highest learning rate of this training, as a share of the run's."""


@dataclass(frozen=True)
class Settings:
    """How a frontier is made.

    Attributes:
        order: The score by which terms are dropped; None as in `scores_of`.
        recover: Share of the run's steps that each cut is trained on; 0 for none.
        averages: Average ranks to try; None for twelve sizes, from the full one downwards.
        ranks: Total ranks to try, in place of `averages`.
        rate: Highest learning rate of the recovery, as a share of the run's.
    """

    order: Order | None = None
    recover: float = DEFAULT_RECOVERY
    averages: Sequence[float] | None = None
    ranks: Sequence[int] | None = None
    rate: float = DEFAULT_RATE


def make_frontier(source: Source, settings: Settings, screen: Screen, told: Callable[[Point], None]) -> Frontier:
    """Measure every point of a frontier; points of an earlier call are reused.

    Args:
        source: The adapter.
        settings: How the frontier is made.
        screen: Shows evaluations and trainings.
        told: Called with every finished point.

    Raises:
        UserError: The task has no loss for each example, there are too few of them, or a budget is out of range.
    """
    processes.refuse_several("loralloc frontier")
    data = task_data(source.recipe)
    if data.example_losses is None:
        raise UserError(
            f"task {source.recipe.task} has no loss per example, which is needed to compare sizes; "
            "loralloc truncate cuts its adapters"
        )
    if len(data.validation) < 2:
        raise UserError("data.validation: sizes are compared by the losses of validation examples; give more than one")
    model = load_adapter(data.model, source.adapter, trainable=True)  # scores by gradients need it
    steps = _recovery_steps(source, settings, data)
    with TemporaryDirectory(prefix="loralloc-") as scratch:
        trainer = evaluations.make_evaluator(source.recipe, data, model, Path(scratch), screen)
        model = _adapted(trainer)
        terms = Terms.of(model)
        check_plain(model, terms.sites[0].adapter, [(site.name, site.layer) for site in terms.sites])
        made_from = source.made_from(model, data)
        order, scores = scores_of(source.folder, settings.order, terms, trainer, data, made_from, screen)
        modules = source.modules or len(terms.sites)
        budgets = _budgets(settings, modules, terms.count)
        chain = {ranks: budgets[:place] for place, ranks in enumerate(budgets)} if steps else {}
        recovery = {"steps": steps, "rate": settings.rate if steps else None}
        of = {**made_from, "order": order, "scores": digest_of(order, scores), **recovery}
        bench = _Bench(source, data, trainer, terms, scores, screen, of, settings.rate, chain)
        points = [bench.cut(ranks) for ranks in budgets]
        if steps:
            points = bench.recover(points, steps, told)
        else:
            for point in points:
                told(point)
    worse = compare_points([point.best.array for point in points])
    best = recommend([point.ranks for point in points], worse)
    recovered = Recovery(settings.recover, settings.rate, steps)
    return Frontier(source, order, recovered, data.metric, points, worse, best, modules)


def _budgets(settings: Settings, modules: int, total: int) -> list[int]:
    if settings.ranks is not None:
        return list(settings.ranks)
    return spread(total) if settings.averages is None else chosen(settings.averages, modules, total)


def _recovery_steps(source: Source, settings: Settings, data: TaskData) -> int:
    if not settings.recover:
        return 0
    steps = source.steps
    if steps is None:
        rows = data.packed(data.train) if isinstance(data.train, Dataset) else None
        steps = stages.total_steps(source.recipe, rows)
    return max(1, round(settings.recover * steps))


def _adapted(trainer: RunTrainer) -> PeftModel:
    assert isinstance(trainer.model, PeftModel)
    return trainer.model


def folder_of(source: Source, ranks: int) -> Path:
    """Where the point of so many ranks is kept."""
    return source.folder / "points" / f"{ranks}-ranks"


@dataclass(frozen=True)
class _Start:
    """The weights from which a recovery starts.

    Attributes:
        parts: The terms of every layer that has any, from large to small.
        heads: Weights that are trained beside the adapter.
    """

    parts: Mapping[str, Part]
    heads: Mapping[str, Tensor]

    @classmethod
    def of(cls, model: PeftModel) -> _Start:
        """Take them from an adapted model."""
        terms = Terms.of(model)
        parts = {site.name: part for site, part in zip(terms.sites, terms.parts, strict=True)}
        return cls(parts, _heads(model))


def _heads(model: PeftModel) -> dict[str, Tensor]:
    state = get_peft_model_state_dict(model)
    return {name: tensor.clone() for name, tensor in state.items() if ".lora_" not in name}


@dataclass
class _Bench:
    """Makes points: holds the trained adapter and the trainer that evaluates it."""

    source: Source
    data: TaskData
    trainer: RunTrainer
    terms: Terms
    scores: Tensor
    screen: Screen
    of: dict[str, Any]
    rate: float
    chain: Mapping[int, Sequence[int]]

    def cut(self, ranks: int) -> Point:
        """Keep the best `ranks` terms, and evaluate; a point of an earlier call is reused."""
        keep, folder = keep_top(self.scores, ranks), self._folder(ranks)
        if (kept := folder.read()) is not None:
            return kept
        folder.clear()
        plan = self._plan(keep)
        plan.save(folder.plan)
        with self.terms.cut(keep):
            begun = time.perf_counter()
            measured = self._measure(self.trainer, begun)
            save_adapter(_adapted(self.trainer), folder.adapter)
        size = self.terms.sites[0].A.element_size()
        point = Point(ranks, plan.parameters, plan.parameters * size, max(plan.ranks.values()), measured)
        folder.write(point)
        return point

    def recover(self, points: Sequence[Point], steps: int, told: Callable[[Point], None]) -> list[Point]:
        """Train each cut for so many steps; the adapter from which they were cut is removed from memory first."""
        heads = _heads(_adapted(self.trainer))
        leave_memory(self.data.model)
        done: list[Point] = []
        for point in points:
            if point.recovered is None:
                gained = [one for one in done if one.gained]
                point = self._recovered(point, steps, self._kept(gained[-1]) if gained else None, heads)
                self._folder(point.ranks).write(point)
            told(point)
            done.append(point)
        return done

    def _folder(self, ranks: int) -> PointFolder:
        return PointFolder(folder_of(self.source, ranks), {**self.of, "after": self.chain.get(ranks)})

    def _kept(self, point: Point) -> _Start:
        """The recovered adapter of a size, read from its files, so that an interrupted chain continues bit for bit."""
        assert self.data.again is not None
        model = load_adapter(self.data.again(), self._folder(point.ranks).adapter, trainable=True)
        start = _Start.of(model)
        leave_memory(model)
        return start

    def _plan(self, keep: Tensor) -> RankPlan:
        """The ranks of a cut, and the scale that the run has trained with."""
        modules = {
            site.name: ModuleRank(rank, len(site.A), site.A.shape[1], len(site.B), self._scale(site.name, site.scaling))
            for site, rank in zip(self.terms.sites, self.terms.kept_ranks(keep), strict=True)
        }
        provenance = {"loralloc": __version__, "order": self.of["order"], "source": str(self.source.adapter)}
        return RankPlan("frontier", modules, {"total_rank": int(keep.sum())}, provenance=provenance)

    def _scale(self, name: str, otherwise: float) -> float:
        return self.source.scales.get(name, otherwise)

    def _measure(self, trainer: RunTrainer, begun: float) -> Measured:
        found = evaluations.evaluate(trainer, self.data, "eval", self.screen, self.data.validation)
        assert self.data.example_losses is not None
        assert trainer.evaluated is not None
        losses = tuple(round(float(loss), 7) for loss in self.data.example_losses(trainer.evaluated))
        return Measured(found, losses, round(time.perf_counter() - begun, 2))

    def _recovered(self, point: Point, steps: int, above: _Start | None, heads: Mapping[str, Tensor]) -> Point:
        """Train a size like a fresh run of so many steps.

        Args:
            point: The size.
            steps: Number of optimizer steps.
            above: Recovered weights of the next larger size whose loss they lowered; None: start from the cut itself.
            heads: Weights that the run has trained beside the adapter.
        """
        assert self.data.again is not None
        folder, data = self._folder(point.ranks), replace(self.data, model=self.data.again())
        with TemporaryDirectory(prefix="loralloc-") as scratch:
            stage = stages.prepare_recovery(
                self.source.recipe, folder.plan, data, RunFolder(Path(scratch)), self.screen, steps, self.rate
            )
            self._put(point.ranks, stage.model, above, heads if above is None else above.heads)
            begun = time.perf_counter()
            stage.train()
            point = replace(point, recovered=self._measure(stage.trainer, begun))
            if point.gained:
                save_adapter(stage.model, folder.adapter)
        leave_memory(data.model)
        return point

    @torch.no_grad()
    def _put(self, ranks: int, model: PeftModel, above: _Start | None, heads: Mapping[str, Tensor]) -> None:
        """Write terms, and the heads as they were trained, into a fresh adapter."""
        factors = self._cut_factors(ranks) if above is None else {}
        for site in plain_sites(model):
            A, B = factors[site.name] if above is None else _largest(above.parts[site.name], len(site.A), site.scaling)
            site.A.copy_(A)
            site.B.copy_(B)
        lost = heads.keys() - get_peft_model_state_dict(model).keys()
        if lost:
            raise UserError(
                f"the adapter has trained more than the recipe would ({sorted(lost)[0]}): add its module to "
                "lora.modules_to_save, or leave the recovery out with --recover 0"
            )
        if heads:
            set_peft_model_state_dict(model, dict(heads))

    def _cut_factors(self, ranks: int) -> dict[str, tuple[Tensor, Tensor]]:
        """The factors of a cut, by layer."""
        sites = self.terms.sites
        scales = [self._scale(site.name, site.scaling) for site in sites]
        factors = self.terms.factors(keep_top(self.scores, ranks), scales)
        return dict(zip((site.name for site in sites), factors, strict=True))


def _largest(part: Part, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Balanced factors A [rank, in] and B [out, rank] of a layer's largest terms."""
    A, B = balanced(*part)
    return A[:rank] / scale**0.5, B[:, :rank] / scale**0.5
