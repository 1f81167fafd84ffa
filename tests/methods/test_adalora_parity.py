"""AdaLoRA against its naive twin, and its first steps against plain LoRA's.

1. The twin (tests/reference/adalora.py) walks beside the package for 200 steps: the same triplets live after every
   step and the weights agree, for both orders, both optimizers, both penalties and every importance.
2. At the same learning rate the first steps move the weights as far as plain LoRA's do; as published they do not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from parity import Optimizer, Parallel, first_steps, regression
from peft import LoraConfig, PeftModel, get_peft_model
from reference.adalora import ReferenceAdaLoRA
from reference.adalora import Site as TwinSite
from torch import Tensor, nn

from loralloc import AdaLoRA, Budget, attach
from loralloc.methods.adalora.state import gate_gain
from loralloc.training.run import AllocationRun

# ---- Beside the twin ----

STEPS, WARMUP, COOLDOWN = 200, 30, 60
FINAL = STEPS - COOLDOWN
FROZEN = FINAL + 1  # the first step of the final phase
SHAPES = [(6, 8), (8, 5), (5, 9), (9, 4)]  # in, out
RANKS = [4, 5, 3, 4]
TARGET = 7  # of 16; no even split over four sites
TOLERANCE = 1e-8
"""On weights of order one. The two sum in another order, 1e-17 in a step; Adam and the penalty turn it into 1e-10."""


class Chain(nn.Module):
    """tanh between linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, o, bias=False, dtype=torch.float64) for i, o in SHAPES)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def chain_of(weights: Sequence[Tensor], x: Tensor) -> Tensor:
    for weight in weights:
        x = torch.tanh(x @ weight.T)
    return x


def batches() -> list[tuple[Tensor, Tensor]]:
    """New inputs in every step; the outputs of one teacher, and from step 90 on those of another."""
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    teachers = [[draw(o, i) / math.sqrt(i) for i, o in SHAPES] for _ in range(2)]
    inputs = [draw(16, SHAPES[0][0]) for _ in range(STEPS)]
    return [(x, chain_of(teachers[t >= 90], x)) for t, x in enumerate(inputs)]


def adam(parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.02, eps=1e-6, weight_decay=0.01)


def sgd(parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5, momentum=0.9)


class Pair:
    """A run and its twin, started at the same weights.

    The published code never clears moments, so `after_step` gets no optimizer unless a test asks for it.
    """

    def __init__(self, optimizer: Optimizer, *, clip: float | None = None, clear: bool = False, **settings: Any):
        phases = {"warmup": WARMUP, "cooldown": COOLDOWN, "interval": 1, "beta1": 0.8, "beta2": 0.9}
        method = AdaLoRA(Budget(total_rank=TARGET), **{**phases, "parity": None, **settings})
        self.model = chain_model()
        self.run = attach(self.model, method, STEPS)
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer, self.clip, self.clear = optimizer(self.trainable), clip, clear
        self.twin = ReferenceAdaLoRA(
            [twin_site(site, method) for site in self.run.sites],
            optimizer,  # type: ignore[arg-type]
            target=TARGET,
            warmup=WARMUP,
            final_start=FINAL,
            interval=self.run.schedule.interval,
            gamma=method.gamma,
            penalty_kind=method.penalty,
            order=method.order,
            importance=method.importance,
            beta1=method.beta1,
            beta2=method.beta2,
            max_grad_norm=clip,
            clip_penalty=False,
        )

    def step(self, x: Tensor, y: Tensor) -> None:
        self.optimizer.zero_grad()
        ((self.model(x) - y) ** 2).mean().backward()
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.trainable, self.clip)
        self.run.before_step()
        self.optimizer.step()
        self.run.after_step(self.optimizer if self.clear else None)
        self.twin.step(lambda weights: ((chain_of(weights, x) - y) ** 2).mean())

    def difference(self, kept_only: bool = False) -> float:
        """Largest difference of a weight."""
        largest = 0.0
        for site, twin, living in zip(self.run.sites, self.twin.sites, self.twin.living(), strict=True):
            keep = torch.tensor(living) if kept_only else torch.ones(len(living), dtype=torch.bool)
            for ours, theirs in ((site.gate, twin.lam), (site.A, twin.Q), (site.B.T, twin.P.T)):
                gap = (ours - theirs).detach()[keep].abs()
                largest = max(largest, gap.max().item() if gap.numel() else 0.0)
        return largest

    def walk(self, steps: int = STEPS, kept_only_from: int = STEPS) -> None:
        """Compare after every step; from `kept_only_from` on the weights of kept triplets alone."""
        for t, (x, y) in enumerate(batches()[:steps]):
            self.step(x, y)
            assert [(site.gate != 0).tolist() for site in self.run.sites] == self.twin.living(), f"step {t}"
            assert self.difference(kept_only=t >= kept_only_from) < TOLERANCE, f"step {t}"
        assert sum(sum(living) for living in self.twin.living()) == TARGET


