"""An encoder with a decoder is scored right, whichever of its stacks is walked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from encoder_decoders import Kind, build
from models import train_adapter
from peft import LoraConfig, PeftModel, get_peft_model
from test_ablation import WAYS, all_ablations, scorer, trained_gates
from torch import Tensor

from loralloc.gating import Site, attach_gates, gates_replaced
from loralloc.training.step_data import ObservedData

KINDS: tuple[Kind, ...] = ("t5", "bart")
TARGETS: Mapping[str, Mapping[Kind, list[str]]] = {
    "both": {"t5": ["q", "wo"], "bart": ["q_proj", "fc2"]},
    "even": {"t5": ["wi"], "bart": ["fc1"]},  # as many in the encoder as in the decoder
    "encoder": {"t5": [r"encoder.block.0.layer.0.SelfAttention.v"], "bart": ["encoder.layers.0.self_attn.v_proj"]},
    "cross": {"t5": ["EncDecAttention.k", "EncDecAttention.q"], "bart": ["encoder_attn.k_proj", "encoder_attn.q_proj"]},
}


def model_of(kind: Kind, targets: str = "both") -> tuple[PeftModel, list[Site]]:
    """A trained adapter, its last rank closed in every other module."""
    torch.manual_seed(1)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS[targets][kind], task_type="SEQ_2_SEQ_LM")
    model: Any = get_peft_model(build(kind, layers=2, dtype=torch.float64), config).to(torch.float64).eval()
    train_adapter(model)
    sites = list(attach_gates(model))
    for site in sites[::2]:
        site.set_scale(torch.arange(3) < 2)
    return model, sites


def batch_of(seed: int = 0, samples: int = 4) -> dict[str, Tensor]:
    """Sources and targets of other lengths than one another, and padded."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 64, (samples, 7), generator=draw)
    labels = torch.randint(4, 64, (samples, 5), generator=draw)
    mask = torch.ones_like(ids)
    ids[1, 4:], mask[1, 4:], labels[0, 3:] = 0, 0, -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@torch.no_grad()
def by_hand(model: PeftModel, sites: list[Site], batches: list[dict[str, Tensor]], settings: Tensor) -> Tensor:
    """One forward pass for each setting: the gates are set, the model computes its own loss."""
    counts = [int((batch["labels"] != -100).sum()) for batch in batches]
    losses = []
    for row in settings:
        with gates_replaced(sites, list(row.split([site.rank for site in sites]))):
            found = [float(model(**batch).loss) for batch in batches]
        losses.append(sum(loss * count for loss, count in zip(found, counts, strict=True)) / sum(counts))
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_is_the_naive_one(kind: Kind, targets: str, way: str) -> None:
    model, sites = model_of(kind, targets)
    batches = [batch_of(), batch_of(1, samples=2)]
    settings = all_ablations(sites)
    expected = by_hand(model, sites, batches, settings)
    found = scorer(model, sites, batches, **WAYS[way]).ablate(settings)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert expected.std() > 1e-3  # the ablations do differ


@pytest.mark.parametrize("kind", KINDS)
def test_a_round_scores_it_and_checks_the_walk(kind: Kind) -> None:
    model, sites = model_of(kind)
    scored = ObservedData(model, sites, [batch_of()]).scoring(4, 0)
    settings = all_ablations(sites)
    torch.testing.assert_close(
        scored.ablate(settings), by_hand(model, sites, [batch_of()], settings), rtol=0, atol=1e-6
    )
    scored.check_loss(batch_of())


@pytest.mark.parametrize("kind", KINDS)
def test_labels_that_are_no_tokens_do_not_count(kind: Kind) -> None:
    model, sites = model_of(kind)
    assert scorer(model, sites, [batch_of()]).labels == 18  # of 4 x 5, 2 are padding


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_collator_has_made_for_the_decoder_is_taken(kind: Kind) -> None:
    model, sites = model_of(kind)
    batch, gates = batch_of(), trained_gates(sites)[None]
    other = torch.full_like(batch["labels"], 5)
    made = {**batch, "decoder_input_ids": other}
    found = [float(scorer(model, sites, [one]).ablate(gates)) for one in (batch, made)]
    with torch.no_grad():
        assert found == pytest.approx([float(model(**one).loss) for one in (batch, made)], rel=1e-6)
    assert found[0] != pytest.approx(found[1], rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_gates_are_autograds(kind: Kind) -> None:
    model, sites = model_of(kind)
    scored, gates = scorer(model, sites, [batch_of()]), trained_gates(sites)
    found, labels = scored.gate_gradients(gates)
    assert labels == 18
    own = gates.clone().requires_grad_()
    with gates_replaced(sites, list(own.split([site.rank for site in sites]))):
        (expected,) = torch.autograd.grad(model(**batch_of()).loss, own)
    torch.testing.assert_close(found.sum(0), expected, rtol=1e-5, atol=1e-7)
