"""What a plan does not depend on (promise 5), and what one bad step does not harm (promise 6)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from models import VOCABULARY, labelled_batch, tiny_bert, tiny_peft
from peft import LoraConfig, PeftModel, get_peft_model
from torch.amp.grad_scaler import GradScaler
from trainers import BATCH, STEPS, adapter_tensors, build, read_trace, same_tensors, sentences, train, training_rows
from transformers import T5Config, T5ForConditionalGeneration, Trainer, TrainerCallback, TrainerControl, TrainerState

from loralloc import AdaLoRA, Budget, RankPlan, UserError, attach

POISON = VOCABULARY - 1


@dataclass(frozen=True)
class Outcome:
    """What a run comes to."""

    plan: RankPlan
    tensors: dict[str, torch.Tensor]
    losses: dict[int, float]


def outcome(folder: Path, name: str = "llama", **settings: Any) -> Outcome:
    """Train with an evaluation set at hand, log every step unless told otherwise."""
    settings = {"logging_steps": 1, "extra": {"eval_dataset": sentences(BATCH, seed=3)}, **settings}
    trainer, allocation = train(folder, name, **settings)
    assert allocation.plan is not None
    losses = {row["step"]: row["loss"] for row in training_rows(trainer)}
    return Outcome(allocation.plan, adapter_tensors(trainer.model), losses)


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The run that all others must equal."""
    return outcome(tmp_path_factory.mktemp("usual"))


# Promise 5. None of this touches the data order or the weights, so the runs are equal bit for bit.


@pytest.mark.parametrize(
    "settings",
    [
        {"logging_steps": 50},
        {"logging_steps": 3, "logging_first_step": True},
        {"eval_strategy": "steps", "eval_steps": 5},
        {"eval_strategy": "epoch", "eval_on_start": True},
        {"save_strategy": "steps", "save_steps": 5},
        {"save_strategy": "steps", "save_steps": 5, "save_only_model": True, "save_total_limit": 1},
        {"activation_checkpointing": True},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
    ],
    ids=lambda settings: ",".join(settings),
)
def test_the_run_does_not_depend_on(settings: dict[str, Any], usual: Outcome, tmp_path: Path) -> None:
    other = outcome(tmp_path, **settings)
    assert other.plan.to_dict() == usual.plan.to_dict()
    assert same_tensors(other.tensors, usual.tensors)
    if "logging_steps" not in settings:  # else a row holds the mean of several steps
        assert other.losses == usual.losses


@pytest.mark.slow
def test_compiling_changes_the_run_by_rounding_only(usual: Outcome, tmp_path: Path) -> None:
    """A compiled graph adds up the gradients of a tensor that several layers share in another order."""
    other = outcome(tmp_path, torch_compile=True, torch_compile_backend="eager")
    assert other.plan.to_dict() == usual.plan.to_dict()
    assert other.tensors.keys() == usual.tensors.keys()
    for name, tensor in usual.tensors.items():
        torch.testing.assert_close(other.tensors[name], tensor, rtol=1e-4, atol=1e-5)
    assert list(other.losses) == list(usual.losses)
    assert list(other.losses.values()) == pytest.approx(list(usual.losses.values()), rel=1e-5)


def test_the_plan_does_depend_on_the_data(usual: Outcome, tmp_path: Path) -> None:
    assert outcome(tmp_path, data=sentences(seed=1)).plan.ranks != usual.plan.ranks


def test_evaluations_do_not_move_the_dropout_of_the_training(tmp_path: Path) -> None:
    often = {"eval_strategy": "steps", "eval_steps": 5}
    two_sets = {"extra": {"eval_dataset": {"a": sentences(BATCH, seed=3), "b": sentences(BATCH, seed=4)}}}
    usual, *others = (
        outcome(tmp_path, model=tiny_peft("llama", lora_dropout=0.2), **settings)
        for settings in ({}, often, {**often, "eval_on_start": True}, {**often, **two_sets})
    )
    for other in others:
        assert other.losses == usual.losses
        assert other.plan.to_dict() == usual.plan.to_dict()


class _Asks(TrainerCallback):
    """Asks for an evaluation after every step."""

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_evaluate = True


class _Evaluates(TrainerCallback):
    """Evaluates and predicts by itself, at several events."""

    trainer: Trainer

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.evaluate()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.predict(sentences(BATCH, seed=4))


