"""Layers of bitsandbytes: gradients pass them after an evaluation too, and what is compared is not rounded."""

from __future__ import annotations

import copy
import weakref
from contextlib import suppress
from typing import Any

import bitsandbytes
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from bitsandbytes.functional import _convert_weight_packed_for_cpu, dequantize_4bit, quantize_4bit
from models import VOCABULARY, tiny_peft, token_batch
from quantized_models import BITS, quantized_llama, quantized_peft, saved_llama, weights_of
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from loralloc import AdaLoRA, Budget, Truncate, UserError, attach
from loralloc.quantized import (
    dequantized,
    is_packed,
    keep_trainable,
    leave_memory,
    misread_rows,
    parameter_count,
    quantized_layers,
)


def gradient(model: Any) -> Tensor:
    """Of a loss by the embedded tokens: it has to pass every layer."""
    ids = token_batch()["input_ids"]
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    model.train()(inputs_embeds=embedded, labels=ids).loss.backward()
    assert embedded.grad is not None
    return embedded.grad


@torch.no_grad()
def evaluated(model: nn.Module, length: int = 8) -> Tensor:
    ids = torch.randint(0, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(0))
    return model.eval()(ids).logits


def pack(layer: Any) -> None:
    """What an evaluation does on a CPU with AVX512-BF16."""
    packed = _convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
    layer.weight.data, layer.weight.quant_state = packed


@pytest.mark.parametrize("bits", BITS)
def test_every_linear_layer_but_the_head_is_found(bits: str) -> None:
    model = quantized_llama(bits)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {name for name, _ in quantized_layers(model)} == linear - {"lm_head"}
    assert not list(quantized_layers(LlamaForCausalLM.from_pretrained(saved_llama())))


@pytest.mark.parametrize("bits", BITS)
def test_parameters_are_counted_as_those_that_few_bits_stand_for(bits: str) -> None:
    """And none of the adapter's: a budget as a share of the base model means the same over all of them."""
    full = sum(parameter.numel() for parameter in LlamaForCausalLM.from_pretrained(saved_llama()).parameters())
    run = attach(quantized_peft(bits), Truncate(Budget(share_of_base=0.01)), total_steps=4)
    assert run.sites[0].base_parameters == full
    assert run.target == int(0.01 * full)
    if bits == "4bit":
        assert sum(parameter.numel() for parameter in quantized_llama(bits).parameters()) < full


def test_tied_weights_heads_and_adapters_are_no_parameters_of_their_own() -> None:
    for name in ("bert", "gpt2"):
        model = tiny_peft(name)  # the head of the one is saved with the adapter, the other's is its embedding
        full = sum(parameter.numel() for parameter in model.unload().parameters())
        assert parameter_count(tiny_peft(name), ["default"]) == full


