"""Rank-one terms of a trained adapter."""

from __future__ import annotations

import pytest
import torch
from models import logits, tiny_peft

from loralloc.adapter.terms import Terms
from loralloc.allocate import keep_top
from loralloc.plain_lora import plain_sites


def deltas(model) -> list[torch.Tensor]:
    return [site.scaling * (site.B @ site.A).detach() for site in plain_sites(model)]


@pytest.fixture
def model():
    return tiny_peft("llama", trained=True)


def test_the_terms_add_up_to_the_update(model) -> None:
    terms = Terms.of(model)
    for (U, sigma, V), delta in zip(terms.parts, deltas(model), strict=True):
        torch.testing.assert_close((U * sigma) @ V.T, delta.double(), rtol=0, atol=1e-6)
    assert terms.count == sum(terms.ranks) == 24
    assert terms.costs == [sum(delta.shape) for delta in deltas(model)]


def test_a_cut_is_the_sum_of_what_is_kept_and_leaves_no_trace(model) -> None:
    terms, before, computed = Terms.of(model), deltas(model), logits(model)
    keep = keep_top(terms.sigma, 7)
    with terms.cut(keep):
        for (U, sigma, V), kept, delta in zip(terms.parts, keep.split(terms.ranks), deltas(model), strict=True):
            torch.testing.assert_close((U * sigma * kept) @ V.T, delta.double(), rtol=0, atol=1e-6)
        assert (logits(model) - computed).abs().max() > 1e-3
        assert sum(int(site.A.any(1).sum()) for site in plain_sites(model)) == 7
    assert all(map(torch.equal, before, deltas(model)))


def test_factors_are_those_of_the_kept_terms_under_any_scale(model) -> None:
    terms = Terms.of(model)
    keep = keep_top(terms.sigma, 7)
    scales = [0.5 + index for index in range(len(terms.sites))]
    with terms.cut(keep):
        cut = deltas(model)
    for (A, B), scale, rank, delta in zip(
        terms.factors(keep, scales), scales, terms.kept_ranks(keep), cut, strict=True
    ):
        assert (len(A), B.shape[1]) == (rank, rank)
        torch.testing.assert_close(scale * B @ A, delta.double(), rtol=0, atol=1e-6)


def test_ranks_that_add_nothing_are_no_terms(model) -> None:
    with torch.no_grad():
        for site in plain_sites(model):
            site.B[:, 1:] = 0
    assert Terms.of(model).count == 6
