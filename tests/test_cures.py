"""Every cure that names a call, or another model, is applied as it stands, and the next attempt gets further."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cures import expression_in, run_line
from models import labelled_batch, lora_config, on_layer, tiny_bert, tiny_llama, tiny_peft, train_adapter
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn

from loralloc import ABLoRA, AdaLoRA, ALLoRA, Budget, UserError, attach
from loralloc.gating import attach_gates, fold_gates, is_gated
from loralloc.methods.controls import Uniform
from loralloc.methods.truncate import Truncate
from loralloc.peft_layers import PARALLEL, peft_model, unwrapped
from loralloc.plain_lora import plain_sites

TWO = Budget(average_rank=2)


def refusal(model: nn.Module, words: str, attempt: Callable[[nn.Module], Any] = attach_gates) -> str:
    """Expect a refusal with these words, taken literally; return all of it."""
    with pytest.raises(UserError) as refused:
        attempt(model)
    assert words in str(refused.value)
    return str(refused.value)


def attaching(method: Any) -> Callable[[nn.Module], Any]:
    return lambda model: attach(model, method, total_steps=30)


# ---- The PeftModel ----


class Pooled(nn.Module):
    """A model around a transformer, as sentence-transformers builds them."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.model = transformer
        self.head = nn.Linear(3, 2)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.head(self.model(**batch).logits)


def sentences(transformer: nn.Module) -> nn.Sequential:
    return nn.Sequential(Pooled(transformer), nn.Identity())


@pytest.mark.parametrize(
    ("model", "place"),
    [
        (tiny_llama(), "model"),
        (sentences(tiny_bert()), "model[0].model"),
        (nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4)), "model"),
        (torch.compile(tiny_llama()), "model"),
    ],
    ids=["transformer", "inside", "no transformer", "compiled"],
)
def test_a_model_without_an_adapter_is_wrapped_by_the_line_of_the_message(model: nn.Module, place: str) -> None:
    message = refusal(model, "expected a PeftModel, got ")
    assert f": wrap it first, {place} = get_peft_model({place}, LoraConfig(r=12, target_modules=" in message
    assert attach_gates(run_line(message, unwrapped(model)))
    assert refusal(nn.Conv2d(3, 3, 3), "expected a PeftModel, got Conv2d, and it has no linear layers")


def injected() -> nn.Module:
    model = tiny_llama()
    try:
        model.add_adapter(lora_config("llama"))
    except ValueError as error:  # transformers 5.24 came before the release of PEFT that it asks for here
        if "version of PEFT" not in str(error):
            raise
        pytest.skip(str(error))
    return model


@pytest.mark.parametrize(
    ("with_layers", "anew"),
    [
        (injected, tiny_llama),
        (lambda: inject_adapter_in_model(lora_config("llama"), tiny_llama()), tiny_llama),
        (lambda: sentences(injected()), lambda: sentences(tiny_llama())),
    ],
    ids=["add_adapter", "inject_adapter_in_model", "inside"],
)
def test_an_injected_adapter_is_wrapped_instead(
    with_layers: Callable[[], nn.Module], anew: Callable[[], nn.Module]
) -> None:
    message = refusal(with_layers(), "with LoRA layers in it; pass the model that get_peft_model returned. Where add_")
    assert "load the model anew and wrap it instead" in message
    assert attach_gates(run_line(message, anew()))


def test_parts_of_a_peft_model_are_no_peft_model() -> None:
    model = tiny_peft("llama")
    for part in (model.base_model, model.get_base_model()):
        refusal(part, "with LoRA layers in it; pass the model that get_peft_model returned.")
    assert attach_gates(model)


