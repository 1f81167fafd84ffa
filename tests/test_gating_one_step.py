"""When a gated layer and its frozen layer are one step of the graph, and when PEFT's own forward pass runs instead.

Either way the layer computes the same; `kernels_called` says which way it went. Every obstacle has its partner: the
same layer without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from models import (
    gated,
    inputs_of,
    labelled_batch,
    logits,
    lora_config,
    naive_update,
    tiny_peft,
    token_batch,
    train_adapter,
    two_adapters,
)
from torch import Tensor, nn
from torch.nn.utils import parametrize

from loralloc import gating
from loralloc.gating import Site, attach_gates, fold_gates


@pytest.fixture
def kernels_called(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], list[str]]:
    """The kernels that some work calls, in order."""
    calls: list[str] = []
    for name in ("gated_linear", "gated_lora"):
        kernel = getattr(gating, name)
        monkeypatch.setattr(gating, name, lambda *a, name=name, kernel=kernel: calls.append(name) or kernel(*a))

    def called(work: Callable[[], object]) -> list[str]:
        calls.clear()
        work()
        return list(calls)

    return called


@pytest.mark.parametrize(
    ("name", "kernel"), [("llama", "gated_linear"), ("bert", "gated_linear"), ("gpt2", "gated_lora")]
)
def test_every_frozen_linear_layer_takes_one_step(name: str, kernel: str, kernels_called: Any) -> None:
    model, sites = gated(name)
    for trained in (False, True):
        model.train(trained)
        assert kernels_called(lambda: logits(model)) == [kernel] * len(sites)  # transformers' Conv1D is not nn.Linear


@contextmanager
def hook(site: Site, register: str) -> Iterator[None]:
    handle = getattr(site.layer.base_layer, register)(lambda *_: None)
    yield
    handle.remove()


@contextmanager
def replaced_forward(site: Site) -> Iterator[None]:
    """As accelerate's hooks do it."""
    frozen = site.layer.base_layer
    frozen.forward = type(frozen).forward.__get__(frozen)
    yield
    del frozen.forward


@contextmanager
def trained(site: Site, name: str) -> Iterator[None]:
    parameter = getattr(site.layer.base_layer, name).requires_grad_(True)
    yield
    parameter.requires_grad_(False)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@contextmanager
def parametrised(site: Site) -> Iterator[None]:
    parametrize.register_parametrization(site.layer.base_layer, "weight", Doubled(), unsafe=True)
    yield
    parametrize.remove_parametrizations(site.layer.base_layer, "weight", leave_parametrized=False)


