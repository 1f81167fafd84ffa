"""What the callback's refusals say to change is changed, and the next attempt trains."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from models import tiny_peft
from test_callback_refusals import EPOCHS, best
from trainers import arguments, build, language_batch, sentences
from transformers import Trainer

from loralloc import AdaLoRA, Budget, RankAllocation, UserError
from loralloc.methods.truncate import Truncate

TWO_RANKS = Budget(average_rank=2)


def refusal(trainer: Trainer) -> str:
    with pytest.raises(UserError) as refused:
        trainer.train()
    return str(refused.value)


def test_a_best_model_by_epochs_comes_from_the_step_that_the_message_names(tmp_path: Path) -> None:
    message = refusal(best(tmp_path, **EPOCHS))
    (delay,) = re.findall(r"set eval_delay=(\d+) with eval_strategy=save_strategy='steps'", message)
    trainer = best(
        tmp_path, eval_delay=int(delay), eval_strategy="steps", save_strategy="steps", eval_steps=8, save_steps=8
    )
    trainer.train()
    assert trainer.state.best_global_step is not None
    assert trainer.state.best_global_step >= int(delay)


def test_ranks_that_are_chosen_at_the_end_go_with_the_last_model(tmp_path: Path) -> None:
    message = refusal(best(tmp_path, method=Truncate(TWO_RANKS, recover=0), eval_delay=16))
    assert "from before the ranks are chosen, which is when the run ends; set load_best_model_at_end=False" in message
    best(
        tmp_path,
        method=Truncate(TWO_RANKS, recover=0),
        eval_delay=16,
        load_best_model_at_end=False,
        eval_steps=8,
        save_steps=8,
    ).train()


def test_a_model_is_passed_as_such(tmp_path: Path) -> None:
    def trainer(**model: object) -> Trainer:
        callbacks = [RankAllocation(AdaLoRA(TWO_RANKS))]
        settings = {"train_dataset": sentences(), "callbacks": callbacks, **model}
        return Trainer(args=arguments(tmp_path), data_collator=language_batch, **settings)  # type: ignore[arg-type]

    message = refusal(trainer(model_init=lambda: tiny_peft("llama")))
    assert message.endswith("(model_init makes a new one for each run); pass model= instead")
    trainer(model=tiny_peft("llama")).train()


def test_each_trainer_gets_an_allocation_of_its_own(tmp_path: Path) -> None:
    first, allocation = build(tmp_path)
    with pytest.raises(UserError, match="belongs to a Trainer already; make a new one for each Trainer"):
        Trainer(tiny_peft("llama"), arguments(tmp_path), language_batch, callbacks=[allocation])
    build(tmp_path)[0].train()
    first.train()
    with pytest.raises(UserError, match="has finished; to train on, use the plain LoRA model without it"):
        first.train()
    first.remove_callback(allocation)
    first.train()
