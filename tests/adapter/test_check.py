"""The check of an export: it compares like with like, on the run's data, and does not share the fault it looks for."""

from __future__ import annotations

import math
import types
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from exports import adapted, assert_unchanged, corrupt_writes, saved_base, snapshot
from models import TARGETS, logits, tiny_peft, token_batch, train_adapter
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForSequenceClassification,
    LlamaForCausalLM,
    T5Config,
    T5ForSequenceClassification,
)

from loralloc import AdaLoRA, Budget, UserError, attach, export_adapter
from loralloc.adapter import check as check_module
from loralloc.adapter import export as export_module
from loralloc.adapter.check import compare, computing_plainly, rounded_otherwise
from loralloc.peft_layers import bare_base
from loralloc.plain_lora import plain_sites

EOS = 2


def wrap_as_accelerate(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> None:
    """What `Accelerator.prepare_model` leaves: autocast around forward, and outputs that look like fp32."""
    model._original_forward = model.forward  # type: ignore[assignment]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", dtype=dtype):
            outputs = model._original_forward(*args, **kwargs)
        outputs["logits"] = outputs["logits"].float()
        return outputs

    model.forward = types.MethodType(forward, model)


@pytest.mark.parametrize("profile", ["ragged", "uniform", "merged"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_wrapper_of_mixed_precision_is_taken_off_on_both_sides(name: str, profile: Any, tmp_path: Path) -> None:
    model = tiny_peft(name, trained=True)
    full = logits(model)
    wrap_as_accelerate(model)
    wrapped = logits(model)
    assert wrapped.dtype == torch.float32
    assert not torch.allclose(wrapped, full, atol=1e-3), "the wrapper computes in bf16"
    export = export_adapter(model, tmp_path / "adapter", profile)
    assert export.difference <= 1e-5 * max(1.0, float(full.abs().max()))
    assert torch.equal(logits(model), wrapped), "the wrapper is back"


def test_autocast_around_the_export_changes_nothing(tmp_path: Path) -> None:
    model = tiny_peft("llama", trained=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        export = export_adapter(model, tmp_path / "adapter")
    assert export.allowed < 1e-3


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_the_bare_base_is_the_base_and_the_adapters_come_back(name: str) -> None:
    model = tiny_peft(name, trained=True)
    model.add_adapter("other", LoraConfig(r=2, target_modules=TARGETS[name]))
    batch, before = token_batch(), snapshot(model)
    trained = logits(model, batch)
    with model.disable_adapter():
        expected = logits(model, batch)
    with bare_base(model) as base:
        assert not [key for key in base.state_dict() if "lora_" in key]
        assert torch.equal(logits(base, batch), expected)
        assert not torch.equal(expected, trained)
    assert_unchanged(model, before)
    assert torch.equal(logits(model, batch), trained)


def test_what_is_in_the_way_of_a_plain_computation_is_back_after_it() -> None:
    model = tiny_peft("llama", trained=True).train()
    wrap_as_accelerate(model)
    forward, state = model.forward, torch.get_rng_state()
    with suppress(ZeroDivisionError), computing_plainly(model):
        assert not model.training
        assert model.forward != forward
        torch.rand(3)
        raise ZeroDivisionError
    assert model.training
    assert model.forward == forward
    assert torch.equal(torch.get_rng_state(), state)


def test_files_without_an_effect_on_the_base_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of the loaded adapter are right, and still nothing comes of them."""
    model = tiny_peft("llama", trained=True)
    stock = PeftModel.from_pretrained

    def loaded_but_disabled(*args: Any, **kwargs: Any) -> PeftModel:
        found = stock(*args, **kwargs)
        for layer in (site.layer for site in plain_sites(found)):
            layer.enable_adapters(False)
        return found

    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(1e-4)  # no more than rounding allows: the comparison of logits would pass
    monkeypatch.setattr(PeftModel, "from_pretrained", loaded_but_disabled)
    with pytest.raises(RuntimeError, match="the reloaded export has no effect: its logits are the base model's"):
        export_adapter(model, tmp_path / "adapter")
    monkeypatch.undo()
    export_adapter(model, tmp_path / "adapter")


def test_an_adapter_that_changes_nothing_may_have_no_effect(tmp_path: Path) -> None:
    model = tiny_peft("llama")
    assert export_adapter(model, tmp_path / "adapter").difference == 0


def test_an_update_that_differs_less_than_the_logits_may_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bf16 logits may differ by several percent; the updates are still compared to the rounding of the files."""
    model = tiny_peft("llama", trained=True, dtype=torch.bfloat16)
    written = export_module.save_file

    def spoil(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        written({key: 1.001 * value for key, value in tensors.items()}, path, metadata=metadata)

    monkeypatch.setattr(export_module, "save_file", spoil)
    with pytest.raises(RuntimeError, match=r"something else: the update of model\.layers\.0\.self_attn\.q_proj"):
        export_adapter(model, tmp_path / "adapter")
    monkeypatch.undo()
    export_adapter(model, tmp_path / "adapter")


# ---- What the check computes with ----


def encoder_decoder(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "bart":
        sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
        return BartForSequenceClassification(
            BartConfig(
                vocab_size=64,
                d_model=16,
                encoder_ffn_dim=16,
                decoder_ffn_dim=16,
                max_position_embeddings=32,
                num_labels=3,
                eos_token_id=EOS,
                **sizes,  # type: ignore[arg-type]
            )
        ).eval()
    return T5ForSequenceClassification(
        T5Config(
            vocab_size=64,
            d_model=16,
            d_kv=8,
            d_ff=16,
            num_layers=1,
            num_heads=2,
            num_labels=3,
            eos_token_id=EOS,
            decoder_start_token_id=0,
        )
    ).eval()


TARGET = {"bart": ["q_proj", "v_proj"], "t5": ["q", "v"]}


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_made_up_inputs_end_like_a_sequence(kind: str, tmp_path: Path) -> None:
    model = get_peft_model(encoder_decoder(kind), LoraConfig(r=2, target_modules=TARGET[kind], task_type="SEQ_CLS"))
    train_adapter(model)
    with pytest.raises(ValueError, match="<eos> token"):
        model(**token_batch())
    assert export_adapter(model.eval(), tmp_path / "adapter").difference < 1e-5


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_a_run_checks_its_export_with_its_own_data(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(encoder_decoder(kind), LoraConfig(r=2, target_modules=TARGET[kind], task_type="SEQ_CLS"))
    batch = token_batch(samples=4)
    batch["input_ids"][batch["input_ids"] == EOS] = EOS + 1
    batch["input_ids"][:, -1] = EOS
    run = attach(model.train(), AdaLoRA(Budget(average_rank=1)), total_steps=3)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(**batch, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        run.before_step(optimizer)
        optimizer.step()
        run.after_step(optimizer)
        optimizer.zero_grad()
    run.finish()
    seen: list[dict[str, Any]] = []
    checked = export_module.check_adapter

    def look(model: PeftModel, folder: Path, factors: Any, batch: Any) -> Any:
        seen.append(batch)
        return checked(model, folder, factors, batch)

    monkeypatch.setattr(export_module, "check_adapter", look)
    export_adapter(model, tmp_path / "adapter")
    assert torch.equal(seen[0]["input_ids"], batch["input_ids"][:2])
    assert len(seen[0]["labels"]) == 2


def test_inputs_that_the_model_refuses_leave_a_way_on(tmp_path: Path) -> None:
    model = get_peft_model(encoder_decoder("bart"), LoraConfig(r=2, target_modules=TARGET["bart"]))
    train_adapter(model)
    batch = token_batch()
    with pytest.raises(UserError, match=r"does not take the inputs of the check \(ValueError: .*<eos> .*batch=\{...\}"):
        export_adapter(model, tmp_path / "adapter", batch=batch)
    assert list(tmp_path.iterdir()) == []
    batch["input_ids"][batch["input_ids"] == EOS] = EOS + 1
    batch["input_ids"][:, -1] = EOS
    export_adapter(model, tmp_path / "adapter", batch=batch)


def test_a_loss_without_logits_is_nothing_to_compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As TRL's fused head returns: its loss would be compared for the logits."""
    model = tiny_peft("llama", trained=True)
    stock = model.base_model.model.forward

    def fused(*args: Any, fused_head: bool = False, **kwargs: Any) -> Any:
        outputs = stock(*args, **kwargs)
        return {"loss": outputs.logits.mean()} if fused_head else outputs

    monkeypatch.setattr(model.base_model.model, "forward", fused)
    batch = token_batch()
    with pytest.raises(UserError, match=r"does not take the inputs of the check"):
        export_adapter(model, tmp_path / "adapter", batch={**batch, "fused_head": True})
    export_adapter(model, tmp_path / "adapter", batch=batch)


def test_a_checkpoint_with_remote_code_is_not_asked_for_it(tmp_path: Path) -> None:
    """A merged folder is loaded again by the classes that are there, not by what its config names."""
    base = AutoModelForCausalLM.from_pretrained(saved_base("llama"))
    base.config.auto_map = {"AutoConfig": "nowhere.Config", "AutoModelForCausalLM": "nowhere.Model"}
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    train_adapter(model)
    export_adapter(model.eval(), tmp_path / "merged", "merged")


def test_a_tokenizer_goes_beside_an_adapter(tmp_path: Path) -> None:
    class Tokenizer:
        def save_pretrained(self, folder: Path) -> None:
            (folder / "tokenizer_config.json").write_text("{}")

    export = export_adapter(tiny_peft("llama", trained=True), tmp_path / "adapter", tokenizer=Tokenizer())  # type: ignore[arg-type]
    assert (export.path / "tokenizer_config.json").is_file()
    assert 'AutoTokenizer.from_pretrained(".")' in (export.path / "README.md").read_text(encoding="utf-8")
    export_adapter(
        tiny_peft("llama", trained=True), tmp_path / "adapter"
    )  # an export may be replaced, tokenizer and all
    assert not (export.path / "tokenizer_config.json").exists()


@pytest.mark.parametrize("profile", ["ragged", "uniform"])
def test_an_adapter_narrower_than_the_model_is_allowed_its_own_rounding(
    profile: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As TRL makes it over a quantised model: folding the scale rounds to the dtype that is stored."""
    model = tiny_peft("llama", trained=True, lora_alpha=5)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    export = export_adapter(model, tmp_path / "adapter", profile)
    assert 1e-5 < export.difference < export.allowed
    corrupt_writes(monkeypatch)
    with pytest.raises(RuntimeError, match=r"computes something else: the update of .* differs"):
        export_adapter(model, tmp_path / "adapter", profile)


def test_devices_without_a_part_of_the_model_are_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch would begin to use every one of them, and warn."""
    model = tiny_peft("llama", trained=True)
    monkeypatch.setattr("torch.random._fork_rng_warned_already", False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: pytest.fail(f"device {device}"))
    before = torch.get_rng_state()
    with check_module.computing_plainly(model):
        torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("profile", ["ragged", "merged"])
def test_a_model_that_amplifies_rounding_is_allowed_what_rounding_does_to_it(
    profile: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a high learning rate: attention at queries a thousand times as long decides by the last digits."""
    model = tiny_peft("llama", trained=True, target_modules=["q_proj"], lora_alpha=5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(1e3)
    assert export_adapter(model, tmp_path / "adapter", profile).allowed < 0.05  # depends on the processor
    with monkeypatch.context() as without:
        without.setattr(check_module, "AMPLIFIED", 0)
        with pytest.raises(RuntimeError, match=r"computes something else: logits differ by"):
            export_adapter(model, tmp_path / "again", profile)
    stock = check_module.logits

    def shifted(of: nn.Module, batch: Any) -> Tensor:
        return stock(of, batch) + (0 if of is model else 0.1)

    monkeypatch.setattr(check_module, "logits", shifted)
    monkeypatch.setattr(export_module, "logits", shifted)
    with pytest.raises(RuntimeError, match=r"computes something else: logits differ by 0\.1"):
        export_adapter(model, tmp_path / "again", profile)


def test_numbers_that_are_not_finite_are_refused_whatever_rounding_does() -> None:
    one = torch.ones(2)
    for broken in (math.nan, math.inf):
        with pytest.raises(RuntimeError, match=f"logits differ by {broken}"):
            compare(one, torch.tensor([1.0, broken]), lambda draw: one * 2)
        with pytest.raises(RuntimeError, match=r"logits differ by 499 \(allowed 1e-05\)"):
            compare(one, torch.tensor([1.0, 500.0]), lambda draw, factor=broken: one * factor)


@pytest.mark.parametrize(("dtype", "times"), [(torch.float32, 8), (torch.bfloat16, 2)])
def test_a_multiple_of_what_rounding_does_is_allowed(dtype: torch.dtype, times: int) -> None:
    expected, rounded = torch.ones(2, dtype=dtype), torch.tensor([1.0, 1.125])
    assert compare(expected, expected + 0.1 * times, lambda draw: rounded).allowed == times * 0.125
    with pytest.raises(RuntimeError, match="logits differ by"):
        compare(expected, expected + 0.2 * times, lambda draw: rounded)


def test_the_roundings_that_change_most_decide() -> None:
    """A model that amplifies rounding answers one of them twice as strongly as another."""
    expected, tried = torch.ones(2), []

    def rounded(draw: int) -> Tensor:
        tried.append(draw)
        return expected + (0.125, 0.5, 0.25, 0.125)[draw]

    assert compare(expected, expected + 3, rounded).allowed == check_module.AMPLIFIED * 0.5
    assert tried == [0, 1], "no more than are needed"
    with pytest.raises(RuntimeError, match=r"logits differ by 5 \(allowed 4\)"):
        compare(expected, expected + 5, rounded)
    assert tried == [0, 1, 0, 1, 2, 3]
    model = tiny_peft("llama", trained=True).eval()
    logits_of_draws = [rounded_otherwise(model, token_batch(), torch.float32, draw) for draw in (0, 0, 1)]
    assert torch.equal(*logits_of_draws[:2])
    assert not torch.equal(*logits_of_draws[1:])


def test_layers_of_compiled_blocks_are_rounded_too() -> None:
    changes = []
    for compiled in (False, True):
        model = tiny_peft("llama", trained=True).eval()
        for block in model.base_model.model.model.layers if compiled else ():
            block.compile(backend="eager")
        logits(model)
        changes.append(rounded_otherwise(model, token_batch(), torch.float32) - logits(model))
    assert torch.equal(*changes)
    assert changes[0].any()


def test_what_a_layer_returns_is_rounded_in_its_own_dtype() -> None:
    """Also where logits come out as fp32."""
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_peft("llama", trained=True, dtype=dtype).eval()
        change = (rounded_otherwise(model, token_batch(), torch.float32) - logits(model)).abs().max()
        assert 0.1 < change / torch.finfo(dtype).eps < 1000


@pytest.mark.parametrize(("name", "serves"), [("llama", True), ("bert", False)])
def test_only_language_models_are_offered_to_a_server_of_them(name: str, serves: bool, tmp_path: Path) -> None:
    for profile in ("ragged", "uniform", "merged"):
        export = export_adapter(tiny_peft(name, trained=True), tmp_path / profile, profile)  # type: ignore[arg-type]
        assert bool(export.serving) == serves
    text = (tmp_path / "ragged" / "README.md").read_text(encoding="utf-8")
    assert ("vllm serve" in text) == serves


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_the_cards_snippet_runs_in_its_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(name)
    export = export_adapter(model, tmp_path / "adapter")
    text = (export.path / "README.md").read_text(encoding="utf-8")
    snippet = text.split("```python\n")[1].split("```")[0]
    assert ("num_labels=3" in snippet) == (name == "bert")
    loaded: dict[str, Any] = {}
    monkeypatch.chdir(export.path)
    exec(snippet.rpartition("tokenizer =")[0], loaded)  # the tiny models have no tokenizer
    torch.testing.assert_close(logits(loaded["model"].eval()), logits(model), rtol=1e-5, atol=1e-5)


def test_a_merged_model_that_comes_back_with_another_weight_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By less than the logits of a narrow model may differ."""
    model = tiny_peft("llama", trained=True, dtype=torch.bfloat16)
    stock = LlamaForCausalLM.from_pretrained

    def spoiled(*args: Any, **kwargs: Any) -> nn.Module:
        found = stock(*args, **kwargs)
        found.model.layers[0].mlp.up_proj.weight.data[0, 0] *= 1.01
        return found

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", spoiled)
    with pytest.raises(RuntimeError, match=r"computes something else: model\.layers\.0\.mlp\.up_proj\.weight differs"):
        export_adapter(model, tmp_path / "merged", "merged")
    monkeypatch.undo()
    export_adapter(model, tmp_path / "merged", "merged")
