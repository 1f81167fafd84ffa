"""From a recipe to objects: data, method, adapted model, training arguments."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors import SafetensorError
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

from loralloc.adapter.from_plan import lora_config
from loralloc.adapter.stored import check_fits
from loralloc.errors import UserError
from loralloc.methods.registry import held_out_for
from loralloc.naming import joined, named, sort_names
from loralloc.plain_lora import check_plain, plain_sites
from loralloc.plan import RankPlan
from loralloc.recipe.passthrough import LOAD, PEFT, TRAINER, imported, values
from loralloc.recipe.run_folder import RunFolder
from loralloc.recipe.schema import Recipe
from loralloc.recipe.sections import ModelConfig
from loralloc.recipe.targets import check_entries, check_new, check_patterns, check_ranks, linear_modules
from loralloc.setting_types import MethodSection
from loralloc.tasks import prepare, prepare_evaluation
from loralloc.tasks.base import TaskData
from loralloc.tasks.generation import check_metrics, read_prompts
from loralloc.tasks.pretrained import load_config, load_model, load_tokenizer, locate
from loralloc.tasks.rows import cut
from loralloc.tasks.spec import GREATER_IS_BETTER, TASKS
from loralloc.training import processes
from loralloc.training.seq2seq_trainer import RunSeq2SeqTrainer
from loralloc.training.trainer import PlainTrainer, RunTrainer
from loralloc.unpickling import nothing_unpickled

SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
"""Learning-rate schedules by their names in transformers, whose own `constant` would ignore the warm-up."""


def task_data(recipe: Recipe) -> TaskData:
    """Load the model and the data of a recipe."""
    data = prepare(recipe.task, _model_section(recipe), recipe.data, recipe.training.seed)
    also = {
        name: prepare_evaluation(recipe.task, data.model, data.tokenizer, recipe.data, source).test
        for name, source in (recipe.data.also or {}).items()
    }
    if (settings := recipe.evaluate.generate) is not None:
        check_metrics(settings.metrics)
        if TASKS[recipe.task].trainer != "Seq2SeqTrainer":  # every seq2seq row has a prompt
            read_prompts(cast(Any, data.held_out), data.tokenizer, settings.samples, recipe.data.max_length)
    _check_smoothing(recipe, data)
    return judged_by(recipe.evaluate.metric, replace(data, also=also))


def _check_smoothing(recipe: Recipe, data: TaskData) -> None:
    """Refuse label smoothing if the Trainer would not apply it, or would drop the class weights.

    Raises:
        UserError: With the reason.
    """
    if not recipe.training.trainer.get("label_smoothing_factor"):
        return
    problem = getattr(data.model.config, "problem_type", None)
    reason = None
    if getattr(recipe.data, "class_weights", None) is not None:
        reason = "the Trainer would leave out data.class_weights; take one of the two out"
    elif recipe.task == "question-answering" or problem in ("multi_label_classification", "regression"):
        reason = "the Trainer smooths where a row or a token has one class, and these have none; take it out"
    if reason is not None:
        raise UserError(f"training.trainer.label_smoothing_factor: {reason}")


def judged_by(metric: str | None, data: TaskData) -> TaskData:
    """Make the recipe's metric the first one; then drop the reference values, which are of the task's own metric."""
    return data if metric in (None, data.metric) else replace(data, metric=metric, reference={})


def _model_section(recipe: Recipe) -> ModelConfig:
    """The recipe's model section, with `load` in the types that transformers takes."""
    return recipe.model.model_copy(update={"load": values(LOAD, recipe.task, recipe.model.load)})


def method_data(section: MethodSection, data: TaskData, seed: int) -> tuple[Dataset | IterableDataset, Dataset | None]:
    """Return (the training examples, the examples that the method looks at besides them, or None).

    The key `validation` of the method's section says where the latter come from: a number is a share held out of the
    training data by the seed, stratified by class; `validation` means the recipe's validation data. A method whose
    settings need no examples has all training data.
    """
    source = held_out_for(section)
    if source is None:
        return data.train, None
    if source == "validation":
        return data.train, data.learned_validation or data.validation
    assert isinstance(data.train, Dataset)
    labels = data.train["labels"] if data.classes else [None]
    held_out = cut(len(data.train), source, seed, labels if isinstance(labels[0], int) else None)
    if not held_out:
        raise UserError(
            f"{len(data.train)} training examples are too few to hold {source:g} of them out for method.validation"
        )
    return data.train.select(sorted(set(range(len(data.train))) - set(held_out))), data.train.select(held_out)


