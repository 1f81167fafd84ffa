"""What AdaLoRA promises, through `attach` and an own loop: start, penalty, scale, importance, selection, refusals.

Numbers in names are those of the theorems that the paper and its code make true. Phases, merging and replicas are in
test_adalora_phases.py, the naive twin walks along in test_adalora_parity.py, and what every method promises is in
test_contract.py.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from adalora_loop import (
    ALL,
    F64,
    FINAL,
    RANK,
    SCALING,
    SHAPES,
    STEPS,
    TARGET,
    WARMUP,
    Loop,
    adam,
    close_to,
    count,
    method_of,
    model_of,
    sgd,
)
from models import tiny_llama
from peft import EvaConfig, LoraConfig, get_peft_model
from reference.adalora import penalty as penalty_of_twin
from torch import nn

from loralloc import AdaLoRA, Budget, UserError, attach

# ---- Start ----

START = pytest.mark.parametrize("published", [True, False])


@START
def test_1_the_start_changes_no_output(published):
    model = model_of()
    inputs = [torch.randn(8, i, dtype=F64) for i, _ in SHAPES]
    before = model(inputs)
    attach(model, method_of(published=published), STEPS)
    assert all(torch.equal(a, b) for a, b in zip(before, model(inputs), strict=True))


def test_2_as_published_the_task_reaches_lambda_alone_at_the_start():
    loop = Loop(method_of(published=True))
    loop.backward()
    for site in loop.sites:
        assert not site.A.grad.any()
        assert not site.B.grad.any()
        assert (site.gate.grad != 0).all()
    loop.walk(1)
    loop.backward()
    assert all((site.A.grad != 0).any() and (site.B.grad != 0).any() for site in loop.sites)


def test_2_by_default_the_task_reaches_p_alone_as_it_reaches_loras_b():
    loop = Loop(method_of())
    loop.backward()
    for site in loop.sites:
        assert not site.A.grad.any()
        assert not site.gate.grad.any()
        assert (site.B.grad != 0).all()
    loop.walk(1)
    loop.backward()
    assert all((site.A.grad != 0).any() and (site.gate.grad != 0).all() for site in loop.sites)


@pytest.mark.parametrize(("width", "distance", "tolerance"), [(768, 2.404, 0.05), (2500, 0.250, 0.06)])
def test_3_as_published_the_factors_are_gaussian_and_not_orthonormal(width, distance, tolerance):
    run = attach(model_of([(width, width)], r=12), method_of(published=True), STEPS)
    (site,) = run.sites
    for factor in (site.A.detach(), site.B.detach().T):
        assert factor.std().item() == pytest.approx(0.02, rel=0.03)
        assert factor.mean().item() == pytest.approx(0.0, abs=0.001)
        gap = torch.linalg.norm(factor @ factor.T - torch.eye(12, dtype=F64))
        assert gap.item() == pytest.approx(distance, abs=tolerance)
    assert torch.equal(site.scale, torch.full((12,), SCALING, dtype=F64))  # ρ = 1


@pytest.mark.parametrize(("parity", "gain"), [("adam", math.sqrt(768 / 3)), ("sgd", 768**0.25 / math.sqrt(3))])
def test_3_by_default_q_is_orthonormal_p_is_zero_and_the_gate_is_as_long_as_loras_rows(parity, gain):
    (site,) = attach(model_of([(40, 768)], r=12), method_of(parity=parity), STEPS).sites
    close_to(site.A.detach() @ site.A.detach().T, torch.eye(12, dtype=F64))
    assert not site.B.any()
    close_to(site.scale, torch.full((12,), SCALING * gain, dtype=F64))
    close_to(site.scale * site.gate.detach(), torch.full((12,), SCALING / math.sqrt(3), dtype=F64))


# ---- Penalty ----


@pytest.mark.parametrize("kind", ["reference", "paper"])
def test_4_the_penalty_of_the_chosen_kind_joins_the_gradients(kind):
    """Of all ranks in every site; γ = 0 adds nothing, bit for bit."""
    loop = Loop(method_of(published=True, penalty=kind, gamma=0.3)).walk(2)
    loop.backward()
    before = [(site.B.grad.clone(), site.A.grad.clone(), site.gate.grad.clone()) for site in loop.sites]
    P, Q = ([getattr(site, symbol) for site in loop.sites] for symbol in "BA")
    gradients = torch.autograd.grad(0.3 * penalty_of_twin(P, Q, kind), [*P, *Q])
    loop.run.before_step()
    for k, (site, (of_B, of_A, of_gate)) in enumerate(zip(loop.sites, before, strict=True)):
        close_to(site.B.grad, of_B + gradients[k])
        close_to(site.A.grad, of_A + gradients[len(P) + k])
        assert torch.equal(site.gate.grad, of_gate)

    silent = Loop(method_of(published=True, penalty=kind, gamma=0.0)).walk(2)
    silent.backward()
    expected = [p.grad.clone() for p in silent.model.parameters() if p.grad is not None]
    silent.run.before_step()
    assert all(
        torch.equal(a, p.grad)
        for a, p in zip(expected, (p for p in silent.model.parameters() if p.grad is not None), strict=True)
    )


@pytest.mark.parametrize(("kind", "length"), [("reference", 2 / 6), ("paper", 0.0)])
def test_5_near_the_optimum_the_penalty_pushes_with_constant_force_or_not_at_all(kind, length):
    loop = Loop(method_of(published=True, gamma=1.0, penalty=kind))
    loop.backward()
    with torch.no_grad():
        for site in loop.sites:
            nn.init.orthogonal_(site.B)
            nn.init.orthogonal_(site.A).add_(1e-7 * torch.randn(site.A.shape, dtype=F64))
    loop.run.before_step()  # λ = 0: the task has left no gradient on A and B
    for site in loop.sites:
        assert torch.linalg.norm(site.A.grad).item() == pytest.approx(length, abs=1e-5)
        assert torch.linalg.norm(site.B.grad) < 1e-12  # orthonormal up to rounding, which is no direction


def test_25_the_penalty_is_in_no_loss_and_needs_no_wrapper():
    losses, gradients = [], []
    for gamma, wrap in ((0.0, False), (5.0, False), (5.0, True)):
        loop = Loop(method_of(published=True, gamma=gamma))
        if wrap:  # as compilers and engines do
            inner, outer = loop.model, nn.Sequential(loop.model)
            loop.model = outer  # type: ignore[assignment]
            assert inner is outer[0]
        loop.backward()
        losses.append(loop.loss(0).item())
        loop.run.before_step()
        gradients.append(torch.cat([site.A.grad.flatten() for site in loop.sites]))
    assert losses[0] == losses[1] == losses[2]
    assert not gradients[0].any()
    assert gradients[1].any()
    assert torch.equal(gradients[1], gradients[2])


# ---- Scale ----


@pytest.mark.parametrize(("published", "gain"), [(True, 1.0), (False, math.sqrt(8 / 3))])
def test_6_the_scale_is_alpha_over_the_starting_rank_for_good(published, gain):
    loop = Loop(method_of(2, published=published), model_of([(6, 8)]))
    (site,) = loop.sites
    (x,) = loop.inputs(0)
    base = x @ site.layer.base_layer.weight.T
    with torch.no_grad():
        site.gate.fill_(1.0)
    close_to(loop.model([x])[0] - base, SCALING * gain * x @ site.A.T @ site.B.T)
    loop = Loop(method_of(2, published=published), model_of([(6, 8)])).walk()
    (site,) = loop.sites
    assert sorted(set(site.scale.tolist())) == pytest.approx([0.0, SCALING * gain])
    assert count(loop.living()) == 2
    update = SCALING * gain * (site.B * site.gate) @ site.A
    close_to(loop.outputs()[0], loop.inputs(999)[0] @ (site.layer.base_layer.weight + update).T)


# ---- Importance and selection ----


def test_13_the_order_of_the_triplets_does_not_matter():
    loop, shuffled = Loop(method_of()), Loop(method_of())
    order = [2, 0, 3, 1]
    with torch.no_grad():
        for site in shuffled.sites:
            site.A.copy_(site.A[order].clone())
            site.B.copy_(site.B[:, order].clone())
    loop.walk()
    shuffled.walk()
    assert [[row[i] for i in order] for row in loop.living()] == shuffled.living()
    assert loop.run.finish().ranks == shuffled.run.finish().ranks


@pytest.mark.parametrize("important", [0, 1, 2])
def test_14_the_selection_is_global(important):
    """A matrix that matters much more takes the ranks of all others."""
    weights = [1000.0 if k == important else 1.0 for k in range(3)]
    ranks = list(Loop(method_of(RANK), weights=weights).walk().run.finish().ranks.values())
    assert ranks == [RANK if k == important else 0 for k in range(3)]
    assert sorted(Loop(method_of(RANK)).walk().run.finish().ranks.values()) != [0, 0, RANK]


@pytest.mark.parametrize("order", ["paper", "reference"])
def test_7_15_closing_meets_the_budget_in_every_step(order):
    loop = Loop(method_of(order=order))
    for t in range(STEPS):
        loop.step()
        assert count(loop.living()) == loop.run.schedule.budget(t)
    assert loop.run.schedule.budget(WARMUP) == ALL
    assert loop.run.schedule.budget(FINAL) == TARGET


@pytest.mark.parametrize("optimizer", [adam, sgd])
def test_15_closing_sets_lambda_to_zero_and_touches_nothing_else(optimizer):
    """Up to its first closing a run is one that never closes, but for the λ that it closes."""
    closing = Loop(method_of(interval=8), optimizer=optimizer).walk(9)
    keeping = Loop(method_of(ALL, interval=8), optimizer=optimizer).walk(9)
    closed = ~torch.tensor(closing.living())
    assert closed.sum() == ALL - closing.run.schedule.budget(8) > 0
    for ours, theirs, off in zip(closing.sites, keeping.sites, closed, strict=True):
        assert torch.equal(ours.A, theirs.A)
        assert torch.equal(ours.B, theirs.B)
        assert torch.equal(ours.gate, torch.where(off, 0.0, theirs.gate))
        for symbol in ("A", "B", "gate"):
            state = closing.optimizer.state[getattr(ours, symbol)]
            for name, value in keeping.optimizer.state[getattr(theirs, symbol)].items():
                assert torch.equal(state[name], value), name


def test_16_equal_scores_leave_the_budget_to_the_first():
    loop = Loop(method_of(gamma=0.0), weights=[0.0, 0.0, 0.0]).walk()  # no gradient: every score is zero
    assert list(loop.run.finish().ranks.values()) == [4, 2, 0]


def test_17_a_target_that_is_the_start_closes_nothing():
    loop = Loop(method_of(ALL)).walk()
    assert count(loop.living()) == ALL
    assert list(loop.run.finish().ranks.values()) == [RANK] * 3


@pytest.mark.parametrize("tensor", ["0.mean", "1.uncertainty"])
def test_17_a_score_that_is_not_a_number_never_survives(tensor):
    loop = Loop(method_of()).walk(WARMUP)
    index, name = tensor.split(".")
    getattr(loop.run.state.stacks[int(index)], name)[0, 1] = math.nan  # of site 0, triplet 1; of site 1, triplet 1
    loop.walk()
    assert count(loop.living()) == TARGET
    assert loop.living()[int(tensor[0])][1] is False
    assert sum(loop.run.finish().ranks.values()) == TARGET


@pytest.mark.parametrize("order", ["paper", "reference"])
def test_20_the_orders_differ_in_the_sensitivity_of_a_zero_lambda(order):
    """At the start and after a closing: none in the paper's order, some in the published code's."""
    loop = Loop(method_of(published=True, order=order, importance="sensitivity", gamma=0.0))
    zeros = 0
    for _ in range(FINAL):
        zero = ~torch.tensor(loop.living())
        loop.step()
        of_lambda = loop.run.state_dict()[0]["6.mean"]
        assert torch.equal(of_lambda == 0, zero if order == "paper" else torch.zeros_like(zero))
        zeros += int(zero.sum())
    assert zeros > ALL + 20


GONE = r"by the gradients of the step just made, which are gone: call run\.after_step\(.*\) before optimizer\.zero_grad"


@pytest.mark.parametrize("set_to_none", [True, False])
def test_the_reference_order_asks_for_gradients_that_are_gone(set_to_none):
    """Zeros in their place would keep all ranks of the first modules."""
    loop = Loop(method_of(order="reference"))
    loop.backward()
    loop.run.before_step()
    loop.optimizer.step()
    loop.optimizer.zero_grad(set_to_none)
    with pytest.raises(UserError, match=GONE):
        loop.run.after_step()


@pytest.mark.parametrize(("order", "importance"), [("paper", "smoothed"), ("reference", "magnitude")])
def test_gradients_may_be_gone_where_nothing_is_measured_after_the_step(order, importance):
    usual, early = (Loop(method_of(order=order, importance=importance)) for _ in range(2))
    usual.walk()
    early.run.after_step = lambda optimizer, after=early.run.after_step: (optimizer.zero_grad(), after(optimizer))
    early.walk()
    assert early.living() == usual.living()


@pytest.mark.parametrize("value", [math.nan, None])
def test_a_step_without_gradients_is_none_whose_gradients_are_gone(value):
    """Skipped for one that is not finite, all are cleared on purpose; or the adapter took no part."""
    loop = Loop(method_of(order="reference", gamma=0.0)).walk(2)
    loop.backward()
    for site in loop.sites:
        for parameter in (site.A, site.B, site.gate):
            parameter.grad = None if value is None else torch.full_like(parameter, value)
    before = loop.run.state_dict()[0]["0.mean"].clone()
    loop.run.before_step(loop.optimizer)
    loop.optimizer.step()
    loop.run.after_step(loop.optimizer)
    close_to(loop.run.state_dict()[0]["0.mean"], 0.85 * before if value is None else before)
    assert count(loop.walk().living()) == TARGET


@pytest.mark.parametrize("importance", ["sensitivity", "magnitude"])
def test_the_simpler_importances_select_what_they_say(importance):
    method = method_of(importance=importance, interval=8, gamma=0.0)
    loop = Loop(method, optimizer=lambda parameters: torch.optim.SGD(parameters, 0.1)).walk(8)
    loop.backward()
    of_step = [
        (s.gate * s.gate.grad).abs() + (s.A * s.A.grad).abs().mean(1) + (s.B * s.B.grad).abs().mean(0)
        for s in loop.sites
    ]
    loop.run.before_step()
    loop.optimizer.step()
    gates = [math.sqrt(site.outputs / 3) * site.gate.detach().abs() for site in loop.sites]
    scores = of_step if importance == "sensitivity" else gates
    best = torch.cat(scores).topk(loop.run.schedule.budget(8)).indices
    loop.run.after_step()
    living = [alive for row in loop.living() for alive in row]
    assert set(best.tolist()) == {i for i, alive in enumerate(living) if alive}
    assert len(best) < ALL


@pytest.mark.parametrize("parity", ["adam", "sgd"])
def test_magnitudes_are_of_gates_which_start_equal_in_layers_of_all_widths(parity):
    """Not of λ, whose unit is that of its layer: there the widest layer begins with the smallest."""
    loop = Loop(method_of(importance="magnitude", parity=parity), model_of([(6, 8), (8, 300), (5, 9)]))
    close_to(loop.run.method._scores(loop.run.state), torch.full((ALL,), 1 / math.sqrt(3), dtype=F64))
    gates = torch.cat([site.gate.detach() for site in loop.sites])
    assert gates.max() > 2 * gates.min()
    with torch.no_grad():
        loop.sites[1].gate.mul_(-2)
    assert sorted(loop.run.method._scores(loop.run.state).topk(RANK).indices.tolist()) == [4, 5, 6, 7]


# ---- What is refused ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta1": 0.0}, "beta1 must be above 0, got 0.0"),
        ({"beta2": 1.0}, "beta2 must be below 1, got 1.0"),
        ({"beta1": math.nan}, "beta1 must be a finite number, got NaN"),
        ({"gamma": -0.1}, "gamma must be at least 0, got -0.1"),
        ({"gamma": math.nan}, "gamma must be a finite number, got NaN"),
        ({"gamma": math.inf}, "gamma must be a finite number, got Infinity"),
        (
            {"warmup": 20, "cooldown": 10},
            r"no step is left .* warmup=20 \(20 steps\) and cooldown=10 \(10 steps\) fill the 30",
        ),
        ({"warmup": 1.5}, "warmup must be a fraction of the run below 1, such as 0.1, or .* steps, got 1.5"),
        ({"cooldown": -1}, "cooldown must be a fraction of the run below 1, such as 0.1, or .* steps, got -1"),
        ({"interval": 0}, "interval must be at least 1, got 0"),
        ({"budget": 13}, r"total_rank=13 asks for 13 ranks, but the 3 adapted modules start with 12"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        attach(model_of(), method_of(**settings), STEPS)


def test_a_run_of_one_step_is_refused():
    with pytest.raises(UserError, match=r"at least \d optimizer steps, the run has 1"):
        attach(model_of(), AdaLoRA(Budget(total_rank=TARGET)), 1)


@pytest.mark.filterwarnings("ignore:lora with eva initialization")
@pytest.mark.parametrize("start", ["eva", "gaussian"])
def test_an_adapter_that_was_computed_from_data_is_refused(start):
    """One that was drawn in another way is not: AdaLoRA draws it anew."""
    given = {"eva_config": EvaConfig()} if start == "eva" else {}
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=start, **given)
    model = get_peft_model(tiny_llama(), config)
    method = AdaLoRA(Budget(average_rank=1))
    if start == "gaussian":
        attach(model, method, STEPS)
        return
    with pytest.raises(UserError, match=r'"eva" computes A from data, and AdaLoRA would draw it anew; use .* ABLoRA$'):
        attach(model, method, STEPS)


def test_a_trained_adapter_is_refused_and_left_as_it_was():
    model = model_of()
    with torch.no_grad():
        model.base_model.model.layers[1].lora_B["default"].weight.fill_(0.3)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        UserError, match=r"layers\.1: the adapter has been trained already .* start from a fresh adapter"
    ):
        attach(model, method_of(), STEPS)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in after)


def test_more_ranks_than_dimensions_are_refused_with_the_cure():
    words = (
        r"2 layers whose names end in 1, 2: rank 6 is above the smaller dimension \(5\), and more rows than that "
        r'cannot be orthonormal; leave them out, LoraConfig\(exclude_modules=\["1", "2"\]\) \(lora.exclude_modules in '
        r"a recipe\), or lower LoraConfig.r \(lora.r in a recipe\) to 5$"
    )
    with pytest.raises(UserError, match=words):
        attach(model_of(r=6), method_of(), STEPS)
    assert [site.rank for site in attach(model_of(r=6, exclude_modules=["1", "2"]), method_of(), STEPS).sites] == [6]
    assert [site.rank for site in attach(model_of(r=5), method_of(), STEPS).sites] == [5, 5, 5]


def test_a_schedule_that_does_not_fit_leaves_the_model_as_it_was():
    model = model_of()
    before = list(model.state_dict())
    with pytest.raises(UserError, match="no step is left"):
        attach(model, method_of(warmup=20, cooldown=10), STEPS)
    assert list(model.state_dict()) == before
    attach(model, method_of(), STEPS)


@pytest.mark.parametrize("name", ["importance", "order", "penalty", "parity"])
def test_unknown_words_are_refused(name):
    with pytest.raises(UserError, match=rf'^{name} must be one of .*; got "smothed"\.'):
        method_of(**{name: "smothed"})


def test_an_unknown_word_is_answered_with_the_known_ones():
    text = r'^importance must be one of smoothed, sensitivity, magnitude; got "smothed"\. Did you mean "smoothed"\?$'
    with pytest.raises(UserError, match=text):
        AdaLoRA(Budget(total_rank=TARGET), importance="smothed")  # type: ignore[arg-type]


def test_orthonormal_factors_in_bfloat16_are_not_pushed_along_their_rounding():
    layer = nn.Sequential(nn.Linear(64, 64, dtype=torch.bfloat16))
    model = get_peft_model(layer, LoraConfig(r=4, target_modules=["0"]), autocast_adapter_dtype=False)
    run = attach(model, AdaLoRA(Budget(average_rank=2)), STEPS)
    model(torch.randn(8, 64, dtype=torch.bfloat16)).square().mean().backward()
    run.before_step()
    assert not run.sites[0].A.grad.any()


def test_a_layer_that_took_no_part_in_the_step_has_no_sensitivity():
    loop = Loop(method_of(published=True, gamma=1.0)).walk(1)
    loop.optimizer.zero_grad()
    before = loop.run.state_dict()[0]["0.mean"].clone()
    loop.model.base_model.model.layers[1](loop.inputs(1)[1]).square().mean().backward()
    assert loop.sites[0].A.grad is None
    loop.run.before_step()
    close_to(loop.run.state_dict()[0]["0.mean"], 0.85 * before)