class Packed(nn.Module):
    """A linear layer as other libraries keep one: packed numbers, which are no parameter, and a bias."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.register_buffer("qweight", torch.zeros(inputs // 8, outputs, dtype=torch.int32))
        self.bias = nn.Parameter(torch.zeros(outputs))


def test_weights_that_are_kept_elsewhere_than_in_a_parameter_are_counted_by_the_layers_size() -> None:
    assert parameter_count(nn.Sequential(Packed(16, 8), nn.Linear(8, 3)), []) == 16 * 8 + 8 + 8 * 3 + 3


class TestTraining:
    @pytest.mark.parametrize("bits", BITS)
    def test_the_gradient_after_an_evaluation_is_the_one_before(self, bits: str) -> None:
        model = quantized_llama(bits)
        keep_trainable(model)
        before = gradient(model)
        assert before.abs().max() > 0
        evaluated(model)
        assert torch.equal(gradient(model), before)

    def test_attaching_turns_the_packing_off(self) -> None:
        model = quantized_peft("4bit")
        for _, layer in quantized_layers(model):
            layer.support_avx512bf16_for_cpu = True  # as it is on such a CPU
        attach(model, AdaLoRA(Budget(average_rank=2)), total_steps=4)
        evaluated(model)
        assert not any(is_packed(layer) for _, layer in quantized_layers(model))

    def test_attaching_to_what_has_been_packed_is_refused_and_to_a_model_loaded_anew_is_not(self) -> None:
        model = quantized_peft("4bit", r=2)
        for _, layer in quantized_layers(model):
            pack(layer)
        method = AdaLoRA(Budget(average_rank=1))
        with pytest.raises(
            UserError, match=r"has packed its weights .* load the base model anew, and evaluate it after"
        ):
            attach(model, method, total_steps=4)
        attach(quantized_peft("4bit", r=2), method, total_steps=4)


class TestRows:
    def test_of_a_multiple_of_64_are_read_as_they_were_written(self) -> None:
        for width in (64, 128, 192, 576):
            weight = torch.randn(8, width)
            quantized, state = quantize_4bit(weight, quant_type="nf4")
            blocks, flat = quantize_4bit(weight.view(-1, 64), quant_type="nf4")
            assert torch.equal(dequantize_4bit(quantized, state), dequantize_4bit(blocks, flat).view(8, width))
        assert not misread_rows(quantized_llama("4bit"))

    def test_of_other_widths_are_named(self) -> None:
        found = misread_rows(quantized_llama("4bit", hidden=64))
        assert found == {f"model.layers.{layer}.mlp.down_proj": 96 for layer in (0, 1)}
        assert not misread_rows(quantized_llama("8bit", hidden=64))


class TestDequantized:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_layers_in_8_bits_multiply_with_their_numbers(self, dtype: torch.dtype) -> None:
        layer = quantized_llama("8bit").model.layers[0].mlp.up_proj
        x = torch.randn(3, 5, 128, dtype=dtype)
        for _ in range(2):  # before bitsandbytes has moved the scales, and after it
            with dequantized(nn.Sequential(layer)):
                torch.testing.assert_close(layer(x), x @ weights_of(layer).T.to(dtype))
            layer(x)

    def test_layers_in_4_bits_too_packed_or_not(self) -> None:
        layer = quantized_llama("4bit").model.layers[0].mlp.up_proj
        weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        x = torch.randn(3, 5, 128)
        assert not torch.equal(layer.train()(x), x @ weight.T), "it rounds to bfloat16 of its own"
        with dequantized(nn.Sequential(layer)):
            assert torch.equal(layer(x), torch.nn.functional.linear(x, weight))
        pack(layer)
        with dequantized(nn.Sequential(layer)):
            torch.testing.assert_close(layer(x), x @ weight.T, rtol=0, atol=0.02 * float((x @ weight.T).abs().max()))
        assert is_packed(layer), "the layer is as it was"

    @pytest.mark.parametrize("bits", BITS)
    def test_a_bias_is_added_and_stays_as_it_is(self, bits: str) -> None:
        kind: Any = bitsandbytes.nn.Linear4bit if bits == "4bit" else bitsandbytes.nn.Linear8bitLt
        settings = {"compute_dtype": torch.float32} if bits == "4bit" else {"has_fp16_weights": False}
        layer = kind(64, 8, **settings).to("cpu")
        layer.requires_grad_(False)
        bias, x = layer.bias.clone(), torch.randn(2, 64)
        with dequantized(nn.Sequential(layer)):
            half, full = layer(x.bfloat16()), layer(x)
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(layer.bias, bias, rtol=0, atol=0)
        layer.bias = None
        with dequantized(nn.Sequential(layer)):
            torch.testing.assert_close(full - layer(x), bias.expand(2, 8))

    @pytest.mark.parametrize("bits", BITS)
    def test_a_small_difference_stays_small(self, bits: str) -> None:
        """Which is what a check can rely on; otherwise it becomes as large as the steps of the rounding."""
        model = quantized_peft(bits, trained=True)
        nudged = copy.deepcopy(model)
        for name, parameter in nudged.named_parameters():
            if "lora_B" in name:
                parameter.data.mul_(1 + 1e-4)
        with dequantized(model), dequantized(nudged):
            close = (evaluated(model, 24) - evaluated(nudged, 24)).abs().max()
        far = (evaluated(model, 24) - evaluated(nudged, 24)).abs().max()
        assert 0 < close < 2e-3
        assert far > 20 * close

    @pytest.mark.parametrize("bits", BITS)
    def test_outside_everything_is_as_it_was(self, bits: str) -> None:
        model = quantized_llama(bits)
        keep_trainable(model)
        before = evaluated(model)
        with suppress(ZeroDivisionError), dequantized(model):
            assert not torch.equal(evaluated(model), before)
            raise ZeroDivisionError
        assert not any("forward" in vars(layer) for _, layer in quantized_layers(model))
        assert torch.equal(evaluated(model), before)

    def test_the_hooks_of_accelerate_still_run(self) -> None:
        class Moves(ModelHook):
            seen = 0

            def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
                self.seen += 1
                return args, kwargs

        model, hook = quantized_llama("8bit"), Moves()
        layer = model.model.layers[0].mlp.up_proj
        add_hook_to_module(layer, hook)
        x = torch.randn(3, 128)
        with dequantized(model):
            torch.testing.assert_close(layer(x), x @ weights_of(layer).T)
        assert hook.seen == 1


@pytest.mark.parametrize("bits", BITS)
def test_the_weights_of_a_model_that_is_done_leave_memory(bits: str) -> None:
    model = quantized_llama(bits)
    evaluated(model)  # from here on, layers in 8 bits hold theirs in two places
    storages = [weakref.ref(p.untyped_storage()) for p in model.parameters() if p.numel() > 1000]
    leave_memory(model)
    assert len(storages) == 16
    assert not any(reference() for reference in storages)
    full = LlamaForCausalLM.from_pretrained(saved_llama())
    leave_memory(full)
    assert sum(p.numel() for p in full.parameters()) == 0
