"""ALLoRA: gradients, steps and modes, against the plainest form of the paper and its own algebra.

The numbers in comments are those of the properties in the method's specification. Contexts: layers side by side in
float64 (adalora_loop.py), and the kernel alone where a claim is about one product.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Sequence

import pytest
import torch
from adalora_loop import RANK, SHAPES, Loop, close_to, model_of
from models import labelled_batch, logits, tiny_peft
from peft import LoraConfig, get_peft_model
from reference import allora as twin
from torch import Tensor, nn

from loralloc import ABLoRA, AdaLoRA, ALLoRA, AutoLoRA, Budget, DepthLinear, Truncate, UserError, attach
from loralloc.methods.allora import method as allora
from loralloc.methods.allora.method import ADAPTIVE
from loralloc.methods.allora.rows import row_norms
from loralloc.methods.base import Method
from loralloc.training.restart import SHOW

pytestmark = pytest.mark.filterwarnings("ignore:ALLoRA.*Adam")

OUT, IN = 7, 9


def sgd(parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05)


def momentum(parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def adam(parameters: Sequence[Tensor], lr: float = 0.01, eps: float = 1e-8) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=lr, eps=eps, weight_decay=0.01)


def loop(method: ALLoRA, optimizer=sgd, seed: int = 0) -> Loop:
    return Loop(method, model_of(lora_alpha=RANK, seed=seed), optimizer)


def plain(optimizer=sgd, steps: int = 1) -> list[Tensor]:
    """Factors of plain LoRA after some steps: ALLoRA's sites without its scales."""
    run = loop(ALLoRA(eta=1.0, mode="post"), optimizer)
    run.run.method = _Inert()
    run.run.state = run.sites
    return run.walk(steps).factors()


class _Inert:
    """A method that does nothing."""

    label, budget = "", None

    def on_gradients(self, state, now) -> None: ...

    def on_step(self, state, now) -> None: ...


# ---- Whole steps ----


def walk_twin(optimizer, steps: int, eta: float, share: float = 1.0) -> list[Tensor]:
    """The loop's own data and start, the layers in their plainest form."""
    source = loop(ALLoRA())
    pairs = [tuple(f.detach().clone().requires_grad_() for f in (site.A, site.B)) for site in source.sites]
    weights = [site.layer.base_layer.weight.detach() for site in source.sites]
    optim = optimizer([factor for pair in pairs for factor in pair])
    for t in range(steps):
        optim.zero_grad()
        inputs = source.inputs(t)
        outputs = [twin.layer(x, W, *pair, eta, share) for x, W, pair in zip(inputs, weights, pairs, strict=True)]
        residuals = [y - x @ goal.T for y, x, goal in zip(outputs, inputs, source.goals, strict=True)]
        torch.stack([(residual**2).mean() for residual in residuals]).sum().backward()
        optim.step()
    return [factor.detach() for pair in pairs for factor in pair]


def factors_of(run: Loop) -> list[Tensor]:
    return [factor.detach() for site in run.sites for factor in (site.A, site.B)]


@pytest.mark.parametrize("optimizer", [sgd, momentum, adam])
@pytest.mark.parametrize("eta", [1.0, 2.0])
def test_the_papers_mode_is_the_twin(optimizer, eta):  # 4, 10
    run = loop(ALLoRA(eta), optimizer).walk(20)
    close_to(factors_of(run), walk_twin(optimizer, 20, eta), 1e-9)


def test_hybrid_is_a_larger_learning_rate_on_smaller_gradients_weight_decay_included():
    run = loop(ALLoRA(2.0, mode="hybrid"), adam).walk(20)
    close_to(factors_of(run), walk_twin(lambda p: adam(p, lr=0.02), 20, 2.0, share=0.5), 1e-9)


@pytest.mark.parametrize("optimizer", [sgd, momentum])
def test_hybrid_is_the_papers_mode_with_sgd(optimizer):  # 15
    paper, hybrid = (loop(ALLoRA(3.0, mode=mode), optimizer).walk(20) for mode in ("paper", "hybrid"))
    close_to(factors_of(hybrid), factors_of(paper), 1e-10)