def test_adapters_of_several_kinds_are_built_without_mixed() -> None:
    mixed = get_peft_model(tiny_llama(), lora_config("llama"), mixed=True)
    refusal(
        mixed, "expected a PeftModel, got PeftMixedModel, for adapters of several kinds; call get_peft_model without"
    )
    assert attach_gates(get_peft_model(tiny_llama(), lora_config("llama")))


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT", "ignore:Already found a `peft_config`")
def test_a_peft_model_inside_another_is_refused_with_the_cure() -> None:
    nested = get_peft_model(tiny_peft("llama"), lora_config("llama"))
    words = "a PeftModel is inside another one (get_peft_model was called on a model that it had returned)"
    for attempt in (attach_gates, lambda model: list(plain_sites(model))):
        message = refusal(nested, words, attempt)
        assert (
            "call get_peft_model once, on the base model, and add a second adapter with model.add_adapter(name"
            in message
        )
    refusal(sentences(nested), words)
    model = get_peft_model(tiny_llama(), lora_config("llama"))
    model.add_adapter("second", lora_config("llama"))
    assert attach_gates(model)


def test_a_peft_model_is_found_where_it_is() -> None:
    inner = tiny_peft("bert", trained=True)
    for model in (inner, torch.compile(inner), sentences(inner), nn.Sequential(inner, Pooled(inner))):
        assert peft_model(model) is inner
        assert len(list(plain_sites(model))) == 6
    sites = attach_gates(sentences(inner))
    assert [site.name for site in sites] == [site.name for site in plain_sites(inner)]
    assert is_gated(inner, "default")


def test_of_several_the_message_says_how_to_pass_each() -> None:
    model = nn.ModuleDict({"actor": tiny_peft("llama"), "critic": tiny_peft("bert")})
    message = refusal(model, "ModuleDict holds 2 PeftModels; pass the one to use: model.actor, model.critic")
    assert expression_in(message, model) is model["critic"]
    assert attach_gates(expression_in(message, model))


# ---- Wrappers ----


def test_a_compiled_model_is_attached_to_and_computes_with_the_gates() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))  # type: ignore[arg-type]
    train_adapter(model)
    compiled, x = torch.compile(model, backend="eager"), torch.randn(5, 4)
    before = compiled(x)  # a graph without gates is there already
    (site,) = attach_gates(compiled)
    torch.testing.assert_close(compiled(x), before)
    with torch.no_grad():
        site.gate.fill_(0.5)
    assert (compiled(x) - before).abs().max() > 1e-2
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).sum().backward()
    assert site.gate.grad is not None
    assert site.gate.grad.any()
    fold_gates([site])
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("inside", [lambda base: torch.compile(base), nn.DataParallel])
def test_a_wrapper_inside_the_peft_model_is_refused_and_put_around_it(inside: Callable[[nn.Module], Any]) -> None:
    model = get_peft_model(inside(tiny_llama()), LoraConfig(r=2, target_modules=["q_proj"]))
    message = refusal(model, "what get_peft_model was called on is wrapped by ")
    assert "wrap last: get_peft_model on the base model itself, then attach, then wrap what get_peft_model" in message
    right = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    assert attach_gates(right)
    inside(right)


def test_a_block_that_was_compiled_alone_is_named() -> None:
    model = tiny_peft("llama")
    model.base_model.model.model.layers[1] = torch.compile(model.base_model.model.model.layers[1])
    refusal(model, "model.layers.1 is wrapped by torch.compile inside the PeftModel")
    in_place = tiny_peft("llama")
    in_place.base_model.model.model.layers[1].compile()
    assert attach_gates(in_place)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("around", [lambda model: model, torch.compile, sentences])
@pytest.mark.parametrize("wrapper", [nn.parallel.DistributedDataParallel, nn.DataParallel])
def test_what_is_inside_of_a_parallel_wrapper_is_attached_to_before(
    wrapper: Callable[..., nn.Module], around: Callable[..., nn.Module]
) -> None:
    model = around(wrapper(tiny_peft("bert")))
    message = refusal(model, f"the model is wrapped by {wrapper.__name__} already ({PARALLEL[wrapper.__name__]}); ")
    assert "attach before wrapping, to what is inside, model" in message
    inside = expression_in(message.split(", or to the model")[0], model)
    assert attach_gates(inside)
    assert len(list(plain_sites(model))) == 6  # a trained one is found for its export
    gates = [name for name, _ in wrapper(inside).named_parameters() if "lora_gate" in name]
    assert len(gates) == 6


