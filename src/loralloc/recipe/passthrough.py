"""Options of transformers, TRL and PEFT by their own names: the three mappings of a recipe that pass them on.

A recipe has keys of its own for what most runs set. Any other option goes into `training.trainer`, `lora.peft` or
`model.load`. Its name and type are checked here, and its value by the library's constructor in `recipe.trial`. An
option that a recipe sets with another key, or with which a run could not keep its promises, is refused with that key or
the reason. The libraries are imported when a recipe is loaded, not with this module.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, TypeVar, get_type_hints

from pydantic import BaseModel, BeforeValidator, ConfigDict, TypeAdapter, ValidationError

from loralloc.recipe.source import Key, dotted, get, suggest
from loralloc.setting_types import Count, Positive, joined_rule, shown
from loralloc.tasks.spec import TASKS

Types = Mapping[str, Any]
"""The type of every option of a class, by its name."""

_Recipe = TypeVar("_Recipe", bound=BaseModel)

TRAINER: Key = ("training", "trainer")
PEFT: Key = ("lora", "peft")
LOAD: Key = ("model", "load")


@dataclass(frozen=True)
class Options:
    """A mapping of a recipe that passes options on.

    Attributes:
        key: Key of the mapping.
        owners: Dotted path of the class or function that takes the options, by task.
        ours: Options that a recipe sets with another key, and that key.
        instead: Options that replace a key of the recipe, and that key; only one of the two may be set.
        refused: Options that no recipe can set, with the reason.
        refused_in: Options that recipes of a task cannot set, with the reason, by task.
        types: Types of options that their owner does not declare, or declares too widely.
    """

    key: Key
    owners: Mapping[str, str]
    ours: Mapping[str, str]
    refused: Mapping[str, str]
    refused_in: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    instead: Mapping[str, Key] = field(default_factory=dict)
    types: Types = field(default_factory=dict)

    def known(self, task: str) -> Types:
        """The types of all options of the owner, including those that a recipe cannot set."""
        return {**_declared(self.owners[task]), **self.types}


def _number_of_a_device(name: Any) -> Any:
    return int(name) if isinstance(name, str) and name.isdecimal() else name  # in a recipe, every key is text


Device = Annotated[int | str, BeforeValidator(_number_of_a_device)]

SCORES = "scores of ranks are made of whole gradients and factors"
SHARDED = "accelerate launch --config_file with fsdp_version: 2"
ONCE = "a run computes its metrics once, from the predictions for all examples"
REFERENCE = "the reference is the base model, the adapter switched off"
STARTS = "it belongs to an initialisation that changes the base weights or needs data: no plain adapter can be exported"

PLANNED = ("alpha_pattern", "layers_pattern", "layers_to_transform", "rank_pattern", "use_rslora")
"""Options of `lora.peft` that a plan decides."""

OPTIONS = (
    Options(
        key=TRAINER,
        owners={name: task.arguments for name, task in TASKS.items()},
        ours={
            "output_dir": "output",
            "max_steps": "training.steps",
            "num_train_epochs": "training.epochs",
            "per_device_train_batch_size": "training.batch_size",
            "gradient_accumulation_steps": "training.accumulation",
            "learning_rate": "training.learning_rate",
            "warmup_steps": "training.warmup",
            "weight_decay": "training.weight_decay",
            "max_grad_norm": "training.max_grad_norm",
            "seed": "training.seed",
            "eval_steps": "training.eval_every",
            "save_steps": "training.save_every",
            "logging_steps": "training.log_every",
            "logging_strategy": "training.log_every",
            "bf16": "training.bf16",
            "activation_checkpointing": "training.gradient_checkpointing",
            "gradient_checkpointing": "training.gradient_checkpointing",
            "gradient_checkpointing_kwargs": "training.trainer.activation_checkpointing_kwargs",
            "max_length": "data.max_length",
            "packing": "data.packing",
            "packing_strategy": "data.packing",
            "dataset_text_field": "data.text",
            "completion_only_loss": "data.learn",
            "assistant_only_loss": "data.learn",
            "model_init_kwargs": "model.load",
            "trust_remote_code": "model.trust_remote_code",
            "predict_with_generate": "evaluate.generate",
            "generation_config": "evaluate.generate",
            "generation_max_length": "evaluate.generate.max_new_tokens",
            "generation_num_beams": "evaluate.generate.num_beams",
        },
        instead={
            "lr_scheduler_type": ("training", "schedule"),
            "eval_strategy": ("training", "eval_every"),
            "save_strategy": ("training", "save_every"),
        },
        refused={
            "deepspeed": f"{SCORES}, which DeepSpeed hides; use FSDP2 ({SHARDED}) or torchrun",
            "fsdp": f"set it with the launcher: {SHARDED}",
            "fsdp_config": f"set it with the launcher: {SHARDED}",
            "parallelism_config": f"{SCORES}, which parallel layers split; use FSDP2 ({SHARDED}) or torchrun",
            "auto_find_batch_size": "it starts over with ranks that are allocated already; halve training.batch_size",
            "resume_from_checkpoint": "loralloc train RECIPE --resume continues a run",
            "enable_jit_checkpoint": "its checkpoints lack the allocation's state; set training.save_every",
            "save_only_model": "a run resumes from its checkpoints, and could not from those",
            "do_train": "a script may read it, the Trainer does not; a run always trains and evaluates",
            "do_eval": "a script may read it, the Trainer does not; a run always trains and evaluates",
            "do_predict": "a script may read it, the Trainer does not; a run always trains and evaluates",
            "local_rank": "set it with the launcher: torchrun, or accelerate launch",
            "disable_tqdm": "a run shows its progress itself; --quiet shows none",
            "hub_strategy": "the adapter is pushed once, when it is exported",
            "hub_always_push": "the adapter is pushed once, when it is exported",
            "eval_on_start": "every run evaluates the untrained model first",
            "prediction_loss_only": "a run is judged by its metric, which needs predictions",
            "batch_eval_metrics": ONCE,
            "eval_do_concat_batches": ONCE,
            "include_for_metrics": ONCE,
            "fp16_full_eval": "it converts the model itself, before it is trained; set training.trainer.fp16",
            "bf16_full_eval": "it converts the model itself, before it is trained; set training.bf16",
            "remove_unused_columns": "metrics need columns that the model does not take",
            "sortish_sampler": "the Trainer does not read it; set training.trainer.train_sampling_strategy",
            "label_names": "the task names its labels",
            "length_column_name": "examples have no such column; lengths are counted",
            "eval_packing": "every example is evaluated by itself",
            "shuffle_dataset": "the Trainer shuffles, and a stream is shuffled while it is read",
            "truncation_mode": "examples lose their end, as data.max_length says",
            "dataset_kwargs": "examples are prepared before the trainer has them",
            "dataset_num_proc": "examples are prepared before the trainer has them",
            "chat_template_path": "the template is the model's: put a chat_template.jinja into its folder",
            "sync_ref_model": REFERENCE,
            "ref_model_mixup_alpha": REFERENCE,
            "ref_model_sync_steps": REFERENCE,
            "eos_token": "examples end before the trainer has them; set it in the model's tokenizer_config.json",
        },
        refused_in={
            "preference": {
                "label_smoothing_factor": "the DPOTrainer does not read it; set training.trainer.label_smoothing",
                "padding_free": "the DPOTrainer pads all the same; take it out",
            }
        },
        types={"accelerator_config": dict[str, Any] | None},
    ),
    Options(
        key=PEFT,
        owners=dict.fromkeys(TASKS, "peft.LoraConfig"),
        ours={
            "r": "lora.r",
            "lora_alpha": "lora.alpha",
            "lora_dropout": "lora.dropout",
            "target_modules": "lora.target_modules",
            "exclude_modules": "lora.exclude_modules",
            "modules_to_save": "lora.modules_to_save",
            "task_type": "task",
            "base_model_name_or_path": "model.name",
            "revision": "model.load.revision",
        },
        instead=dict.fromkeys(PLANNED, ("plan",)),
        refused={
            "peft_type": "ranks are allocated for LoRA alone",
            "auto_mapping": "PEFT writes it itself",
            "peft_version": "PEFT writes it itself",
            "inference_mode": "the adapter is to be trained",
            "loftq_config": STARTS,
            "eva_config": STARTS,
            "corda_config": STARTS,
            "lora_ga_config": STARTS,
            "qalora_group_size": "it belongs to use_qalora, whose update is more than B·A",
            "runtime_config": "it belongs to use_dora, whose update is more than B·A",
            "megatron_config": "Megatron's tensor-parallel layers shard the factors",
            "megatron_core": "Megatron's tensor-parallel layers shard the factors",
        },
        types={"rank_pattern": dict[str, Count], "alpha_pattern": dict[str, Positive]},
    ),
    Options(
        key=LOAD,
        owners=dict.fromkeys(TASKS, "transformers.PreTrainedModel.from_pretrained"),
        ours={
            "pretrained_model_name_or_path": "model.name",
            "dtype": "model.dtype",
            "torch_dtype": "model.dtype",
            "trust_remote_code": "model.trust_remote_code",
            "quantization_config": "model.load_in",
        },
        refused={
            "local_files_only": "a run asks whether the Hub can be reached; with HF_HUB_OFFLINE=1 it does not",
            "weights_only": "it lets a checkpoint run code; convert the checkpoint to safetensors",
            "config": "the configuration is the model's own, with the labels of the data",
            "ignore_mismatched_sizes": "the labels of the data decide whether the head is a new one",
            "state_dict": "weights cannot be written in a recipe",
            "output_loading_info": "a run has no use for it",
            "generation_config": "evaluate.generate says how a run generates",
            "adapter_kwargs": "ranks are allocated in a fresh adapter; name the base model",
            "adapter_name": "ranks are allocated in a fresh adapter; name the base model",
            "tqdm_class": "a class cannot be written in a recipe",
            "kernel_config": "an object cannot be written in a recipe",
            "distributed_config": f"{SCORES}, which parallel layers shard",
            "device_mesh": f"{SCORES}, which parallel layers shard",
            "tp_plan": f"{SCORES}, which parallel layers shard",
            "tp_size": f"{SCORES}, which parallel layers shard",
        },
        # What from_pretrained takes through **kwargs; a test compares it with transformers.
        types={
            "attn_implementation": str | dict[str, str],
            "experts_implementation": str | dict[str, str],
            "device_map": str | int | dict[str, int | str],
            "max_memory": dict[Device, int | str],
            "offload_folder": str,
            "offload_buffers": bool,
            "subfolder": str,
            "variant": str,
            "gguf_file": str,
            "key_mapping": dict[str, str],
            "proxies": dict[str, str],
            "code_revision": str,
            "use_kernels": bool,
            "allow_all_kernels": bool,
        },
    ),
)
"""The three mappings."""

MAPPINGS = tuple(dotted(options.key) for options in OPTIONS)
"""The dotted keys of the three mappings."""

OF_THE_EXPORTED_ALONE = ("eval_strategy", "load_best_model_at_end", "push_to_hub")
"""Options of `training.trainer` that concern only the exported adapter; a search is trained without them."""

TO_THE_HUB = ("push_to_hub", "hub_model_id", "hub_private_repo", "hub_revision", "hub_token")
"""Options of `training.trainer` that push the exported adapter to the Hub; the runs of a comparison drop them."""

TOLD_TO_OTHERS = (*TO_THE_HUB, "report_to")
"""Options of `training.trainer` that report to other services; rehearsals drop them."""

OF_EVALUATIONS = (
    *("fp16", "full_determinism", "label_smoothing_factor", "use_cpu"),
    *("per_device_eval_batch_size", "eval_accumulation_steps", "eval_use_gather_object"),
    *("dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_persistent_workers", "dataloader_in_order"),
    *("dataloader_pin_memory", "dataloader_multiprocessing_context"),
    *("accelerator_config", "ddp_backend", "ddp_timeout"),
    *("loss_type", "loss_weights", "router_aux_loss_coef", "pad_token", "pad_to_multiple_of"),
    *("beta", "label_smoothing", "f_divergence_type", "f_alpha_divergence_coef", "ld_alpha", "discopop_tau"),
    "use_weighting",
)
"""Options of `training.trainer` that decide what an evaluation computes, or how it reads its examples.