@pytest.mark.parametrize("optimizer", [sgd, adam])
def test_post_multiplies_the_step_of_plain_lora(optimizer):  # 15
    eta = 2.0
    run, twins = loop(ALLoRA(eta, mode="post"), optimizer), loop(ALLoRA(eta, mode="post"), optimizer)
    twins.run.method, twins.run.state = _Inert(), None  # plain LoRA, whose step is stretched here by hand
    for _ in range(10):
        before = factors_of(twins)
        before = [factor.clone() for factor in before]
        twins.step()
        run.step()
        for k, site in enumerate(twins.sites):
            A, B = before[2 * k : 2 * k + 2]
            s = twin.row_scale(B @ A, eta)
            mean = float((s[:, None] * B).norm() / B.norm()) if B.any() else eta
            site.A.data = A + mean * (site.A.data - A)
            site.B.data = B + s[:, None] * (site.B.data - B)
    close_to(factors_of(run), factors_of(twins), 1e-9)


def test_post_at_eta_one_starts_as_plain_lora():  # 15
    for ours, theirs in zip(loop(ALLoRA(1.0, mode="post"), adam).walk(1).factors(), plain(adam), strict=True):
        assert torch.equal(ours, theirs)


def test_from_zero_b_moves_eta_times_as_far_and_a_stays():  # 6
    run = loop(ALLoRA(2.0))
    start = [site.A.detach().clone() for site in run.sites]
    run.step()
    for site, A, lora_B in zip(run.sites, start, plain()[::3], strict=True):
        assert torch.equal(site.A, A)
        close_to(site.B.detach(), 2 * lora_B)


def test_a_small_eta_is_lora_at_a_larger_learning_rate():  # 7
    small = 1e-4
    run = loop(ALLoRA(small), lambda p: torch.optim.SGD(p, lr=0.05 / small)).walk(20)
    close_to(run.factors(), plain(sgd, 20), 1e-6)


def test_adam_takes_the_same_first_step_whatever_eta():  # 11
    steps = [loop(ALLoRA(eta), lambda p: adam(p, eps=1e-30)).walk(1).factors() for eta in (0.5, 2.0, 8.0)]
    expected = plain(lambda p: adam(p, eps=1e-30))
    for found in steps:
        close_to(found, expected, 1e-9)


def test_with_constant_scales_adam_goes_the_same_way_whatever_eta(monkeypatch):  # 11
    ways = []
    for eta in (0.5, 2.0, 8.0):
        run = loop(ALLoRA(eta), lambda p: adam(p, eps=1e-30))
        assert all((site._variant.row_scale == eta).all() for site in run.sites)
        with monkeypatch.context() as frozen:
            frozen.setattr(ALLoRA, "_scale_rows", lambda self, state: None)
            ways.append(run.walk(12).factors())
    for way in ways:
        close_to(way, ways[0], 1e-7)
    close_to(ways[0], plain(lambda p: adam(p, eps=1e-30), 12), 1e-7)


def test_eta_matters_with_sgd_and_hardly_with_adam():  # 12
    def walked(eta: float, optimizer) -> Loop:
        run = loop(ALLoRA(eta), optimizer)
        run.run.begin(60)
        return run.walk(60)

    for optimizer, low, high in ((sgd, 0.1, math.inf), (lambda p: adam(p, lr=2e-3), 0.0, 0.1)):
        one, two = (
            torch.cat([site.B.detach().flatten() for site in walked(eta, optimizer).sites]) for eta in (1.0, 2.0)
        )
        assert low < (one - two).norm() / one.norm() < high


# ---- As a method ----


def test_the_trained_model_is_plain_lora_without_a_scale():  # 2
    model = tiny_peft("llama", trained=True, lora_alpha=4)
    before = logits(model)
    run = attach(model, ALLoRA(), 10)
    close_to(logits(model), before, 1e-6)
    assert set(run.finish().ranks.values()) == {4}
    close_to(logits(model), before, 1e-6)
    close_to(logits(model.merge_and_unload()), before, 1e-5)


def test_norms_are_computed_once_a_step_and_never_to_evaluate(monkeypatch):  # 21
    calls = []
    monkeypatch.setattr(allora, "row_norms", lambda A, g, B: calls.append(len(A)) or row_norms(A, g, B))
    run = loop(ALLoRA())
    assert calls == [1] * len(SHAPES)  # one group for each shape
    for _ in range(3):  # accumulated batches, and an evaluation
        run.backward()
    run.outputs()
    assert len(calls) == len(SHAPES)
    run.step()
    assert len(calls) == 2 * len(SHAPES)


def test_layers_of_one_shape_are_one_call(monkeypatch):
    calls = []
    monkeypatch.setattr(allora, "row_norms", lambda A, g, B: calls.append(len(A)) or row_norms(A, g, B))
    Loop(ALLoRA(), model_of([(6, 8), (5, 9), (6, 8), (6, 8)], lora_alpha=RANK))
    assert sorted(calls) == [1, 3]


