"""One callback in transformers' Trainer: what a run decides, what it reports, and what it leaves behind.

What the callback refuses: test_callback_refusals.py. On what a plan does not depend, and bad steps:
test_callback_promises.py.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from models import BUILDERS, lora_config, lora_layers, tiny_llama, tiny_peft, token_batch
from models import logits as logits_of
from peft import PeftModel
from torch import nn
from trainers import (
    BATCH,
    STEPS,
    arguments,
    build,
    class_batch,
    language_batch,
    read_trace,
    sentences,
    train,
    training_rows,
)
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loralloc import AdaLoRA, Budget, RankPlan, export_adapter
from loralloc.gating import is_gated
from loralloc.methods.adalora.penalty import penalty_value
from loralloc.training.callback import MARKER

MODELS = list(BUILDERS)

# The phases of a run of 24 steps: int(0.15 * 24) = 3 and 24 - int(0.45 * 24) = 14.
LAST_FULL, FIRST_FINAL = 3, 15


class Watch(TrainerCallback):
    """Count the open gates of every site after every step, in the model itself."""

    def __init__(self) -> None:
        self.ranks: dict[int, list[int]] = {}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        layers = lora_layers(kwargs["model"]).values()
        self.ranks[state.global_step - 1] = [int((layer.lora_gate["default"] != 0).sum()) for layer in layers]


def budget_at(step: int, start: int, target: int) -> int:
    """The cubic budget, written from the paper for the phases above."""
    if step <= LAST_FULL:
        return start
    if step >= FIRST_FINAL:
        return target
    remaining = 1 - (step - LAST_FULL) / (FIRST_FINAL - 1 - LAST_FULL)
    return int(target + (start - target) * remaining**3)


def ranks_after(events: list[dict[str, Any]], step: int) -> list[int]:
    """The ranks that a trace says hold after a 0-based step."""
    return [event["ranks"] for event in events if "ranks" in event and event["step"] <= step][-1]


def costs(model: nn.Module) -> list[int]:
    """Parameters of one rank of each layer."""
    return [layer.in_features + layer.out_features for layer in lora_layers(model).values()]


@dataclass(frozen=True)
class Finished:
    """A run that has ended."""

    name: str
    trainer: Trainer
    plan: RankPlan
    events: list[dict[str, Any]]
    watched: dict[int, list[int]]

    @property
    def model(self) -> Any:
        return self.trainer.model.eval()


@pytest.fixture(scope="module", params=MODELS)
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """One run of each model with nothing but the callback; no test changes it."""
    folder, watch = tmp_path_factory.mktemp("run"), Watch()
    trace = folder / "deep" / "trace.jsonl"
    held_out = {"eval_dataset": sentences(BATCH, seed=3)}
    trainer, allocation = train(
        folder, request.param, trace=trace, callbacks=[watch], logging_steps=1, eval_strategy="epoch", extra=held_out
    )
    assert allocation.plan is not None
    return Finished(request.param, trainer, allocation.plan, read_trace(trace), watch.ranks)


# What a run decides.


def test_one_callback_and_no_other_code_prunes_to_the_budget(finished: Finished) -> None:
    assert list(finished.plan.ranks) == list(lora_layers(finished.model))
    assert finished.plan.total_rank == 2 * len(finished.plan.ranks) == 12
    assert finished.plan.provenance["steps"] == finished.plan.provenance["total_steps"] == STEPS


def test_without_the_callback_nothing_is_pruned(tmp_path: Path) -> None:
    model = tiny_peft("llama")
    Trainer(model, arguments(tmp_path), language_batch, train_dataset=sentences()).train()
    assert all((layer.lora_A["default"].weight != 0).any(1).all() for layer in lora_layers(model).values())


def test_a_run_that_is_stopped_early_meets_the_budget(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 6

    trace = tmp_path / "trace.jsonl"
    trainer, allocation = train(tmp_path, callbacks=[Stop()], trace=trace)
    assert allocation.plan is not None
    assert allocation.plan.total_rank == 12
    assert (allocation.plan.provenance["steps"], allocation.plan.provenance["total_steps"]) == (6, STEPS)
    assert not is_gated(trainer.model, "default")
    assert [event["event"] for event in read_trace(trace)][-1] == "finish"


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"max_steps": 10}, 10),
        ({"max_steps": -1, "num_train_epochs": 2}, 16),
        ({"max_steps": -1, "num_train_epochs": 1.5}, 12),
        ({"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 3}, 6),
    ],
)
def test_the_number_of_steps_comes_from_the_trainer(settings: dict[str, Any], steps: int, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    _, allocation = train(tmp_path, data=sentences(61), trace=trace, **settings)
    assert allocation.plan is not None
    assert allocation.plan.provenance["total_steps"] == allocation.plan.provenance["steps"] == steps
    start, *_, finish = read_trace(trace)
    assert (start["total_steps"], finish["step"]) == (steps, steps)
    warmup, fallen = int(0.15 * steps), steps - int(0.45 * steps)
    assert start["schedule"] == {"warmup": warmup, "fallen": fallen, "interval": 1}


def test_only_the_active_adapter_is_allocated(tmp_path: Path) -> None:
    model = tiny_peft("llama")
    model.add_adapter("other", lora_config("llama"))
    before = {name: t.clone() for name, t in model.state_dict().items() if ".other." in name}
    _, allocation = train(tmp_path, model=model)
    assert allocation.plan is not None
    assert allocation.plan.total_rank == 12
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


# Promise 1: attaching changes no output.


@pytest.mark.parametrize("name", MODELS)
def test_the_first_forward_equals_the_base_model_bit_for_bit(name: str, tmp_path: Path) -> None:
    trainer, _ = build(tmp_path, name)
    batch = token_batch()
    assert is_gated(trainer.model, "default")
    assert torch.equal(logits_of(trainer.model, batch), logits_of(BUILDERS[name](), batch))


# What a run leaves behind: plain LoRA.


def test_after_training_the_model_is_plain_lora(finished: Finished) -> None:
    assert not is_gated(finished.model, "default")
    assert list(finished.model.state_dict()) == list(tiny_peft(finished.name).state_dict())
    assert (logits_of(finished.model) - logits_of(BUILDERS[finished.name]())).abs().max() > 1e-2  # it has learnt


def test_after_training_merging_is_right(finished: Finished) -> None:
    merged = copy.deepcopy(finished.model).merge_and_unload()
    torch.testing.assert_close(logits_of(merged), logits_of(finished.model), rtol=0, atol=1e-5)


def test_after_training_peft_saves_and_loads_it(finished: Finished, tmp_path: Path) -> None:
    finished.model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(BUILDERS[finished.name](), tmp_path).eval()
    torch.testing.assert_close(logits_of(reloaded), logits_of(finished.model), rtol=0, atol=1e-5)
    assert not (tmp_path / MARKER).exists()


def test_the_exported_adapter_has_the_ranks_of_the_plan(finished: Finished, tmp_path: Path) -> None:
    export = export_adapter(finished.model, tmp_path / "adapter")
    assert export.ranks == finished.plan.ranks
    reloaded = PeftModel.from_pretrained(BUILDERS[finished.name](), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits_of(reloaded), logits_of(finished.model), rtol=0, atol=1e-5)


def test_the_plan_can_be_written_and_read(finished: Finished, tmp_path: Path) -> None:
    finished.plan.save(tmp_path / "ranks.json")
    loaded = RankPlan.load(tmp_path / "ranks.json")
    assert loaded.to_dict() == finished.plan.to_dict()
    assert loaded.provenance["settings"]["gamma"] == 0.1


def test_the_trainer_goes_on_working_after_training(tmp_path: Path) -> None:
    trainer, _ = train(tmp_path, extra={"eval_dataset": sentences(BATCH, seed=3)})
    trainer.save_model(str(tmp_path / "saved"))
    batch = language_batch(sentences(BATCH, seed=3))
    expected = float(trainer.model.eval()(**batch).loss.detach())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)
    reloaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "saved").eval()
    assert float(reloaded(**batch).loss.detach()) == pytest.approx(expected, rel=1e-5)


# What a run reports.


def check_trace(
    events: list[dict[str, Any]], watched: dict[int, list[int]], model: nn.Module, unit: str, plan: RankPlan
) -> None:
    """Compare every number of a trace with the model, the schedule and the plan."""
    start, *changes, finish = events
    layers, price = lora_layers(model), costs(model)
    full = 24 if unit == "ranks" else 4 * sum(price)
    assert start == {
        "event": "start",
        "step": 0,
        "label": "AdaLoRA",
        "total_steps": STEPS,
        "schedule": {"warmup": LAST_FULL, "fallen": FIRST_FINAL - 1, "interval": 1},
        "phases": [
            ["warm-up", 0, LAST_FULL],
            ["budget falls", LAST_FULL + 1, FIRST_FINAL - 1],
            ["final ranks", FIRST_FINAL, STEPS - 1],
        ],
        "unit": unit,
        "start_budget": full,
        "target_budget": full // 2,
        "costs": [1] * len(price) if unit == "ranks" else list(price),
        "sites": list(layers),
        "in": [layer.in_features for layer in layers.values()],
        "out": [layer.out_features for layer in layers.values()],
        "ranks": [4] * len(layers),
    }
    assert [event["event"] for event in changes] == ["allocate"] * (len(changes) - 1) + ["freeze"]
    assert len(changes) > 4
    assert changes[-1]["step"] == FIRST_FINAL
    steps = [event["step"] for event in changes]
    assert steps == sorted(set(steps))
    assert all(later["ranks"] != earlier["ranks"] for earlier, later in zip(events, changes[:-1], strict=False))
    for event in changes:
        assert event["budget"] == budget_at(event["step"], full, full // 2)
        assert event["parameters"] == sum(rank * cost for rank, cost in zip(event["ranks"], price, strict=True))
        if unit == "ranks":
            assert sum(event["ranks"]) == event["budget"]
        else:  # never above, and no further rank fits
            room = [cost for rank, cost in zip(event["ranks"], price, strict=True) if rank < 4]
            assert 0 <= event["budget"] - event["parameters"] < min(room)
    ranks = list(plan.ranks.values())
    assert finish == {"event": "finish", "step": STEPS, "ranks": ranks, "parameters": plan.parameters}
    # Every λ starts at zero and moves in the first step, so open gates can be counted from then on.
    assert {step: ranks_after(events, step) for step in watched} == watched


def test_the_trace_tells_what_happened_in_the_model(finished: Finished) -> None:
    check_trace(finished.events, finished.watched, finished.model, "ranks", finished.plan)


def test_a_budget_in_parameters_is_kept_at_every_step(tmp_path: Path) -> None:
    watch = Watch()
    method = AdaLoRA(Budget(fraction=0.5))
    trainer, allocation = train(tmp_path, "gpt2", method=method, trace=tmp_path / "trace.jsonl", callbacks=[watch])
    assert allocation.plan is not None
    check_trace(read_trace(tmp_path / "trace.jsonl"), watch.ranks, trainer.model, "parameters", allocation.plan)


def test_the_log_holds_the_rank_statistics_of_the_step(finished: Finished) -> None:
    price = costs(finished.model)
    rows = training_rows(finished.trainer)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row in rows:
        ranks = finished.watched[row["step"] - 1]
        assert row["rank/total"] == sum(ranks)
        assert row["rank/min"] == min(ranks)
        assert row["rank/max"] == max(ranks)
        assert row["budget"] == budget_at(row["step"] - 1, 24, 12)
        assert row["params/active"] == sum(rank * cost for rank, cost in zip(ranks, price, strict=True))
    others = [row for row in finished.trainer.state.log_history if "loss" not in row]
    assert len(others) == 4  # three evaluations and the summary
    assert not any("rank/total" in row for row in others)


def test_rank_statistics_reach_the_loggers_that_come_after(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    class Logger(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
            seen.append(dict(logs))

    trainer, _ = train(tmp_path, callbacks=[Logger()], logging_steps=5)
    assert [row["rank/total"] for row in seen if "loss" in row] == [row["rank/total"] for row in training_rows(trainer)]


# The penalty is part of the training alone.


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_no_loss_contains_the_penalty(name: str, tmp_path: Path) -> None:
    held_out = sentences(BATCH, seed=3)
    method = AdaLoRA.as_published(Budget(average_rank=2), gamma=50.0, warmup=2, cooldown=2)
    trainer, allocation = build(
        tmp_path,
        name,
        method=method,
        extra={"eval_dataset": held_out},
        max_steps=8,
        logging_steps=1,
        train_sampling_strategy="sequential",
    )
    batch = (class_batch if name == "bert" else language_batch)(held_out)

    def loss_by_hand(model: nn.Module) -> float:
        logits, labels = logits_of(model.eval(), {k: v for k, v in batch.items() if k != "labels"}), batch["labels"]
        if name == "llama":
            logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        log_probabilities = logits.log_softmax(-1)[labels != -100]
        return float(-log_probabilities.gather(1, labels[labels != -100][:, None]).mean())

    stacks = [stack for stack in allocation.run.state.stacks if stack.symbol != "gate"]
    penalty = sum(penalty_value(s.weights(), s.rank_dim, "reference", 2 * 6) for s in stacks)
    assert 50 * penalty > 10  # a leak would be seen

    base = loss_by_hand(BUILDERS[name]())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(base, rel=1e-6)
    trainer.train()
    first = (class_batch if name == "bert" else language_batch)(sentences()[:BATCH])
    assert training_rows(trainer)[0]["loss"] == pytest.approx(float(BUILDERS[name]()(**first).loss.detach()), rel=1e-5)
    trained = trainer.evaluate()["eval_loss"]
    assert trained == pytest.approx(loss_by_hand(trainer.model), rel=1e-6)
    assert trained != pytest.approx(base, rel=1e-5)


def test_an_evaluation_in_the_middle_equals_the_loss_by_hand(tmp_path: Path) -> None:
    held_out = sentences(BATCH, seed=3)
    found: dict[int, float] = {}

    class ByHand(TrainerCallback):
        def on_evaluate(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
            with torch.no_grad():
                found[state.global_step] = float(kwargs["model"].eval()(**language_batch(held_out)).loss)

    trainer, _ = train(
        tmp_path, extra={"eval_dataset": held_out}, eval_strategy="steps", eval_steps=6, callbacks=[ByHand()]
    )
    logged = {row["step"]: row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row}
    assert sorted(found) == [6, 12, 18, 24]
    assert logged == pytest.approx(found, rel=1e-6)
