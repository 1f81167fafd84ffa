"""Loading a base model in 4 or 8 bits (`model.load_in`), through bitsandbytes.

4 bits are NF4 with double quantisation, as in QLoRA (arXiv 2305.14314), 8 bits LLM.int8 (arXiv 2208.07339). All linear
layers are quantised but the head, which is trained in full where it is new; embeddings, norms and head are in
`model.dtype`.

`peft.prepare_model_for_kbit_training` is not called. It freezes the base model, which adding an adapter does as well.
It casts what is not quantised to fp32, norms above all, which `model.dtype: float32` loads in the first place; whoever
asks for bfloat16 wants half of that memory. And it makes inputs require gradients, which only reentrant checkpointing
needs; transformers uses the other kind.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

from loralloc.errors import UserError
from loralloc.naming import common_ends
from loralloc.quantized import BLOCK, keep_trainable, misread_rows, quantized_layers


def compute_dtype() -> torch.dtype:
    """Return the compute dtype of 4-bit layers: bfloat16 on CPUs and on GPUs since Ampere, else float16."""
    if torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


def quantization_config(load_in: str, kept: Sequence[str] = ()) -> BitsAndBytesConfig:
    """Return how transformers is to quantise a model.

    Args:
        load_in: `4bit` or `8bit`.
        kept: Modules that are not quantised; if none is named, transformers chooses them.
    """
    skipped = list(kept) or None
    if load_in == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype(),
        llm_int8_skip_modules=skipped,  # it is called so for 4 bits too
    )


def heads(kind: Any, config: PreTrainedConfig, trust_remote_code: bool) -> list[str]:
    """Return the modules with linear layers that a model has beside its base model, without loading it.

    Args:
        kind: A class of transformers that makes models from configurations.
        config: The configuration.
        trust_remote_code: Whether code that comes with the model may run.
    """
    with torch.device("meta"):
        model = kind.from_config(config, trust_remote_code=trust_remote_code)
    base = model.base_model
    if base is model:  # the class does not name its base model; transformers has to guess
        return []
    others = [(name, child) for name, child in model.named_children() if child is not base]
    return [name for name, child in others if any(isinstance(part, nn.Linear) for part in child.modules())]


def load_quantized(
    load: Callable[..., tuple[PreTrainedModel, dict[str, Any]]], load_in: str, kept: Sequence[str]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a model, quantised.

    A layer that the checkpoint does not have, such as the pooler of an encoder trained without one, is new and has no
    weights to quantise: transformers would leave a layer that computes nothing. Such layers are not quantised.

    Args:
        load: Calls `from_pretrained` with more options; returns the model and what was found in the checkpoint.
        load_in: `4bit` or `8bit`.
        kept: Modules that are not quantised.
    """
    model, found = load(quantization_config=quantization_config(load_in, kept))
    new = [name for name, _ in quantized_layers(model) if f"{name}.weight" in found["missing_keys"]]
    if not new:
        return model, found
    del model  # before another one takes its place
    return load_quantized(load, load_in, [*kept, *new])


def check_not_quantized(name: str, config: PreTrainedConfig, load_in: str) -> None:
    """Refuse to quantise a checkpoint that is quantised already: transformers would leave it as it is.

    Args:
        name: Name of the model.
        config: Its configuration.
        load_in: `4bit` or `8bit`.

    Raises:
        UserError: It is quantised already.
    """
    stored = getattr(config, "quantization_config", None)
    if stored is not None:
        method = stored.get("quant_method", "an unknown method") if isinstance(stored, dict) else stored.quant_method
        raise UserError(
            f'model.load_in is {load_in}, but the weights of model "{name}" are stored quantised already '
            f"({getattr(method, 'value', method)}); remove model.load_in, or name the model in full precision"
        )


def prepare_quantized(name: str, model: nn.Module) -> None:
    """Prepare the bitsandbytes layers of a loaded model, if it has any, for training.

    Args:
        name: Name of the model.
        model: The model.

    Raises:
        UserError: bitsandbytes would compute with other weights than the checkpoint's.
    """
    keep_trainable(model)
    if misread := misread_rows(model):
        where = common_ends(misread, [other for other, _ in quantized_layers(model) if other not in misread])
        raise UserError(
            f'model "{name}" does not work in 4 bits on a CPU: bitsandbytes reads other weights than it wrote where a '
            f"layer's inputs are no multiple of {BLOCK}, as in {', '.join(where)} ({min(misread.values())} inputs); "
            "set model.load_in: 8bit, or train on a GPU"
        )


def stored_config(model: PreTrainedModel) -> PreTrainedConfig:
    """Return a model's configuration as its checkpoint has it: without a quantisation that was done on loading."""
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is None or quantizer.pre_quantized:
        return model.config
    config: Any = copy.deepcopy(model.config)
    del config.quantization_config
    return config  # type: ignore[no-any-return]