OBSTACLES: dict[str, Callable[[Site], Any]] = {
    "forward hook": lambda site: hook(site, "register_forward_hook"),
    "forward pre-hook": lambda site: hook(site, "register_forward_pre_hook"),
    "backward hook": lambda site: hook(site, "register_full_backward_hook"),
    "backward pre-hook": lambda site: hook(site, "register_full_backward_pre_hook"),
    "replaced forward pass": replaced_forward,
    "trained weight": lambda site: trained(site, "weight"),
    "trained bias": lambda site: trained(site, "bias"),
    "parametrised weight": parametrised,
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_a_frozen_layer_that_is_more_than_its_product_is_called(obstacle: str, kernels_called: Any) -> None:
    _, (site, *_) = gated("bert")
    x = inputs_of(site, 3, 5)
    before = site.layer(x)
    assert kernels_called(lambda: site.layer(x)) == ["gated_linear"]
    with OBSTACLES[obstacle](site):
        assert kernels_called(lambda: site.layer(x)) == ["gated_lora"]
        torch.testing.assert_close(site.layer(x), site.layer.base_layer(x) + naive_update(site, x))
    assert kernels_called(lambda: site.layer(x)) == ["gated_linear"]
    assert torch.equal(site.layer(x), before)


def test_a_hook_may_change_what_the_frozen_layer_returns() -> None:
    _, (site, *_) = gated("llama")
    x = inputs_of(site, 3, 5)
    frozen = site.layer.base_layer(x)
    site.layer.base_layer.register_forward_hook(lambda _, args, output: 3 * output)
    torch.testing.assert_close(site.layer(x), 3 * frozen + naive_update(site, x))


def test_trained_biases_learn() -> None:
    """LoraConfig(bias="lora_only") trains the biases of adapted layers."""
    model = tiny_peft("bert", trained=True, bias="lora_only")
    sites = attach_gates(model)
    model(**labelled_batch("bert")).loss.backward()
    assert all(site.layer.base_layer.bias.grad.any() for site in sites)


def test_dropout_stands_between_them_while_training(kernels_called: Any) -> None:
    model, sites = gated("llama", lora_dropout=0.25)
    assert kernels_called(lambda: logits(model)) == ["gated_linear"] * len(sites)
    model.train()
    assert kernels_called(lambda: logits(model)) == ["gated_lora"] * len(sites)


def test_pefts_states_take_pefts_way(kernels_called: Any) -> None:
    model, sites = two_adapters()
    one_step = ["gated_linear"] * len(sites)
    assert kernels_called(lambda: logits(model)) == one_step
    model.base_model.set_adapter(["default", "plain"])
    assert kernels_called(lambda: logits(model)) == ["gated_lora"] * len(sites)
    model.set_adapter("plain")
    assert kernels_called(lambda: logits(model)) == []
    model.set_adapter("default")
    with model.disable_adapter():
        assert kernels_called(lambda: logits(model)) == []
    mixed = {**token_batch(), "adapter_names": ["default", "plain", "__base__"]}
    assert kernels_called(lambda: model(**mixed)) == ["gated_lora"] * len(sites)
    model.merge_adapter(adapter_names=["default"])
    assert kernels_called(lambda: logits(model)) == []
    model.unmerge_adapter()
    assert kernels_called(lambda: logits(model)) == one_step


def test_gates_that_are_replaced_and_adapters_that_are_shut_off(kernels_called: Any) -> None:
    _, (site, *_) = gated("llama")
    x = inputs_of(site, 3, 5)
    per_sample = torch.randn(3, 1, site.rank)
    with site.gates_replaced(per_sample):
        assert kernels_called(lambda: site.layer(x)) == ["gated_linear"]
        update = ((x @ site.A.T) * site.scale * per_sample) @ site.B.T
        torch.testing.assert_close(site.layer(x), site.layer.base_layer(x) + update)
    with site.gates_replaced(None):
        assert kernels_called(lambda: site.layer(x)) == []
        assert torch.equal(site.layer(x), site.layer.base_layer(x))


def test_an_adapter_that_leaves_a_layer_out(kernels_called: Any) -> None:
    """The active adapter has nothing in a layer that another, gated one adapts."""
    model, sites = gated("llama")
    model.add_adapter("narrow", lora_config("llama", target_modules=["v_proj"]))
    train_adapter(model, 9, "narrow")
    model.set_adapter("narrow")
    assert kernels_called(lambda: logits(model)) == []
    q_proj = next(site for site in sites if site.name.endswith("q_proj"))
    x = inputs_of(q_proj, 3, 5)
    assert torch.equal(q_proj.layer(x), q_proj.layer.base_layer(x))


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_whole_model_has_the_same_gradients_either_way(name: str) -> None:
    model, sites = gated(name)
    batch = labelled_batch(name)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(**batch).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    one_step = gradients()
    for site in sites:
        site.layer.base_layer.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(gradients(), one_step, rtol=1e-5, atol=1e-6)


def test_folding_leaves_what_others_put_around_the_forward_pass() -> None:
    _, (site, *rest) = gated("llama")
    x = inputs_of(site, 3, 5)
    ours, calls = site.layer.forward, []
    site.layer.forward = lambda *args: calls.append(1) or ours(*args)
    expected = site.layer(x)
    fold_gates([site, *rest])
    torch.testing.assert_close(site.layer(x), expected)
    assert len(calls) == 2
    assert "forward" not in vars(rest[0].layer)
