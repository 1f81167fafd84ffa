"""ABLoRA on tiny models: what a round does, what it leaves alone, and what is refused.

Property numbers are those of the specification of ALoRA. The scores have tests of their own (test_ablora_scores.py),
the forward passes too (training/test_ablation.py).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import BUILDERS, labelled_batch, logits, tiny_peft, train_adapter
from peft import LoraConfig, PeftModel, get_peft_model
from reference.ablora import importance, one_round
from torch import Tensor

from loralloc import ABLoRA, AdaLoRA, ALLoRA, Budget, UserError, attach
from loralloc.training.run import AllocationRun

STEPS = 12
TWO = Budget(average_rank=2)  # of 4


def batches(name: str, count: int = 2) -> list[dict[str, Tensor]]:
    return [labelled_batch(name, 100 + seed) for seed in range(count)]


class Loop:
    """A short run with one round after step 3 and one after step 7."""

    def __init__(
        self, name: str = "llama", budget: Budget = TWO, model: PeftModel | None = None, **settings: Any
    ) -> None:
        settings = {"warmup": 4, "interval": 4, "rounds": 2, "validation": batches(name), **settings}
        self.name, self.events = name, []
        self.model = tiny_peft(name) if model is None else model
        torch.manual_seed(0)
        self.run: AllocationRun = attach(self.model, ABLoRA(budget, **settings), STEPS)
        self.run.on_event = self.events.append
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=0.02)

    def update(self) -> None:
        """Everything of a step but the method's part after it."""
        self.model(**labelled_batch(self.name, self.run.step)).loss.backward()
        self.run.before_step(self.optimizer)
        self.optimizer.step()

    def walk(self, until: int = STEPS) -> Loop:
        while self.run.step < until:
            self.update()
            self.run.after_step(self.optimizer)
            self.optimizer.zero_grad()
        return self

    def to_round(self, step: int = 3) -> Loop:
        """Up to the moment before the round after a step."""
        self.walk(step).update()
        return self

    @property
    def rounds(self) -> list[dict[str, Any]]:
        return [event for event in self.events if "round" in event]


# ---- The start ----


def test_starting_ranks_are_even_and_the_rest_of_the_capacity_is_closed():
    run = Loop().run
    assert [int((site.scale != 0).sum()) for site in run.sites] == [2] * 6
    assert [site.rank for site in run.sites] == [4] * 6
    uneven = Loop(budget=Budget(total_rank=15)).run
    assert [int((site.scale != 0).sum()) for site in uneven.sites] == [3, 3, 3, 2, 2, 2]


@pytest.mark.parametrize(("rslora", "scale"), [(False, 6 / 2), (True, 6 / 2**0.5)])
def test_the_scale_is_alpha_over_the_starting_rank_and_never_changes(rslora, scale):
    """Property 15; lora_alpha is 6, the capacity 4 and the starting rank 2."""
    loop = Loop(model=tiny_peft("llama", use_rslora=rslora))
    for step in range(STEPS):
        for site in loop.run.sites:
            open_ranks = site.scale[site.scale != 0]
            torch.testing.assert_close(open_ranks, torch.full_like(open_ranks, scale))
            assert site.plan_scale == pytest.approx(scale)
        loop.walk(step + 1)
    plan = loop.run.finish()
    assert [module.scale for module in plan.modules.values()] == pytest.approx([scale] * 6)


def test_a_plan_tells_the_starting_rank_which_the_final_one_may_exceed():
    plan = Loop().walk().run.finish()
    assert {module.start for module in plan.modules.values()} == {2}
    assert max(plan.ranks.values()) > 2
    assert plan.total_rank == plan.peak == 12
    assert plan.start_parameters > 0


# ---- A round ----


