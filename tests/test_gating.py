"""What a gated model computes, and how gates come and go.

The naive twin is the formula, `base(x) + ((x Aᵀ) ∘ scale ∘ gate) Bᵀ`, written with plain operations. What PEFT's own
verbs do to a gated model, what is refused, and what we rely on in PEFT: test_gating_peft.py.
"""

from __future__ import annotations

import pickle
from copy import deepcopy
from typing import Any

import pytest
import torch
from models import (
    BUILDERS,
    gated,
    inputs_of,
    labelled_batch,
    logits,
    lora_config,
    lora_layers,
    naive_delta,
    naive_update,
    shake,
    tiny_bert,
    tiny_llama,
    tiny_peft,
    train_adapter,
)
from peft import get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from loralloc import AdaLoRA, Budget, attach
from loralloc.gating import attach_gates, fold_gates, is_gated

MODELS = list(BUILDERS)


def adapter_gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    model(**batch).loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {name.removeprefix("_orig_mod."): gradient for name, gradient in gradients.items()}


# ---- What attaching does ----


@pytest.mark.parametrize("name", MODELS)
def test_attaching_to_a_fresh_adapter_changes_no_bit_of_the_base_models_output(name: str) -> None:
    model = tiny_peft(name)
    with model.disable_adapter():
        base = logits(model)
    attach_gates(model)
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"rank_pattern": {r".*\.1\..*": 3}}])
def test_gates_of_one_are_pefts_own_lora(name: str, settings: dict[str, Any]) -> None:
    model = tiny_peft(name, trained=True, **settings)
    plain = logits(model)
    with model.disable_adapter():
        assert not torch.allclose(plain, logits(model), atol=1e-2)  # the adapter does something
    attach_gates(model)
    torch.testing.assert_close(logits(model), plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_sites_are_the_lora_layers_in_the_models_order(name: str) -> None:
    model = tiny_peft(name)
    sites = attach_gates(model)
    assert [site.name for site in sites] == list(lora_layers(model))
    for site in sites:
        base = model.get_base_model().get_submodule(site.name).base_layer
        weight = base.weight.T if name == "gpt2" else base.weight
        assert (site.outputs, site.inputs) == weight.shape
        assert (site.rank, site.cost, site.scaling) == (4, sum(weight.shape), 1.5)
        assert site.gate.tolist() == [1.0] * 4
        assert site.scale.tolist() == [1.5] * 4


def test_the_scale_is_pefts_scaling_times_a_constant_and_zero_where_a_rank_is_closed() -> None:
    (site, *_) = attach_gates(tiny_peft("llama", use_rslora=True))
    assert site.scaling == 3.0  # 6 / √4
    site.set_scale(torch.tensor([True, False, True, True]))
    assert site.scale.tolist() == [3.0, 0.0, 3.0, 3.0]
    site.set_scale(torch.tensor([False, False, True, True]), factor=2.5)
    assert site.scale.tolist() == [0.0, 0.0, 7.5, 7.5]
    assert not site.scale.requires_grad


def test_gates_are_fp32_over_bf16_factors_and_follow_wider_ones() -> None:
    base = tiny_llama(dtype=torch.bfloat16)
    sites = attach_gates(get_peft_model(base, lora_config("llama"), autocast_adapter_dtype=False))
    assert {site.A.dtype for site in sites} == {torch.bfloat16}
    assert {site.gate.dtype for site in sites} == {site.scale.dtype for site in sites} == {torch.float32}
    wide = attach_gates(get_peft_model(tiny_llama(dtype=torch.float64), lora_config("llama")))
    assert {site.gate.dtype for site in wide} == {torch.float64}


def test_gates_are_parameters_of_the_model_and_learn() -> None:
    model, sites = gated("llama")
    parameters = dict(model.named_parameters())
    gates = {name: p for name, p in parameters.items() if "lora_gate" in name}
    assert {id(p) for p in gates.values()} == {id(site.gate) for site in sites}
    assert all(p.requires_grad for p in gates.values())
    before = [site.gate.detach().clone() for site in sites]
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    model(**labelled_batch("llama")).loss.backward()
    optimizer.step()
    for site, old in zip(sites, before, strict=True):
        moved = site.gate != old
        assert moved[:-1].all()
        assert not moved[-1]  # closed for good: no gradient


# ---- What a gated layer computes ----


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shape", [(3, 5), (4,), (1, 1), (2, 3, 2)])
def test_forward_is_the_formula(name: str, shape: tuple[int, ...]) -> None:
    _, sites = gated(name)
    for site in sites:
        x = inputs_of(site, *shape)
        torch.testing.assert_close(site.layer(x), site.layer.base_layer(x) + naive_update(site, x))


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_formula(name: str) -> None:
    _, sites = gated(name)
    for site in sites:
        x, twin = (inputs_of(site, 3, 5).requires_grad_() for _ in range(2))
        tensors = (site.A, site.B, site.gate)
        actual = torch.autograd.grad(site.layer(x).square().sum(), (x, *tensors))
        naive = site.layer.base_layer(twin) + naive_update(site, twin)
        expected = torch.autograd.grad(naive.square().sum(), (twin, *tensors))
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_a_whole_gated_model_is_the_base_model_with_the_updates_added_to_its_weights(name: str) -> None:
    model, sites = gated(name)
    twin = BUILDERS[name]()
    if name == "bert":
        twin.classifier.load_state_dict(model.base_model.model.classifier.modules_to_save["default"].state_dict())
    for site in sites:
        twin.get_submodule(site.name).weight.data += naive_delta(site)
    torch.testing.assert_close(logits(model), logits(twin), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_dropout_acts_on_the_adapters_input_only_while_training(name: str) -> None:
    _, sites = gated(name, lora_dropout=0.5)
    for site in sites:
        x = inputs_of(site, 3, 5)
        site.layer.train()
        torch.manual_seed(7)
        actual = site.layer(x)
        torch.manual_seed(7)
        dropped = nn.functional.dropout(x, 0.5)
        torch.testing.assert_close(actual, site.layer.base_layer(x) + naive_update(site, dropped))
        site.layer.eval()
        torch.testing.assert_close(site.layer(x), site.layer.base_layer(x) + naive_update(site, x))


def test_dropout_draws_what_pefts_own_forward_draws() -> None:
    model = tiny_peft("llama", trained=True, lora_dropout=0.5).train()
    torch.manual_seed(7)
    plain = logits(model)
    attach_gates(model)
    torch.manual_seed(7)
    torch.testing.assert_close(logits(model), plain, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(model), plain, atol=1e-2)  # another draw, another output


@pytest.mark.parametrize("name", MODELS)
def test_a_bf16_base_under_fp32_adapters_gives_bf16_outputs_and_fp32_gradients(name: str) -> None:
    _, sites = gated(name, dtype=torch.bfloat16)
    for site in sites:
        x = inputs_of(site, 3, 5).to(torch.bfloat16)
        actual = site.layer(x)
        expected = (site.layer.base_layer(x).float() + naive_update(site, x)).to(torch.bfloat16)
        torch.testing.assert_close(actual, expected, rtol=2**-7, atol=1e-6)  # one unit in bf16's last place
        actual.float().sum().backward()
        assert (site.A.grad.dtype, site.B.grad.dtype, site.gate.grad.dtype) == (torch.float32,) * 3


def test_over_a_bf16_base_the_input_is_kept_as_it_is() -> None:
    """One narrow tensor for all layers that share it; PEFT's cast would keep a wide copy for each."""
    _, (site, *_) = gated("llama", dtype=torch.bfloat16)
    x = inputs_of(site, 30, 50).to(torch.bfloat16)

    def kept() -> list[Tensor]:
        found: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
            site.layer(x)
        return [t for t in found if t.numel() == x.numel() and t.data_ptr() != x.data_ptr()]

    assert not kept()
    fold_gates([site])
    assert [t.dtype for t in kept()] == [torch.float32], "the partner"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_the_products_are_bf16_and_the_gradients_fp32(dtype: torch.dtype) -> None:
    _, sites = gated("llama", dtype=dtype)
    for site in sites:
        x = inputs_of(site, 3, 5).to(dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = site.layer(x)
            plain = site.layer.base_layer(x)
        assert actual.dtype == plain.dtype == torch.bfloat16
        expected = plain.float() + naive_update(site, x.float())
        error = (actual.float() - expected).abs().max() / expected.abs().max()
        assert 0 < error < 2**-6
        actual.float().square().sum().backward()  # outside autocast, as Trainer does
        assert site.A.grad.dtype == site.gate.grad.dtype == torch.float32
        assert site.gate.grad.isfinite().all()


def test_disabled_adapters_give_the_base_model_and_come_back_trainable() -> None:
    model, sites = gated("llama")
    on = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_llama()))
    assert torch.equal(logits(model), on)
    assert all(site.gate.requires_grad for site in sites)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(reentrant: bool) -> None:
    model, sites = gated("llama", lora_dropout=0.25)
    model.train()
    batch = labelled_batch("llama")
    torch.manual_seed(7)
    expected = adapter_gradients(model, batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    torch.manual_seed(7)
    actual = adapter_gradients(model, batch)
    assert set(actual) == set(expected)
    assert sum("lora_gate" in name for name in actual) == len(sites)
    torch.testing.assert_close(actual, expected)


def test_a_layer_compiles_into_one_graph() -> None:
    torch._dynamo.reset()
    _, sites = gated("llama")
    site = sites[0]
    x = inputs_of(site, 3, 5)
    compiled = torch.compile(site.layer, backend="aot_eager", fullgraph=True)
    eager = torch.autograd.grad(site.layer(x).square().sum(), (site.A, site.B, site.gate))
    torch.testing.assert_close(compiled(x), site.layer(x))
    torch.testing.assert_close(torch.autograd.grad(compiled(x).square().sum(), (site.A, site.B, site.gate)), eager)
    site.set_scale(torch.arange(site.rank) < 2)  # closing ranks must reach a graph that is compiled already
    torch.testing.assert_close(compiled(x), site.layer.base_layer(x) + naive_update(site, x))


def test_the_whole_model_compiles_into_one_graph_and_closing_ranks_compiles_nothing_anew() -> None:
    torch._dynamo.reset()  # what other tests have compiled of the same code decides what is compiled of it here
    model = get_peft_model(tiny_bert(layers=1), lora_config("bert"))
    train_adapter(model)
    sites = attach_gates(model)
    shake(sites)
    batch = labelled_batch("bert")
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for open_ranks in (3, 2):
        for site in sites:
            site.set_scale(torch.arange(site.rank) < open_ranks)
        expected = adapter_gradients(model, batch)
        with torch._dynamo.config.patch(error_on_recompile=open_ranks == 2):  # the error says why
            actual = adapter_gradients(compiled, batch)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler looks at it
def test_blocks_that_are_compiled_one_by_one_share_a_graph() -> None:
    """The first block's input needs no gradient, so two graphs serve any number of blocks, as with plain LoRA."""
    torch._dynamo.reset()
    model = get_peft_model(tiny_llama(layers=3), lora_config("llama"))
    model.config.use_cache = False  # of which every block has a part of its own
    train_adapter(model)
    sites = attach_gates(model)
    expected = adapter_gradients(model, labelled_batch("llama"))
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    for block in model.base_model.model.model.layers:
        block.compile(backend=counter, fullgraph=True)
    torch.testing.assert_close(adapter_gradients(model, labelled_batch("llama")), expected, rtol=1e-4, atol=1e-6)
    assert counter.frame_count == 2
    for site in sites:
        site.set_scale(torch.arange(site.rank) < 2)
    with torch._dynamo.config.patch(error_on_recompile=True):
        adapter_gradients(model, labelled_batch("llama"))


def test_a_gated_model_can_be_copied_and_pickled() -> None:
    model, _ = gated("llama")
    for other in (deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), logits(model))
        replaced = [module for module in other.modules() if "forward" in vars(module)]
        assert replaced
        assert all(module.forward.__self__.layer is module for module in replaced)


# ---- Folding ----


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"lora_dropout": 0.5}])
def test_folding_gives_the_same_function_and_stock_peft(name: str, settings: dict[str, Any]) -> None:
    model, sites = gated(name, **settings)
    expected = logits(model)
    fold_gates(sites)
    difference = (logits(model) - expected).abs().max() / expected.abs().max()
    assert difference <= 1e-6
    stock = tiny_peft(name, **settings)
    assert list(model.state_dict()) == list(stock.state_dict())
    for layer in lora_layers(model).values():
        assert layer.adapter_layer_names == type(layer).adapter_layer_names == LoraLayer.adapter_layer_names
        assert layer.lora_variant == {}
        assert not hasattr(layer, "lora_gate")
    assert not is_gated(model, "default")
    assert stock.load_state_dict(model.state_dict())
    assert torch.equal(logits(stock), logits(model))


