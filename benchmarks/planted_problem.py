"""A problem whose right ranks are known: a teacher that differs from its base by updates of planted ranks.

The base is a causal language model. The teacher adds σ · U Vᵀ to some of its linear layers, drawn at random; U and V
are orthonormal, with one column for each rank planted in the layer. σ is the same share of every layer's root mean
square singular value, so that all planted ranks are equally large. The student is the base with an adapter. Inputs are
texts that the base itself writes. At each position the teacher predicts the next token. A student is judged by the
Kullback-Leibler divergence of its distribution from the teacher's, on texts that no student was trained on.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from shapes import SHAPES, Shape
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM
from transformers.loss.loss_utils import ForCausalLMLoss

from loralloc.allocate import keep_top, keep_within
from loralloc.budget import Unit
from loralloc.methods.validation import IGNORED

Labels = Literal["distribution", "sampled"]

RANDOM = {
    "tiny": SHAPES["tiny"],
    "minilm": Shape("minilm", "llama", 384, 6, 1536, 12, 12, vocabulary=512),
}
"""Bases with random weights, by name: the second is as large as MiniLM, but a decoder."""

HELD_OUT = 256
"""Texts in each of the two parts that students are judged on: one to choose learning rates, one to report."""


@dataclass(frozen=True)
class Teaching:
    """The settings of a problem.

    Attributes:
        base: Name of a random base, or a folder with a model.
        concentration: 0 for the same rank in every layer, up to rounding. Else the n-th layer in a random order gets
            ranks in proportion to n to the power of −concentration, up to the capacity.
        average: Planted ranks, the mean over layers.
        capacity: Most ranks of a layer, planted or found.
        strength: σ, as a share of the root mean square of a layer's singular values.
        labels: `distribution`: students learn the teacher's distribution. `sampled`: one token drawn from it.
        steps: Optimizer steps of a student.
        batch: Texts in a step.
        tokens: Tokens of a text.
        seed: Seed of everything that is random.
    """

    base: str
    concentration: float
    average: float
    capacity: int
    strength: float
    labels: Labels
    steps: int
    batch: int
    tokens: int
    seed: int


class Lessons(Sequence[dict[str, Tensor]]):
    """Batches of texts with the teacher's labels, which are computed when a batch is read.

    Args:
        teacher: The teacher.
        texts: Token ids, [n, tokens].
        size: Texts in a batch.
        labels: Kind of labels: floats are a distribution at each position, [batch, tokens, vocabulary]; whole numbers
            are tokens drawn from it, one place later, as language models read their labels.
    """

    def __init__(self, teacher: nn.Module, texts: Tensor, size: int, labels: Labels) -> None:
        self.teacher, self.texts, self.size, self.labels = teacher, texts, size, labels

    def __len__(self) -> int:
        """Batches, the last of which may be smaller."""
        return math.ceil(len(self.texts) / self.size)

    @torch.no_grad()
    def __getitem__(self, index: Any) -> Any:
        """Return a batch, the same at every call; a slice returns lessons on fewer texts."""
        if isinstance(index, slice):
            start, stop, _ = index.indices(len(self))
            return Lessons(self.teacher, self.texts[start * self.size : stop * self.size], self.size, self.labels)
        if not 0 <= index < len(self):
            raise IndexError(index)
        texts = self.texts[index * self.size : (index + 1) * self.size]
        labels = self.teacher(input_ids=texts).logits.softmax(-1)
        if self.labels == "sampled":
            generator = torch.Generator().manual_seed(int(texts.sum()))
            drawn = torch.multinomial(labels.flatten(0, 1), 1, generator=generator).view(texts.shape)
            labels = functional.pad(drawn[:, :-1], (1, 0), value=IGNORED)
        return {"input_ids": texts, "labels": labels}

    def sampled(self) -> Lessons:
        """The same texts with sampled labels."""
        return Lessons(self.teacher, self.texts, self.size, "sampled")


@dataclass(frozen=True)
class Problem:
    """Base, teacher, texts and the planted ranks.

    Attributes:
        base: The base model; copy it before an adapter is put on it.
        costs: Parameters of one rank of each adapted layer, in + out, by full module name.
        truth: Planted ranks, likewise.
        train: Lessons of all steps.
        validation: Lessons on held-out texts, to choose learning rates on.
        test: Lessons on other held-out texts, to report.
    """

    base: nn.Module
    costs: Mapping[str, int]
    truth: Mapping[str, int]
    train: Lessons
    validation: Lessons
    test: Lessons


@lru_cache(maxsize=1)
def problem(teaching: Teaching) -> Problem:
    """Plant the ranks; the same ones at every call."""
    base = base_model(teaching.base)
    layers = {name: module for name, module in base.named_modules() if _is_adapted(base, module)}
    costs = {name: layer.in_features + layer.out_features for name, layer in layers.items()}
    generator = torch.Generator().manual_seed(teaching.seed)
    truth = planted_ranks(list(layers), teaching, generator)
    teacher = copy.deepcopy(base)
    for name, rank in truth.items():
        plant(teacher.get_submodule(name).weight, rank, teaching.strength, generator)
    texts = written(teaching.base, 2 * HELD_OUT + teaching.steps * teaching.batch, teaching.tokens, teaching.seed)
    validation, test, train = texts.split([HELD_OUT, HELD_OUT, len(texts) - 2 * HELD_OUT])
    lessons = Lessons(teacher, train, teaching.batch, teaching.labels)
    judges = (Lessons(teacher, part, 64, "distribution") for part in (validation, test))
    return Problem(base, costs, truth, lessons, *judges)


def _is_adapted(base: Any, module: nn.Module) -> bool:
    """Whether PEFT's "all-linear" adapts a module."""
    return isinstance(module, nn.Linear) and module is not base.get_output_embeddings()


