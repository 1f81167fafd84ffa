"""Many settings of the gates in one pass, from the block where they differ: the same losses as one pass for each.

Property numbers are those of the specification of ALoRA.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from models import BUILDERS, labelled_batch, tiny_peft, train_adapter
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from loralloc import UserError, gating
from loralloc.gating import Site, attach_gates, gates_replaced
from loralloc.methods.ablora.scores import ablation_importance, ablation_settings, two_point_importance
from loralloc.training import ablation
from loralloc.training.ablation import AblationScorer
from loralloc.training.step_data import ObservedData

NAMES = ("llama", "bert", "gpt2")
LAYERS = 3
Batch = Mapping[str, Tensor]


def model_of(name: str, dtype: torch.dtype = torch.float64, **settings: Any) -> tuple[PeftModel, list[Site]]:
    """A trained adapter on three blocks, its last rank closed in every other module."""
    base = BUILDERS[name](0, layers=LAYERS, dtype=dtype)
    targets = {"llama": ["q_proj", "down_proj"], "bert": ["query", "output.dense"], "gpt2": ["c_attn", "c_proj"]}[name]
    config = {"r": 3, "lora_alpha": 6, "target_modules": targets, "fan_in_fan_out": name == "gpt2", **settings}
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(**config)).to(dtype).eval()
    train_adapter(model)
    sites = attach_gates(model)
    for site in sites[::2]:
        site.set_scale(torch.arange(3) < 2)
    return model, sites


def padded(name: str, seed: int = 0, samples: int = 4) -> dict[str, Tensor]:
    """Sequences of uneven length; a language model learns the second half of each."""
    batch = {key: value.clone() for key, value in labelled_batch(name, seed).items()}
    batch = {key: torch.cat([value, value.flip(0)])[:samples] for key, value in batch.items()}
    batch["attention_mask"][1, 5:] = 0
    if name != "bert":
        batch["labels"][:, :4] = -100
        batch["labels"][1, 5:] = -100
    return batch


def naive(model: PeftModel, sites: Sequence[Site], batches: Sequence[Batch], settings: Tensor) -> Tensor:
    """One forward pass for each setting: the gates are set, the model computes its own loss."""
    losses = []
    before = [site.gate.detach().clone() for site in sites]
    with torch.no_grad():
        for row in settings:
            for site, own in zip(sites, row.split([site.rank for site in sites]), strict=True):
                site.gate.copy_(own)
            total, count = 0.0, 0
            for batch in batches:
                labels = batch["labels"][:, 1:] if batch["labels"].dim() == 2 else batch["labels"]
                n = int((labels != -100).sum())
                total, count = total + float(model(**batch).loss) * n, count + n
            losses.append(total / count)
        for site, gate in zip(sites, before, strict=True):
            site.gate.copy_(gate)
    return torch.tensor(losses, dtype=torch.float64)


def trained_gates(sites: Sequence[Site]) -> Tensor:
    return torch.cat([site.gate.detach() * (site.scale != 0) for site in sites])


def all_ablations(sites: Sequence[Site]) -> Tensor:
    gates = trained_gates(sites)
    ends = torch.stack([gates, torch.zeros_like(gates)])
    return torch.cat([ends, ablation_settings(gates, gates.nonzero()[:, 0])])


def scorer(model: PeftModel, sites: Sequence[Site], batches: Sequence[Batch], **settings: Any) -> AblationScorer:
    return AblationScorer(model, sites, batches, nullcontext, **settings)


@functools.cache
def naive_losses(name: str, dtype: torch.dtype) -> Tensor:
    """Of all ablations on the batches of the test below."""
    model, sites = model_of(name, dtype)
    return naive(model, sites, [padded(name), padded(name, 1, samples=2)], all_ablations(sites))


WAYS: Mapping[str, Mapping[str, Any]] = {
    "walked": {},
    "walked-one-at-a-time": {"tokens": 0},
    "batched": {"walk": False},
    "sequential": {"walk": False, "tokens": 0},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", NAMES)
def test_every_way_is_the_naive_one(name, dtype, close, way):
    """Property 8, E1 to E3 together; two parts of different size."""
    model, sites = model_of(name, dtype)
    batches = [padded(name), padded(name, 1, samples=2)]
    settings = all_ablations(sites)
    mine = scorer(model, sites, batches, **WAYS[way]).ablate(settings)
    if dtype == torch.float32 or name != "bert":  # transformers' language models compute their loss in fp32
        close = max(close, 1e-5 if dtype == torch.float32 else 1e-6)
    expected = naive_losses(name, dtype)
    torch.testing.assert_close(mine, expected, rtol=0, atol=close)
    assert expected.std() > 1e-3  # the ablations do differ


@pytest.mark.parametrize("name", NAMES)
def test_the_ways_agree_with_each_other_in_fp64(name):
    """Property 8 to 1e-12, also where the model's own loss is computed in fp32."""
    model, sites = model_of(name)
    batches = [padded(name), padded(name, 1, samples=2)]
    first, *others = (scorer(model, sites, batches, **way).ablate(all_ablations(sites)) for way in WAYS.values())
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_prefixes_save_what_they_should(name):
    """Property 8: R ranks, spread evenly over L blocks, take R (L + 1) block evaluations; the naive way 2 R L."""
    model, sites = model_of(name)
    batch = padded(name)
    settings = all_ablations(sites)[2:]
    ranks = len(settings) // 2
    walked, plain = scorer(model, sites, [batch]), scorer(model, sites, [batch], walk=False)
    walked.ablate(settings)
    plain.ablate(settings)
    per_sample = walked.block_samples / walked.samples
    assert per_sample == ranks * (LAYERS + 1) + 2 * LAYERS  # two reference passes
    assert walked.forwards == per_sample / LAYERS
    assert plain.forwards == 2 * ranks
    walked.ablate(settings)
    assert walked.block_samples / walked.samples == per_sample + ranks * (LAYERS + 1)  # the references are kept