@pytest.mark.parametrize("other", [_Asks, _Evaluates])
def test_nor_do_evaluations_that_another_callback_wants(other: type[TrainerCallback], tmp_path: Path) -> None:
    usual = outcome(tmp_path, model=tiny_peft("llama", lora_dropout=0.2))
    callback = other()
    extra = {"eval_dataset": sentences(BATCH, seed=3)}
    model = tiny_peft("llama", lora_dropout=0.2)
    trainer, allocation = build(tmp_path, model=model, callbacks=[callback], extra=extra, logging_steps=1)
    callback.trainer = trainer  # type: ignore[attr-defined]
    trainer.train()
    assert allocation.plan is not None
    assert allocation.plan.to_dict() == usual.plan.to_dict()
    assert same_tensors(adapter_tensors(trainer.model), usual.tensors)


def test_an_evaluation_after_the_training_takes_no_random_numbers_back(tmp_path: Path) -> None:
    trainer, _ = train(tmp_path, extra={"eval_dataset": sentences(BATCH)}, eval_strategy="steps", eval_steps=STEPS)
    before = torch.get_rng_state()
    trainer.evaluate()
    assert not torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("size", "checkpointing"), [(1, False), pytest.param(2, True, marks=pytest.mark.slow)])
def test_accumulated_micro_batches_give_the_plan_of_the_whole_batch(
    size: int, checkpointing: bool, usual: Outcome, tmp_path: Path
) -> None:
    lengths = [len(row["ids"]) for row in sentences()]
    assert len(set(lengths)) > 5  # so micro-batches differ in their number of tokens
    other = outcome(
        tmp_path,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=BATCH // size,
        activation_checkpointing=checkpointing,
    )
    assert other.plan.to_dict() == usual.plan.to_dict()
    assert other.losses == pytest.approx(usual.losses, rel=1e-5)
    for name, tensor in usual.tensors.items():
        torch.testing.assert_close(other.tensors[name], tensor, rtol=0, atol=2e-4)


# Where a model's own loss ignores accumulation.

IGNORES = (
    "^the loss of {} ignores the number of items in a step, so with 4 accumulated batches on 1 processes gradients "
    "would be 4 times too large; set model[.]accepts_loss_kwargs = False on the base model before building the "
    "Trainer, which then takes the mean over batches itself$"
)


def curable_bert(cured: bool) -> PeftModel:
    base = tiny_bert()
    if cured:
        base.accepts_loss_kwargs = False
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["query", "output.dense"], task_type="SEQ_CLS")
    return get_peft_model(base, config)


def test_a_loss_that_ignores_accumulation_is_refused(tmp_path: Path) -> None:
    trainer, _ = build(
        tmp_path,
        "bert",
        model=curable_bert(False),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    )
    with pytest.raises(UserError, match=IGNORES.format("BertForSequenceClassification")):
        trainer.train()


def test_the_cure_for_a_loss_that_ignores_accumulation_gives_the_same_plan(tmp_path: Path) -> None:
    accumulation = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    cured = outcome(tmp_path, "bert", model=curable_bert(True), **accumulation)
    whole = outcome(tmp_path, "bert", model=curable_bert(True))
    untouched = outcome(tmp_path, "bert", model=curable_bert(False))
    assert cured.plan.ranks == whole.plan.ranks == untouched.plan.ranks
    assert cured.losses == pytest.approx(whole.losses, rel=1e-5)
    assert whole.losses == untouched.losses