def test_ranks_closed_for_good_become_exact_zeros_and_open_ranks_do_not() -> None:
    _, sites = gated("llama")
    fold_gates(sites)
    for site in sites:
        assert not site.A[-1].any()
        assert not site.B[:, -1].any()
        assert site.A[:-1].any(1).all()
        assert not site.B[:, 0].any()  # open, but its gate was 0: B says so, A stays
        assert site.B[:, 1:-1].any(0).all()


def test_a_folded_adapter_can_be_attached_and_folded_again() -> None:
    model, sites = gated("llama")
    fold_gates(sites)
    expected = logits(model)
    fold_gates(attach_gates(model))
    assert torch.equal(logits(model), expected)  # gates of one fold into B without a rounding


def test_a_run_that_learned_nothing_folds_into_the_base_model() -> None:
    model = tiny_peft("llama")
    attach(model, AdaLoRA(Budget(average_rank=2)), total_steps=20).finish()
    assert torch.equal(logits(model), logits(tiny_llama()))


def test_a_model_may_be_moved_before_its_first_forward_pass() -> None:
    model, sites = gated("llama")
    model.to("meta")  # any other device; layers that a model never calls (an unused pooler) never see a forward pass
    fold_gates(sites)


def moved_without_a_forward_pass() -> Any:
    """As `model.to("cuda")` right after attaching; "meta", which every machine has, computes nothing."""
    model = tiny_peft("llama")
    sites = attach_gates(model)
    for site in sites:
        site.set_row_scale(torch.ones(site.outputs))
    return model.to("meta"), sites


def test_evaluating_a_moved_model_in_inference_mode_leaves_it_trainable() -> None:
    """What is made in inference mode could not be saved for a backward pass later."""
    model, sites = moved_without_a_forward_pass()
    with torch.inference_mode():
        assert model(input_ids=torch.ones(1, 3, dtype=torch.long, device="meta")).logits.is_inference()
    scales = [scale for site in sites for scale in (site._variant.scale, site._variant.row_scale)]
    assert {scale.device.type for scale in scales} == {"meta"}
    assert not any(scale.is_inference() for scale in scales)


def test_a_moved_model_can_be_merged_before_its_first_forward_pass() -> None:
    model, _ = moved_without_a_forward_pass()
    model.merge_adapter()
    assert all(layer.merged for layer in lora_layers(model).values())


def test_a_model_may_be_cast_after_attaching() -> None:
    """The scale has the dtype that the gates had when it was set; it does not follow a cast."""
    model = tiny_peft("llama").double()
    shake(attach_gates(model))
    wide = logits(model)
    torch.testing.assert_close(logits(model.float()), wide.float())
