"""Losses of single samples are the model's own, and what has none is refused."""

from __future__ import annotations

import pytest
import torch
from models import BUILDERS, labelled_batch, on_layer, tiny_peft, train_adapter
from test_ablation import model_of, padded, scorer, trained_gates

from loralloc import ABLoRA, Budget, UserError, attach
from loralloc.gating import attach_gates
from loralloc.training.step_data import ObservedData


def test_regression_and_several_classes_are_the_models_own_losses():
    for labels in (torch.tensor([0.5, -1.0, 2.0]), torch.tensor([[0.0, 1, 1], [1, 0, 0], [0, 0, 1]])):
        base = BUILDERS["bert"](0, dtype=torch.float64)
        if labels.dim() == 1:
            base.classifier = torch.nn.Linear(16, 1).double()
            base.num_labels = base.config.num_labels = 1
        model = on_layer(base, "query").double().eval()
        train_adapter(model)
        sites = attach_gates(model)
        batch = {**labelled_batch("bert"), "labels": labels.double()}
        scored = scorer(model, sites, [batch])
        gates = trained_gates(sites)
        own = model(**batch).loss.item()
        assert float(scored.ablate(gates[None])) == pytest.approx(own, rel=1e-6)
        assert scored.labels == labels.numel()
        scored.check_loss(batch)


def test_a_loss_that_is_another_is_refused(monkeypatch):
    model, sites = model_of("llama")
    batch = padded("llama")
    scored = scorer(model, sites, [batch])
    scored.check_loss(batch)
    base = model.get_base_model()
    monkeypatch.setattr(base, "loss_function", lambda **kw: torch.tensor(99.0))
    with pytest.raises(UserError, match=r'computes the loss 99 where that of a "next token" is .* each sample'):
        scored.check_loss(batch)
    monkeypatch.setattr(base, "loss_type", "ForObjectDetection")
    with pytest.raises(UserError, match=r"cannot be taken sample by sample .*ForObjectDetection"):
        scorer(model, sites, [batch])


def test_batches_without_labels_are_refused():
    model, sites = model_of("llama")
    batch = padded("llama")
    with pytest.raises(UserError, match=r"must hold labels as a tensor; it has input_ids, attention_mask"):
        scorer(model, sites, [{key: value for key, value in batch.items() if key != "labels"}])
    with pytest.raises(UserError, match=r"has no labels .all are -100."):
        scorer(model, sites, [{**batch, "labels": torch.full_like(batch["labels"], -100)}])


@pytest.mark.parametrize("settings", [{}, {"mode": "exact"}, {"mode": "taylor"}, {"score": "gate"}], ids=str)
def test_a_run_that_could_not_score_is_refused_in_its_first_step(settings, monkeypatch):
    """Not at its first round, after the warmup; scores that need no ablations need no such loss."""
    for broken in (False, True):
        model = tiny_peft("llama").train()
        if broken:
            monkeypatch.setattr(model.get_base_model(), "loss_function", lambda **kw: 0 * kw["logits"].sum() + 99)
        batch = labelled_batch("llama")
        run = attach(model, ABLoRA(Budget(average_rank=2), [batch], **settings), total_steps=1000)
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
        model(**batch).loss.backward()
        if broken and "score" not in settings:
            with pytest.raises(UserError, match=r"computes the loss 99 where"):
                run.before_step(optimizer)
        else:
            run.before_step(optimizer)


def test_the_first_round_looks_again_where_the_first_step_could_not(monkeypatch):
    """A first step that was skipped, or a resumed run."""
    model, sites = model_of("llama")
    batch = padded("llama")
    ObservedData(model, sites, [batch]).scoring(4, 0)
    monkeypatch.setattr(model.get_base_model(), "loss_function", lambda **kw: torch.tensor(99.0))
    with pytest.raises(UserError, match=r"computes the loss 99 where"):
        ObservedData(model, sites, [batch]).scoring(4, 0)