def game_of(model: PeftModel, run: AllocationRun, data: list[dict[str, Tensor]]):
    """S as a function of the active ranks, by setting gates and calling the model: nothing of ours."""

    def game(active: frozenset[int]) -> float:
        first = 0
        with torch.no_grad():
            for site in run.sites:
                site.gate.copy_(torch.tensor([float(first + i in active) for i in range(site.rank)]))
                first += site.rank
            value = -sum(float(model(**batch).loss) for batch in data) / len(data)
            for site in run.sites:
                site.gate.fill_(1.0)
        return value

    return game


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_a_round_is_that_of_the_naive_twin(name, mode):
    """Algorithm 1 end to end, and property 19: fast prunes what exact prunes."""
    model = tiny_peft(name)
    loop = Loop(name, model=model, mode=mode, samples=6).to_round()
    before = loop.run.state.open.clone()
    active = before.nonzero()[:, 0].tolist()
    naive = importance(game_of(model, loop.run, batches(name)), active)
    ranks = [int(part.sum()) for part in before.split(4)]
    values = iter(naive.values())
    table = {site.name: [next(values) for _ in range(rank)] for site, rank in zip(loop.run.sites, ranks, strict=True)}
    pruned, grown = one_round(table, n_prune=3)  # three types of modules in each model
    loop.run.after_step(loop.optimizer)
    (event,) = loop.rounds
    assert event["pruned"] == list(pruned.values())
    assert event["grown"] == list(grown.values())
    assert event["mode"] == mode
    lowest = sorted(active, key=lambda rank: naive[rank])[:3]
    assert sorted(lowest) == (before & ~loop.run.state.open).nonzero()[:, 0].tolist()


def test_growing_changes_no_output_and_new_ranks_are_loras():
    """Property 12: after the round the model is what it was with the pruned gates off."""
    loop = Loop().to_round()
    state, sites = loop.run.state, loop.run.sites
    before = state.open.clone()
    loop.run.after_step(loop.optimizer)
    after = logits(loop.model)
    opened = state.born == 0
    assert int(opened.sum()) == 3
    with torch.no_grad():
        for site, new, old in zip(sites, opened.split(4), before.split(4), strict=True):
            assert not site.B[:, new].any()
            assert (site.A[new].abs() <= site.inputs**-0.5).all()
            site.gate.copy_(old & (site.scale != 0))
    torch.testing.assert_close(logits(loop.model), after, rtol=0, atol=1e-6)
    drawn = [site.A.detach()[new].flatten() for site, new in zip(sites, opened.split(4), strict=True)]
    assert torch.cat(drawn).std() > 0.1


def test_closed_ranks_lose_their_moments_and_survivors_keep_theirs():
    """Property 16."""
    loop = Loop().to_round()
    moments = {site.name: loop.optimizer.state[site.A]["exp_avg"].clone() for site in loop.run.sites}
    before = loop.run.state.open.clone()
    loop.run.after_step(loop.optimizer)
    same = (before & loop.run.state.open & (loop.run.state.born < 0)).split(4)
    for site, kept, open_now in zip(loop.run.sites, same, loop.run.state.open.split(4), strict=True):
        now = loop.optimizer.state[site.A]["exp_avg"]
        assert torch.equal(now[kept], moments[site.name][kept])
        assert not now[~open_now].any()
        assert moments[site.name][kept].any() or not kept.any()


def test_a_new_rank_takes_a_first_step_of_the_learning_rate():
    loop = Loop().walk(4)
    (site, new), *_ = [
        (site, born == 0)
        for site, born in zip(loop.run.sites, loop.run.state.born.split(4), strict=True)
        if (born == 0).any()
    ]
    loop.walk(5)
    assert site.B[:, new].abs().max().item() == pytest.approx(0.02, rel=1e-3)  # from 0; Adam's own would be 0.045


def test_the_trace_tells_what_a_round_did():
    loop = Loop(mode="fast", samples=4).walk()
    first, second = loop.rounds
    assert (first["event"], second["event"]) == ("allocate", "freeze")
    assert (first["step"], second["step"]) == (3, 7)
    assert sum(first["pruned"]) == sum(first["grown"]) == 3
    assert first["churn"] == 0.0
    assert first["ablated"] <= 12
    assert first["forwards"] > 4
    assert {"correlation", "error_allowed", "score_spread", "sampling_error"} <= first.keys()


def test_protected_ranks_survive_the_next_round():
    """Their partner: without protection new ranks are pruned again, which the trace calls churn."""
    churn = [Loop(protect_rounds=rounds, mode="exact", n_prune=5).walk().rounds[1]["churn"] for rounds in (0, 1)]
    assert churn[0] > 0
    assert churn[1] == 0


