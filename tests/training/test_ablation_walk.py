"""Models that do more than hand a hidden state from block to block: scored right, by whole passes where need be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from models import BUILDERS, on_layer, train_adapter
from peft import LoraConfig, PeftModel, get_peft_model
from test_ablation import LAYERS, all_ablations, model_of, naive, padded, scorer, trained_gates
from torch import Tensor, nn
from transformers import PreTrainedModel

from loralloc import UserError
from loralloc.gating import Site, attach_gates, gates_replaced
from loralloc.training.step_data import ObservedData, samples_of


def classifier(change: Any) -> tuple[PeftModel, list[Site]]:
    """A BERT that was changed before it got its adapter."""
    base = BUILDERS["bert"](0, layers=LAYERS, dtype=torch.float64)
    change(base.bert.encoder.layer)
    model = get_peft_model(base, LoraConfig(r=3, target_modules=["query", "output.dense"])).double().eval()
    train_adapter(model)
    return model, attach_gates(model)


def _shift(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output + torch.linspace(-1, 1, output.shape[-1], dtype=output.dtype) ** 3


def _hook_on_a_block(layers: nn.ModuleList) -> None:
    layers[0].register_forward_hook(_shift)


def _hook_on_a_frozen_layer(layers: nn.ModuleList) -> None:
    layers[1].attention.self.query.register_forward_hook(_shift)


@pytest.mark.parametrize("change", [_hook_on_a_block, _hook_on_a_frozen_layer])
def test_hooks_of_others_run_once(change: Any) -> None:
    """They follow what a block or layer returns, also where that is known and not computed."""
    model, sites = classifier(change)
    plain, plain_sites = classifier(lambda layers: None)
    batch, settings = padded("bert"), all_ablations(sites)
    expected = naive(model, sites, [batch], settings)
    assert (expected - naive(plain, plain_sites, [batch], settings)).abs().max() > 1e-2
    torch.testing.assert_close(scorer(model, sites, [batch]).ablate(settings), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("where", ["between", "shared"])
def test_models_that_cannot_be_walked_are_computed_whole(where: str) -> None:
    base = BUILDERS["bert"](0, layers=LAYERS, dtype=torch.float64)
    layers = base.bert.encoder.layer
    if where == "between":  # something happens between two blocks
        layers[1].register_forward_pre_hook(lambda _, args: (args[0] * 1.5, *args[1:]))
    else:  # one block is called twice
        layers[2] = layers[1]
    model = on_layer(base, "query").double().eval()
    train_adapter(model)
    sites = attach_gates(model)
    batch, settings = padded("bert"), all_ablations(sites)
    scored = scorer(model, sites, [batch])
    torch.testing.assert_close(scored.ablate(settings), naive(model, sites, [batch], settings), rtol=0, atol=1e-12)
    assert scored.forwards == len(settings) + 2  # two passes found it out


def test_models_that_go_on_in_place_are_scored_right() -> None:
    """What was noted of a reference is no tensor that the model may still write to."""
    model, sites = model_of("bert")
    batch, settings = padded("bert"), all_ablations(sites)
    before = naive(model, sites, [batch], settings)
    for site in sites:
        site.layer.register_forward_hook(lambda module, args, output: output.mul_(1.5))
    for block in model.get_base_model().bert.encoder.layer:
        block.attention.register_forward_pre_hook(lambda module, args: (args[0].mul_(1.1), *args[1:]))
    scored = scorer(model, sites, [batch])
    expected = naive(model, sites, [batch], settings)
    torch.testing.assert_close(scored.ablate(settings), expected, rtol=0, atol=1e-12)
    assert scored.forwards < len(settings)  # it was walked
    assert (expected - before).abs().min() > 1e-4


class _Sharing(nn.Module):
    """A block that hands something to the last block behind the model's back, or takes it."""

    def __init__(self, block: nn.Module, shared: dict[str, Tensor], gives: bool) -> None:
        super().__init__()
        self.block, self.shared, self.gives = block, shared, gives

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.gives:
            self.shared["hidden"] = hidden.mean(1, keepdim=True)
        else:
            hidden = hidden + self.shared.pop("hidden")
        return self.block(hidden, *args, **kwargs)


def _share(layers: nn.ModuleList) -> None:
    shared: dict[str, Tensor] = {}
    layers[0], layers[2] = _Sharing(layers[0], shared, gives=True), _Sharing(layers[2], shared, gives=False)


