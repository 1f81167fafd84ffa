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
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
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
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from loralloc import gating
from loralloc.gating import Site, attach_gates, fold_gates, gates_replaced
from loralloc.training.prefix_reuse import computing


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
    add_hook_to_module(site.layer.base_layer, ModelHook())
    yield
    remove_hook_from_module(site.layer.base_layer)


@contextmanager
def replaced_for_all_layers(site: Site) -> Iterator[None]:
    forward = nn.Linear.forward
    nn.Linear.forward = lambda self, x: forward(self, x)
    yield
    nn.Linear.forward = forward


@contextmanager
def hook_on_all_modules(site: Site) -> Iterator[None]:
    handle = register_module_forward_hook(lambda *_: None)
    yield
    handle.remove()


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


@contextmanager
def flattened(site: Site, name: str) -> Iterator[None]:
    """As FSDP does it: the parameter is elsewhere, and a view of it takes its place."""
    frozen = site.layer.base_layer
    parameter = getattr(frozen, name)
    delattr(frozen, name)
    setattr(frozen, name, parameter.detach().requires_grad_())
    yield
    delattr(frozen, name)
    setattr(frozen, name, parameter)


OBSTACLES: dict[str, Callable[[Site], Any]] = {
    "forward hook": lambda site: hook(site, "register_forward_hook"),
    "forward pre-hook": lambda site: hook(site, "register_forward_pre_hook"),
    "backward hook": lambda site: hook(site, "register_full_backward_hook"),
    "backward pre-hook": lambda site: hook(site, "register_full_backward_pre_hook"),
    "hook on all modules": hook_on_all_modules,
    "replaced forward pass": replaced_forward,
    "forward pass replaced for all layers": replaced_for_all_layers,
    "trained weight": lambda site: trained(site, "weight"),
    "trained bias": lambda site: trained(site, "bias"),
    "parametrised weight": parametrised,
    "flattened weight": lambda site: flattened(site, "weight"),
    "flattened bias": lambda site: flattened(site, "bias"),
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


def test_a_gate_may_be_parametrised() -> None:
    _, (site, *_) = gated("llama")
    x = inputs_of(site, 3, 5)
    with torch.no_grad():
        update, frozen = naive_update(site, x), site.layer.base_layer(x)
    parametrize.register_parametrization(site.layer.lora_gate, "default", Doubled())
    torch.testing.assert_close(site.layer(x), frozen + 2 * update)


def test_a_hook_may_change_what_the_frozen_layer_returns() -> None:
    _, (site, *_) = gated("llama")
    x = inputs_of(site, 3, 5)
    frozen = site.layer.base_layer(x)
    site.layer.base_layer.register_forward_hook(lambda _, args, output: 3 * output)
    torch.testing.assert_close(site.layer(x), 3 * frozen + naive_update(site, x))


def test_trained_biases_learn() -> None:
    """They are no part of the adapter, so they are unfrozen after attaching or not at all."""
    model = tiny_peft("bert", trained=True)
    sites = attach_gates(model)
    for site in sites:
        site.layer.base_layer.bias.requires_grad_(True)
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
    with gates_replaced([site], [per_sample]):
        assert kernels_called(lambda: site.layer(x)) == ["gated_linear"]
        update = ((x @ site.A.T) * site.scale * per_sample) @ site.B.T
        torch.testing.assert_close(site.layer(x), site.layer.base_layer(x) + update)
    with gates_replaced([site], [None]):
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


class Counting(ModelHook):
    calls = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return args, kwargs


@pytest.mark.parametrize("hooked", ["before attaching", "after attaching"])
def test_accelerates_hooks_on_an_adapted_layer_stay(hooked: str) -> None:
    model = tiny_peft("llama", trained=True)
    layer, counting = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj"), Counting()
    plain = logits(model)
    if hooked == "before attaching":
        add_hook_to_module(layer, counting)
    sites = attach_gates(model)
    if hooked == "after attaching":
        add_hook_to_module(layer, counting)
    torch.testing.assert_close(logits(model), plain, rtol=1e-5, atol=1e-5)
    assert counting.calls == 1
    fold_gates(sites)
    torch.testing.assert_close(logits(model), plain, rtol=1e-5, atol=1e-5)
    assert counting.calls == 2
    remove_hook_from_module(layer)
    torch.testing.assert_close(logits(model), plain, rtol=1e-5, atol=1e-5)
    assert not any("forward" in vars(site.layer) for site in sites if site.layer is not layer)


def test_a_compiled_layer_sees_that_the_frozen_layers_forward_pass_was_replaced() -> None:
    torch._dynamo.reset()
    _, (site, *_) = gated("llama")
    x = inputs_of(site, 3, 5)
    compiled = torch.compile(site.layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), site.layer(x))
    known = torch.randn(3, 5, site.outputs)
    with computing(site.layer.base_layer, lambda *_: known):
        torch.testing.assert_close(compiled(x), known + naive_update(site, x))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_output_may_be_changed_in_place(name: str) -> None:
    """As `nn.ReLU(inplace=True)` behind an adapted layer does."""
    _, sites = gated(name)
    for site in sites:
        x = inputs_of(site, 3, 5).requires_grad_()
        (expected,) = torch.autograd.grad(site.layer(x).relu().square().sum(), x)
        (found,) = torch.autograd.grad(site.layer(x).relu_().square().sum(), x)
        assert torch.equal(found, expected)
        checkpoint(site.layer, x, use_reentrant=True).relu_().square().sum().backward()
        assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_output_of_a_pass_without_gradients_may_be_changed_later(name: str) -> None:
    _, (site, *_) = gated(name)
    for shape in ((3, 5), (4,)):
        x, learned = inputs_of(site, *shape), torch.ones((), requires_grad=True)
        with torch.no_grad():
            output = site.layer(x)
        before = output.clone()
        output += learned
        assert torch.equal(output, before + learned)
