"""From a recipe to objects: data, method, adapted model, training arguments."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors import SafetensorError
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

from loralloc.adapter.from_plan import lora_config
from loralloc.errors import UserError
from loralloc.naming import named
from loralloc.plain_lora import plain_sites
from loralloc.plan import RankPlan
from loralloc.recipe.run_folder import RunFolder
from loralloc.recipe.schema import Recipe, TrainingConfig
from loralloc.recipe.targets import check_entries, linear_modules
from loralloc.setting_types import MethodSection
from loralloc.tasks import prepare, prepare_evaluation
from loralloc.tasks.base import TaskData
from loralloc.tasks.pretrained import load_config, load_model, load_tokenizer, locate
from loralloc.tasks.rows import cut
from loralloc.tasks.spec import TASKS
from loralloc.training import processes

SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
"""Learning-rate schedules by their names in transformers; its own `constant` would ignore the warm-up."""


def task_data(recipe: Recipe) -> TaskData:
    """Load the model and the data of a recipe."""
    return prepare(recipe.task, recipe.model, recipe.data, recipe.training.seed)


def method_data(section: MethodSection, data: TaskData, seed: int) -> tuple[Dataset, Dataset | None]:
    """Return (the examples to train on, those that the method looks at, None where it looks at none).

    A method's section says where they come from with its key `validation`: a share is cut from the training data by
    the seed, of every class alike, `validation` are the recipe's validation data.
    """
    source = getattr(section, "validation", None)
    if source is None:
        return data.train, None
    if source == "validation":
        return data.train, data.validation
    labels = data.train["labels"] if data.classes else None
    held_out = cut(len(data.train), source, seed, labels)
    if not held_out:
        raise UserError(
            f"{len(data.train)} training examples are too few to hold {source:g} of them out for method.validation"
        )
    return data.train.select(sorted(set(range(len(data.train))) - set(held_out))), data.train.select(held_out)


def add_adapter(model: PreTrainedModel, recipe: Recipe) -> PeftModel:
    """Put a fresh LoRA adapter on a model.

    Raises:
        UserError: An entry of the recipe matches no module, or none that can be adapted; the message lists what the
            model has.
    """
    set_seed(recipe.training.seed)
    lora = recipe.lora
    check_entries(lora, model, planned=recipe.plan is not None)
    config = _planned_config(recipe, model) if recipe.plan is not None else _even_config(recipe)
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise UserError(
            f"lora.target_modules: {lora.target_modules} fits no module that can be adapted; the model has "
            f"{linear_modules(model)} ({str(error).splitlines()[0]})"
        ) from error
    assert isinstance(adapted, PeftModel)
    sites = list(plain_sites(adapted))
    widest = {site.name: max(site.A.shape[1], len(site.B)) for site in sites}
    above = {site.name: len(site.A) for site in sites if len(site.A) > widest[site.name]}
    if above:
        where, most = named(list(above), widest.keys() - above), min(widest[name] for name in above)
        raise UserError(
            f"lora.r: rank {max(above.values())} is above the {most} dimensions of {where}; lower it to {most} at most"
        )
    return adapted


def check_precision(recipe: Recipe, model: PreTrainedModel) -> None:
    """Refuse two half precisions in one model.

    Raises:
        UserError: Its weights are in float16, and autocast would be bfloat16.
    """
    if recipe.training.bf16 and model.dtype == torch.float16:
        raise UserError(
            f"training.bf16: the weights of the model are in float16 (model.dtype: {recipe.model.dtype}), and torch "
            "does not mix them with bfloat16; set model.dtype to bfloat16 or float32, or training.bf16 to false"
        )


def _even_config(recipe: Recipe) -> LoraConfig:
    """The rank of the recipe in every module."""
    lora = recipe.lora
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT types it as int and takes any number
        target_modules=copy(lora.target_modules),
        exclude_modules=copy(lora.exclude_modules),
        **_common(recipe),
    )


def _planned_config(recipe: Recipe, model: PreTrainedModel) -> LoraConfig:
    """The ranks and the scale of a plan."""
    assert recipe.plan is not None
    plan = RankPlan.load(recipe.plan)
    try:
        return lora_config(plan, model, **_common(recipe))
    except UserError as error:
        raise UserError(f"{recipe.plan}: {error}") from error


def _common(recipe: Recipe) -> dict[str, Any]:
    """What a plan does not decide."""
    lora = recipe.lora
    return {
        "lora_dropout": lora.dropout,
        "modules_to_save": copy(lora.modules_to_save),  # PEFT appends the names of heads to it
        "task_type": TaskType[TASKS[recipe.task].peft_type],
    }


def training_arguments(settings: TrainingConfig, folder: Path) -> TrainingArguments:
    """Translate a recipe's `training` section for the Trainer; checkpoints go to `folder`."""
    length = {"max_steps": settings.steps} if settings.steps else {"num_train_epochs": settings.epochs}
    try:
        return TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=settings.batch_size,
            per_device_eval_batch_size=2 * settings.batch_size,
            gradient_accumulation_steps=settings.accumulation,
            learning_rate=settings.learning_rate,
            lr_scheduler_type=SCHEDULES[settings.schedule],
            warmup_steps=settings.warmup,
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
            seed=settings.seed,
            data_seed=settings.seed,
            use_cpu=processes.on_cpu(),
            bf16=settings.bf16,
            activation_checkpointing=settings.gradient_checkpointing,
            logging_steps=settings.log_every,
            logging_nan_inf_filter=False,
            eval_strategy="steps" if settings.eval_every else "no",
            eval_steps=settings.eval_every,
            save_strategy="steps" if settings.save_every else "no",
            save_steps=settings.save_every or 500,
            save_total_limit=2,  # one may be incomplete when the process is killed
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
            report_to=[],
            **length,  # type: ignore[arg-type]
        )
    except ValueError as error:  # bf16 on a device without it, for example
        raise UserError(f"training: {str(error).splitlines()[0]}") from error


