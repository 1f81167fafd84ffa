"""The sections of a recipe: every key once, with its type, range, default and description. `data` is the task's."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from loralloc.methods.settings import BudgetSection
from loralloc.recipe.passthrough import LOAD, PEFT, TRAINER, options_schema
from loralloc.setting_types import (
    AtLeastZero,
    Between0And1,
    Count,
    Number,
    Phase,
    Positive,
    Section,
    Seed,
    Share,
    Text,
    Whole,
    is_number,
    is_text,
)
from loralloc.tasks.spec import TASKS


def _check_names(value: Any) -> Any:
    if is_text(value) or (isinstance(value, list) and value and all(map(is_text, value))):
        return value
    raise ValueError("must be a name or a list of names")


Names = Annotated[str | list[str], BeforeValidator(_check_names)]


class ModelConfig(Section):
    """The pretrained model."""

    name: Text = Field(description="a local path, a name on the Hub, or demo:minilm")
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = Field(
        default="float32", description="type of the frozen weights; with load_in, of those that are not quantised"
    )
    load_in: Literal["4bit", "8bit"] | None = Field(
        default=None,
        description="quantise the linear layers except the head: less memory; needs bitsandbytes",
    )
    trust_remote_code: bool = Field(default=False, description="run Python code that the model's repository carries")
    load: dict[str, Any] = Field(
        default={},
        description="more arguments of transformers' from_pretrained, by their own names; weights in "
        "pytorch_model.bin, which are pickles, need use_safetensors: false",
        json_schema_extra=options_schema(LOAD),
    )


class DataConfig(*(task.data for task in TASKS.values())):
    """The data, and which of their columns mean what: the keys of every task. A rule refuses those of other tasks."""


if TYPE_CHECKING:
    TaskName = str
else:
    TaskName = Literal[tuple(TASKS)]


class LoraSection(Section):
    """The adapter that ranks are allocated in; names as in PEFT's LoraConfig."""

    r: Count = Field(default=12, description="rank of every layer at the start; no layer can exceed it")
    alpha: Positive = Field(
        default=24, description="scale of the update: alpha / r; with ablora, alpha over the average rank"
    )
    dropout: Share = Field(default=0.0, description="dropout before the adapter")
    target_modules: Names = Field(default="all-linear", description="all-linear, a list of names, or a pattern")
    exclude_modules: Names | None = Field(
        default=None, description="modules to leave out: a list of names, or a pattern"
    )
    modules_to_save: list[Text] | None = Field(default=None, description="modules trained and saved in full")
    peft: dict[str, Any] = Field(
        default={},
        description="more fields of PEFT's LoraConfig, by their own names",
        json_schema_extra=options_schema(PEFT),
    )


class TrainingConfig(Section):
    """The run. Exactly one of steps and epochs."""

    steps: Count | None = Field(default=None, description="optimizer steps")
    epochs: Positive | None = Field(default=None, description="passes over the training data")
    batch_size: Count = Field(default=16, description="examples per device and forward pass")
    accumulation: Count = Field(default=1, description="forward passes per optimizer step")
    learning_rate: Annotated[float, Field(gt=0)] = Field(default=1e-3, description="peak learning rate")
    schedule: Literal["linear", "cosine", "constant"] | None = Field(
        default=None, description="learning rate after its warm-up; null: linear, or trainer.lr_scheduler_type"
    )
    warmup: Phase = Field(
        default=0.1, description="learning rate warm-up: fraction of the run, or steps, fewer than it has"
    )
    weight_decay: AtLeastZero = Field(default=0.0, description="decoupled weight decay")
    max_grad_norm: AtLeastZero = Field(default=1.0, description="gradient clipping; 0 turns it off")
    seed: Seed = Field(default=0, description="seed of everything that is random")
    eval_every: Count | None = Field(default=None, description="steps between evaluations; null: only at the end")
    save_every: Count | None = Field(default=None, description="steps between checkpoints; null: none")
    keep_best: bool = Field(
        default=False,
        description="export the best of the evaluated states, by the task's metric, not the last one; evaluations then "
        "begin when the ranks are final. Needs eval_every, and save_every equal to it",
    )
    early_stopping: Count | None = Field(
        default=None,
        description="end the run after so many evaluations in a row without a better one, once the ranks are final; "
        "null: never. Needs eval_every",
    )
    log_every: Count = Field(default=10, description="steps between log lines")
    bf16: bool = Field(default=False, description="bfloat16 autocast")
    compact: bool = Field(
        default=False, description="take closed ranks out of memory once the ranks are final: faster steps, one process"
    )
    gradient_checkpointing: bool = Field(default=False, description="recompute activations: slower, less memory")
    trainer: dict[str, Any] = Field(
        default={},
        description="more fields of the trainer's arguments, by their own names",
        json_schema_extra=options_schema(TRAINER),
    )

    @property
    def keeps_checkpoints(self) -> bool:
        """Whether a run can be resumed."""
        return self.save_every is not None or self.trainer.get("save_strategy", "no") != "no"


