"""The methods and controls that learn a planted problem, at one budget, from the same start.

All of them see the same batches in the same order, in the same number of AdamW steps, with a warm-up of a tenth of the
steps and a linear decay to 0, gradients clipped to norm 1, and updates scaled by 1. Those that take longer say so: they
search before the training, or make more steps after a cut. The result is plain LoRA.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from planted_problem import Lessons, Problem, in_proportion
from torch import nn
from transformers import get_linear_schedule_with_warmup

from loralloc import (
    ABLoRA,
    AdaLoRA,
    ALLoRA,
    AutoLoRA,
    Budget,
    Random,
    RankPlan,
    Truncate,
    Uniform,
    attach,
    lora_config,
)
from loralloc.budget import Modules
from loralloc.methods.ablora.scores import Mode
from loralloc.methods.base import Decision, Method, StepContext
from loralloc.methods.truncate import TruncateState
from loralloc.plan import ModuleRank

Ranks = Mapping[str, int]
Trained = tuple[nn.Module, Ranks]
"""A student, and the ranks that it has."""

SCORED = 256
"""Texts that AB-LoRA scores ranks on: the last training texts, on which it trains later."""


@dataclass(frozen=True)
class Task:
    """A problem at a budget.

    Attributes:
        problem: The problem.
        budget: What a student may have in the end.
        capacity: Ranks of every layer at the start.
        rate: Highest learning rate.
        seed: Seed of the adapter's start, and of a method's random choices.
    """

    problem: Problem
    budget: Budget
    capacity: int
    rate: float
    seed: int

    @property
    def average(self) -> float:
        """Ranks of every layer at the budget, if all had the same."""
        return self.budget.resolve(self.modules) / sum(self.modules.costs(self.budget.unit))

    @property
    def modules(self) -> Modules:
        """The layers as the budget needs them: ranks at the start, and costs of a rank."""
        costs = list(self.problem.costs.values())
        return Modules([self.capacity] * len(costs), costs, [4 * cost for cost in costs])

    def in_proportion(self, weights: Mapping[str, float]) -> Ranks:
        """Share the budget out in proportion to weights of the layers."""
        target, costs = self.budget.resolve(self.modules), self.modules.parameters
        ranks = in_proportion(list(weights.values()), self.capacity, costs, self.budget.unit, target)
        return dict(zip(weights, ranks, strict=True))

    def student(self, config: LoraConfig) -> PeftModel:
        """Put a fresh adapter on the base."""
        torch.manual_seed(self.seed + 1)
        base = copy.deepcopy(self.problem.base)
        return get_peft_model(base, config)

    def at_capacity(self, alpha: float | None = None) -> PeftModel:
        """Put an adapter of full capacity on the base; by default, lora_alpha is the capacity, for a scale of 1."""
        alpha = self.capacity if alpha is None else alpha
        return self.student(LoraConfig(r=self.capacity, lora_alpha=alpha, target_modules="all-linear"))

    def at_ranks(self, ranks: Ranks) -> PeftModel:
        """Put an adapter of given ranks on the base, with a scale of 1."""
        layers = {name: self.problem.base.get_submodule(name) for name in ranks}
        modules = {
            name: ModuleRank(rank, self.capacity, layers[name].in_features, layers[name].out_features, 1.0)
            for name, rank in ranks.items()
        }
        return self.student(lora_config(RankPlan("planted", modules), self.problem.base))


def train(
    student: nn.Module, lessons: Lessons, rate: float, method: Method | None = None, steps: int | None = None
) -> Ranks:
    """Train a student in place.

    Args:
        student: The base with an adapter.
        lessons: A batch for each step; they start over where there are more steps.
        rate: Highest learning rate.
        method: What allocates ranks; None for plain LoRA.
        steps: Optimizer steps; one for each batch by default.

    Returns:
        The ranks that the method found; none for plain LoRA.
    """
    steps = len(lessons) if steps is None else steps
    run = None if method is None else attach(student, method, steps)
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    if run is not None:
        run.max_grad_norm = 1.0
    student.train()
    for step in range(steps):
        student(**lessons[step % len(lessons)]).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        if run is not None:
            run.before_step(optimizer)
        optimizer.step()
        if run is not None:
            run.after_step(optimizer)
        schedule.step()
        optimizer.zero_grad()
    return {} if run is None else run.finish().ranks


def allocated(task: Task, method: Method, alpha: float | None = None) -> Trained:
    """Train from full capacity with a method."""
    student = task.at_capacity(alpha)
    return student, train(student, task.problem.train, task.rate, method)


def planned(task: Task, ranks: Ranks) -> Trained:
    """Train plain LoRA at given ranks."""
    student = task.at_ranks(ranks)
    train(student, task.problem.train, task.rate)
    return student, ranks


def retrained(task: Task, method: Method) -> Trained:
    """Train plain LoRA anew at the ranks that a method finds."""
    return planned(task, allocated(task, method)[1])


def searched(task: Task, **settings: float) -> Trained:
    """AutoLoRA as recipes have it: a search half as long as the training, on .7 and .3 of its data; then plain LoRA."""
    lessons, student = task.problem.train, task.at_capacity()
    cut = max(1, int(0.7 * len(lessons)))
    method = AutoLoRA(lessons[cut:], task.budget, **settings)
    ranks = train(student, lessons[:cut], task.rate, method, steps=len(lessons) // 2)
    return planned(task, ranks)


def ablated(task: Task, mode: Mode) -> Trained:
    """AB-LoRA: ranks are scored on tokens that the teacher draws, since a score is a mean over labels."""
    lessons = task.problem.train.sampled()
    scored = lessons[-max(1, SCORED // lessons.size) :]
    return allocated(task, ABLoRA(task.budget, list(scored), mode=mode), alpha=task.average)


def recovered(task: Task, more: float) -> Trained:
    """Train as long as the others, cut, and continue with what was kept for a share `more` of those steps."""
    steps = len(task.problem.train)
    extra = max(1, round(more * steps))
    student = task.at_capacity()
    method = Truncate(task.budget, recover=extra)
    return student, train(student, task.problem.train, task.rate, method, steps + extra)


class MomentsKept(Truncate):
    """A cut after which the optimizer goes on as it was: with moments of the old factors, and without a warm-up."""

    @property
    def restarts(self) -> bool:
        return False

    def on_step(self, state: TruncateState, now: StepContext) -> Decision | None:
        decision = super().on_step(state, now)
        return None if decision is None else replace(decision, warmup=None)


METHODS: Mapping[str, Callable[[Task], Trained]] = {
    "true ranks": lambda task: planned(task, task.in_proportion(task.problem.truth)),
    "uniform": lambda task: allocated(task, Uniform(task.budget)),
    "AdaLoRA": lambda task: allocated(task, AdaLoRA(task.budget)),
    "random": lambda task: allocated(task, Random(task.budget, rank_seed=task.seed)),
    "truncation": lambda task: allocated(task, Truncate(task.budget, recover=0)),
    "cut and recover": lambda task: allocated(task, Truncate(task.budget, recover=0.4)),
    "full capacity": lambda task: planned(task, dict.fromkeys(task.problem.costs, task.capacity)),
    "AutoLoRA": searched,
    "AB-LoRA, taylor": lambda task: ablated(task, "taylor"),
    "ALLoRA": lambda task: allocated(task, ALLoRA(mode="hybrid", allocate=Uniform(task.budget))),
    "ALLoRA + AdaLoRA": lambda task: allocated(task, ALLoRA(mode="hybrid", allocate=AdaLoRA(task.budget))),
    "AdaLoRA, as published": lambda task: allocated(task, AdaLoRA.as_published(task.budget)),
    "AdaLoRA, sensitivity": lambda task: allocated(task, AdaLoRA(task.budget, importance="sensitivity")),
    "AdaLoRA, magnitude": lambda task: allocated(task, AdaLoRA(task.budget, importance="magnitude")),
    "cut and recover, 0.2": lambda task: allocated(task, Truncate(task.budget, recover=0.2)),
    "cut and recover, 1 + 0.2": lambda task: recovered(task, 0.2),
}
"""All end at the budget, except `full capacity`. All train for the same number of steps, except AutoLoRA, which
searches first, and `1 + 0.2`."""

EXPERIMENTS: Mapping[str, Callable[[Task], Trained]] = {
    "AB-LoRA": lambda task: ablated(task, "fast"),
    "AutoLoRA, logits at 0.03": lambda task: searched(task, logit_learning_rate=0.03),
    "ALLoRA, post": lambda task: allocated(task, ALLoRA(mode="post", allocate=Uniform(task.budget))),
    "AdaLoRA, retrained": lambda task: retrained(task, AdaLoRA(task.budget)),
    "truncation, retrained": lambda task: retrained(task, Truncate(task.budget, recover=0)),
    "cut and recover, 0.6": lambda task: allocated(task, Truncate(task.budget, recover=0.6)),
    "cut and recover, moments kept": lambda task: allocated(task, MomentsKept(task.budget, recover=0.4)),
    "cut and recover, from 4": lambda task: allocated(replace(task, capacity=4), Truncate(task.budget, recover=0.4)),
    "cut and recover, from 16": lambda task: allocated(replace(task, capacity=16), Truncate(task.budget, recover=0.4)),
}
"""Run only on request: methods that take long, and variants that explain the results of others."""