def tiny_t5() -> PeftModel:
    """A model whose forward takes **kwargs and whose loss is computed in place, without the number of items."""
    config = T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    torch.manual_seed(0)
    return get_peft_model(
        T5ForConditionalGeneration(config), LoraConfig(r=4, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")
    )


def test_a_loss_computed_in_place_is_refused_under_accumulation(tmp_path: Path) -> None:
    trainer, _ = build(tmp_path, model=tiny_t5(), per_device_train_batch_size=2, gradient_accumulation_steps=4)
    with pytest.raises(UserError, match=IGNORES.format("T5ForConditionalGeneration")):
        trainer.train()


def test_a_loss_computed_in_place_is_fine_without_accumulation(tmp_path: Path) -> None:
    _, allocation = train(tmp_path, model=tiny_t5())
    assert allocation.plan is not None
    assert allocation.plan.total_rank == 2 * len(allocation.plan.ranks)


# Promise 6: a bad step is skipped, counted and reported.


def poisoned(step: int | None) -> tuple[PeftModel, list[dict[str, Any]]]:
    """A model whose loss is not finite for one token, and rows in which that token stands in one batch only."""
    model = tiny_peft("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[POISON] = torch.inf
    rows = sentences(BATCH * STEPS)
    rows = [{**row, "ids": [token - (token == POISON) for token in row["ids"]]} for row in rows]
    if step is not None:
        rows[BATCH * step + 2]["ids"][0] = POISON
    return model, rows


@pytest.mark.parametrize("step", [0, 2, 7, 15])
def test_a_bad_step_is_skipped_counted_and_reported(step: int, tmp_path: Path) -> None:
    class Weights(TrainerCallback):
        def __init__(self) -> None:
            self.after: list[dict[str, torch.Tensor]] = []

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.after.append(adapter_tensors(kwargs["model"]))

    (model, rows), weights, trace = poisoned(step), Weights(), tmp_path / "trace.jsonl"
    trainer, allocation = train(
        tmp_path, model=model, data=rows, trace=trace, train_sampling_strategy="sequential", callbacks=[weights]
    )
    assert allocation.plan is not None
    assert allocation.plan.provenance["bad_steps"] == 1
    assert [event for event in read_trace(trace) if event["event"] == "bad_step"] == [
        {"event": "bad_step", "step": step}
    ]
    assert read_trace(trace)[0]["event"] == "start"
    assert allocation.plan.total_rank == 12
    for stack in allocation.run.state.stacks:
        assert stack.mean.isfinite().all()
        assert stack.uncertainty.isfinite().all()
    assert all(tensor.isfinite().all() for tensor in adapter_tensors(trainer.model).values())
    if step > 0:
        before, after = weights.after[step - 1], weights.after[step]
        factors = [name for name in before if "lora_gate" not in name]
        assert all(torch.equal(before[name], after[name]) for name in factors)  # not even by momentum
        gates = [name for name in before if "lora_gate" in name]
        assert all(torch.equal(after[name], before[name] * (after[name] != 0)) for name in gates)  # only closed


def test_a_bad_micro_batch_spoils_its_step_alone(tmp_path: Path) -> None:
    model, rows = poisoned(7)
    trace = tmp_path / "trace.jsonl"
    _, allocation = train(
        tmp_path,
        model=model,
        data=rows,
        trace=trace,
        train_sampling_strategy="sequential",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    )
    assert allocation.plan is not None
    assert [event["step"] for event in read_trace(trace) if event["event"] == "bad_step"] == [7]
    assert (allocation.plan.provenance["bad_steps"], allocation.plan.total_rank) == (1, 12)


def test_a_sound_run_has_no_bad_steps(tmp_path: Path) -> None:
    (model, rows), trace = poisoned(None), tmp_path / "trace.jsonl"
    _, allocation = train(tmp_path, model=model, data=rows, trace=trace, train_sampling_strategy="sequential")
    assert allocation.plan is not None
    assert allocation.plan.provenance["bad_steps"] == 0
    assert not any(event["event"] == "bad_step" for event in read_trace(trace))


def test_a_run_of_nothing_but_bad_steps_is_given_up(tmp_path: Path) -> None:
    model, rows = poisoned(None)
    rows = [{**row, "ids": [POISON, *row["ids"]]} for row in rows]
    trainer, _ = build(tmp_path, model=model, data=rows, max_steps=100)
    with pytest.raises(FloatingPointError, match=r"51 optimizer steps in a row .*last: step 50.*bf16 instead of fp16"):
        trainer.train()


@pytest.mark.parametrize("overflows", [0, 1, 2, 3])
def test_a_loss_scaler_may_overflow_at_the_start_of_a_warm_up(overflows: int) -> None:
    """The Trainer's step in fp16, in a loop: the schedule, from zero, moves on only when the scaler has stepped."""
    model = tiny_peft("llama").train()
    run = attach(model, AdaLoRA(Budget(average_rank=2)), total_steps=STEPS)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 4))
    scaler = GradScaler("cpu", init_scale=16.0)
    for step in range(STEPS):
        loss = model(**labelled_batch("llama", step)).loss * (torch.inf if step < overflows else 1.0)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        sound, scale = run.before_step(), scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        run.after_step(optimizer)
        optimizer.zero_grad()
        assert sound == (scaler.get_scale() >= scale)
        if sound:
            schedule.step()
    assert run.finish().total_rank == 12
    assert run.bad_steps == overflows