@pytest.mark.parametrize("name", NAMES)
def test_frozen_layers_are_not_multiplied_again_up_to_the_first_difference(name, monkeypatch):
    """A layer sees the two references, and the ablations of ranks in layers that are called before it."""
    model, sites = model_of(name)
    seen = {id(site.layer.base_layer): 0 for site in sites}
    for kind in {type(site.layer.base_layer) for site in sites}:
        monkeypatch.setattr(kind, "forward", functools.partialmethod(_counted, kind.forward, seen))
    batch = padded(name)
    scorer(model, sites, [batch]).ablate(all_ablations(sites)[2:])
    order = list(seen.values())
    before = [2 * sum(int((other.scale != 0).sum()) for other in sites[:index]) for index in range(len(sites))]
    assert order == [4 * (2 + rows) for rows in before]


def _counted(layer: Any, forward: Callable[..., Any], seen: dict[int, int], x: Tensor) -> Any:
    if id(layer) in seen:
        seen[id(layer)] += len(x)
    return forward(layer, x)


def test_adapters_that_are_shut_off_are_left_out(monkeypatch):
    """A rank alone needs one adapter; a rank removed needs all those from the first that is computed."""
    calls: list[int] = []
    for name in ("gated_lora", "gated_linear"):
        kernel = getattr(gating, name)
        monkeypatch.setattr(gating, name, lambda *args, kernel=kernel: calls.append(1) or kernel(*args))
    model, sites = model_of("llama")
    scored = scorer(model, sites, [padded("llama")], tokens=0)
    without, alone = all_ablations(sites)[2:].chunk(2)
    scored.ablate(alone[:1])
    assert len(calls) == len(sites) + 1  # the reference with all gates, and the one that was asked for
    calls.clear()
    scored.ablate(alone)
    assert len(calls) == len(alone)
    calls.clear()
    scored.ablate(without[:1])
    assert len(calls) == len(sites)


