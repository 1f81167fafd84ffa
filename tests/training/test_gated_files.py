"""What a gated model writes: plain LoRA that stock PEFT reads rightly at any time, and what a resumed run needs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from models import lora_config, tiny_bert, tiny_llama, tiny_peft, token_batch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from trainers import build, same_tensors, train, train_until_killed
from transformers import EarlyStoppingCallback

from loralloc import AdaLoRA, ALLoRA, Budget, RankPlan, Truncate, UserError, attach
from loralloc.methods.base import Method
from loralloc.training.gated_files import FILE
from loralloc.training.run import AllocationRun

TWO_RANKS = AdaLoRA(Budget(average_rank=2))
METHODS: dict[str, Method] = {
    "adalora": TWO_RANKS,
    "truncate": Truncate(Budget(average_rank=2)),
    "allora": ALLoRA(mode="hybrid", allocate=TWO_RANKS),
}
BASES = {"llama": tiny_llama, "bert": tiny_bert}


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    training = model.training
    found = model.eval()(**token_batch()).logits
    model.train(training)
    return found


def stock(folder: Path, name: str = "llama") -> Tensor:
    """The logits of a folder as stock PEFT loads it."""
    return logits(PeftModel.from_pretrained(BASES[name](), str(folder)))


def same(left: Tensor, right: Tensor) -> bool:
    return torch.allclose(left, right, rtol=1e-5, atol=1e-5 * float(right.abs().max()))


def step_once(model: PeftModel, optimizer: torch.optim.Optimizer) -> None:
    batch = token_batch()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_second_adapter_gets_its_allocation_when_the_first_is_finished() -> None:
    """Each would save and load the model its own way, and the last one would win."""
    model = tiny_peft("llama")
    model.add_adapter("other", lora_config("llama"))
    first = attach(model, TWO_RANKS, total_steps=8)
    model.set_adapter("other")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    words = (
        'a rank allocation is attached already, to the adapter "default" of the same model; finish() it before "other" '
        'gets one, or load the base model anew for "other"'
    )
    with pytest.raises(UserError, match=f"^{re.escape(words)}$"):
        attach(model, TWO_RANKS, total_steps=8)
    assert same_tensors(model.state_dict(), before)
    first.finish()
    attach(model, TWO_RANKS, total_steps=8)


def test_an_adapter_that_was_deleted_holds_no_other_up() -> None:
    model = tiny_peft("llama")
    model.add_adapter("other", lora_config("llama"))
    attach(model, TWO_RANKS, total_steps=8)
    model.set_adapter("other")
    model.delete_adapter("default")
    attach(model, TWO_RANKS, total_steps=8)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", BASES)
def test_every_checkpoint_and_save_model_are_right_in_stock_peft(name: str, method: str, tmp_path: Path) -> None:
    settings = {"model": tiny_peft(name, lora_alpha=4)} if method == "allora" else {}
    trainer, allocation = train(
        tmp_path, name, method=METHODS[method], save_strategy="steps", save_steps=8, max_steps=16, **settings
    )
    trainer.save_model(str(tmp_path / "saved"))
    final = logits(trainer.model)
    assert same(stock(tmp_path / "saved", name), final)
    assert same(stock(tmp_path / "checkpoint-16", name), final)
    assert not same(stock(tmp_path / "checkpoint-8", name), final), "the run went on after it"
    assert allocation.plan is not None
    assert RankPlan.load(tmp_path / "checkpoint-16" / "ranks.json").ranks == allocation.plan.ranks
    card = (tmp_path / "checkpoint-16" / "README.md").read_text(encoding="utf-8")
    assert "plain LoRA at its final ranks" in card
    assert "not final" not in card


def test_a_checkpoint_in_the_middle_is_the_function_at_that_step(tmp_path: Path) -> None:
    trainer, _ = train_until_killed(tmp_path, 9, save_strategy="steps", save_steps=8)
    trainer.save_model(str(tmp_path / "saved"))  # as another callback would, in the middle of the run
    assert same(stock(tmp_path / "saved"), logits(trainer.model))
    trainer.model.load_adapter(str(tmp_path / "checkpoint-8"), "default", is_trainable=True)
    assert same(stock(tmp_path / "checkpoint-8"), logits(trainer.model))
    card = (tmp_path / "checkpoint-8" / "README.md").read_text(encoding="utf-8")
    assert card.count("Written after step 8 of 24 by loralloc") == 1
    assert "its ranks not final" in card


def test_the_best_model_comes_back_with_its_own_gates(tmp_path: Path) -> None:
    class Watch(EarlyStoppingCallback):
        """Notes the function at every evaluation."""

        def on_evaluate(self, args, state, control, model=None, **kwargs):  # type: ignore[no-untyped-def]
            seen[state.global_step] = logits(model)

    seen: dict[int, Tensor] = {}
    settings = {"eval_strategy": "steps", "eval_steps": 2, "eval_delay": 16, "save_strategy": "steps", "save_steps": 2}
    trainer, _ = build(
        tmp_path,
        callbacks=[Watch(early_stopping_patience=99)],
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=False,
        extra={"eval_dataset": [{"ids": [5, 9, 14, 20, 6], "label": 0}] * 4},
        learning_rate=0.05,
        **settings,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint is not None
    best = int(trainer.state.best_model_checkpoint.rpartition("-")[2])
    assert same(logits(trainer.model), seen[best])
    assert same(stock(tmp_path / f"checkpoint-{max(seen)}"), seen[max(seen)]), "the last checkpoint stays what it was"
    assert best != max(seen)
    assert not same(seen[best], seen[max(seen)])


# ---- In a loop of one's own ----


def gated_run() -> tuple[PeftModel, torch.optim.Optimizer]:
    model = tiny_peft("llama", trained=False).train()
    attach(model, AdaLoRA(Budget(average_rank=2)), total_steps=20)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        step_once(model, optimizer)
    return model, optimizer


def test_save_pretrained_before_finish_is_right_and_changes_nothing(tmp_path: Path) -> None:
    model, _ = gated_run()
    before, function = {name: t.clone() for name, t in model.state_dict().items()}, logits(model)
    model.save_pretrained(tmp_path / "a")
    model.save_pretrained(str(tmp_path / "b"), state_dict=model.state_dict())
    model.save_pretrained(tmp_path / "c", True, ["default"])
    for folder in "abc":
        assert same(stock(tmp_path / folder), function)
        assert not [key for key in load_file(tmp_path / folder / "adapter_model.safetensors") if "gate" in key]
    assert same_tensors(before, dict(model.state_dict()))


def test_a_process_that_does_not_write_writes_nothing(tmp_path: Path) -> None:
    model, _ = gated_run()
    model.save_pretrained(str(tmp_path / "a"), is_main_process=False)
    assert not list((tmp_path / "a").iterdir())


def test_another_adapter_is_saved_and_loaded_as_ever(tmp_path: Path) -> None:
    model, _ = gated_run()
    model.add_adapter("other", lora_config("llama", r=2))
    model.save_pretrained(str(tmp_path), selected_adapters=["other"])
    assert not (tmp_path / FILE).exists()
    model.load_adapter(str(tmp_path / "other"), "third")
    model.save_pretrained(str(tmp_path))
    assert (tmp_path / FILE).is_file()
    assert (tmp_path / "third" / "adapter_model.safetensors").is_file()


def test_gated_factors_come_back_bit_for_bit(tmp_path: Path) -> None:
    model, optimizer = gated_run()
    model.save_pretrained(tmp_path)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    step_once(model, optimizer)
    assert not same_tensors(before, dict(model.state_dict()))
    model.load_adapter(str(tmp_path), "default", is_trainable=True)
    assert same_tensors(before, dict(model.state_dict()))


def test_a_plain_adapter_is_not_loaded_under_gates(tmp_path: Path) -> None:
    tiny_peft("llama", trained=True).save_pretrained(str(tmp_path))
    model, _ = gated_run()
    with pytest.raises(UserError, match=rf"has no {FILE}, and the gates .* under another adapter_name"):
        model.load_adapter(str(tmp_path), "default", is_trainable=True)
    model.load_adapter(str(tmp_path), "plain")


def test_after_finish_saving_and_loading_are_pefts_own(tmp_path: Path) -> None:
    model = tiny_peft("llama").train()
    run = attach(model, AdaLoRA(Budget(average_rank=2)), total_steps=20)
    assert {"save_pretrained", "load_adapter"} <= vars(model).keys()
    run.finish()
    assert not {"save_pretrained", "load_adapter"} & vars(model).keys()
    model.save_pretrained(str(tmp_path))
    assert not (tmp_path / FILE).exists()


def ten_steps(run: AllocationRun) -> None:
    """Ten of twelve steps: the ranks are final by then."""
    optimizer = torch.optim.AdamW([p for p in run.model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(10):
        batch = token_batch()
        run.model(**batch, labels=batch["input_ids"]).loss.backward()
        run.before_step(optimizer)
        optimizer.step()
        run.after_step(optimizer)
        optimizer.zero_grad()


def test_a_compact_run_saves_what_the_masked_one_does(tmp_path: Path) -> None:
    functions = []
    for compact in (False, True):
        torch.manual_seed(0)  # starts are drawn
        model = tiny_peft("llama").train()
        run = attach(model, TWO_RANKS, total_steps=12, compact=compact)
        ten_steps(run)
        model.save_pretrained(str(tmp_path / str(compact)))
        assert same(stock(tmp_path / str(compact)), logits(model))
        functions.append(stock(tmp_path / str(compact)))
        assert (run.sites[0].rank < 4) == compact, "ranks have left the tensors"
    assert same(functions[0], functions[1])


class Around(nn.Module):
    """A model that holds the one that is saved."""

    def __init__(self, inner: PeftModel) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **batch: Tensor):
        return self.inner(**batch)


def test_a_compact_model_inside_another_is_saved_and_loaded(tmp_path: Path) -> None:
    outer = Around(tiny_peft("llama").train())
    run = attach(outer, TWO_RANKS, total_steps=12, compact=True)
    ten_steps(run)
    assert run.sites[0].rank < 4, "ranks have left the tensors"
    function = logits(outer.inner)
    outer.inner.save_pretrained(str(tmp_path))
    assert same(stock(tmp_path), function)
    whole = {name: tensor.clone() for name, tensor in outer.state_dict().items()}
    assert {tensor.shape[0] for name, tensor in whole.items() if "lora_A" in name} == {4}
    run.sites[0].A.data.zero_()
    outer.inner.load_adapter(str(tmp_path), "default", is_trainable=True)
    assert same(logits(outer.inner), function)
    run.sites[0].A.data.zero_()
    outer.load_state_dict(whole)
    assert same(logits(outer.inner), function)


def with_another(model: PeftModel) -> PeftModel:
    """The model with a second, fresh adapter."""
    model.add_adapter("other", lora_config("llama"))
    return model


@pytest.mark.parametrize("kind", ["cat", "svd"])  # the others are approximations
def test_finished_adapters_are_mixed_by_peft(kind: str, tmp_path: Path) -> None:
    """PEFT mixes adapters whose configs have sets of names, as it makes them."""
    trainer, _ = train(tmp_path, max_steps=8)
    model = with_another(trainer.model)  # type: ignore[arg-type]
    before = logits(model)
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "mixed", combination_type=kind)
    model.set_adapter("mixed")
    assert same(logits(model), before)  # the other adapter adds nothing


def test_gated_adapters_are_not_mixed() -> None:
    model = with_another(tiny_peft("llama"))
    model.add_adapter("third", lora_config("llama"))
    run = attach(model, TWO_RANKS, total_steps=8)
    words = 'PEFT would mix the factors of "default" without the gates of the attached rank allocation; finish() it'
    with pytest.raises(UserError, match=re.escape(words)):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "mixed", combination_type="cat")
    model.add_weighted_adapter(["other", "third"], [1.0, 1.0], "mixed", combination_type="cat")
    run.finish()
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "all", combination_type="cat")
    assert {"mixed", "all"} <= {*model.peft_config}
