"""Promises: methods that look at data score taggers and models of answers as they do classifiers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import HIDDEN, VOCABULARY, lora_config, token_batch, train_adapter
from peft import PeftModel, get_peft_model
from test_ablation import scorer, trained_gates
from torch import Tensor
from transformers import BertConfig, BertForQuestionAnswering, BertForTokenClassification

from loralloc import ABLoRA, AutoLoRA, Budget, UserError, attach
from loralloc.adapter.check import check_batch
from loralloc.gating import attach_gates
from loralloc.outputs import logits_of
from loralloc.testing.models import seeded
from loralloc.training.losses import SampleLoss

HEADS = {"tokens": (BertForTokenClassification, "TOKEN_CLS"), "answers": (BertForQuestionAnswering, "QUESTION_ANS")}


def model_of(kind: str, dtype: torch.dtype = torch.float32) -> PeftModel:
    """A tiny BERT with one of the heads, and an adapter."""
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    head, task = HEADS[kind]
    config.num_labels = 3 if kind == "tokens" else 2
    torch.manual_seed(0)
    adapted = get_peft_model(seeded(head, config, 0), lora_config("bert", task_type=task))
    assert isinstance(adapted, PeftModel)
    return adapted.to(dtype)


def batch_of(kind: str, seed: int = 0) -> dict[str, Tensor]:
    batch = token_batch(seed, samples=4)
    ids = batch["input_ids"]
    if kind == "tokens":
        labels = torch.where(ids % 4 == 0, -100, ids % 3)
        return {**batch, "labels": labels}
    return {**batch, "start_positions": ids[:, 0] % 4, "end_positions": 4 + ids[:, 1] % 3}


@pytest.mark.parametrize("kind", HEADS)
def test_losses_of_samples_are_the_models_own(kind: str) -> None:
    model = model_of(kind, torch.float64).eval()
    train_adapter(model)
    sites = attach_gates(model)
    batch = batch_of(kind)
    scored = scorer(model, sites, [batch])
    own = model(**batch).loss.item()
    assert float(scored.ablate(trained_gates(sites)[None])) == pytest.approx(own, rel=1e-6)
    scored.check_loss(batch)
    assert scored.check_walk()
    single = [model(**{key: value[i : i + 1] for key, value in batch.items()}).loss.item() for i in range(4)]
    counted = SampleLoss.of(model)
    inputs, labels = counted.split(batch)
    sums = counted(logits_of(model(**inputs)), labels)
    per_sample = [counted.count(labels[i : i + 1]) for i in range(4)]
    assert (sums / torch.tensor(per_sample)).tolist() == pytest.approx(single, rel=1e-6)


def test_positions_outside_of_the_tokens_are_left_out_as_by_the_model() -> None:
    """What lies behind the tokens is ignored, what lies before the first one means the first."""
    model = model_of("answers", torch.float64).eval()
    batch = batch_of("answers")
    outside = {**batch, "start_positions": torch.tensor([7, -1, 2, 99]), "end_positions": torch.tensor([7, 3, 4, 99])}
    counted = SampleLoss.of(model)
    inputs, labels = counted.split(outside)
    assert labels.tolist() == [[-100, -100], [0, 3], [2, 4], [-100, -100]]
    found = counted(logits_of(model(**inputs)), labels).sum() / counted.count(labels)
    assert found.item() == pytest.approx(model(**outside).loss.item(), rel=1e-9)
    nowhere = {**batch, **dict.fromkeys(("start_positions", "end_positions"), torch.full((4,), 50))}
    with pytest.raises(UserError, match=r"has no labels"):
        scorer(model, attach_gates(model), [nowhere])


def test_a_loss_that_is_another_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("answers")
    batch = batch_of("answers")
    scored = scorer(model, attach_gates(model), [batch])
    base: Any = model.get_base_model()
    alive = base.forward

    def doubled(*args: Any, **kwargs: Any) -> Any:
        output = alive(*args, **kwargs)
        output.loss = output.loss and 2 * output.loss
        return output

    scored.check_loss(batch)
    monkeypatch.setattr(base, "forward", doubled)
    with pytest.raises(UserError, match=r'BertForQuestionAnswering computes the loss .* where that of a "span" is'):
        scored.check_loss(batch)


def make(method: str, kind: str) -> Any:
    validation = [batch_of(kind, 100 + seed) for seed in range(2)]
    if method == "ablora":
        return ABLoRA(Budget(average_rank=2), validation, warmup=3, interval=3, rounds=2)
    return AutoLoRA(validation=validation, budget=Budget(average_rank=2))


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("method", ["ablora", "autolora"])
def test_a_run_meets_its_budget_with_finite_scores(method: str, kind: str) -> None:
    model, events = model_of(kind), []
    run = attach(model, make(method, kind), 10)
    run.on_event = events.append
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    first = None
    while run.step < 10:
        loss = model(**batch_of(kind, run.step)).loss
        first = loss.item() if first is None else first
        loss.backward()
        run.before_step(optimizer)
        optimizer.step()
        run.after_step(optimizer)
        optimizer.zero_grad()
    plan = run.finish()
    assert plan.total_rank == 2 * len(plan.modules)
    assert len(set(plan.ranks.values())) > 1, "the data have a say"
    for parameter in model.parameters():
        assert parameter.isfinite().all()
    for name, module in model.named_modules():
        if (A := getattr(module, "lora_A", None)) and name.removeprefix("base_model.model.") in plan.ranks:
            open_ranks = int(A["default"].weight.any(dim=1).sum())
            assert open_ranks == plan.ranks[name.removeprefix("base_model.model.")]


@pytest.mark.parametrize("kind", HEADS)
def test_the_check_of_an_export_sees_all_logits(kind: str) -> None:
    """Also where the batch has labels, with which the first output is the loss; beginnings and ends are compared."""
    model = model_of(kind).eval()
    batch = batch_of(kind)
    output = model(**batch)
    assert output[0].dim() == 0
    expected = output.logits if kind == "tokens" else torch.stack([output.start_logits, output.end_logits], -1)
    assert torch.equal(logits_of(output), expected)
    made_up = logits_of(model(**check_batch(model, None)))
    assert made_up.shape[-1] == (3 if kind == "tokens" else 2)


def test_other_outputs() -> None:
    tensor = torch.ones(2, 3)
    assert logits_of(tensor) is tensor
    assert logits_of((tensor, None)) is tensor
    with pytest.raises(ValueError, match="it returns a loss and no logits"):
        logits_of((tensor.sum(),))