class GenerateConfig(Section):
    """Answers to held-out prompts, before and after training; for task seq2seq, in every evaluation."""

    max_new_tokens: Count = Field(default=128, description="tokens of an answer, at most")
    temperature: AtLeastZero = Field(
        default=0.0, description="0 takes the likeliest token; above 0, tokens are sampled"
    )
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0, description="sample from the likeliest tokens with this total probability"
    )
    num_beams: Count = Field(default=1, description="beams of a beam search; 1 for none")
    length_penalty: float = Field(
        default=1.0,
        description="exponent of the length that divides a beam's score; more favours long answers",
    )
    min_new_tokens: Whole = Field(default=0, description="tokens of an answer, at least")
    no_repeat_ngram_size: Whole = Field(default=0, description="n-grams of this size occur at most once; 0: no limit")
    metrics: list[Literal["exact_match", "bleu", "chrf", "rouge"]] = Field(
        default=[], description="metrics that compare answers with the references"
    )
    after: Text | None = Field(
        default=None,
        description='exact_match compares the text after the last occurrence of this marker, such as "####", quoted',
    )
    samples: Count | None = Field(default=100, description="how many prompts to answer, from the first on; null: all")


class EvaluateConfig(Section):
    """How a run is judged, and what is evaluated beyond the task's own metrics."""

    metric: Text | None = Field(
        default=None, description="the task's metric that a run is judged by; null: its first one"
    )
    cuts: Whole = Field(
        default=5,
        description="at how many smaller sizes the finished adapter is evaluated, each half of the one before; 0: none",
    )
    generate: GenerateConfig | None = Field(default=None, description="answers to held-out prompts; null: none")


Peer = Literal["dora", "rslora", "eva"]


def _several(value: Any) -> Any:
    """Read a list, or a single value as a list of one."""
    found = value if isinstance(value, list) else [value]
    if not found:
        raise ValueError("must name at least one")
    if len({json.dumps(one, sort_keys=True, default=str) for one in found}) < len(found):
        raise ValueError("must not name anything twice")
    return found


def _seeds(value: Any) -> Any:
    """Read a list of seeds, or a number n as the seeds 0 to n − 1."""
    if is_number(value):
        if not isinstance(value, int) or value < 1:
            raise ValueError("must be a number of seeds, or a list of them")
        return list(range(value))
    return _several(value)


def _budgets(value: Any) -> Any:
    """Read budgets: numbers are average ranks, mappings are as in `method.budget`."""
    found = [{"average_rank": one} if is_number(one) else one for one in _several(value)]
    for one in found:
        if not isinstance(one, dict) or sum(entry is not None for entry in one.values()) != 1:
            raise ValueError("must be average ranks, or budgets of one key as in method.budget")
    return _several(found)


VARIANT = "^[a-z0-9_]+$"
"""The pattern of variants' names, which are also names of folders; a message in `rules` says it in words."""


class CompareConfig(Section):
    """What `loralloc compare` compares; `loralloc train` trains the recipe's own method alone."""

    methods: Annotated[list[Text], BeforeValidator(_several, json_schema_input_type=Text | list[Text])] | None = Field(
        default=None, description="methods beside plain LoRA and the controls; null: the recipe's own"
    )
    variants: dict[Annotated[str, WithJsonSchema({"type": "string", "pattern": VARIANT})], dict[str, Any]] = Field(
        default={},
        description="methods with other settings, under names to list in methods; "
        "published: {name: adalora, parity: none}",
    )
    learning_rates: (
        Annotated[list[Positive], BeforeValidator(_several, json_schema_input_type=Positive | list[Positive])] | None
    ) = Field(
        default=None,
        description="tried by every method at every budget; null: half of training.learning_rate, all of it, and twice",
    )
    budgets: (
        Annotated[
            list[BudgetSection],  # type: ignore[valid-type]  # made at run time
            BeforeValidator(_budgets, json_schema_input_type=Positive | list[Positive | BudgetSection]),
        ]
        | None
    ) = Field(default=None, description="average ranks, or budgets as method.budget; null: the recipe's own")
    seeds: Annotated[list[Seed], BeforeValidator(_seeds, json_schema_input_type=Count | list[Seed])] = Field(
        default=[0, 1, 2], description="how many seeds, from 0 on, or a list of them"
    )
    tuning_seeds: Count | None = Field(
        default=None,
        description="how many of the seeds try every learning rate; the others train at the best one alone; null: all",
    )
    peers: list[Peer] = Field(
        default=["dora", "rslora", "eva"], description="relatives of LoRA from PEFT, trained beside them; []: none"
    )
    capacity: Annotated[Number, Field(ge=1)] | None = Field(
        default=None,
        description="the most a layer may get, in average ranks; null: the recipe's lora.r over its average_rank, or "
        "1.5",
    )
    margin: Between0And1 = Field(
        default=0.01, description="the smallest difference that matters, as a share of plain LoRA's mean loss of a row"
    )
    threads: Count = Field(
        default=1, description="processor threads of a run; losses depend on it in their last digits"
    )
