"""AdaLoRA through a run: phases, the hard mask of the last one, merging and saving, counting, replicas.

Numbers in names as in test_adalora.py.
"""

from __future__ import annotations

import pytest
import torch
from adalora_loop import (
    ALL,
    F64,
    FINAL,
    FROZEN,
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
from peft import PeftModel

from loralloc import AdaLoRA, Budget, UserError
from loralloc.plan import ModuleRank, RankPlan

# ---- Phases ----


@pytest.mark.parametrize("order", ["paper", "reference"])
def test_18_closed_triplets_live_between_closings_and_rest_in_the_final_phase(order):
    loop = Loop(method_of(order=order, interval=7))
    for t in range(FROZEN):
        loop.step()
        assert count(loop.living()) == (loop.run.schedule.budget(t) if t in (7, 14) else ALL)
    final = loop.walk(FROZEN + 1).living()
    assert count(final) == TARGET
    for _ in range(FROZEN + 1, STEPS):
        loop.step()
        assert loop.living() == final


def test_a_cap_holds_from_the_budget_on_that_the_modules_can_have_under_it():
    """Three modules of 4: up to 9 ranks with a cap of 3, and 6 in the end."""
    loop = Loop(method_of(Budget(total_rank=TARGET, max_rank=3)), weights=[1000.0, 1.0, 1.0])
    free = Loop(method_of(TARGET), weights=[1000.0, 1.0, 1.0])
    above = 0
    for t in range(STEPS):
        loop.step()
        budget = loop.run.schedule.budget(t)
        ranks = [sum(row) for row in loop.living()]
        assert sum(ranks) == budget
        if budget <= 9:
            assert max(ranks) <= 3
        else:
            above += max(ranks) > 3
    assert above > WARMUP
    assert max(loop.run.finish().ranks.values()) == 3
    assert max(free.walk().run.finish().ranks.values()) == 4, "the partner: without a cap the first module has all"


def test_18_a_closed_triplet_can_come_back():
    """One place for two: the first goal needs triplet 0, the second goal triplet 1."""
    model = model_of([(2, 2)], r=2)
    loop = Loop(
        AdaLoRA(Budget(total_rank=1), warmup=2, cooldown=3, interval=5, gamma=0.0),
        model,
        lambda p: torch.optim.SGD(p, 0.05),
    )
    (site,) = loop.sites
    with torch.no_grad():
        site.A.copy_(torch.eye(2))
        site.B.copy_(torch.eye(2))
    living = []
    for t in range(26):
        loop.goals = [
            site.layer.base_layer.weight + torch.diag(torch.tensor([2.0, 0.1] if t < 11 else [0.1, 3.0], dtype=F64))
        ]
        loop.step()
        living.append(loop.living()[0])
    assert living[10] == [True, False]
    assert living[25] == [False, True]


@pytest.mark.parametrize("cooldown", [2, 0.001])
def test_18_the_shortest_final_phase_still_ends_at_the_budget(cooldown):
    """Otherwise finishing changes the function that was trained and evaluated."""
    loop = Loop(method_of(interval=7, cooldown=cooldown)).walk()
    assert count(loop.living()) == TARGET


@pytest.mark.parametrize("order", ["paper", "reference"])
def test_19_scores_rest_in_the_final_phase(order):
    loop = Loop(method_of(order=order)).walk(FINAL - 1)
    before, last = (
        {n: v.clone() for n, v in loop.walk(until).run.state_dict()[0].items()} for until in (FINAL - 1, FINAL)
    )
    assert not any(torch.equal(before[name], last[name]) for name in last)
    after = loop.walk().run.state_dict()[0]
    assert all(torch.equal(after[name], last[name]) for name in last)


@pytest.mark.parametrize("kind", ["reference", "paper"])
def test_closed_for_good_means_no_gradient_and_no_share_in_the_penalty(kind):
    loop = Loop(method_of(penalty=kind, gamma=1.0)).walk(FROZEN + 1)
    for _ in range(3):
        loop.backward()
        loop.run.before_step()
        for site, living in zip(loop.sites, loop.living(), strict=True):
            for i, alive in enumerate(living):
                gradients = (site.A.grad[i], site.B.grad[:, i], site.gate.grad[i])
                assert all(bool(gradient.any()) == alive for gradient in gradients)
        loop.optimizer.step()
        loop.run.after_step(loop.optimizer)


def test_the_reference_order_keeps_the_drift_of_closed_triplets():
    for order in ("paper", "reference"):
        loop = Loop(method_of(order=order), optimizer=lambda p: torch.optim.Adam(p, lr=0.02)).walk(FROZEN + 1)
        off = [~torch.tensor(row) for row in loop.living()]
        before = [site.A.detach()[row] for site, row in zip(loop.sites, off, strict=True)]
        loop.walk()
        still = [torch.equal(site.A[row], old) for site, row, old in zip(loop.sites, off, before, strict=True)]
        assert all(still) == (order == "paper")


@pytest.mark.parametrize("kind", ["reference", "paper"])
@pytest.mark.parametrize("optimizer", [adam, sgd])
def test_the_final_phase_is_that_of_a_compacted_copy(optimizer, kind):
    """Weights, momentum, weight decay and penalty: kept triplets evolve as if the closed ones did not exist."""
    loop = Loop(method_of(9, penalty=kind), optimizer=optimizer).walk(FROZEN + 1)
    keep = [torch.tensor(row) for row in loop.living()]
    ranks = [int(row.sum()) for row in keep]
    assert RANK > min(ranks) > 0
    names = [site.name for site in loop.sites]
    pattern = {
        "rank_pattern": dict(zip(names, ranks, strict=True)),
        "alpha_pattern": {n: SCALING * r for n, r in zip(names, ranks, strict=True)},
    }
    small = Loop(method_of(sum(ranks), penalty=kind), model_of(**pattern), optimizer)
    assert [site.rank for site in small.sites] == ranks
    small.walk(1)  # makes the optimizer's state
    for site, compact, on in zip(loop.sites, small.sites, keep, strict=True):
        for symbol, index in (("A", on), ("B", (slice(None), on)), ("gate", on)):
            theirs, ours = getattr(site, symbol), getattr(compact, symbol)
            ours.data.copy_(theirs.data[index])
            for name, value in loop.optimizer.state[theirs].items():
                small.optimizer.state[ours][name] = (value[index] if value.shape == theirs.shape else value).clone()
    small.run.step = loop.run.step
    loop.walk()
    small.walk()
    for site, compact, on in zip(loop.sites, small.sites, keep, strict=True):
        close_to(site.A[on], compact.A)
        close_to(site.B[:, on], compact.B)
        close_to(site.gate[on], compact.gate)


# ---- Merging, saving, counting, replicas ----


def test_21_merging_and_finishing_keep_the_function():
    loop = Loop(method_of(RANK), weights=[1000.0, 1.0, 1.0])  # leaves two sites without a rank
    for until in (WARMUP, STEPS):
        expected = loop.walk(until).outputs()
        loop.model.merge_adapter()
        close_to(loop.outputs(), expected)
        loop.model.unmerge_adapter()
        close_to(loop.outputs(), expected)
    base = [x @ site.layer.base_layer.weight.T for x, site in zip(loop.inputs(999), loop.sites, strict=True)]
    assert list(loop.run.finish().ranks.values()) == [RANK, 0, 0]
    close_to(loop.outputs(), expected)
    for k in (1, 2):
        assert torch.equal(loop.outputs()[k], base[k])
    assert not torch.allclose(loop.outputs()[0], base[0])
    merged = loop.model.merge_and_unload()
    close_to([y.detach() for y in merged(loop.inputs(999))], expected)


def test_22_the_finished_adapter_is_plain_lora_on_disk(tmp_path):
    loop = Loop(method_of(5)).walk()
    expected = loop.outputs()
    loop.run.finish()
    loop.model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(model_of().unload(), tmp_path)
    with torch.no_grad():
        close_to(reloaded(loop.inputs(999)), expected)


def test_22_a_checkpoint_of_another_model_is_refused():
    tensors, numbers = Loop(method_of()).walk(8).run.state_dict()
    loop = Loop(method_of(), model_of(SHAPES[:2]))
    with pytest.raises(
        UserError, match=r"its sites has layers\.2=\[4, 5, 9.* where this run has null; resume with the"
    ):
        loop.run.load_state_dict(tensors, numbers)
    with pytest.raises(UserError, match="its method is 'ablora', this run's is 'adalora'"):
        Loop(method_of()).run.load_state_dict(tensors, {**numbers, "method": "ablora"})


@pytest.mark.parametrize(
    "settings",
    [{"parity": "sgd"}, {"order": "reference"}, {"gamma": 0.3}, {"beta1": 0.5}, {"warmup": 6}],
)
def test_22_a_checkpoint_with_other_settings_is_refused(settings):
    tensors, numbers = Loop(method_of()).walk(8).run.state_dict()
    with pytest.raises(UserError, match=f"{next(iter(settings))}=.* where this run has .*; resume with the settings"):
        Loop(method_of(**settings)).run.load_state_dict(tensors, numbers)


def test_22_a_checkpoint_with_another_budget_is_refused():
    tensors, numbers = Loop(method_of()).walk(8).run.state_dict()
    text = (
        "^the checkpoint belongs to another run: its schedule has target=6 where this run has 5; resume with the "
        "settings it was made with$"
    )
    with pytest.raises(UserError, match=text):
        Loop(method_of(budget=5)).run.load_state_dict(tensors, numbers)
    with pytest.raises(
        UserError, match="its settings has max_rank=null where this run has 3; resume with the settings"
    ):
        Loop(method_of(Budget(total_rank=6, max_rank=3))).run.load_state_dict(tensors, numbers)


def test_23_parameters_are_kept_ranks_times_inputs_and_outputs():
    plan = Loop(method_of()).walk().run.finish()
    assert plan.parameters == sum(rank * (i + o) for rank, (i, o) in zip(plan.ranks.values(), SHAPES, strict=True))

    def uniform(shapes: list[tuple[int, int]]) -> int:
        return RankPlan("", {str(k): ModuleRank(1, 1, i, o, 1.0) for k, (i, o) in enumerate(shapes)}).parameters

    block = [(1024, 4096), (4096, 1024)]
    assert uniform(12 * (4 * [(768, 768)] + [(768, 3072), (3072, 768)])) == 165_888  # DeBERTa-base
    assert uniform(12 * (4 * [(1024, 1024)] + block) + 12 * (8 * [(1024, 1024)] + block)) == 540_672  # BART-large


@pytest.mark.parametrize("order", ["paper", "reference"])
def test_24_replicas_with_averaged_gradients_agree_bit_for_bit(order):
    loops = [Loop(method_of(order=order)) for _ in range(2)]
    loops[1].inputs = lambda step: Loop.inputs(loops[1], 500 + step)  # type: ignore[method-assign]
    for _ in range(STEPS):
        for loop in loops:
            loop.backward()
        for ours, theirs in zip(*(loop.model.parameters() for loop in loops), strict=True):
            if ours.grad is not None:
                mean = (ours.grad + theirs.grad) / 2
                ours.grad, theirs.grad = mean, mean.clone()
        for loop in loops:
            loop.run.before_step()
            loop.optimizer.step()
            loop.run.after_step(loop.optimizer)
        assert loops[0].living() == loops[1].living()
        assert all(torch.equal(a, b) for a, b in zip(loops[0].factors(), loops[1].factors(), strict=True))


def test_24_clipping_scales_the_sensitivities_of_its_step():
    means = []
    for factor in (1.0, 0.25):
        loop = Loop(method_of(gamma=0.0)).walk(3)
        loop.backward()
        for parameter in loop.model.parameters():
            if parameter.grad is not None:
                parameter.grad *= factor
        before = {name: value.clone() for name, value in loop.run.state_dict()[0].items()}
        loop.run.before_step()
        after = loop.run.state_dict()[0]
        means.append([after[name] - 0.85 * before[name] for name in after if name.endswith("mean")])
    close_to([0.25 * mean for mean in means[0]], means[1])
