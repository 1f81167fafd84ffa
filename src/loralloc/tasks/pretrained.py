"""Loading a pretrained model and its tokenizer, with errors that say what to do."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import is_protobuf_available, is_sentencepiece_available

from loralloc.errors import UserError
from loralloc.tasks.base import ModelSection
from loralloc.tasks.hub import is_reachable, out_of_reach
from loralloc.tasks.locations import check_load_in, model_folder
from loralloc.tasks.quantization import check_not_quantized, heads, load_quantized, prepare_quantized
from loralloc.tasks.rows import shorten
from loralloc.tasks.spec import TASKS
from loralloc.unpickling import nothing_unpickled, only_tensors_unpickled

logger = logging.getLogger(__name__)

FROM_THE_HUB = (
    "cache_dir",
    "code_revision",
    "force_download",
    "gguf_file",
    "proxies",
    "revision",
    "subfolder",
    "token",
)
"""Arguments of `from_pretrained` that say where a model is: configuration and tokenizer are loaded with them too."""

PICKLES = (
    "convert it to safetensors (load the model where you trust it, and save_pretrained), or set "
    "model.load.use_safetensors: false if you trust whoever wrote it"
)
"""What to do about weights in pytorch_model.bin."""


@dataclass(frozen=True)
class Checkpoint:
    """Where a model was found, and how to load it."""

    name: str
    """As the recipe names it."""
    path: str
    """A folder, or a name on the Hub."""
    dtype: str
    trust_remote_code: bool
    local_only: bool
    """Whether to look at this machine only."""
    load: Mapping[str, Any] = field(default_factory=dict)
    """More arguments of the model's `from_pretrained`."""
    load_in: str | None = None
    """`4bit` or `8bit` to quantise it."""

    @property
    def reads_pickles(self) -> bool:
        """Whether the recipe allows pickled weights."""
        return self.load.get("use_safetensors") is False

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `from_pretrained` for configuration, tokenizer and weights alike."""
        place = {name: value for name, value in self.load.items() if name in FROM_THE_HUB}
        return {"trust_remote_code": self.trust_remote_code, "local_files_only": self.local_only, **place}


def locate(section: ModelSection) -> Checkpoint:
    """Find a model without loading it.

    Args:
        section: The recipe's model section.

    Returns:
        Where to load it from.

    Raises:
        UserError: The folder is missing or holds no model, or the Hub has no such model, or the package that would
            quantise it is not installed.
    """
    check_load_in(section.load_in)
    name, folder = section.name, model_folder(section.name)
    if folder is not None:
        path, local_only = str(folder), True
    else:
        path, local_only = name, not is_reachable(name, "model", section.load.get("token"))
    trusted, load = section.trust_remote_code, section.load
    return Checkpoint(name, path, section.dtype, trusted, local_only, load, section.load_in)


@contextmanager
def _loading(part: str, checkpoint: Checkpoint) -> Iterator[None]:
    """Turn the errors of `from_pretrained` into one that names model and cure; refuse pickles that are not allowed."""
    try:
        with only_tensors_unpickled() if checkpoint.reads_pickles else nothing_unpickled(PICKLES):
            yield
    except UserError:
        raise
    except (
        OSError,
        ValueError,
        TypeError,
        AssertionError,
        ImportError,
        RuntimeError,
        KeyError,
        SafetensorError,
    ) as error:
        if isinstance(error, OSError) and checkpoint.local_only and not Path(checkpoint.path).is_dir():
            raise UserError(
                f'Model "{checkpoint.name}" is neither a folder nor was its {part} downloaded before. {out_of_reach()}'
            ) from error
        reason = shorten(str(error).strip().split("\n")[0], 300)
        cure = _cure(str(error), checkpoint)
        options = f" with model.load ({', '.join(checkpoint.load)})" if checkpoint.load else ""
        raise UserError(f'The {part} of model "{checkpoint.name}" cannot be loaded{options}: {reason}{cure}') from error


def _cure(reason: str, checkpoint: Checkpoint) -> str:
    """A remedy for failures whose messages do not name one."""
    if "trust_remote_code" in reason and not checkpoint.trust_remote_code:
        return " If you trust its code, set model.trust_remote_code: true."
    if re.search(r"(no|a) file named model\.(\S+\.)?safetensors", reason) and not checkpoint.reads_pickles:
        return f" Weights in pytorch_model.bin are a pickle, which can run any code, and are not read: {PICKLES}."
    # Without the packages that read SentencePiece models, transformers takes one for a tiktoken file and asks for that.
    if "tiktoken" in reason and not (is_sentencepiece_available() and is_protobuf_available()):
        return ' If it is a SentencePiece model, install the extra: pip install "loralloc[sentencepiece]".'
    return ""


def load_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    """Load the configuration of a model.

    Args:
        checkpoint: The model.

    Returns:
        Its configuration.

    Raises:
        UserError: It cannot be loaded, or the weights that are to be quantised are quantised already.
    """
    with _loading("configuration", checkpoint):
        config = AutoConfig.from_pretrained(checkpoint.path, **checkpoint.options)
    if checkpoint.load_in is not None:
        check_not_quantized(checkpoint.name, config, checkpoint.load_in)
    return config


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """Load a tokenizer, and make sure that it has a padding token.

    Args:
        checkpoint: The model.

    Returns:
        Its tokenizer. Where it has no padding token, the end-of-sequence token serves as one.

    Raises:
        UserError: It cannot be loaded, or has neither token.
    """
    with _loading("tokenizer", checkpoint):
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.path, **checkpoint.options)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError(
                f'The tokenizer of model "{checkpoint.name}" has neither a padding nor an end-of-sequence '
                "token. Set pad_token in its tokenizer_config.json."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    task: str, checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase, seed: int, **options: Any
) -> PreTrainedModel:
    """Load a pretrained model.

    Args:
        task: One of `TASKS`; it names the class of the model with its head.
        checkpoint: The model.
        tokenizer: Its tokenizer.
        seed: Seed of parameters that the checkpoint does not have, such as a new head. The state of the
            global random generator is left as it was.
        options: More arguments of `from_pretrained`.

    Returns:
        The model, on the CPU unless `device_map` is among the arguments; a quantised one on the device that computes.
        Its `new_parameters` are the names of the parameters that the checkpoint does not have.

    Raises:
        UserError: It cannot be loaded, or does not fit the tokenizer, or cannot be quantised.
    """
    with _loading("weights", checkpoint), torch.random.fork_rng(devices=[]):
        model, found = _load_weights(getattr(transformers, TASKS[task].model_class), checkpoint, seed, options)
    model.new_parameters = frozenset(found["missing_keys"])
    if TASKS[task].trainer in ("Trainer", "Seq2SeqTrainer"):
        # The loss is a mean over the batch. But forward takes any keyword, so a Trainer would assume that the model
        # divides by the items of all accumulated batches, and would not divide the loss by the number of batches.
        model.accepts_loss_kwargs = False
    prepare_quantized(checkpoint.name, model)
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(
            f'The tokenizer of model "{checkpoint.name}" knows {len(tokenizer)} tokens, the model only '
            f"{rows}. They do not belong together."
        )
    model.config.pad_token_id = tokenizer.pad_token_id
    return model


def _load_weights(kind: Any, checkpoint: Checkpoint, seed: int, options: Mapping[str, Any]) -> tuple[Any, Any]:
    """Load a model, quantised or not, with its loading info; what the checkpoint lacks depends on the seed alone."""

    def load(**more: Any) -> Any:
        torch.default_generator.manual_seed(seed)
        safe = {"use_safetensors": not checkpoint.reads_pickles}
        arguments = {**checkpoint.load, **safe, **checkpoint.options, **options, **more}
        return kind.from_pretrained(checkpoint.path, dtype=checkpoint.dtype, output_loading_info=True, **arguments)

    if checkpoint.load_in is None:
        return load()
    config = options.get("config") or load_config(checkpoint)
    return load_quantized(load, checkpoint.load_in, heads(kind, config, checkpoint.trust_remote_code))


def replaces_head(checkpoint: Checkpoint, config: PreTrainedConfig, kind: str, count: int) -> bool:
    """Whether the checkpoint's head must be replaced by one with another number of outputs; a warning says so.

    Args:
        checkpoint: The model.
        config: Its configuration.
        kind: The suffix of model classes with such a head, such as `ForSequenceClassification`.
        count: Outputs that the data need.
    """
    trained = any(name.endswith(kind) for name in config.architectures or [])
    if not trained or config.num_labels == count:
        return False
    logger.warning(
        'The head of model "%s" has %d outputs, the data need %d: it is replaced by a new one.',
        checkpoint.name,
        config.num_labels,
        count,
    )
    return True


def check_length(length: int, config: PreTrainedConfig, name: str, key: str = "max_length") -> None:
    """Refuse examples longer than the model's positions.

    Args:
        length: Longest example, in tokens.
        config: Configuration of the model.
        name: Name of the model.
        key: The key of `data` that says the length.

    Raises:
        UserError: The length is too great.
    """
    limit = positions(config, "decoder" if key == "target_length" else "encoder")
    if limit is not None and length > limit:
        raise UserError(f'data.{key} is {length}, but model "{name}" has {limit} positions.')


def positions(config: PreTrainedConfig, stack: Literal["encoder", "decoder"]) -> int | None:
    """The number of positions of a model; None if they are relative (T5), or not known.

    Args:
        config: Configuration of the model.
        stack: Which of the two, for models in which their numbers differ (LED).
    """
    text = config.get_text_config()
    own = getattr(text, f"max_{stack}_position_embeddings", None)
    found = getattr(text, "max_position_embeddings", None) if own is None else own
    return found if found is not None and found > 0 else None  # XLNet says -1


def check_stacks(task: str, config: PreTrainedConfig, name: str) -> None:
    """Refuse a model without both encoder and decoder for a task that needs both, and one with both for other tasks.

    Args:
        task: One of `TASKS`.
        config: Configuration of the model.
        name: Name of the model.

    Raises:
        UserError: With the task that fits.
    """
    kind, both = getattr(config, "model_type", "unknown"), bool(getattr(config, "is_encoder_decoder", False))
    needed = TASKS[task].peft_type == "SEQ_2_SEQ_LM"
    if needed and not both:
        raise UserError(
            f'Task {task} needs an encoder with a decoder, such as T5 or BART; model "{name}" ({kind}) is one of the '
            "two; a decoder learns with task: causal-lm, an encoder with task: sequence-classification"
        )
    if both and not needed:
        raise UserError(
            f'Task {task} needs a decoder alone, and model "{name}" ({kind}) is an encoder with a decoder; '
            "set task: seq2seq, with data.source and data.target"
        )


def check_end(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse a tokenizer that cannot end a text.

    Raises:
        UserError: It has no end-of-sequence token.
    """
    if tokenizer.eos_token is None:
        raise UserError(
            f'The tokenizer of model "{name}" has no end-of-sequence token to end a text with. '
            "Set eos_token in its tokenizer_config.json."
        )
