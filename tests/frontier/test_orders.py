"""Scores of rank-one terms, against the loss itself."""

from __future__ import annotations

import pytest
import torch
from models import labelled_batch, logits, tiny_peft

from loralloc.adapter.terms import Terms
from loralloc.frontier.orders import score_terms
from loralloc.gating import is_gated


@pytest.fixture(params=["llama", "bert"])
def trained(request):
    model = tiny_peft(request.param, trained=True).eval()
    batches = [labelled_batch(request.param, seed=seed) for seed in range(3)]
    return model, Terms.of(model), batches


@torch.no_grad()
def loss(model, terms: Terms, batches, keep) -> float:
    with terms.cut(keep):
        sums = [
            (float(model(**batch).loss), (batch["labels"][..., 1:] if batch["labels"].dim() > 1 else batch["labels"]))
            for batch in batches
        ]
    counts = [int((labels != -100).sum()) for _, labels in sums]
    return sum(value * count for (value, _), count in zip(sums, counts, strict=True)) / sum(counts)


def test_sensitivity_tells_what_the_loss_gains_without_a_term(trained) -> None:
    """To second order; with the Fisher information for the curvature, so that the order is right, not the number."""
    model, terms, batches = trained
    scores = score_terms("sensitivity", model, terms, batches)
    everything = torch.ones(len(scores), dtype=torch.bool)
    whole = loss(model, terms, batches, everything)
    rises = torch.tensor(
        [loss(model, terms, batches, everything & (torch.arange(len(scores)) != k)) - whole for k in range(len(scores))]
    )
    ranks = torch.stack([scores.argsort().argsort(), rises.argsort().argsort()]).double()
    assert torch.corrcoef(ranks)[0, 1] > 0.8
    singular = score_terms("singular_value", model, terms, ())
    other = torch.stack([singular.argsort().argsort(), rises.argsort().argsort()]).double()
    assert torch.corrcoef(ranks)[0, 1] > torch.corrcoef(other)[0, 1]


def test_ablation_adds_what_a_term_does_alone(trained) -> None:
    model, terms, batches = trained
    alone = score_terms("ablation", model, terms, batches) - score_terms("sensitivity", model, terms, batches)
    step, nothing = 1e-2, torch.zeros(len(alone), dtype=torch.bool)
    base = loss(model, terms, batches, nothing)
    for k in range(0, len(alone), 5):
        scaled = Terms(terms.sites, [(U, sigma * step, V) for U, sigma, V in terms.parts])
        slope = (base - loss(model, scaled, batches, torch.arange(len(alone)) == k)) / step
        assert float(alone[k]) == pytest.approx(slope, rel=0.1, abs=2e-4)


def test_scoring_leaves_the_model_as_it_is(trained) -> None:
    model, terms, batches = trained
    before = logits(model)
    score_terms("ablation", model, terms, batches)
    assert not is_gated(model, "default")
    assert torch.equal(logits(model), before)