def load_for_export(
    folder: RunFolder, verb: str = "loralloc export", *, to_merge: bool = False
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Load the base model of a run and, with stock PEFT, the adapter it exported; the data are not needed.

    Args:
        folder: The run folder.
        verb: What is asked for, for the message where several processes ask.
        to_merge: Load the base model in full precision, also where the run has quantised it.
    """
    recipe = folder.load_recipe()
    processes.refuse_several(verb)
    section = recipe.model.model_copy(update={"load_in": None}) if to_merge else recipe.model
    checkpoint = locate(section)
    kept = replace(checkpoint, path=str(folder.model), local_only=True)
    tokenizer = load_tokenizer(kept)
    options = {"config": load_config(kept), "ignore_mismatched_sizes": True}
    base = load_model(recipe.task, checkpoint, tokenizer, recipe.training.seed, **options)
    return _with_adapter(base, folder), tokenizer


def _with_adapter(base: PreTrainedModel, folder: RunFolder) -> PeftModel:
    try:
        return PeftModel.from_pretrained(base, str(folder.weights))
    except (SafetensorError, RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"{folder.weights} cannot be loaded: {str(error).splitlines()[0]}") from error


def load_adapted(folder: RunFolder, recipe: Recipe) -> tuple[PeftModel, TaskData]:
    """Load the base model and the data of a run and, with stock PEFT, the adapter it exported."""
    data = task_data(recipe)
    return _with_adapter(data.model, folder), data


def load_with_data(folder: RunFolder, recipe: Recipe, source: str) -> tuple[PeftModel, TaskData]:
    """Load the base model of a run, with stock PEFT the adapter it exported, and data; the run's own are not needed."""
    model, tokenizer = load_for_export(folder, "loralloc evaluate --data")
    base: Any = model.get_base_model()
    return model, prepare_evaluation(recipe.task, base, tokenizer, recipe.data, source)