A trainer that only evaluates takes no others. So what a run was trained with, or what made it fast on its device
(`tf32`, kernels, compilation), stops no evaluation elsewhere.
"""


def imported(path: str) -> Any:
    """Import a class or one of its methods by its dotted path; the first part is the package.

    >>> imported("pathlib.PurePath.is_absolute").__name__
    'is_absolute'
    """
    package, *names = path.split(".")
    found: Any = importlib.import_module(package)
    for name in names:
        found = getattr(found, name)
    return found


@cache
def _declared(path: str) -> Types:
    """The types of the options that a dataclass or a function declares."""
    owner = imported(path)
    hints = get_type_hints(owner)
    if is_dataclass(owner):
        return {option.name: hints[option.name] for option in fields(owner) if option.init}
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(owner).parameters.values()
    return {option.name: hints[option.name] for option in parameters if option.kind not in several}


@cache
def option_keys() -> Mapping[str, str]:
    """Return the libraries' description of every option for which a recipe has no key of its own, by dotted key.

    Refused options are included: whoever looks for one is told why it is refused.
    """
    found: dict[str, str] = {}
    for options in OPTIONS:
        for task, path in options.owners.items():
            names, described = options.known(task).keys() - options.ours.keys(), _help(path)
            found |= {dotted((*options.key, name)): described.get(name, "") for name in sorted(names)}
    return found


def _help(path: str) -> Mapping[str, str]:
    """The first sentence of the help of each field of a dataclass."""
    owner = imported(path)
    declared = fields(owner) if is_dataclass(owner) else ()
    return {option.name: _first_sentence(str(option.metadata.get("help", ""))) for option in declared}


def _first_sentence(text: str) -> str:
    return " ".join(text.split()).partition(". ")[0].removesuffix(".")


def options_schema(key: Key) -> Callable[[dict[str, Any]], None]:
    """Return a function that adds the options of a mapping, for all tasks, to the mapping's JSON schema.

    Args:
        key: One of `TRAINER`, `PEFT` and `LOAD`.
    """

    def complete(node: dict[str, Any]) -> None:
        options = next(options for options in OPTIONS if options.key == key)
        start = f"{dotted(key)}."
        told = {name.removeprefix(start): text for name, text in option_keys().items() if name.startswith(start)}
        node["additionalProperties"] = False
        node["properties"] = {
            name: {"description": text} if text else {} for name, text in told.items() if name not in options.refused
        }

    return complete


def exclusive_keys() -> Iterator[Sequence[Key]]:
    """Yield pairs of keys that must not be set together: an option and the key that it replaces."""
    for options in OPTIONS:
        yield from (((*options.key, name), replaced) for name, replaced in options.instead.items())


def broken_options(tree: Mapping[str, Any], keys: Mapping[str, str]) -> Iterator[tuple[Key, str]]:
    """Check the names and types of all options that a recipe passes on.

    Args:
        tree: The recipe; its values may be of any type.
        keys: All keys that a recipe may have, for suggestions.

    Yields:
        The key and what is wrong with it.
    """
    task = tree.get("task")
    if not isinstance(task, str) or task not in TASKS:
        return
    for options in OPTIONS:
        given = get(tree, *options.key)
        for name in given if isinstance(given, Mapping) else ():
            key = (*options.key, name)
            if problem := _problem(options, task, name, given[name], tree, keys):
                yield key, problem


def _problem(
    options: Options, task: str, name: str, value: Any, tree: Mapping[str, Any], keys: Mapping[str, str]
) -> str | None:
    key = (*options.key, name)
    if name in options.ours:
        return f"{dotted(key)} is {options.ours[name]} in a recipe: set that"
    refused = {**options.refused, **options.refused_in.get(task, {})}
    if name in refused:
        return f"{dotted(key)} cannot be set: {refused[name]}"
    types = options.known(task)
    if name not in types:
        owner = options.owners[task]
        return f'unknown key "{name}" in "{dotted(options.key)}", the options of {owner}.{suggest(key, keys)}'
    replaced = options.instead.get(name)
    if replaced is not None and (beside := get(tree, *replaced)) is not None:
        return f"{dotted(key)} takes the place of {dotted(replaced)}, which is {beside}: leave one of them out"
    try:
        _adapter(types[name]).validate_python(value)
    except ValidationError as error:
        return f"{dotted(key)} {joined_rule(error.errors())}, got {shown(value)}"
    return None


def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind, config=ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True))


def values(key: Key, task: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return copies of a mapping's options, in the types that their owner takes.

    Args:
        key: The mapping, one of `TRAINER`, `PEFT` and `LOAD`.
        task: The recipe's task.
        given: What the recipe says there, checked.
    """
    types = next(options for options in OPTIONS if options.key == key).known(task)
    return {name: _adapter(types[name]).validate_python(deepcopy(value)) for name, value in given.items()}


def without(given: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return a mapping without some of its options."""
    return {name: value for name, value in given.items() if name not in names}


def only(given: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return a mapping with no other options than these."""
    return {name: value for name, value in given.items() if name in names}


def with_options(recipe: _Recipe, key: Key, given: Mapping[str, Any]) -> _Recipe:
    """Return a recipe with other options in one of its mappings."""
    section, name = map(str, key)
    changed = getattr(recipe, section).model_copy(update={name: dict(given)})
    return recipe.model_copy(update={section: changed})
