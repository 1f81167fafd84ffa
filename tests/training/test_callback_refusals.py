"""What the callback refuses before the first step, in which words, and the nearest setting that it accepts."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from models import logits, tiny_llama, tiny_peft
from trainers import BATCH, adapter_tensors, arguments, build, language_batch, same_tensors, sentences, train
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState

from loralloc import AdaLoRA, Budget, RankAllocation, UserError
from loralloc.gating import is_gated

TWO_RANKS = Budget(average_rank=2)
TOO_SHORT = "optimizer steps, the run has 1"


def refuses(words: str) -> Any:
    """Expect a UserError with these words, taken literally."""
    return pytest.raises(UserError, match=re.escape(words))


# From the Trainer's constructor.


def test_a_budget_above_the_capacity_is_refused_with_the_numbers(tmp_path: Path) -> None:
    model = tiny_peft("llama")
    before, keys = logits(model), list(model.state_dict())
    words = (
        "the budget average_rank=5 asks for 30 ranks, but the 6 adapted modules start with 24; lower the budget or "
        "raise LoraConfig.r"
    )
    with refuses(words):
        build(tmp_path, model=model, method=AdaLoRA(Budget(average_rank=5)))
    assert list(model.state_dict()) == keys  # the model is as it was
    assert torch.equal(logits(model), before)
    build(tmp_path, model=model, method=AdaLoRA(Budget(average_rank=4)))


def test_a_model_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with refuses(
        "expected a PeftModel, got LlamaForCausalLM: wrap it first, model = get_peft_model(model, LoraConfig("
    ):
        build(tmp_path, model=tiny_llama())


def test_a_trained_adapter_is_refused(tmp_path: Path) -> None:
    model = tiny_peft("llama", trained=True)
    before = adapter_tensors(model)
    with refuses("the adapter has been trained already (B is not zero)"):
        build(tmp_path, model=model)
    assert same_tensors(adapter_tensors(model), before)


def test_two_callbacks_on_one_model_are_refused(tmp_path: Path) -> None:
    with refuses("a rank allocation is attached already; finish() it first"):
        build(tmp_path, callbacks=[RankAllocation(AdaLoRA(TWO_RANKS))])


def test_a_callback_belongs_to_one_trainer(tmp_path: Path) -> None:
    _, allocation = build(tmp_path)
    with refuses("this RankAllocation belongs to a Trainer already; make a new one for each Trainer"):
        Trainer(tiny_peft("llama"), arguments(tmp_path), language_batch, callbacks=[allocation])


# From train(), before the first step.


def test_a_callback_added_late_is_refused(tmp_path: Path) -> None:
    trainer = Trainer(tiny_peft("llama"), arguments(tmp_path), language_batch, train_dataset=sentences())
    trainer.add_callback(RankAllocation(AdaLoRA(TWO_RANKS)))
    with refuses("the allocation is not attached: pass it to the Trainer's constructor, callbacks=[allocation]"):
        trainer.train()


def test_training_again_after_the_end_is_refused(tmp_path: Path) -> None:
    trainer, _ = train(tmp_path)
    after = adapter_tensors(trainer.model)
    with refuses("this allocation has finished; to train on, use the plain LoRA model without it"):
        trainer.train()
    assert same_tensors(adapter_tensors(trainer.model), after)


def test_training_on_without_the_callback_is_fine(tmp_path: Path) -> None:
    trainer, _ = train(tmp_path)
    before = adapter_tensors(trainer.model)
    Trainer(trainer.model, arguments(tmp_path, max_steps=2), language_batch, train_dataset=sentences()).train()
    assert not same_tensors(adapter_tensors(trainer.model), before)


def test_an_optimizer_from_before_the_gates_is_refused(tmp_path: Path) -> None:
    model = tiny_peft("llama")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    trainer, _ = build(tmp_path, model=model, extra={"optimizers": (optimizer, None)})
    words = (
        "the optimizer does not hold the gates of 6 modules (model.layers.0.self_attn.q_proj, ...): it was built "
        "before the allocation was attached; let the Trainer build it, or build it after attach()"
    )
    with refuses(words):
        trainer.train()


def test_an_optimizer_built_after_the_gates_is_accepted(tmp_path: Path) -> None:
    trainer, allocation = build(tmp_path)
    trainer.optimizer = torch.optim.AdamW([p for p in trainer.model.parameters() if p.requires_grad], lr=1e-2)
    trainer.train()
    assert allocation.plan is not None
    assert allocation.plan.total_rank == 12


def test_a_model_that_the_trainer_builds_anew_is_refused(tmp_path: Path) -> None:
    trainer = Trainer(
        None,
        arguments(tmp_path),
        language_batch,
        train_dataset=sentences(),
        model_init=lambda: tiny_peft("llama"),
        callbacks=[RankAllocation(AdaLoRA(TWO_RANKS))],
    )
    words = (
        "the Trainer trains another model than the one the allocation was attached to (model_init makes a new one for "
        "each run); pass model= instead"
    )
    with refuses(words):
        trainer.train()


def test_smaller_batches_after_the_first_steps_are_refused_with_their_size(tmp_path: Path) -> None:
    class RunOut(TrainerCallback):
        def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
            if state.global_step == 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")

    trainer, _ = build(tmp_path, callbacks=[RunOut()], auto_find_batch_size=True, per_device_train_batch_size=16)
    words = (
        "memory ran out after 2 steps, and auto_find_batch_size begins anew with batches of 14, but ranks have been "
        "allocated by then; start over with a new model, callback and Trainer, with per_device_train_batch_size=14 and "
        "auto_find_batch_size=False"
    )
    with refuses(words):
        trainer.train()


@pytest.mark.parametrize(
    ("steps", "method", "words"),
    [
        (1, AdaLoRA(TWO_RANKS), TOO_SHORT),
        (
            24,
            AdaLoRA(TWO_RANKS, warmup=10, cooldown=0.6),
            "no step is left in which the budget could fall: warmup=10 (10 steps) and cooldown=0.6 (14 steps) fill the "
            "24 steps of the run",
        ),
    ],
)
def test_a_schedule_that_does_not_fit_is_refused_with_the_numbers(
    steps: int, method: AdaLoRA, words: str, tmp_path: Path
) -> None:
    trainer, allocation = build(tmp_path, method=method, max_steps=steps)
    with refuses(words):
        trainer.train()
    assert allocation.plan is None


def test_a_schedule_that_just_fits_is_accepted(tmp_path: Path) -> None:
    _, allocation = train(tmp_path, method=AdaLoRA(TWO_RANKS, warmup=10, cooldown=13))
    assert allocation.plan is not None
    assert allocation.plan.total_rank == 12


# The best checkpoint may only be one whose ranks are final: from step 16 of 24 on.


def best(folder: Path, **settings: Any) -> Trainer:
    """A run that loads its best checkpoint; the highest loss counts as best, so that the last one is not it."""
    defaults: dict[str, Any] = {
        "load_best_model_at_end": True,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "metric_for_best_model": "loss",
        "greater_is_better": True,
        "extra": {"eval_dataset": sentences(BATCH, seed=3)},
    }
    return build(folder, **{**defaults, **settings})[0]


EPOCHS = {"eval_strategy": "epoch", "save_strategy": "epoch"}


@pytest.mark.parametrize(
    "settings",
    [{}, {"eval_delay": 15}, EPOCHS, {**EPOCHS, "eval_delay": 1}, {"eval_delay": 15, "save_strategy": "best"}],
)
def test_an_early_best_model_is_refused_with_the_cure(settings: dict[str, Any], tmp_path: Path) -> None:
    words = (
        "load_best_model_at_end could bring back a checkpoint from before step 16, when the ranks become final; set "
        "eval_delay=16 with eval_strategy=save_strategy='steps' (or its equivalent in epochs), or "
        "load_best_model_at_end=False"
    )
    with refuses(words):
        best(tmp_path, **settings).train()


@pytest.mark.parametrize("settings", [{"eval_delay": 16}, {**EPOCHS, "eval_delay": 2}], ids=["steps", "epochs"])
def test_the_best_model_of_the_final_phase_comes_back(settings: dict[str, Any], tmp_path: Path) -> None:
    trainer = best(tmp_path, **settings)
    trainer.train()
    measured = {row["step"]: row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row}
    winner = max(measured, key=measured.__getitem__)
    assert 16 <= min(measured) <= winner < 24
    assert trainer.state.best_global_step == winner
    assert not is_gated(trainer.model, "default")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(measured[winner], rel=1e-6)
    assert measured[winner] > 1.001 * measured[24]


def test_evaluations_may_start_early_when_the_last_model_is_kept(tmp_path: Path) -> None:
    trainer = best(tmp_path, load_best_model_at_end=False)
    trainer.train()
    assert sum("eval_loss" in row for row in trainer.state.log_history) == 24


# Engines. Their arguments are made up where the hardware is missing.


class Arguments(SimpleNamespace):
    """Training arguments with nothing unusual."""

    def __init__(self, **settings: Any) -> None:
        usual = {
            "deepspeed": None,
            "fsdp": None,
            "n_gpu": 1,
            "fp16": False,
            "max_grad_norm": 1.0,
            "should_save": True,
            "gradient_accumulation_steps": 1,
            "load_best_model_at_end": False,
            "world_size": 1,
            "average_tokens_across_devices": True,
            "output_dir": "unused",
            "eval_on_start": False,
        }
        super().__init__(**{**usual, **settings})


def begin(folder: Path, settings: Arguments) -> None:
    """Call the callback as the Trainer would on that engine."""
    trainer, allocation = build(folder)
    optimizer = trainer.create_optimizer()
    state = TrainerState(max_steps=24)
    allocation.on_train_begin(settings, state, trainer.control, model=trainer.model, optimizer=optimizer)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"deepspeed": "zero3.json"},
            "DeepSpeed is not supported: it takes the gradients that scores are made of into buffers of its own; to "
            "shard a large base model use FSDP2 (accelerate launch with fsdp_version: 2 in its config file), else DDP",
        ),
        (
            {"fsdp": True},
            "FSDP was asked for, and accelerate shards nothing on CPUs: it would train the whole model in every "
            "process without a word. Leave FSDP out (in a loop of your own, fully_shard works on CPUs too)",
        ),
        (
            {"n_gpu": 2},
            "this machine has 2 GPUs, and one process would spread every batch over them with torch.nn.DataParallel, "
            "which is not supported; start one process for each: torchrun --nproc-per-node=2 --no-python loralloc "
            "train RECIPE (or torchrun --nproc-per-node=2 SCRIPT), or use one of them, CUDA_VISIBLE_DEVICES=0",
        ),
        (
            {"parallelism_config": SimpleNamespace(tp_size=2, cp_size=1)},
            "tensor and context parallelism are not supported: they spread a layer's output over processes; use FSDP2",
        ),
        ({"fp16": True, "max_grad_norm": 0.0}, "fp16 without gradient clipping leaves the loss scale in the gradients"),
        ({"fp16": True, "max_grad_norm": None}, "set max_grad_norm=1.0, or use bf16"),
    ],
)
def test_an_engine_that_would_be_wrong_is_refused(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    with refuses(words):
        begin(tmp_path, Arguments(**settings))


WHOLE = "FSDP2 with an adapter that every process holds whole needs "
FSDP2 = {"fsdp_version": 2, "cpu_ram_efficient_loading": False}


@pytest.mark.parametrize(
    ("engine", "options", "words"),
    [
        ("DEEPSPEED", {}, "DeepSpeed is not supported: it takes the gradients that scores are made of into buffers"),
        ("MEGATRON_LM", {}, "Megatron-LM is not supported: it splits the layers that ranks are in; use FSDP2"),
        (
            "FSDP",
            {"fsdp_version": 1},
            "FSDP1 is not supported: it flattens the factors that scores are made of; set fsdp_version: 2 in the "
            "config file of accelerate launch",
        ),
        (
            "FSDP",
            {**FSDP2, "cpu_ram_efficient_loading": True},
            f"{WHOLE}fsdp_cpu_ram_efficient_loading: false (it loads only sharded weights)",
        ),
        (
            "FSDP",
            {**FSDP2, "activation_checkpointing": True},
            f"{WHOLE}fsdp_activation_checkpointing: false (use the Trainer's own)",
        ),
        ("FSDP", {**FSDP2, "cpu_offload": True}, f"{WHOLE}fsdp_offload_params: false (it has not been verified)"),
    ],
)
def test_an_engine_chosen_by_the_launcher_is_refused(
    engine: str, options: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with `accelerate launch --use_deepspeed`: no argument of the Trainer names the engine."""
    trainer, allocation = build(tmp_path)
    for shared in (PartialState._shared_state, AcceleratorState._shared_state):
        monkeypatch.setitem(shared, "distributed_type", DistributedType[engine])
    plugin = FullyShardedDataParallelPlugin(**options) if options else None
    monkeypatch.setitem(AcceleratorState._shared_state, "fsdp_plugin", plugin)
    state = TrainerState(max_steps=24)
    with refuses(words):
        allocation.on_train_begin(trainer.args, state, trainer.control, model=trainer.model)