def add_adapter(model: PreTrainedModel, recipe: Recipe) -> PeftModel:
    """Put a fresh LoRA adapter on a model.

    Raises:
        UserError: An entry of the recipe matches no module, or none that can be adapted; the message lists what the
            model has. Or the adapter is more than plain LoRA.
    """
    set_seed(recipe.training.seed)
    lora, config = recipe.lora, adapter_config(recipe, model)
    check_ranks(config, model)
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        narrowed = "".join(f", lora.peft.{name}" for name in lora.peft if name.startswith("layers_"))
        raise UserError(
            f"lora.target_modules{narrowed}: {lora.target_modules} fits no module that can be adapted; the model has "
            f"{linear_modules(model)} ({str(error).splitlines()[0]})"
        ) from error
    assert isinstance(adapted, PeftModel)
    sort_names(config)
    check_new(model, adapted)
    sites = list(plain_sites(adapted))
    check_plain(adapted, sites[0].adapter, [(site.name, site.layer) for site in sites])
    check_patterns(lora, [site.name for site in sites])
    widest = {site.name: max(site.A.shape[1], len(site.B)) for site in sites}
    above = {site.name: len(site.A) for site in sites if len(site.A) > widest[site.name]}
    if above:
        where, most = named(list(above), widest.keys() - above), min(widest[name] for name in above)
        raise UserError(
            f"lora.r: rank {max(above.values())} is above the {most} dimensions of {where}; lower it to {most} at most"
        )
    return adapted


def adapter_config(recipe: Recipe, model: PreTrainedModel) -> LoraConfig:
    """Return the adapter configuration of a recipe, or of its plan; the task's heads get no adapter.

    Raises:
        UserError: An entry of the recipe matches no module, or the plan does not fit the model.
    """
    check_entries(recipe.lora, model, planned=recipe.plan is not None)
    config = _planned_config(recipe, model) if recipe.plan is not None else even_config(recipe)
    config.exclude_modules = _with_heads(config.exclude_modules, recipe, model)
    return config


def _with_heads(excluded: str | list[str] | None, recipe: Recipe, model: PreTrainedModel) -> str | list[str] | None:
    """Add the task's heads to the excluded modules: PEFT trains heads in full, whatever the recipe says.

    DistilBERT's `pre_classifier` counts as a head: it is trained in full, which PEFT cannot do with an adapted layer.
    """
    ends = TASKS[recipe.task].heads
    if not ends:
        return excluded
    names = [name for name, _ in model.named_modules()]
    heads = [name for name in names if name.endswith(ends)]
    inside = [name for name in names if any(name == head or name.startswith(f"{head}.") for head in heads)]
    return joined(excluded, inside) or None


def check_precision(recipe: Recipe, model: PreTrainedModel) -> None:
    """Refuse to mix float16 weights with bfloat16 autocast.

    Raises:
        UserError: The weights are in float16, and training.bf16 is set.
    """
    if recipe.training.bf16 and model.dtype == torch.float16:
        raise UserError(
            f"training.bf16: the weights of the model are in float16 (model.dtype: {recipe.model.dtype}), and torch "
            "does not mix them with bfloat16; set model.dtype to bfloat16 or float32, or training.bf16 to false"
        )


def check_warmup(recipe: Recipe, steps: int) -> None:
    """Refuse a warm-up in steps after which no step is left: the learning rate would never be reached.

    Args:
        recipe: The recipe.
        steps: Optimizer steps of its training.

    Raises:
        UserError: With both lengths.
    """
    warmup = recipe.training.warmup
    if isinstance(warmup, int) and warmup >= steps:
        raise UserError(
            f"training.warmup: the learning rate would rise over {warmup} steps, and the training has {steps}; lower "
            "it, or write a fraction of the run, such as 0.1"
        )


def even_config(recipe: Recipe) -> LoraConfig:
    """The adapter configuration of a recipe without a plan: `lora.r` in every module unless `lora.peft` differs."""
    lora = recipe.lora
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT types it as int and takes any number
        target_modules=copy(lora.target_modules),
        exclude_modules=copy(lora.exclude_modules),
        **_common(recipe),
    )


def _planned_config(recipe: Recipe, model: PreTrainedModel) -> LoraConfig:
    """The adapter configuration with the ranks and the scale of the recipe's plan."""
    assert recipe.plan is not None
    plan = RankPlan.load(recipe.plan)
    try:
        return lora_config(plan, model, **_common(recipe))
    except UserError as error:
        raise UserError(f"{recipe.plan}: {error}") from error


def _common(recipe: Recipe) -> dict[str, Any]:
    """Fields of the adapter configuration that a plan does not decide."""
    lora, task = recipe.lora, TASKS[recipe.task]
    return {
        "lora_dropout": lora.dropout,
        "modules_to_save": _saved(recipe),
        "task_type": None if task.peft_type is None else TaskType[task.peft_type],
        "revision": recipe.model.load.get("revision"),
        **values(PEFT, recipe.task, lora.peft),
    }


def _saved(recipe: Recipe) -> list[str] | None:
    """Modules to train in full; for the task types that PEFT knows, it adds the heads itself."""
    heads = TASKS[recipe.task].heads if TASKS[recipe.task].peft_type is None else ()
    return [*(recipe.lora.modules_to_save or ()), *heads] or None