# ---- The adapter's state ----


def inactive() -> PeftModel:
    model = tiny_peft("llama")
    model.add_adapter("other", lora_config("llama"))
    return model


def frozen(symbol: str) -> PeftModel:
    model = tiny_peft("llama", lora_alpha=4)
    for name, parameter in model.named_parameters():
        if re.search(rf"lora_[{symbol}]", name):
            parameter.requires_grad_(False)
    return model


def apply_call(message: str, model: nn.Module) -> None:
    """Run the first `model.name(...)` of a message."""
    eval(re.findall(r"model\.\w+\(.*?\)", message)[0], {"model": model})


def merged() -> PeftModel:
    model = tiny_peft("llama", trained=True)
    model.merge_adapter()
    return model


def disabled() -> PeftModel:
    model = tiny_peft("llama", trained=True)
    model.base_model.disable_adapter_layers()
    return model


def two_active() -> PeftModel:
    model = inactive()
    model.base_model.set_adapter(["default", "other"])
    return model


STATES: dict[str, tuple[Callable[[], PeftModel], str | None, str]] = {
    "inactive": (inactive, "other", 'all 6 adapted layers: adapter "other" is not being trained (inactive, or frozen'),
    "frozen": (lambda: frozen("AB"), None, 'all 6 adapted layers: adapter "default" is not being trained'),
    "frozen B": (lambda: frozen("B"), None, "all 6 adapted layers: B is frozen at zero, as in every fresh adapter"),
    "merged": (merged, None, "all 6 adapted layers: the adapter is merged into the base weights"),
    "two active": (
        two_active,
        None,
        "ranks are allocated for one adapter at a time, but active are ['default', 'other']",
    ),
}


@pytest.mark.parametrize("state", STATES)
def test_the_call_that_a_message_names_puts_the_adapter_right(state: str) -> None:
    build, adapter, words = STATES[state]
    model = build()
    message = refusal(model, words, lambda model: attach_gates(model, adapter))
    apply_call(message, model)
    assert len(attach_gates(model, adapter)) == 6


def test_an_adapter_for_inference_is_loaded_as_trainable(tmp_path: Path) -> None:
    tiny_peft("llama", trained=True).save_pretrained(str(tmp_path))
    assert "or load it with is_trainable=True" in refusal(
        PeftModel.from_pretrained(tiny_llama(), tmp_path), "frozen as"
    )
    assert attach_gates(PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True))


def test_a_is_frozen_and_b_learns() -> None:
    """LoRA-FA. The sibling, B frozen where it is not zero, learns through A."""
    batch = labelled_batch("llama")
    for model in (frozen("A"), frozen("B")):
        train_adapter(model)
        run = attach(model, ALLoRA(), total_steps=4)
        optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
        losses = []
        for _ in range(4):
            loss = model(**batch).loss
            losses.append(loss.item())
            loss.backward()
            run.before_step(optimizer)
            optimizer.step()
            run.after_step(optimizer)
            optimizer.zero_grad()
        assert losses[-1] < losses[0]
    assert attach(frozen("A"), AdaLoRA(TWO), total_steps=10)


def test_the_scale_that_a_message_asks_for_is_taken() -> None:
    message = refusal(tiny_peft("llama", lora_alpha=0), "the scale lora_alpha / r is 0.0; it must be positive")
    assert message.endswith("set LoraConfig(lora_alpha=...) to a number above 0, such as 2 · r")
    assert attach_gates(tiny_peft("llama", lora_alpha=8))


def test_an_allocation_that_is_attached_is_finished_first() -> None:
    model = tiny_peft("llama")
    run = attach(model, AdaLoRA(TWO), total_steps=10)
    refusal(model, "a rank allocation is attached already; finish() it first, or load the model anew")
    run.finish()
    assert attach_gates(model)
    assert attach_gates(tiny_peft("llama"))