def test_fsdp_that_accelerate_leaves_out_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with `accelerate launch --use_fsdp --cpu`."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with refuses("FSDP was asked for, and accelerate shards nothing on CPUs"):
        begin(tmp_path, Arguments())


@pytest.mark.parametrize("settings", [{}, {"fp16": True}, {"max_grad_norm": 0.0}])
def test_an_engine_that_is_right_is_accepted(settings: dict[str, Any], tmp_path: Path) -> None:
    begin(tmp_path, Arguments(**settings))


# A model whose run was refused is not lost.


def test_after_a_refused_schedule_the_model_can_be_freed(tmp_path: Path) -> None:
    trainer, allocation = build(tmp_path, max_steps=1)
    with refuses(TOO_SHORT):
        trainer.train()
    allocation.run.finish()
    assert not is_gated(trainer.model, "default")


def test_after_a_refusal_the_same_trainer_can_be_put_right(tmp_path: Path) -> None:
    trainer, allocation = build(tmp_path, max_steps=1)
    with refuses(TOO_SHORT):
        trainer.train()
    trainer.args.max_steps = 24
    trainer.train()
    reference = train(tmp_path)[1].plan
    assert allocation.plan is not None
    assert reference is not None
    assert allocation.plan.to_dict() == reference.to_dict()