def test_each_block_keeps_its_budget():
    loop = Loop(scope="block", n_prune=1).walk()
    for event in loop.rounds:
        assert sum(event["ranks"][:3]) == sum(event["ranks"][3:]) == 6
        assert sum(event["pruned"][:3]) == sum(event["pruned"][3:]) == 1


def test_a_module_alone_in_its_block_keeps_its_ranks():
    """Nothing could grow in place of what it would lose: BERT's pooler stands in no block."""
    base = BUILDERS["bert"](0)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["query", "value", "pooler.dense"]))
    loop = Loop("bert", model=model, scope="block", n_prune=1).walk()
    assert [event["budget"] for event in loop.rounds] == [10, 10]
    assert all(event["ranks"][-1] == 2 and event["pruned"][-1] == 0 for event in loop.rounds)
    assert sum(map(sum, (event["pruned"] for event in loop.rounds))) == 4


def test_modules_among_which_nothing_could_move_are_refused():
    alone = tiny_peft("llama", target_modules=["q_proj"])
    with pytest.raises(UserError, match=r'scope="block" no rank could move: .*use scope="global"'):
        Loop(model=alone, scope="block")
    assert len(Loop(model=alone, scope="global").walk().rounds) == 2  # the cure
    for scope in ("global", "block"):
        with pytest.raises(UserError, match=r"no rank could move: one module is adapted; adapt more of them"):
            Loop(model=tiny_peft("llama", target_modules=["layers.0.self_attn.q_proj"]), scope=scope)
        assert Loop(model=tiny_peft("llama", target_modules="all-linear"), scope=scope).run.sites[1:]  # the cure


@pytest.mark.parametrize("refused", ["rounds", "scale", "prepared"])
def test_what_is_refused_leaves_the_adapter_as_it_was(refused):
    """Closed ranks are cleared when a run ends; a run that never began must not cost the adapter its A."""
    model = tiny_peft("llama", lora_alpha=4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    method: Any = ABLoRA(TWO, batches("llama"), warmup=4, interval=4, rounds=2 if refused == "scale" else 99)
    if refused == "scale":
        method = ALLoRA(allocate=method)
    elif refused == "prepared":
        method = ALLoRA(allocate=AdaLoRA(TWO, warmup=6, cooldown=6))
    with pytest.raises(UserError):
        attach(model, method, STEPS)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


def test_rounds_look_at_the_same_samples_unless_told_otherwise(monkeypatch):
    for resample, expected in ((False, [0, 0]), (True, [0, 1])):
        loop, drawn = Loop(resample=resample, samples=3), []
        scoring = loop.run.data.scoring
        loop.run.data.scoring = lambda n, draw, s=scoring, d=drawn: (d.append(draw), s(n, draw))[1]
        loop.walk()
        assert drawn == expected


def test_as_published():
    method = ABLoRA.as_published(TWO, batches("llama"), rounds=2)
    assert (method.keep_budget, ABLoRA(TWO, batches("llama")).keep_budget) == (False, True)
    assert (method.mode, method.warmup, method.interval, method.rounds, method.samples) == (
        "exact",
        0.1,
        0.025,
        2,
        None,
    )


# ---- The paper's ablations: gates, sensitivity ----


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
def test_gates_start_at_one_and_move_as_twice_the_sigmoid_of_their_logits(optimizer):
    """Property 20, and that the optimizer moves a' although it holds α'."""
    loop = Loop(score="gate", validation=None, warmup=11, rounds=1)
    assert torch.equal(logits(loop.model), logits(tiny_peft("llama")))
    train_adapter(loop.model)
    site = loop.run.sites[0]
    assert site.gate.requires_grad
    mine = optimizer([site.gate], lr=0.3)
    a = torch.zeros(4, requires_grad=True)
    theirs = optimizer([a], lr=0.3)
    for step in range(5):
        gradient = torch.randn(4, generator=torch.Generator().manual_seed(step))
        gate = 2 * torch.sigmoid(a)
        a.grad = None
        (gate * gradient).sum().backward()
        theirs.step()
        site.gate.grad = gradient.clone()
        loop.run.before_step()
        mine.step()
        loop.run.state.from_logits()
        loop.run.begin(STEPS)  # anew, without the rest of a step
        torch.testing.assert_close(site.gate.detach(), 2 * torch.sigmoid(a.detach()), rtol=0, atol=1e-5)
    assert (site.gate - 1).abs().max() > 0.1
    assert ((site.gate > 0) & (site.gate < 2)).all()


def test_gates_of_other_scores_are_not_trained():
    loop = Loop()
    assert not any(site.gate.requires_grad for site in loop.run.sites)
    loop.run.check_optimizer(loop.optimizer)
    loop.walk()
    assert all((site.gate == 1).all() for site in loop.run.sites)


def test_sensitivity_is_summed_since_the_last_round():
    loop = Loop(score="sensitivity", validation=None)
    total = torch.zeros(24)
    for step in range(4):
        loop.walk(step)
        loop.model(**labelled_batch("llama", step)).loss.backward()
        for index, site in enumerate(loop.run.sites):
            for i in range(4):
                total[4 * index + i] += (site.A[i] * site.A.grad[i]).abs().mean() + (
                    site.B[:, i] * site.B.grad[:, i]
                ).abs().mean()
        if step == 3:
            break
        loop.optimizer.zero_grad()
    loop.run.before_step(loop.optimizer)
    torch.testing.assert_close(loop.run.state.sensitivity, total.detach())
    loop.optimizer.step()
    loop.run.after_step(loop.optimizer)
    assert loop.rounds[0]["pruned"] != [0] * 6
    assert not loop.run.state.sensitivity.any()


@pytest.mark.parametrize("score", ["gate", "sensitivity"])
def test_the_other_scores_resume_bit_for_bit(score):
    settings = {"score": score, "validation": None, "protect_rounds": 1}
    whole, first, second = Loop(**settings).walk(), Loop(**settings).walk(6), Loop(**settings)
    tensors, numbers = first.run.state_dict()
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.run.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, numbers)
    second.walk()
    assert first.rounds + second.rounds == whole.rounds
    weights = (dict(loop.model.named_parameters()) for loop in (whole, second))
    assert all(torch.equal(a, b) for a, b in zip(*(w.values() for w in weights), strict=True))


