"""Multiple choice has several rows of a model for each sample: all of them have the sample's gates."""

from __future__ import annotations

import pytest
import torch
from models import labelled_batch, tiny_bert, train_adapter
from peft import LoraConfig, get_peft_model
from test_ablation import all_ablations, naive, scorer
from transformers import BertForMultipleChoice

from loralloc.gating import attach_gates


@pytest.mark.parametrize("walk", [True, False])
@pytest.mark.parametrize("tokens", [None, 1])  # as many copies a pass as fit, or one
def test_every_ablation_is_that_of_a_pass_of_its_own(walk: bool, tokens: int | None) -> None:
    torch.manual_seed(0)
    base = BertForMultipleChoice(tiny_bert(layers=3).config).double()
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["query", "output.dense"])
    model = get_peft_model(base, config).double().eval()
    train_adapter(model)
    sites = attach_gates(model)
    for site in sites[::2]:
        site.set_scale(torch.arange(3) < 2)
    rows = {key: value for key, value in labelled_batch("bert").items() if key != "labels"}
    batch = {key: torch.stack([value, value.flip(1)], 1) for key, value in rows.items()}
    batch["labels"] = torch.arange(len(batch["input_ids"])) % 2
    scored = scorer(model, sites, [batch], walk=walk, tokens=tokens)
    settings = all_ablations(sites)
    scored.check_loss(batch)
    assert scored.samples == scored.labels == len(batch["labels"])
    expected = naive(model, sites, [batch], settings)
    torch.testing.assert_close(scored.ablate(settings), expected, rtol=1e-9, atol=1e-12)
    assert len(expected.unique()) > len(sites)
    contributions, labels = scored.gate_gradients(settings[0])
    for site in sites:
        site.gate.grad = None
    model(**batch).loss.backward()
    by_hand = torch.cat([site.gate.grad if site.gate.grad is not None else torch.zeros(site.rank) for site in sites])
    open_ranks = torch.cat([site.scale != 0 for site in sites])
    torch.testing.assert_close(contributions.sum(0)[open_ranks], by_hand.double()[open_ranks], rtol=1e-6, atol=1e-9)
    assert labels == len(batch["labels"])
