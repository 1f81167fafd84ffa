"""PEFT's variants of LoRA, trained by the same trainer on the same data: DoRA, rsLoRA and EVA.

Their adapters may hold more than plain LoRA, so PEFT saves them, and they are not exported.
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
from loralloc.training.meter import processor_time
from loralloc.training.step_data import random_state_kept
from loralloc.training.trainer import RunTrainer


def _dora(config: LoraConfig) -> None:
    config.use_dora = True


def _rslora(config: LoraConfig) -> None:
    config.use_rslora = True


def _eva(config: LoraConfig) -> None:
    """Initialise the adapter from data; with ρ = 1 every module keeps its rank."""
    config.init_lora_weights = "eva"
    config.eva_config = EvaConfig(rho=1.0)


MOST_BATCHES = 1000
"""Batches after which EVA's initialisation is given up."""

CHANGES: dict[str, Callable[[LoraConfig], None]] = {"dora": _dora, "rslora": _rslora, "eva": _eva}


def train_peer(recipe: Recipe, peer: str, resume: bool, screen: Screen) -> None:
    """Train one of PEFT's variants, evaluate it, and save its adapter with PEFT.

    Args:
        recipe: The recipe of plain LoRA at the same rank.
        peer: A key of `CHANGES`.
        resume: Continue from the newest whole checkpoint.
        screen: Shows what happens.
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
    """Let EVA initialise the adapter from training batches; the random state is restored afterwards.

    Returns:
        Its cost under the keys of a search: `seconds` and `processor_seconds`.
    """
    begun, worked = time.perf_counter(), processor_time()
    stage.model.to(stage.trainer.args.device)
    with random_state_kept():
        initialize_lora_eva_weights(
            stage.model,
            _Batches(stage.trainer),
            prepare_model_inputs_fn=_read_tokens,
            prepare_layer_inputs_fn=_tokens,
            show_progress_bar=False,
        )
    return {"seconds": time.perf_counter() - begun, "processor_seconds": processor_time() - worked}


def _read_tokens(batch: dict[str, Any], config: LoraConfig) -> torch.Tensor | None:
    """Mask of the tokens that EVA uses, [n, length]: no padding and, as in PEFT, only those with a label.

    Labels count only if there is one for each token. None without an attention mask: all tokens are used.
    """
    mask = batch.get("attention_mask")
    if mask is not None and (labels := batch.get("labels")) is not None and labels.shape == mask.shape:
        mask = mask.bool() & (labels != config.eva_config.label_mask_value)  # type: ignore[union-attr]
    return mask


def _tokens(inputs: Any, mask: torch.Tensor | None, name: str) -> torch.Tensor:
    """A layer's inputs, one row per token or example, [..., d] -> [n, d]; without masked tokens if the mask fits."""
    del name
    states = inputs[0] if isinstance(inputs, tuple) else inputs
    if mask is not None and states.shape[:-1] == mask.shape:
        return states[mask.bool()]
    return states.flatten(0, -2).contiguous()


class _Batches:
    """Training batches as plain dictionaries, as EVA needs them; EVA reads on until its singular vectors converge."""

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
