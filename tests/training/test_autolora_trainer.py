"""AutoLoRA in transformers' Trainer: the step it computes again is the step, whatever the Trainer did to the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from models import labelled_batch, tiny_bert, tiny_peft
from models import lora_config as plain_config
from peft import get_peft_model
from torch import Tensor
from trainers import STEPS, Compare, arguments, build, language_batch, read_trace, sentences, train
from transformers import Trainer

from loralloc import AutoLoRA, RankAllocation, RankPlan, UserError, attach, lora_config

HELD_OUT = sentences(20, seed=5)


def searching(**settings: Any) -> AutoLoRA:
    return AutoLoRA(HELD_OUT, **{"logit_learning_rate": 0.05, **settings})


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {}),
        ("llama", {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 4}),  # items in a batch
        ("bert", {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 4}),  # mean over batches
        ("llama", {"bf16": True}),
        ("llama", {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}),
    ],
    ids=["plain", "accumulated", "classifier", "bf16", "checkpointed"],
)
def test_a_step_computed_again_is_the_step(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_peft(name, lora_dropout=0.2)
    model.get_base_model().accepts_loss_kwargs = name != "bert"
    trainer, allocation = build(
        tmp_path, name, model=model, method=searching(), max_grad_norm=0.0, max_steps=4, **settings
    )
    compare = Compare(allocation)
    trainer.add_callback(compare)
    trainer.train()
    assert compare.equal == [True] * 4
    assert allocation.run.state.updates == 4


def test_a_search_leaves_a_plan_and_plain_lora(tmp_path: Path) -> None:
    trainer, allocation = train(tmp_path, method=searching(check_every=6), trace=tmp_path / "trace.jsonl")
    plan = allocation.plan
    assert plan is not None
    assert all(1 <= module.rank <= module.start for module in plan.modules.values())
    events = read_trace(tmp_path / "trace.jsonl")
    assert [event["event"] for event in events] == ["start", *["plan"] * 4, "finish"]
    assert events[0]["target_budget"] is None
    assert events[-2]["ranks"] == events[-1]["ranks"] == list(plan.ranks.values())
    assert list(trainer.model.state_dict()) == list(tiny_peft("llama").state_dict())


def test_the_trainers_clipping_is_told(tmp_path: Path) -> None:
    for norm, expected in ((0.5, 0.5), (0.0, None)):
        _, allocation = train(tmp_path, method=searching(), max_grad_norm=norm, max_steps=2)
        assert allocation.run.max_grad_norm == expected


def test_the_logged_gradient_norm_is_that_of_the_weights(tmp_path: Path) -> None:
    """Selection variables have gradients of their own, and weight decay is not theirs."""
    trainer, _ = train(tmp_path, method=searching(), max_steps=1, logging_steps=1)
    plain = Trainer(
        model=tiny_peft("llama"),
        args=arguments(tmp_path, max_steps=1, logging_steps=1),
        train_dataset=sentences(),  # type: ignore[arg-type]
        data_collator=language_batch,
    )
    plain.train()
    norms = [t.state.log_history[0]["grad_norm"] for t in (trainer, plain)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_a_settled_plan_ends_the_training(tmp_path: Path) -> None:
    method = searching(check_every=2, patience=2, logit_learning_rate=1e-9)
    trainer, allocation = train(tmp_path, method=method)
    assert trainer.state.global_step < STEPS
    assert allocation.plan is not None
    assert allocation.plan.provenance["steps"] == trainer.state.global_step


def test_columns_that_the_trainer_removes_are_removed_here_too(tmp_path: Path) -> None:
    def rows(count: int, seed: int) -> Dataset:
        made = [{"input_ids": row["ids"], "note": "text"} for row in sentences(count, seed=seed)]
        return Dataset.from_list(made)

    def collate(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        assert all(set(example) == {"input_ids"} for example in examples)
        return language_batch([{"ids": example["input_ids"]} for example in examples])

    allocation = RankAllocation(AutoLoRA(rows(9, 5)))
    trainer = Trainer(
        model=tiny_peft("llama"),
        args=arguments(tmp_path, remove_unused_columns=True, max_steps=2),
        train_dataset=rows(32, 0),
        data_collator=collate,
        callbacks=[allocation],
    )
    trainer.train()
    assert allocation.run.state.updates == 2


def test_a_loss_of_the_trainers_own_is_refused_and_the_first_order_takes_it(tmp_path: Path) -> None:
    trainer, _ = build(tmp_path, method=searching(), label_smoothing_factor=0.1)
    with pytest.raises(UserError, match=r'no gradient came through the loss .* AutoLoRA\(mode="first_order"\)'):
        trainer.train()
    _, allocation = train(tmp_path, method=searching(mode="first_order"), label_smoothing_factor=0.1, max_steps=3)
    assert allocation.run.state.updates == 3


class Penalized(Trainer):
    """A Trainer whose loss has a term that the model knows nothing of."""

    weight = 1e-2

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        loss = loss + self.weight * sum(p.square().sum() for n, p in model.named_parameters() if "lora_A" in n)
        return (loss, outputs) if return_outputs else loss


REPLAYING = ("fast", "paper", "exact", "reference")


@pytest.mark.parametrize("mode", [*REPLAYING, "first_order"])
@pytest.mark.parametrize("weight", [0.0, 1e-2])
def test_a_term_that_the_trainer_adds_is_refused_where_a_step_is_computed_again(
    mode: str, weight: float, tmp_path: Path
) -> None:
    allocation = RankAllocation(searching(mode=mode))
    trainer = Penalized(
        model=tiny_peft("llama"),
        args=arguments(tmp_path, max_steps=3),
        train_dataset=sentences(),  # type: ignore[arg-type]
        data_collator=language_batch,
        callbacks=[allocation],
    )
    trainer.weight = weight
    if weight and mode != "first_order":
        with pytest.raises(UserError, match=rf'mode="{mode}" .* off from the one .* train on .*use mode="first_order"'):
            trainer.train()
        return
    trainer.train()
    assert allocation.run.state.updates == 3


@pytest.mark.parametrize("mode", REPLAYING)
@pytest.mark.parametrize("settings", [{}, {"bf16": True}, {"gradient_checkpointing": True}], ids=str)
def test_what_a_trainer_does_to_the_models_own_loss_is_taken(
    mode: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """Clipping, dropout, micro-batches, autocast, checkpoints: in all modes that compute a step again."""
    if "gradient_checkpointing" in settings:
        settings = {**settings, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    model = tiny_peft("llama", lora_dropout=0.2)
    method = searching(mode=mode)
    common: dict[str, Any] = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.05, "max_steps": 2}
    _, allocation = train(tmp_path, model=model, method=method, **common, **settings)
    assert allocation.run.state.updates == allocation.run.state.steps == 2


def test_the_best_model_cannot_be_one_of_the_search(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4}
    trainer, _ = build(
        tmp_path, method=searching(), load_best_model_at_end=True, extra={"eval_dataset": HELD_OUT}, **settings
    )
    with pytest.raises(UserError, match="would bring back a checkpoint from before the ranks are chosen"):
        trainer.train()


class TestFreshAdapter:
    """`lora_config`: plain LoRA at the ranks of a plan."""

    def plan(self) -> RankPlan:
        run = attach(tiny_peft("bert"), AutoLoRA([{}]), 9)
        for index, row in enumerate(run.state.logits):
            row[: 1 + index % 3] = 3.0
        run.state.write_gates()
        return run.finish()

    def test_has_the_ranks_and_the_scale_of_the_plan(self) -> None:
        plan = self.plan()
        assert set(plan.ranks.values()) == {1, 2, 3}
        base = tiny_bert()
        model = get_peft_model(base, lora_config(plan, base, task_type="SEQ_CLS", lora_dropout=0.1))
        again = attach(model, AutoLoRA([{}]), 9)
        assert {site.name: site.rank for site in again.sites} == plan.ranks
        assert {site.scaling for site in again.sites} == {6 / 4}

    def test_where_every_rank_stays_it_is_plain_lora_bit_for_bit(self) -> None:
        """Spec, 41: the same draw, and the same steps."""
        whole = attach(tiny_peft("bert"), AutoLoRA([{}]), 9).finish()
        assert set(whole.ranks.values()) == {4}
        ends = []
        for planned in (False, True):
            base = tiny_bert()
            config = lora_config(whole, base, task_type="SEQ_CLS") if planned else plain_config("bert")
            torch.manual_seed(3)
            model = get_peft_model(base, config)
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
            for step in range(3):
                model(**labelled_batch("bert", step)).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            ends.append(model.state_dict())
        assert ends[0].keys() == ends[1].keys()
        assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())

    def test_a_module_without_a_rank_gets_no_adapter(self) -> None:
        """Also where its name ends like that of one that has."""
        record = self.plan()
        modules = dict(record.modules)
        closed = "bert.encoder.layer.0.attention.output.dense"
        modules[closed] = type(modules[closed])(0, 4, 16, 16, 1.5)
        base = tiny_bert()
        model = get_peft_model(base, lora_config(RankPlan("autolora", modules), base))
        names = {site.name for site in attach(model, AutoLoRA([{}]), 9).sites}
        assert names == set(modules) - {closed}

    def test_names_that_end_alike_are_told_apart(self) -> None:
        block = torch.nn.ModuleDict({"fc": torch.nn.Linear(4, 4)})
        base = torch.nn.ModuleDict({"fc": torch.nn.Linear(4, 4), "block": block})
        module = type(next(iter(self.plan().modules.values())))(2, 4, 4, 4, 1.0)
        model = get_peft_model(base, lora_config(RankPlan("lora", {"fc": module}), base))  # type: ignore[arg-type]
        assert [n for n, _ in model.named_modules() if n.endswith("lora_A")] == ["base_model.model.fc.lora_A"]

    def test_another_model_is_refused(self) -> None:
        with pytest.raises(UserError, match=r"belongs to another model: bert.encoder.* there is no such module"):
            lora_config(self.plan(), torch.nn.Linear(2, 2))

    @pytest.mark.parametrize("setting", ["r", "target_modules", "use_rslora"])
    def test_what_the_plan_decides_is_refused(self, setting: str) -> None:
        with pytest.raises(UserError, match=f"^{setting}: the plan decides that; leave it out of lora_config"):
            lora_config(self.plan(), tiny_bert(), **{setting: 8})