@pytest.mark.parametrize("frozen", ["A", "B"])
@pytest.mark.parametrize("mode", ["paper", "hybrid", "post"])
def test_one_factor_may_be_frozen(frozen, mode):  # 22
    run = loop(ALLoRA(mode=mode))
    with torch.no_grad():
        for site in run.sites:
            site.B.normal_()
            getattr(site, frozen).requires_grad_(False)
    run.optimizer = sgd([p for p in run.model.parameters() if p.requires_grad])
    before = [factor.clone() for factor in factors_of(run)]
    run.walk(3)
    moved = [not torch.equal(a, b) for a, b in zip(factors_of(run), before, strict=True)]
    assert moved == [frozen == "B", frozen == "A"] * len(SHAPES)


@pytest.mark.parametrize(
    "inner", [AdaLoRA(Budget(total_rank=6), warmup=2, cooldown=15), DepthLinear(Budget(total_rank=6))]
)
def test_rows_are_those_of_the_gated_product(inner):
    run = loop(ALLoRA(2.0, allocate=inner), adam).walk(20)
    for site in run.sites:
        delta = (site.B * (site.gate * site.scale)).detach() @ site.A.detach()
        close_to(site._variant.row_scale, twin.row_scale(delta, 2.0), 1e-7)
    plan = run.run.finish()
    assert plan.total_rank == 6
    assert plan.method == "allora"
    assert plan.provenance["settings"]["allocate"]["name"] == inner.id
    assert {module.scale for module in plan.modules.values()} == {1.0}


def test_gates_of_an_allocating_method_are_trained_plainly_and_others_not_at_all():
    run = loop(ALLoRA())
    assert not any(site.gate.requires_grad for site in run.sites)
    with run.model.disable_adapter():
        pass  # PEFT makes every parameter of the adapter trainable again at its end
    run.backward()
    assert all(site.gate.grad is None for site in run.sites)
    inner = loop(ALLoRA(allocate=AdaLoRA(Budget(total_rank=6))))
    assert all(site.gate.requires_grad for site in inner.sites)


# ---- What is said and what is refused ----


def walk_with(optimizer_class: type, mode: str, steps: int = 3) -> list[str]:
    run = loop(ALLoRA(mode=mode), lambda p: optimizer_class(p, lr=1e-3))  # type: ignore[arg-type]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(steps):
            run.backward()
            run.run.before_step(run.optimizer)
            run.optimizer.step()
            run.run.after_step(run.optimizer)
    return [str(warning.message) for warning in said]


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
def test_the_papers_mode_warns_once_with_an_optimizer_that_undoes_it(kind):
    (message,) = walk_with(kind, "paper")
    assert f'ALLoRA(mode="paper") with {kind.__name__}' in message
    assert 'use mode="hybrid" or mode="post", or SGD' in message
    for quiet in (walk_with(kind, "hybrid"), walk_with(kind, "post"), walk_with(torch.optim.SGD, "paper")):
        assert quiet == []


@pytest.mark.parametrize(
    ("eta", "rule"),
    [
        (0, "above 0, got 0"),
        (-1.0, "above 0, got -1.0"),
        (math.inf, "a finite number, got Infinity"),
        (math.nan, "a finite number, got NaN"),
        ("2", 'a number, got "2"'),
    ],
)
def test_eta_must_be_positive_and_finite(eta, rule):
    with pytest.raises(UserError, match=f"^eta must be {rule}$"):
        ALLoRA(eta)


def test_an_unknown_mode_meets_the_nearest():
    with pytest.raises(UserError, match=r'mode must be one of paper, hybrid, post; got "hybid". Did you mean "hybrid"'):
        ALLoRA(mode="hybid")  # type: ignore[arg-type]


def test_it_does_not_allocate_for_itself():
    with pytest.raises(UserError, match="allocate must be a method that allocates ranks, such as AdaLoRA"):
        ALLoRA(allocate=ALLoRA())


@pytest.mark.parametrize(
    ("settings", "pattern"),
    [
        ({"lora_alpha": 8}, r"is scaled by 2, but ALLoRA has no scaling factor; set LoraConfig\(lora_alpha=4, "),
        (
            {"lora_alpha": 4, "use_rslora": True},
            r"is scaled by 2, .*\(lora_alpha=4, use_rslora=False, alpha_pattern=\{\}\)",
        ),
        ({"lora_alpha": 4, "lora_dropout": 0.05}, r"lora_dropout is 0.05, .*set LoraConfig\(lora_dropout=0.0\)"),
    ],
)
@pytest.mark.parametrize("inner", [None, AdaLoRA(Budget(total_rank=6))])
def test_scale_and_dropout_are_refused_with_the_cure(settings, pattern, inner):
    model = tiny_peft("llama", **settings)
    before = logits(model)
    with pytest.raises(UserError, match=pattern):
        attach(model, ALLoRA(allocate=inner), 30)
    assert torch.equal(logits(model), before)