def test_references_are_computed_anew_where_memory_is_short(monkeypatch):
    monkeypatch.setattr(ablation, "KEPT_BYTES", 0)
    model, sites = model_of("llama")
    scored = scorer(model, sites, [padded("llama")])
    first, again = (scored.ablate(all_ablations(sites)) for _ in range(2))
    assert torch.equal(first, again)
    kept = scorer(model, sites, [padded("llama")])
    monkeypatch.setattr(ablation, "KEPT_BYTES", 2**30)
    assert torch.equal(kept.ablate(all_ablations(sites)), first)
    kept.ablate(all_ablations(sites))
    assert scored.forwards == kept.forwards + 2


def test_layers_outside_the_blocks_take_part():
    """A pooler sees one vector a sample, behind the last block."""
    base = BUILDERS["bert"](0, layers=2, dtype=torch.float64)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["query", "pooler.dense"])).double().eval()
    train_adapter(model)
    sites = attach_gates(model)
    settings, batch = all_ablations(sites), padded("bert")
    scored = scorer(model, sites, [batch])
    torch.testing.assert_close(scored.ablate(settings), naive(model, sites, [batch], settings), rtol=0, atol=1e-12)
    assert scored.forwards < len(settings)  # it was walked


def test_a_layer_that_routes_rows_is_refused():
    _, sites = model_of("llama")
    words = r"q_proj: ranks cannot be switched per sample where a layer sees 7 rows for 4 samples \(does it "
    with pytest.raises(UserError, match=words), gates_replaced(sites, [torch.ones(4, 1, 3)] * len(sites)):
        sites[0].layer(torch.zeros(7, 16, dtype=torch.float64))
    flat, apart = torch.randn(8, 16, dtype=torch.float64), torch.rand(4, 1, 3, dtype=torch.float64)
    with gates_replaced([sites[0]], [apart]):
        whole = sites[0].layer(flat.view(4, 2, 16))
        torch.testing.assert_close(sites[0].layer(flat), whole.flatten(0, 1))
    with gates_replaced([sites[0]], [None]):
        assert torch.equal(sites[0].layer(flat), sites[0].layer.base_layer(flat))
    assert not torch.allclose(sites[0].layer(flat), sites[0].layer.base_layer(flat))


def test_the_head_computes_labelled_positions_only():
    """E3 of the specification."""
    model, sites = model_of("llama")
    seen: list[int] = []
    model.get_base_model().lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    scorer(model, sites, [padded("llama")], tokens=0).ablate(all_ablations(sites)[:1])
    assert set(seen) == {3}  # of 7


# ---- Gradients of the gates (properties 9, 10) ----


@pytest.mark.parametrize("name", NAMES)
def test_gate_gradients_are_those_of_the_loss_and_of_the_factors(name):
    """Property 9: with the gates at 1, dL/dα = <A_i, dL/dA_i> = <B_i, dL/dB_i>; samples add up."""
    model, sites = model_of(name)
    batch = padded(name)
    scored = scorer(model, sites, [batch])
    per_sample, labels = scored.gate_gradients(trained_gates(sites))
    assert per_sample.shape == (4, sum(site.rank for site in sites))
    assert labels == scored.labels == (4 if name == "bert" else int((batch["labels"][:, 1:] != -100).sum()))
    model(**batch).loss.backward()
    total = per_sample.sum(0)
    by_a = torch.cat([(site.A * site.A.grad).sum(1) for site in sites])
    by_b = torch.cat([(site.B * site.B.grad).sum(0) for site in sites])
    for expected in (by_a, by_b, torch.cat([site.gate.grad for site in sites])):
        torch.testing.assert_close(total, expected.detach(), rtol=1e-6, atol=1e-7)
    assert scored.forwards == 2
    scored.ablate(all_ablations(sites)[:1])
    assert scored.forwards < 2 + 2 + 1  # the pass of the gradient was one of the references