def trainer_class(recipe: Recipe) -> type[RunTrainer]:
    """Return the class that trains a recipe's task."""
    name = TASKS[recipe.task].trainer
    if name == "Trainer":
        return PlainTrainer
    if name == "Seq2SeqTrainer":
        return RunSeq2SeqTrainer
    from loralloc.training import trl_trainers  # the import takes seconds, so only tasks that need it pay

    return {"SFTTrainer": trl_trainers.RunSFTTrainer, "DPOTrainer": trl_trainers.RunDPOTrainer}[name]


def training_arguments(recipe: Recipe, folder: Path, more: Mapping[str, Any] | None = None) -> TrainingArguments:
    """Make the training arguments of a recipe: its `training` section, overridden by `training.trainer`.

    Args:
        recipe: The recipe.
        folder: Where checkpoints go.
        more: Arguments that the task sets.

    Raises:
        UserError: The class refuses a value.
    """
    options = values(TRAINER, recipe.task, recipe.training.trainer)
    try:
        return arguments_class(recipe.task)(**{**_own_arguments(recipe, folder), **(more or {}), **options})
    except ValueError as error:  # bf16 on a device without it, for example
        raise UserError(f"training: {str(error).splitlines()[0]}") from error


def arguments_class(task: str) -> type[TrainingArguments]:
    """The class of a task's training arguments."""
    return imported(TASKS[task].arguments)


def _own_arguments(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Arguments from the recipe's own keys, and defaults that `training.trainer` may override."""
    settings = recipe.training
    length = {"max_steps": settings.steps} if settings.steps else {"num_train_epochs": settings.epochs}
    return {
        "output_dir": str(folder),
        "hub_model_id": Path(recipe.output).name,
        "hub_strategy": "end",  # a push before the end would include a pickled file
        "per_device_train_batch_size": settings.batch_size,
        "per_device_eval_batch_size": 2 * settings.batch_size,
        "gradient_accumulation_steps": settings.accumulation,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": SCHEDULES[settings.schedule or "linear"],
        "warmup_steps": settings.warmup,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "seed": settings.seed,
        "data_seed": settings.seed,
        "use_cpu": processes.on_cpu(),
        "bf16": settings.bf16,
        "activation_checkpointing": settings.gradient_checkpointing,
        "logging_steps": settings.log_every,
        "logging_nan_inf_filter": False,
        "eval_strategy": "steps" if settings.eval_every else "no",
        "eval_steps": settings.eval_every,
        "save_strategy": "steps" if settings.save_every else "no",
        "save_steps": settings.save_every or 500,
        "save_total_limit": 2,  # one may be incomplete when the process is killed
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "report_to": [],
        "greater_is_better": GREATER_IS_BETTER.get(settings.trainer.get("metric_for_best_model", "loss")),
        **length,
    }


def load_for_export(
    folder: RunFolder, verb: str = "loralloc export", *, to_merge: bool = False
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Load the base model of a run and, with stock PEFT, the adapter it exported; the data are not needed.

    Args:
        folder: The run folder.
        verb: The command, for the message if several processes run it.
        to_merge: Load the base model in full precision, even if the run quantised it.
    """
    recipe = folder.load_recipe()
    processes.refuse_several(verb)
    section = _model_section(recipe)
    checkpoint = locate(section.model_copy(update={"load_in": None}) if to_merge else section)
    kept = replace(checkpoint, path=str(folder.model), local_only=True, load={})
    tokenizer = load_tokenizer(kept)
    config = load_config(kept)
    # The run's padding token may be the end-of-sequence token, whose embedding some models would set to zero.
    config.pad_token_id = load_config(checkpoint).pad_token_id
    options = {"config": config, "ignore_mismatched_sizes": True}
    base = load_model(recipe.task, checkpoint, tokenizer, recipe.training.seed, **options)
    return load_adapter(base, folder.weights), tokenizer


def load_adapter(base: PreTrainedModel, adapter: Path, *, trainable: bool = False) -> PeftModel:
    """Load an adapter with stock PEFT.

    Args:
        base: The base model.
        adapter: Folder of the adapter.
        trainable: Whether its weights are to have gradients.

    Raises:
        UserError: It cannot be loaded, or does not fit the base model.
    """
    check_fits(adapter, [name for name, _ in base.named_modules() if name])
    try:
        with nothing_unpickled("export the adapter again, or convert it with PEFT's save_pretrained"):
            return PeftModel.from_pretrained(base, str(adapter), is_trainable=trainable)
    except (SafetensorError, RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"{adapter} cannot be loaded: {str(error).splitlines()[0]}") from error


def load_adapted(folder: RunFolder, recipe: Recipe) -> tuple[PeftModel, TaskData]:
    """Load the base model and the data of a run and, with stock PEFT, the adapter it exported."""
    data = task_data(recipe)
    return load_adapter(data.model, folder.weights), data


def load_with_data(folder: RunFolder, recipe: Recipe, source: str) -> tuple[PeftModel, TaskData]:
    """Load a run's base model, its exported adapter (with stock PEFT) and other data; its own data are not needed."""
    model, tokenizer = load_for_export(folder, "loralloc evaluate --data")
    base: Any = model.get_base_model()
    return model, prepare_evaluation(recipe.task, base, tokenizer, recipe.data, source)