def test_what_blocks_share_behind_the_model_is_noticed() -> None:
    model, sites = classifier(_share)
    batch, settings = padded("bert"), all_ablations(sites)
    assert not scorer(model, sites, [batch]).check_walk()
    scored = ObservedData(model, sites, [batch]).scoring(4, 0)
    torch.testing.assert_close(scored.ablate(settings), naive(model, sites, [batch], settings), rtol=0, atol=1e-12)
    assert scored.forwards == len(settings)


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_models_that_share_nothing_are_walked(name: str) -> None:
    model, sites = model_of(name)
    assert scorer(model, sites, [padded(name)]).check_walk()
    scored = ObservedData(model, sites, [padded(name)]).scoring(4, 0)
    scored.ablate(all_ablations(sites))
    unchecked = scorer(model, sites, [padded(name)])
    unchecked.ablate(all_ablations(sites))
    assert scored.forwards == unchecked.forwards < len(all_ablations(sites))  # a check is no scoring


@pytest.mark.parametrize(("mixed", "passes"), [("no", False), ("bf16", True)])
def test_walks_are_compared_in_the_precision_that_accelerate_has_set(mixed: str, passes: bool) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # one process has one precision
    model, sites = model_of("llama")
    Accelerator(cpu=True, mixed_precision=mixed).prepare_model(model)
    scored = scorer(model, sites, [padded("llama")])
    sums = scored._sums
    scored._sums = lambda *args: 1.01 * sums(*args)  # about what bf16 rounds away
    assert scored.check_walk() is passes
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(("change", "passes"), [(lambda layers: None, False), (_share, True)])
def test_a_probe_checks_once_and_remembers(change: Any, passes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, sites = classifier(change)
    data = ObservedData(model, sites, [padded("bert")])
    settings = all_ablations(sites)
    expected = naive(model, sites, [padded("bert")], settings)
    for _ in range(2):
        scored = data.scoring(4, 0)
        torch.testing.assert_close(scored.ablate(settings), expected, rtol=0, atol=1e-12)
        assert (scored.forwards == len(settings)) is passes
    monkeypatch.setattr(type(scored), "check_walk", lambda self: pytest.fail("it is known"))
    data.scoring(4, 1)


def test_a_model_whose_loss_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sites = model_of("llama")
    monkeypatch.setattr(model.get_base_model(), "loss_function", lambda **kw: torch.tensor(float("nan")))
    batch = padded("llama")
    with pytest.raises(UserError, match="loss of the first validation batch is nan, and from that no ranks"):
        scorer(model, sites, [batch]).check_loss(batch)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_with_gradient_checkpoints_gates_are_differentiated_sample_by_sample(name: str) -> None:
    """Evaluation mode has no checkpoints, so that a whole batch might not fit."""
    model, sites = model_of(name)
    whole, labels = scorer(model, sites, [padded(name)]).gate_gradients(trained_gates(sites))
    base = model.get_base_model()
    assert isinstance(base, PreTrainedModel)
    base.gradient_checkpointing_enable({"use_reentrant": False})
    seen: list[int] = []
    base.get_input_embeddings().register_forward_hook(lambda module, args, output: seen.append(len(output)))
    apart, same_labels = scorer(model, sites, [padded(name)]).gate_gradients(trained_gates(sites))
    assert seen == [1, 1, 1, 1]
    assert labels == same_labels
    torch.testing.assert_close(apart, whole, rtol=1e-6, atol=1e-7)


def test_packed_batches_are_refused() -> None:
    model, sites = model_of("llama")
    batch = {"input_ids": torch.ones(1, 6, dtype=torch.long), "labels": torch.ones(1, 6, dtype=torch.long)}
    scorer(model, sites, [{**batch, "position_ids": torch.arange(6)[None]}])
    for packed in ({"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}, {"cu_seq_lens_q": torch.tensor([0, 3, 6])}):
        with pytest.raises(UserError, match=r"packed, several examples in a row.*padding_free=False, packing=False"):
            scorer(model, sites, [{**batch, **packed}])


def test_what_is_no_value_a_sample_is_not_cut() -> None:
    cut = samples_of({**padded("bert"), "num_items_in_batch": torch.tensor(4), "sections": torch.ones(3)}, slice(2))
    assert len(cut["labels"]) == len(cut["input_ids"]) == 2
    assert cut["num_items_in_batch"] == 4
    assert len(cut["sections"]) == 3


def test_a_layer_that_all_samples_share_is_refused_by_its_name() -> None:
    """As DeBERTa's projections of relative positions, [1, positions, in]."""
    _, sites = model_of("llama")
    words = r"q_proj: .* sees 1 rows for 4 samples .*LoraConfig\(exclude_modules=\[\"model.*q_proj\"\]\)$"
    with pytest.raises(UserError, match=words), gates_replaced(sites, [torch.ones(4, 1, 3)] * len(sites)):
        sites[0].layer(torch.zeros(1, 7, 16, dtype=torch.float64))