def test_a_state_of_other_weights_is_refused():
    """Gates that are never trained say nothing about the weights: B does."""
    first, second = Loop().walk(6), Loop()
    with pytest.raises(UserError, match="other weights than those loaded"):
        second.run.load_state_dict(*first.run.state_dict())


# ---- Refusals ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "quick"}, r'mode must be one of fast, exact, taylor; got "quick"'),
        ({"score": "gates"}, r'score must be one of ablation, gate, sensitivity; got "gates".* Did you mean "gate"'),
        ({"scope": "layer"}, r'scope must be one of global, block; got "layer"'),
        ({"rounds": -1}, "rounds must be at least 0, got -1"),
        ({"n_prune": 0}, "n_prune must be at least 1, got 0"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"protect_rounds": -1}, "protect_rounds must be at least 0, got -1"),
        ({"warmup": 8, "interval": 4}, "the last of 2 rounds would follow step 12 of 12, .* lower warmup=8"),
        ({"warmup": 1.5}, "warmup must be a fraction of the run below 1, such as 0.1, or .* steps, got 1.5"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Loop(**settings)


def test_a_trained_adapter_is_refused():
    with pytest.raises(UserError, match=r"has been trained already .B is not zero., and ABLoRA would close a part"):
        Loop(model=tiny_peft("llama", trained=True))


def test_a_loop_that_does_not_show_the_optimizer_is_refused():
    loop = Loop()
    loop.update()
    with pytest.raises(UserError, match=r"ABLoRA clears the optimizer's state .* run.after_step\(optimizer\)"):
        loop.run.after_step()


def test_no_rounds_are_plain_lora():
    loop = Loop(rounds=0).walk()
    assert loop.rounds == []
    assert set(loop.run.finish().ranks.values()) == {2}


def test_a_budget_that_fills_every_dimension_is_lowered():
    """Where layers are no wider, a larger LoraConfig.r would change nothing."""
    model = tiny_peft("llama", r=24, target_modules=["q_proj", "v_proj"])  # 16 and 8 dimensions wide
    with pytest.raises(UserError, match=r"\(48 ranks in 4 modules\), .*lower the budget, below 48 ranks"):
        attach(model, ABLoRA(Budget(total_rank=48), [labelled_batch("llama")]), 40)
    assert attach(model, ABLoRA(Budget(total_rank=47), [labelled_batch("llama")]), 40).start == 47