def planted_ranks(names: Sequence[str], teaching: Teaching, generator: torch.Generator) -> dict[str, int]:
    """Choose the planted rank of every layer, in a random order, with a mean as near to the average as can be."""
    weights = [place**-teaching.concentration for place in range(1, len(names) + 1)]
    total = round(teaching.average * len(names))
    ranks = in_proportion(weights, teaching.capacity, [1] * len(names), "ranks", total)
    order = torch.randperm(len(names), generator=generator).tolist()
    return {name: ranks[place] for name, place in zip(names, order, strict=True)}


def in_proportion(weights: Sequence[float], capacity: int, costs: Sequence[int], unit: Unit, target: int) -> list[int]:
    """Share ranks out in proportion to weights under a budget, as seats are by Webster's rule.

    Whole weights that cost exactly the budget are returned unchanged.

    Args:
        weights: Of each module, 0 or more.
        capacity: Most ranks of a module; what one cannot take goes to the others in the same proportion.
        costs: Parameters of one rank of each module.
        unit: What the budget counts.
        target: The budget.

    >>> in_proportion([4, 2, 0], 3, [1, 1, 1], "ranks", 5), in_proportion([2, 1], 8, [10, 30], "parameters", 100)
    ([3, 2, 0], [4, 2])
    """
    due = [(level + 0.5) / weight if weight else math.inf for weight in weights for level in range(capacity)]
    scores = -torch.tensor(due, dtype=torch.float64)
    prices = torch.tensor([cost for cost in costs for _ in range(capacity)])
    kept = keep_top(scores, target) if unit == "ranks" else keep_within(scores, prices, target)
    return kept.view(len(weights), capacity).sum(1).tolist()


@torch.no_grad()
def plant(weight: Tensor, rank: int, strength: float, generator: torch.Generator) -> None:
    """Add σ · U Vᵀ of some rank to a weight, [out, in], in place."""
    draw = [torch.linalg.qr(torch.randn(size, rank, generator=generator))[0] for size in weight.shape]
    weight += strength * weight.norm() / math.sqrt(min(weight.shape)) * (draw[0] @ draw[1].mT)


def base_model(base: str) -> nn.Module:
    """Load or make the base; its own loss takes distributions as well as tokens.

    The weights of a random base roughly preserve the norm of their inputs, so that every layer affects the output.
    """
    if base in RANDOM:
        model, generator = RANDOM[base].build("cpu"), torch.Generator().manual_seed(0)
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5, generator=generator)
    elif Path(base).is_dir():
        model = AutoModelForCausalLM.from_pretrained(base)
    else:
        raise SystemExit(f"--base {base} is no folder; give one with a causal language model, or {', '.join(RANDOM)}")
    model.loss_function = own_loss
    return model.train()


def own_loss(logits: Tensor, labels: Tensor, vocab_size: int, **settings: Any) -> Tensor:
    """Cross-entropy with the teacher's distribution, or with tokens that it drew.

    It is set as the model's own loss, so that methods which compute a step's loss again get the same one.
    """
    if labels.is_floating_point():
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(0, 1))
    return ForCausalLMLoss(logits, labels, vocab_size, **settings)


@cache
def written(base: str, texts: int, tokens: int, seed: int) -> Tensor:
    """Let the base write texts, [texts, tokens]."""
    model: Any = base_model(base).eval()
    torch.manual_seed(seed)
    start = torch.full((texts, 1), model.config.bos_token_id or 1)
    more = tokens - 1
    return model.generate(
        start, do_sample=True, top_k=0, use_cache=True, max_new_tokens=more, min_new_tokens=more, pad_token_id=0
    )


@torch.no_grad()
def divergence(student: nn.Module, lessons: Lessons) -> float:
    """Mean over positions of KL(teacher ‖ student), in nats."""
    student.eval()
    total = torch.zeros((), dtype=torch.float64)
    for lesson in lessons:
        logits = student(input_ids=lesson["input_ids"]).logits.log_softmax(-1)
        total += functional.kl_div(logits, lesson["labels"], reduction="none").sum(dtype=torch.float64)
    return float(total / lessons.texts.numel())
