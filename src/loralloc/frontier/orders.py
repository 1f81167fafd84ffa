"""Scores of an adapter's rank-one terms: those with the lowest scores are dropped first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from peft import PeftModel
from torch import Tensor

from loralloc.adapter.terms import Terms
from loralloc.gating import attach_gates, fold_gates
from loralloc.methods.ablora.scores import two_point_importance
from loralloc.training.step_data import ObservedData

Order = Literal["singular_value", "sensitivity", "ablation"]
ORDERS: tuple[Order, ...] = get_args(Order)

SAMPLES = 256
"""Most examples on which terms are scored."""


def score_terms(order: Order, model: PeftModel, terms: Terms, batches: Sequence[Any]) -> Tensor:
    """Score the terms of an adapter.

    With g a factor on each term (1 as trained), N labels in the batches, and c what each example adds to dLoss/dg:

        singular_value   σ: what the term adds to the update, whatever the data
        sensitivity      −dLoss/dg + N/2 Σ c²: how much the loss rises without the term, to second order, with the
                         empirical Fisher information for the curvature
        ablation         the same, and −dLoss/dg where all terms are off: AB-LoRA's importance from two points
                         (`two_point_importance`), which adds how much the loss falls with the term alone

    Args:
        order: Which scores.
        model: The model; it is unchanged afterwards.
        terms: Its terms.
        batches: Batches of examples, labels included; only for scores that look at data.

    Returns:
        [R] on the CPU, float64.

    Raises:
        UserError: The loss of an example is not known for this model, or examples have no labels.
    """
    if order == "singular_value":
        return terms.sigma
    everything = torch.ones(len(terms.sigma), dtype=torch.bool)
    with terms.cut(everything):  # so that each term is a rank of its own
        sites = attach_gates(model)
        data = ObservedData(model, sites, batches)
        try:
            data.check_scoring()
            ablations = data.scoring(SAMPLES, 0)
            gates = torch.cat([site.gate.detach() for site in sites])
            on, labels = ablations.gate_gradients(gates)
            off = torch.zeros_like(on) if order == "sensitivity" else ablations.gate_gradients(0 * gates)[0]
        finally:
            data.close()
            fold_gates(sites)
    found = two_point_importance(on, off, labels).double().cpu().split([site.rank for site in sites])
    return torch.cat([scores[:k] for scores, k in zip(found, terms.ranks, strict=True)])