def chain_model() -> PeftModel:
    pattern = {str(k): rank for k, rank in enumerate(RANKS)}
    return get_peft_model(Chain(), LoraConfig(r=4, lora_alpha=8, target_modules=list(pattern), rank_pattern=pattern))


@torch.no_grad()
def twin_site(site: Any, method: AdaLoRA) -> TwinSite:
    """A copy of a site; ρ goes into the twin's scale."""
    if method.parity is not None:
        # Off the exact optimum of the penalty, where the unsquared norm has no direction but rounding.
        site.A.mul_(1.1)
        site.B.mul_(0.9)
    P, lam, Q = (leaf.detach().clone().requires_grad_() for leaf in (site.B, site.gate, site.A))
    scale = site.scaling * gate_gain(site.outputs, method.parity)
    return TwinSite(site.layer.base_layer.weight.detach().clone(), P, lam, Q, scale)


@pytest.mark.parametrize(
    ("optimizer", "clip", "penalty", "gamma"),
    [
        (adam, None, "reference", 0.1),
        (adam, 0.05, "paper", 0.003),
        (sgd, None, "paper", 0.003),
        (sgd, 0.05, "reference", 0.1),
    ],
)
def test_reference_order_is_the_twins_to_the_last_step(optimizer, clip, penalty, gamma):
    Pair(optimizer, clip=clip, order="reference", penalty=penalty, gamma=gamma).walk()


@pytest.mark.parametrize(("optimizer", "penalty", "gamma"), [(adam, "paper", 0.003), (sgd, "reference", 0.1)])
def test_paper_order_is_the_twins_until_the_ranks_are_frozen(optimizer, penalty, gamma):
    """After that the twin's closed triplets drift and pull at the kept ones through the penalty; ours do not."""
    pair = Pair(optimizer, order="paper", penalty=penalty, gamma=gamma, clear=True)
    pair.walk(FROZEN + 1)
    x, y = batches()[FROZEN + 1]
    pair.step(x, y)
    assert pair.difference() > 1e-6


@pytest.mark.parametrize("optimizer", [adam, sgd])
def test_paper_order_without_a_penalty_keeps_to_the_twin_where_ranks_are_kept(optimizer):
    Pair(optimizer, order="paper", gamma=0.0, clear=True).walk(kept_only_from=FROZEN + 1)


@pytest.mark.parametrize(("importance", "interval"), [("sensitivity", 1), ("magnitude", 7)])
def test_simpler_importances_are_the_twins(importance, interval):
    Pair(adam, order="reference", importance=importance, interval=interval).walk()


def test_this_steps_sensitivity_is_the_twins_in_the_papers_order():
    Pair(sgd, order="paper", importance="sensitivity", interval=7).walk(FROZEN + 1)


def test_parity_is_a_larger_scale_and_nothing_else():
    Pair(adam, order="reference", parity="adam").walk()


def test_reference_order_leaves_the_moments_of_closed_triplets_alone():
    Pair(sgd, order="reference", clear=True).walk()


# ---- Beside plain LoRA: ‖ΔW‖ after the first steps ----

