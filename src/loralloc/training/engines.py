"""What a Trainer may run on: one process, DistributedDataParallel, FSDP2. All else is refused before training.

Under FSDP2 (`accelerate launch --config_file fsdp2.yaml`) accelerate shards the model when it is prepared. The adapter
and everything else that is trained is not sharded (`sharding`): a Trainer then saves and loads the same as on one
process, and nothing of the base model.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn
from transformers import Trainer, TrainingArguments

from loralloc.errors import UserError
from loralloc.peft_layers import adapter_modules, peft_model
from loralloc.sharding import check_quantized, is_sharded

LAUNCH = "accelerate launch with fsdp_version: 2 in its config file"


def refuse_engines(args: TrainingArguments) -> None:
    """Refuse, in one sentence, the engines under which gates or scores would silently be wrong.

    Raises:
        UserError: With what to use instead.
    """
    engine = AcceleratorState().distributed_type if AcceleratorState._shared_state else None
    if args.deepspeed or engine == DistributedType.DEEPSPEED:
        raise UserError(
            "DeepSpeed is not supported: it takes the gradients that scores are made of into buffers of its own; to "
            f"shard a large base model use FSDP2 ({LAUNCH}), else DDP (torchrun)"
        )
    if engine == DistributedType.MEGATRON_LM:
        raise UserError(f"Megatron-LM is not supported: it splits the layers that ranks are in; use FSDP2 ({LAUNCH})")
    if engine == DistributedType.FSDP:
        _check_plugin(AcceleratorState().fsdp_plugin)
    elif args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        where = "on CPUs" if not torch.accelerator.is_available() else "with one process"
        raise UserError(
            f"FSDP was asked for, and accelerate shards nothing {where}: it would train the whole model in every "
            "process without a word. Leave FSDP out (in a loop of your own, fully_shard works on CPUs too)"
        )
    if args.n_gpu > 1:
        raise UserError(
            f"this machine has {args.n_gpu} GPUs, and one process would spread every batch over them with "
            "torch.nn.DataParallel, which is not supported; start one process for each: torchrun --nproc-per-node="
            f"{args.n_gpu} --no-python loralloc train RECIPE (or torchrun --nproc-per-node={args.n_gpu} SCRIPT), or "
            "use one of them, CUDA_VISIBLE_DEVICES=0"
        )
    parallel = getattr(args, "parallelism_config", None)
    if parallel is not None and (parallel.tp_size > 1 or parallel.cp_size > 1):
        raise UserError(
            "tensor and context parallelism are not supported: they spread a layer's output over processes; use FSDP2 "
            f"({LAUNCH}) without them"
        )
    if args.fp16 and not args.max_grad_norm:
        raise UserError(
            "fp16 without gradient clipping leaves the loss scale in the gradients that scores are made of; set "
            "max_grad_norm=1.0, or use bf16"
        )


def _check_plugin(plugin: FullyShardedDataParallelPlugin | None) -> None:
    """Refuse what FSDP cannot do with an adapter that stays whole."""
    assert plugin is not None
    if plugin.fsdp_version != 2:
        raise UserError(
            "FSDP1 is not supported: it flattens the factors that scores are made of; set fsdp_version: 2 in the "
            "config file of accelerate launch"
        )
    for option, wanted in (
        (plugin.cpu_ram_efficient_loading, "fsdp_cpu_ram_efficient_loading: false (it loads only sharded weights)"),
        (plugin.activation_checkpointing, "fsdp_activation_checkpointing: false (use the Trainer's own)"),
        (_offloads(plugin), "fsdp_offload_params: false (it has not been verified)"),
    ):
        if option:
            raise UserError(f"FSDP2 with an adapter that every process holds whole needs {wanted}")


def _offloads(plugin: FullyShardedDataParallelPlugin) -> bool:
    return type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy"


def under_fsdp2(trainer: Trainer) -> bool:
    """Whether accelerate will shard the Trainer's model, or has done so."""
    return bool(trainer.accelerator.is_fsdp2)


def _plugin(trainer: Trainer) -> FullyShardedDataParallelPlugin:
    plugin = trainer.accelerator.state.fsdp_plugin
    assert plugin is not None
    return plugin


def keep_adapter_whole(trainer: Trainer) -> None:
    """Make accelerate shard only the base model, and the Trainer save and load as on one process. Before training.

    Raises:
        UserError: The engine is not supported.
    """
    if not under_fsdp2(trainer):
        return
    refuse_engines(trainer.args)
    model, plugin = trainer.model, _plugin(trainer)
    assert isinstance(model, nn.Module)
    check_quantized(model)
    whole = adapter_modules(model)
    for module in whole:  # accelerate moves what it shards
        module.to(trainer.accelerator.device)
    plugin.ignored_modules = [*_ignored_by_the_user(plugin, model), *whole]
    if not plugin.transformer_cls_names_to_wrap:
        plugin.transformer_cls_names_to_wrap = _blocks(model)
    trainer.is_fsdp_enabled = False  # the Trainer's FSDP code saves and loads sharded adapters


def _ignored_by_the_user(plugin: FullyShardedDataParallelPlugin, model: nn.Module) -> list[nn.Module]:
    ignored = plugin.ignored_modules
    if isinstance(ignored, str):
        raise UserError("fsdp_ignored_modules is not supported: the adapter is left out by itself; remove it")
    known = {id(module) for module in adapter_modules(model)}
    return [module for module in ignored or () if id(module) not in known]


def _blocks(model: nn.Module) -> list[str] | None:
    """Classes of the blocks to shard, from the model's `_no_split_modules`; None if it names none.

    Classes that hold the embeddings are left out: accelerate shards embeddings separately, and would shard them twice.
    """
    base: Any = peft_model(model).get_base_model()
    embeddings, named = base.get_input_embeddings(), set(base._no_split_modules or ())
    found = [module for module in base.modules() if type(module).__name__ in named]
    return sorted({type(m).__name__ for m in found if all(part is not embeddings for part in m.modules())}) or None


def shard_now(trainer: Trainer) -> None:
    """Shard the base model now, for an evaluation that comes before training."""
    model = trainer.model
    if under_fsdp2(trainer) and isinstance(model, nn.Module) and not is_sharded(model):
        _plugin(trainer).set_auto_wrap_policy(model)
        fsdp2_prepare_model(trainer.accelerator, model)
