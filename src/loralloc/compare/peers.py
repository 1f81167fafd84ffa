"""PEFT's own ways with an adapter, trained by the same trainer on the same data: DoRA, rsLoRA and EVA.

Their adapters may be more than plain LoRA, so that they are saved as PEFT saves them, and not exported.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from transformers import PreTrainedModel, set_seed

from loralloc.errors import UserError
from loralloc.naming import sort_names
from loralloc.recipe.from_recipe import adapter_config, task_data
from loralloc.recipe.run import final_metrics, plan_of
from loralloc.recipe.run_folder import RunFolder
from loralloc.recipe.schema import Recipe
from loralloc.recipe.screen import Screen
from loralloc.recipe.stages import Stage, prepare_training
from loralloc.tasks.quantization import stored_config
from loralloc.training.step_data import random_state, set_random_state
from loralloc.training.trainer import RunTrainer


def _dora(config: LoraConfig) -> None:
    config.use_dora = True


def _rslora(config: LoraConfig) -> None:
    config.use_rslora = True


def _eva(config: LoraConfig) -> None:
    """A start from the data; ρ = 1 leaves every module its rank."""
    config.init_lora_weights = "eva"
    config.eva_config = EvaConfig(rho=1.0)


MOST_BATCHES = 1000
"""Batches after which EVA's search for a start is given up."""

CHANGES: dict[str, Callable[[LoraConfig], None]] = {"dora": _dora, "rslora": _rslora, "eva": _eva}


def train_peer(recipe: Recipe, peer: str, resume: bool, screen: Screen) -> None:
    """Train one of PEFT's own, evaluate it, and save the adapter as PEFT does.

    Args:
        recipe: The recipe of plain LoRA at the same rank.
        peer: Which of `CHANGES`.
        resume: Continue from the newest whole checkpoint.
        screen: Told what must not be overlooked.
    """

    def adapt(model: PreTrainedModel, recipe: Recipe) -> PeftModel:
        set_seed(recipe.training.seed)
        config = adapter_config(recipe, model)
        CHANGES[peer](config)
        adapted = get_peft_model(model, config)
        assert isinstance(adapted, PeftModel)
        sort_names(config)
        return adapted

    folder = RunFolder.of(recipe)
    stage = prepare_training(recipe, task_data(recipe), folder, screen, after_search=False, adapt=adapt)
    looked = _start_from_data(stage) if peer == "eva" else None
    if not resume:
        folder.create(recipe)
    stage.train(stage.checkpoint() if resume else None)
    seconds, plan = stage.trainer.train_seconds, plan_of(stage)
    if (failure := stage.failure(plan)) is not None:
        raise UserError(failure)
    metrics = final_metrics(stage, plan, math.nan, seconds)
    metrics["final_parameters"] = sum(
        weight.numel() for name, weight in stage.model.named_parameters() if ".lora_" in name
    )
    if looked is not None:
        metrics["search"] = looked
    plan.save(folder.plan)
    stored_config(stage.data.model).save_pretrained(folder.model)
    stage.data.tokenizer.save_pretrained(folder.model)
    stage.model.save_pretrained(str(folder.adapter))
    folder.write_json(folder.metrics, metrics)


def _start_from_data(stage: Stage) -> dict[str, float]:
    """Let EVA look at training batches; the random numbers of the run are as if it had not.

    Returns:
        What that has cost, as a search tells it.
    """
    before, begun, worked = random_state(), time.perf_counter(), time.process_time()
    stage.model.to(stage.trainer.args.device)
    try:
        initialize_lora_eva_weights(
            stage.model,
            _Batches(stage.trainer),
            prepare_model_inputs_fn=_read_tokens,
            prepare_layer_inputs_fn=_tokens,
            show_progress_bar=False,
        )
    finally:
        set_random_state(before)
    return {"seconds": time.perf_counter() - begun, "processor_seconds": time.process_time() - worked}


def _read_tokens(batch: dict[str, Any], config: LoraConfig) -> torch.Tensor | None:
    """Which tokens count, [n, length]: no padding and, as PEFT has it, only those with a label where each may have."""
    mask = batch.get("attention_mask")
    if mask is not None and (labels := batch.get("labels")) is not None and labels.shape == mask.shape:
        mask = mask.bool() & (labels != config.eva_config.label_mask_value)  # type: ignore[union-attr]
    return mask


def _tokens(inputs: Any, mask: torch.Tensor | None, name: str) -> torch.Tensor:
    """What a layer reads, a row for every token or example: [..., d] -> [n, d], padding left out where it is known."""
    del name
    states = inputs[0] if isinstance(inputs, tuple) else inputs
    if mask is not None and states.shape[:-1] == mask.shape:
        return states[mask.bool()]
    return states.flatten(0, -2).contiguous()


class _Batches:
    """Training batches as plain dictionaries, which EVA wants; it goes through them until its directions rest."""

    def __init__(self, trainer: RunTrainer) -> None:
        self._loader, self._seen = trainer.get_train_dataloader(), 0

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self._loader:
            self._seen += 1
            if self._seen > MOST_BATCHES:
                raise UserError(f"EVA has found no start in {MOST_BATCHES:,} batches; larger batches may help it")
            yield dict(batch)