def test_base_parameters_that_learn_are_saved_as_modules_or_frozen() -> None:
    model = tiny_peft("bert")
    model.get_base_model().bert.pooler.dense.requires_grad_(True)
    message = refusal(model, "2 parameters of the base model are not frozen (bert.pooler.dense.weight, ...)")
    assert message.endswith("freeze them, or train their module as a whole with LoraConfig(modules_to_save=[...])")
    model.get_base_model().bert.pooler.dense.requires_grad_(False)
    assert attach_gates(model)
    saved = tiny_peft("bert", modules_to_save=["pooler.dense", "classifier"])
    assert attach_gates(saved)
    assert any("pooler" in name and p.requires_grad for name, p in saved.named_parameters())


# ---- Methods ----


def test_a_trained_adapter_is_started_afresh_or_truncated() -> None:
    trained = tiny_peft("llama", trained=True)
    for method in (AdaLoRA(TWO), ABLoRA(TWO, score="sensitivity"), Uniform(TWO)):
        message = refusal(trained, "all 6 adapted layers: the adapter has been trained already", attaching(method))
        assert "start from a fresh adapter" in message
        assert attach(tiny_peft("llama"), method, 30)
    assert message.endswith("or cut the trained one down with Truncate")
    assert attach(trained, Truncate(TWO), 30)


def test_some_trained_layers_are_named_alone() -> None:
    model = tiny_peft("llama")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "v_proj.lora_B" in name:
                parameter.fill_(0.1)
    refusal(model, "2 layers whose names end in v_proj: the adapter has been", attaching(AdaLoRA(TWO)))


def test_ranks_that_cannot_move_get_room() -> None:
    def full(r: int) -> PeftModel:
        return tiny_peft("llama", r=r)

    method = ABLoRA(Budget(average_rank=4), score="sensitivity", rounds=2)
    message = refusal(full(4), "the budget fills the whole capacity", attaching(method))
    (rank,) = re.findall(r"raise it to (\d+)", message)
    assert attach(full(int(rank)), method, 30)
    capped = ABLoRA(Budget(max_rank=2), score="sensitivity", rounds=2)
    refusal(full(4), "raise it, or give a budget of fewer ranks beside it", attaching(capped))
    assert attach(full(4), replace(capped, budget=Budget(max_rank=3, average_rank=2)), 30)
    assert attach(full(4), replace(capped, budget=Budget(max_rank=2, average_rank=1.5)), 30)


def test_ranks_that_cannot_move_within_blocks_move_between_them() -> None:
    method = ABLoRA(TWO, score="sensitivity", scope="block", rounds=2)
    message = refusal(on_layer(tiny_llama(), "q_proj"), 'with scope="block" no rank could move', attaching(method))
    assert 'adapt more of them (target_modules="all-linear"), or use scope="global"' in message
    assert attach(get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules="all-linear")), method, 30)
    method = ABLoRA(Budget(average_rank=1), score="sensitivity", scope="global", rounds=2)
    assert attach(on_layer(tiny_llama(), "q_proj"), method, 30)


def test_a_budget_above_the_start_is_lowered_or_the_start_raised() -> None:
    model = tiny_peft("llama")
    refusal(
        model,
        "lower the budget or raise LoraConfig.r (lora.r in a recipe)",
        attaching(AdaLoRA(Budget(average_rank=5))),
    )
    assert attach(model, AdaLoRA(Budget(average_rank=4)), 30)
    assert attach(tiny_peft("llama", r=5), AdaLoRA(Budget(average_rank=5)), 30)


def test_ranks_that_a_cap_does_not_allow_get_a_higher_cap_or_become_fewer() -> None:
    model = tiny_peft("llama")
    message = refusal(
        model,
        "asks for 18 ranks, but with max_rank=2 the 6 adapted modules can have no more than 12;",
        attaching(AdaLoRA(Budget(average_rank=3, max_rank=2))),
    )
    ((cap, total),) = re.findall(r"raise max_rank to (\d+) or lower the budget to total_rank=(\d+)$", message)
    assert attach(model, AdaLoRA(Budget(average_rank=3, max_rank=int(cap))), 30)
    assert attach(tiny_peft("llama"), AdaLoRA(Budget(total_rank=int(total), max_rank=2)), 30)