LAYERS = [(32, 32), (32, 1536), (1536, 32), (64, 172), (172, 64), (384, 384), (384, 1536), (1536, 384), (64, 1536)]
FACTOR = 2.0

HALF = Budget(fraction=0.5)


def ratios(rank: int, draws: int, optimizer: Optimizer, method: AdaLoRA, at: Sequence[int]) -> Tensor:
    """‖ΔW‖ over LoRA's, [steps, layers], in the root mean square over draws of factors and data.

    One draw is no measure where ranks are few: P and Q may point away from the gradient, and two values λ make two
    random walks.
    """

    def rms(method: AdaLoRA | None) -> Tensor:
        every = [first_steps(LAYERS, rank, method, optimizer, at, seed) for seed in range(draws)]
        return torch.stack(every).square().mean(0).sqrt()

    return rms(method) / rms(None)


def adam_small(parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-4)


def adamw_small(parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.01)


def sgd_plain(parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


DRAWS = [(2, 5), (8, 3), (12, 2), (32, 1)]
WITH_ADAM = [(adamw_small, *row) for row in DRAWS] + [(adam_small, 12, 2)]


@pytest.mark.parametrize(("optimizer", "rank", "draws"), WITH_ADAM)
def test_first_steps_of_adam_go_as_far_as_loras(optimizer, rank, draws):
    ours = ratios(rank, draws, optimizer, AdaLoRA(HALF), (1, 3, 10))
    assert ours.min() > 1 / FACTOR
    assert ours.max() < FACTOR


@pytest.mark.parametrize(("rank", "draws"), DRAWS)
def test_the_first_step_of_sgd_goes_as_far_as_loras(rank, draws):
    ours = ratios(rank, draws, sgd_plain, AdaLoRA(HALF, parity="sgd"), (1,))
    assert ours.min() > 1 / FACTOR
    assert ours.max() < FACTOR


def parallel_peft() -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(Parallel(LAYERS), LoraConfig(r=8, lora_alpha=16, target_modules=r"layers\.\d+"))


def first_update(model: PeftModel, optimizer: Optimizer, run: AllocationRun | None) -> list[Tensor]:
    """ΔW of every layer after one step."""
    optim = optimizer([p for p in model.parameters() if p.requires_grad])
    regression(LAYERS, 1)(model).backward()
    if run is not None:
        run.before_step()
    optim.step()
    layers = model.base_model.model.layers
    factors = [(layer.lora_A["default"].weight, layer.lora_B["default"].weight) for layer in layers]
    gates = [2.0] * len(layers) if run is None else [site.gate * site.scale for site in run.sites]
    return [((B * gate) @ A).detach() for gate, (A, B) in zip(gates, factors, strict=True)]


@pytest.mark.parametrize(("optimizer", "parity"), [(adam_small, "adam"), (sgd_plain, "sgd")])
def test_the_first_step_is_that_of_lora_with_the_same_rows(optimizer, parity):
    """The same ΔW, entry by entry, when LoRA's A is Q / √3: not only as long, but as useful."""
    model, lora = parallel_peft(), parallel_peft()
    run = attach(model, AdaLoRA(HALF, gamma=0.0, parity=parity), 1000)
    for layer, site in zip(lora.base_model.model.layers, run.sites, strict=True):
        layer.lora_A["default"].weight.data = site.A.detach() / math.sqrt(3)
    pairs = zip(first_update(model, optimizer, run), first_update(lora, optimizer, None), strict=True)
    for ours, loras in pairs:
        torch.testing.assert_close(ours, loras, rtol=1e-3, atol=1e-3 * loras.abs().max().item())


@pytest.mark.parametrize(("optimizer", "at"), [(adam_small, (1, 3, 10)), (sgd_plain, (1,))])
def test_as_published_the_first_steps_stay_far_behind(optimizer, at):
    for rank in (2, 32):
        ours = ratios(rank, 1, optimizer, AdaLoRA.as_published(HALF), at)
        assert ours.max() < 0.1