def test_samples_contribute_what_each_would_alone():
    model, sites = model_of("bert")
    batch = padded("bert")
    together, _ = scorer(model, sites, [batch]).gate_gradients(trained_gates(sites))
    for index in range(4):
        one = {key: value[index : index + 1] for key, value in batch.items()}
        alone, _ = scorer(model, sites, [one]).gate_gradients(trained_gates(sites))
        torch.testing.assert_close(together[index], alone[0] / 4, rtol=1e-9, atol=1e-12)


def test_errors_shrink_in_the_order_that_taylor_promises():
    """Property 10: halving B divides the errors of the terms by 4 and that of their sum by 8."""
    errors: dict[str, list[float]] = {"remove": [], "keep": [], "sum": []}
    for scale in (1 / 32, 1 / 64):
        model, sites = model_of("bert")
        with torch.no_grad():
            for site in sites:
                site.B.mul_(scale)
        scored = scorer(model, sites, [padded("bert")])
        gates = trained_gates(sites)
        ranks = gates.nonzero()[:, 0]
        losses = scored.ablate(torch.cat([torch.stack([gates, gates * 0]), ablation_settings(gates, ranks)]))
        remove, keep = losses[2 : 2 + len(ranks)] - losses[0], losses[1] - losses[2 + len(ranks) :]
        on, off = (scored.gate_gradients(g)[0][:, ranks].sum(0) for g in (gates, gates * 0))
        errors["remove"].append(float((remove + on).abs().mean()))
        errors["keep"].append(float((keep + off).abs().mean()))
        errors["sum"].append(float((remove + keep + on + off).abs().mean()))
    ratios = {term: first / second for term, (first, second) in errors.items()}
    assert ratios["remove"] == pytest.approx(4, rel=0.15)
    assert ratios["keep"] == pytest.approx(4, rel=0.15)
    assert ratios["sum"] == pytest.approx(8, rel=0.3)


# ---- What scores depend on (properties 3, 6, 12, 17) ----


def scores(model: PeftModel, sites: Sequence[Site], batch: Batch) -> Tensor:
    gates = trained_gates(sites)
    return ablation_importance(scorer(model, sites, [batch]).ablate(ablation_settings(gates, gates.nonzero()[:, 0])))


def test_ranks_that_do_nothing_score_as_nothing():
    """Property 3: with B_i = 0 or A_i = 0 both terms are zero; and estimated so."""
    model, sites = model_of("bert")
    with torch.no_grad():
        sites[0].B[:, 0] = 0
        sites[1].A[1] = 0
    gates = trained_gates(sites)
    dead = torch.tensor([0, 4])
    scored = scorer(model, sites, [padded("bert")])
    whole, nothing = scored.ablate(torch.stack([gates, gates * 0]))
    without, alone = scored.ablate(ablation_settings(gates, dead)).chunk(2)
    torch.testing.assert_close(without, whole.expand(2), rtol=0, atol=1e-14)
    torch.testing.assert_close(alone, nothing.expand(2), rtol=0, atol=1e-14)
    (on, labels), (off, _) = (scored.gate_gradients(g) for g in (gates, gates * 0))
    assert two_point_importance(on, off, labels)[dead].tolist() == [0, 0]
    assert two_point_importance(on, off, labels).abs().max() > 1e-3


def _rescale(site: Site, batch: dict[str, Tensor]) -> None:
    site.A.mul_(3.0)
    site.B.div_(3.0)


def _flip(site: Site, batch: dict[str, Tensor]) -> None:
    site.A.neg_()
    site.B.neg_()


def _shuffle_samples(site: Site, batch: dict[str, Tensor]) -> None:
    for key in batch:
        batch[key] = batch[key].flip(0)


@pytest.mark.parametrize("change", [_rescale, _flip, _shuffle_samples])
def test_scores_depend_on_the_function_alone(change: Callable[[Site, dict[str, Tensor]], None]):
    """Property 6."""
    model, sites = model_of("llama")
    batch = padded("llama")
    before = scores(model, sites, batch)
    with torch.no_grad():
        for site in sites:
            change(site, batch)
    torch.testing.assert_close(scores(model, sites, batch), before, rtol=0, atol=1e-10)