def test_the_message_leads_to_an_adapter_that_is_taken():
    attach(tiny_peft("llama", lora_alpha=4, lora_dropout=0.0), ALLoRA(), 30)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("total", [12, 13])
def test_so_does_that_for_the_scale_of_an_allocating_method(total, rslora):
    """ABLoRA's scale is lora_alpha over the average starting rank, here 2 or 13/6."""
    method = ALLoRA(allocate=ABLoRA(Budget(total_rank=total), [labelled_batch("llama")], rounds=1))
    with pytest.raises(UserError, match="ALLoRA has no scaling factor") as refused:
        attach(tiny_peft("llama", lora_alpha=3, use_rslora=rslora), method, 30)
    (alpha,) = re.findall(r"lora_alpha=([\d.]+), use_rslora=False", str(refused.value))
    assert float(alpha) == pytest.approx(total / 6, rel=1e-5)
    attach(tiny_peft("llama", lora_alpha=float(alpha)), method, 30)


def test_modules_of_different_rank_need_an_alpha_each():
    ranks = {"q_proj": 2}
    words = (
        r"2 layers whose names end in q_proj: the adapter is scaled by 2, .* "
        r'LoraConfig\(lora_alpha=4, use_rslora=False, alpha_pattern=\{"q_proj": 2\}\)'
    )
    with pytest.raises(UserError, match=words):
        attach(tiny_peft("llama", lora_alpha=4, rank_pattern=ranks), ALLoRA(), 30)
    attach(
        tiny_peft("llama", lora_alpha=4, use_rslora=False, rank_pattern=ranks, alpha_pattern={"q_proj": 2}),
        ALLoRA(),
        30,
    )


def test_a_search_that_looks_ahead_by_lora_is_refused():
    with pytest.raises(UserError, match="AutoLoRA's search looks ahead by one step of plain LoRA"):
        ALLoRA(allocate=AutoLoRA(validation=[labelled_batch("llama")]))


def test_optimizers_that_undo_the_scaling_are_known_by_name():
    for name in ("Adadelta", "Rprop", "Muon", "Lion", "AdamW8bit"):
        assert any(part in name.lower() for part in ADAPTIVE)
    assert not any(part in "sgd" for part in ADAPTIVE)


def test_what_a_method_says_of_itself_the_composition_says_too() -> None:
    """Each property of the interface is the allocating method's, such as Truncate's restart of the optimizer."""
    asked = {name for name, value in vars(Method).items() if isinstance(value, property)}
    assert "restarts" in asked
    assert asked <= set(vars(ALLoRA))
    for kind in (Truncate, AdaLoRA, DepthLinear):
        allocate = kind(Budget(average_rank=2))
        composed = ALLoRA(allocate=allocate)
        for name in asked - {"allocator"}:
            assert getattr(composed, name) == getattr(allocate, name), name


def test_a_composition_that_resets_the_optimizer_asks_for_it_at_the_first_step() -> None:
    model = tiny_peft("llama", lora_alpha=4)
    run = attach(model, ALLoRA(allocate=Truncate(Budget(average_rank=2))), 10)
    model(**labelled_batch("llama")).loss.backward()
    with pytest.raises(UserError, match="^" + re.escape(SHOW)):
        run.before_step()


def test_where_a_name_ends_another_the_cure_names_the_modules_whole():
    """PEFT saves the entries sorted, and takes the first one that fits the end of a name."""

    def adapted(**settings):
        base = nn.Module()
        base.fc = nn.Linear(8, 8)
        for name in "abcd":
            base.add_module(name, nn.ModuleDict({"fc": nn.Linear(8, 8)}))
        config = LoraConfig(r=2, target_modules=["fc"], rank_pattern={"^fc": 4, "a.fc": 4}, **settings)
        return get_peft_model(base, config)

    cure = r'lora_alpha=2, use_rslora=False, alpha_pattern=\{"\^fc": 4, "a.fc": 4\}\)'
    with pytest.raises(UserError, match=cure):
        attach(adapted(lora_alpha=2), ALLoRA(), 30)
    attach(adapted(lora_alpha=2, alpha_pattern={"^fc": 4, "a.fc": 4}), ALLoRA(), 30)