def test_permuted_ranks_have_permuted_scores():
    """Property 6; the partner: they do differ."""
    model, sites = model_of("llama")
    site, batch = sites[1], padded("llama")
    before = scores(model, sites, batch)[2:5]
    with torch.no_grad():
        site.A.copy_(site.A[[2, 0, 1]].clone())
        site.B.copy_(site.B[:, [2, 0, 1]].clone())
    after = scores(model, sites, batch)[2:5]
    torch.testing.assert_close(after, before[[2, 0, 1]], rtol=0, atol=1e-10)
    assert not torch.allclose(after, before, rtol=0, atol=1e-5)


def test_a_closed_rank_is_a_removed_one():
    """Property 12: scale 0, gate 0, and a smaller adapter are the same function."""
    model, sites = model_of("bert")
    batch = padded("bert")
    gates = trained_gates(sites)
    gates[[3, 7]] = 0
    by_gate = scorer(model, sites, [batch]).ablate(gates[None])
    sites[1].set_scale(torch.tensor([False, True, True]))
    sites[2].set_scale(torch.tensor([True, False, False]))
    by_scale = scorer(model, sites, [batch]).ablate(trained_gates(sites)[None])
    torch.testing.assert_close(by_scale, by_gate, rtol=0, atol=1e-12)
    with torch.no_grad():
        for site, rank in ((sites[1], 0), (sites[2], 1)):
            site.B[:, rank] = 99.0  # what a closed rank holds does not matter
    assert torch.equal(scorer(model, sites, [batch]).ablate(trained_gates(sites)[None]), by_scale)


# ---- No side effect (property 11) ----


def test_scoring_leaves_no_trace():
    """Property 11: parameters, gradients, optimizer, random state, modes, hooks; dropout is off."""
    model = tiny_peft("llama", trained=True, lora_dropout=0.5)
    sites = attach_gates(model)
    model.train()
    model.get_base_model().model.layers[0].eval()  # a mixture of modes
    batch = padded("llama")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(**batch).loss.backward()
    optimizer.step()
    data = ObservedData(model, sites, [batch, padded("llama", 1)])
    forwards = [id(block.forward.__func__) for block in model.get_base_model().model.layers]

    def state() -> list[Any]:
        tensors = [p.detach().clone() for p in model.parameters()]
        tensors += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        tensors += [t.clone() for s in optimizer.state.values() for t in s.values()]
        tensors += [torch.get_rng_state(), torch.tensor([m.training for m in model.modules()])]
        return [*tensors, torch.tensor([p.requires_grad for p in model.parameters()])]

    before = state()
    losses = []
    for _ in range(2):
        torch.manual_seed(len(losses))
        before[-3] = torch.get_rng_state()
        scored = data.scoring(7, 0)
        assert scored.samples == 7
        losses.append(scored.ablate(all_ablations(sites)))
        on, _ = scored.gate_gradients(trained_gates(sites))
        assert on.abs().max() > 0
        assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
    assert torch.equal(*losses)  # no dropout
    assert forwards == [id(block.forward.__func__) for block in model.get_base_model().model.layers]
    assert data.state_dict() == {"drawn": 0}


def test_draws_are_batches_of_their_own_and_never_larger_than_asked():
    model = tiny_peft("bert", trained=True)
    sites = attach_gates(model)
    batches = [padded("bert", seed) for seed in range(4)]
    data = ObservedData(model, sites, batches)
    whole = torch.ones(1, sum(site.rank for site in sites))
    losses = [float(data.scoring(6, draw).ablate(whole)) for draw in (0, 0, 1, 2)]
    assert losses[0] == losses[1] != losses[2]
    assert losses[3] == losses[0]  # four batches, two for each draw
    cut = [batches[0], {key: value[:2] for key, value in batches[1].items()}]
    assert losses[0] == pytest.approx(float(naive(model, sites, cut, whole)), abs=1e-6)
    assert data.scoring(10**6, 0).samples == 16
