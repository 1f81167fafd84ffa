"""Recipes: one YAML file for the whole life of a run, checked as a whole before anything is loaded.

Values come from the defaults here, then the file, then flags. Nothing is coerced: `"12x"` is no number
and `1.5` no step count. Relative paths of data and output are relative to the current directory, not to
the recipe. This module imports neither torch nor transformers, so that `--help` stays fast; the `method` section is
made from the methods themselves, which need torch, so they are imported when a recipe is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, Union, get_args

from pydantic import BaseModel, BeforeValidator, Field, SerializeAsAny, ValidationError, create_model, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from loralloc.errors import closest
from loralloc.methods.settings import BudgetSection
from loralloc.recipe.passthrough import (
    LOAD,
    MAPPINGS,
    PEFT,
    TRAINER,
    broken_options,
    exclusive_keys,
    option_keys,
    options_schema,
)
from loralloc.recipe.source import Key, apply_overrides, dotted, dump_yaml, read_recipe_file, suggest
from loralloc.setting_types import (
    AtLeastZero,
    Count,
    MethodSection,
    Phase,
    Positive,
    Section,
    Seed,
    Share,
    Text,
    broken_rule,
    is_number,
    is_text,
    shown,
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
        description="linear layers in few bits, the head aside: less memory; needs bitsandbytes",
    )
    trust_remote_code: bool = Field(default=False, description="run Python code that the model's repository carries")
    load: dict[str, Any] = Field(
        default={},
        description="more arguments of transformers' from_pretrained, by their own names",
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
    alpha: Positive = Field(default=24, description="scale of the update: alpha / r, fixed for the whole run")
    dropout: Share = Field(default=0.0, description="dropout before the adapter")
    target_modules: Names = Field(default="all-linear", description="all-linear, a list of names, or a pattern")
    exclude_modules: Names | None = Field(default=None, description="a list of names, or a pattern, left alone")
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
    warmup: Phase = Field(default=0.1, description="learning rate warm-up: fraction of the run, or steps")
    weight_decay: AtLeastZero = Field(default=0.0, description="decoupled weight decay")
    max_grad_norm: AtLeastZero = Field(default=1.0, description="gradient clipping; 0 turns it off")
    seed: Seed = Field(default=0, description="seed of everything that is random")
    eval_every: Count | None = Field(default=None, description="steps between evaluations; null: only at the end")
    save_every: Count | None = Field(default=None, description="steps between checkpoints; null: none")
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
    """Answers to held-out prompts, before training and after it. Only for task causal-lm."""

    max_new_tokens: Count = Field(default=128, description="tokens of an answer, at most")
    temperature: AtLeastZero = Field(default=0.0, description="0 takes the likeliest token; more lets chance in")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0, description="share of the likeliest tokens that chance chooses from"
    )
    metrics: list[Literal["exact_match", "bleu", "chrf", "rouge"]] = Field(
        default=[], description="what answers are compared with the references by"
    )
    after: Text | None = Field(
        default=None, description="exact_match compares what follows the last of these, such as ####"
    )
    samples: Count | None = Field(default=100, description="prompts to answer, the first ones; null: all")


class EvaluateConfig(Section):
    """What is evaluated beyond the task's own metrics."""

    generate: GenerateConfig | None = Field(default=None, description="answers to held-out prompts; null: none")


class Recipe(Section):
    """A whole run."""

    task: TaskName = Field(description="what the model learns to do")
    model: ModelConfig = Field(description="the pretrained model")
    data: DataConfig = Field(description="the data and its columns")
    method: SerializeAsAny[MethodSection] = Field(description="how ranks are allocated")
    lora: LoraSection = Field(default=LoraSection(), description="the adapter")
    plan: Text | None = Field(default=None, description="ranks.json of another run: start at its ranks and scale")
    training: TrainingConfig = Field(description="the run")
    evaluate: EvaluateConfig = Field(default=EvaluateConfig(), description="what is evaluated beyond the metrics")
    output: Text = Field(description="folder of the run")

    @model_validator(mode="after")
    def _obeys_rules(self) -> Self:
        _refuse(_broken_rules(self.model_dump()))
        return self


class _CompleteRecipe(Recipe):
    @model_validator(mode="after")
    def _obeys_its_method(self) -> Self:
        _refuse(_broken_by_method(self.model_dump()))
        return self


def _refuse(broken: Iterable[tuple[Key, str]]) -> None:
    if told := [f"{dotted(key)}: {message}" for key, message in broken]:
        raise ValueError("; ".join(told))


@cache
def complete_recipe() -> type[Recipe]:
    """Return the class of recipes in which the `method` section is one of the methods that there are.

    Raises:
        loralloc.errors.UserError: A package brings a method that cannot be imported.
    """
    from loralloc.methods.registry import sections

    method: Any = Union[tuple(sections().values())]  # noqa: UP007 - made at run time
    chosen: Any = (method, Field(discriminator="name", description="how ranks are allocated"))
    return create_model("Recipe", __base__=_CompleteRecipe, __doc__=Recipe.__doc__, method=chosen)


def _models(annotation: Any) -> list[type[BaseModel]]:
    kinds = [annotation, *get_args(annotation)]
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]


def _walk_keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, field in model.model_fields.items():
        yield prefix + name, field.description or ""
        for section in _models(field.annotation):
            yield from _walk_keys(section, f"{prefix}{name}.")


@cache
def recipe_keys() -> Mapping[str, str]:
    """Return the description of every key that a recipe may have, by the key with dots.

    Of a key that several methods have, the first one's.
    """
    walked = list(_walk_keys(complete_recipe()))
    return {**dict(walked), **dict(reversed(walked))}


def _keys_and_options() -> Mapping[str, str]:
    """The same, with the options of the libraries underneath."""
    return {**recipe_keys(), **option_keys()}


_EXCLUSIVE: dict[Key, tuple[str, ...]] = {
    ("method", "budget"): tuple(BudgetSection.model_fields),
    ("training",): ("steps", "epochs"),
}


def _exclusive() -> Iterator[Sequence[Key]]:
    """Keys of which at most one may be set."""
    yield from ([(*section, name) for name in members] for section, members in _EXCLUSIVE.items())
    yield from exclusive_keys()


def _get(tree: Any, *key: str) -> Any:
    for part in key:
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree


def _broken_rules(tree: Mapping[str, Any]) -> Iterator[tuple[Key, str]]:
    """Check what no single key can: yields (key, message). The values may be of any type."""
    for section, members in _EXCLUSIVE.items():
        values = _get(tree, *map(str, section))
        if isinstance(values, Mapping):
            chosen = [name for name in members if values.get(name) is not None]
            if len(chosen) != 1:
                listed_keys = " and ".join(chosen) or "none of them"
                key = (*section, chosen[-1]) if chosen else section
                yield key, f"{dotted(section)} needs exactly one of {', '.join(members)}; got {listed_keys}"
    yield from _broken_columns(tree)
    if _get(tree, "evaluate", "generate") is not None and tree.get("task") not in ("causal-lm", None):
        yield ("evaluate", "generate"), f"evaluate.generate is for task causal-lm, but the task is {tree.get('task')}"
    capacity, target = _value_of(tree, {})("lora", "r"), _get(tree, "method", "budget", "average_rank")
    patterned = _get(tree, "lora", "peft", "rank_pattern")  # whose ranks are not lora.r
    if is_number(capacity) and is_number(target) and target > capacity and not patterned:
        yield (
            ("method", "budget", "average_rank"),
            f"method.budget.average_rank is {target}, but no layer can exceed lora.r, which is {capacity}. "
            "Lower the one or raise the other (AdaLoRA starts at about 1.5 times its target)",
        )


def _broken_columns(tree: Mapping[str, Any]) -> Iterator[tuple[Key, str]]:
    """The columns that a task needs, and those that mean nothing to it."""
    name, data = tree.get("task"), tree.get("data")
    if not isinstance(name, str) or name not in TASKS or not isinstance(data, Mapping):
        return
    task, set_keys = TASKS[name], {key for key, value in data.items() if value is not None}
    keys = dict.fromkeys(key for other in TASKS.values() for key in other.keys)
    for key in keys:
        if data.get(key) not in (None, DataConfig.model_fields[key].default) and key not in task.keys:
            others = listed(other for other, its in TASKS.items() if key in its.keys)
            yield ("data", key), f"data.{key} is for task {others}, but the task is {name}"
    least, reason = task.shortest
    length = data.get("max_length")
    if isinstance(length, int) and 1 <= length < least:
        yield ("data", "max_length"), f"data.max_length must be at least {least}: {reason}"
    yield from _broken_stream(tree, data)
    if task.recognised and not any(set_keys & set(form) for form in task.forms):
        return
    if len(task.forms) == 1:
        for key in task.forms[0]:
            if key not in set_keys:
                description = task.data.model_fields[key].description
                yield ("data", key), f'missing "{key}" in "data": {description}'
        return
    chosen = [form[0] for form in task.forms if form[0] in set_keys]
    if len(chosen) != 1 and (chosen or not any(set_keys & set(form) for form in task.forms)):
        forms = ", ".join(" with ".join(form) for form in task.forms)
        rule = f"data needs exactly one of {forms} for task {name}"
        yield ("data", *chosen[-1:]), f"{rule}; got {' and '.join(chosen) or 'none of them'}"
    for form in task.forms:
        if set_keys & set(form):
            for key in form:
                if key not in set_keys:
                    partner = next(other for other in form if other in set_keys)
                    yield ("data", partner), f"data.{partner} needs data.{key} as well"


def _broken_stream(tree: Mapping[str, Any], data: Mapping[str, Any]) -> Iterator[tuple[Key, str]]:
    """What streamed data cannot do: nobody knows how many there are, and nothing can be cut off them."""
    if data.get("streaming") is not True:
        return
    reason = "data.streaming reads the training data while training"
    if _get(tree, "training", "steps") is None:
        yield ("data", "streaming"), f"{reason}, so their number is not known; set training.steps"
    if not is_text(data.get("validation")):
        yield ("data", "streaming"), f"{reason}, so nothing can be cut off; name a file in data.validation"
    if isinstance(data.get("train"), list) and not all(map(is_text, data["train"])):
        yield ("data", "streaming"), f"{reason}, one source after the other; take the weights out of data.train"


def _broken_by_method(tree: Mapping[str, Any]) -> Iterator[tuple[Key, str]]:
    """The rules of the recipe's method, and of the libraries that it hands options to."""
    from loralloc.methods.registry import broken_rules, sections

    yield from broken_options(tree, _keys_and_options())
    name = _get(tree, "method", "name")
    if not isinstance(name, str) or name not in sections():
        return
    value = _value_of(tree, sections()[name].model_fields)
    yield from broken_rules(name, value)
    looks_at = value("method", "validation")
    task = TASKS.get(str(tree.get("task")))
    if looks_at is not None and task is not None and not task.own_loss:
        yield (
            ("method", "name"),
            f"{name} learns ranks from the loss of a batch, which task {tree.get('task')} does not have: its loss "
            "compares two answers; use adalora or allora",
        )
    if looks_at not in (None, "validation") and _get(tree, "data", "streaming") is True:
        yield (
            ("method", "validation"),
            f"method.validation is {looks_at}, but nothing can be cut off data that are streamed; set it to "
            "validation, or take data.streaming out",
        )


def _value_of(tree: Mapping[str, Any], method: Mapping[str, FieldInfo]) -> Callable[..., Any]:
    """Look keys up in a recipe, with the defaults of `lora` and of the method."""
    defaults = {"lora": LoraSection.model_fields, "method": method}

    def value(*key: str) -> Any:
        found, declared = _get(tree, *key), defaults.get(key[0], {}).get(key[-1])
        if found is None and len(key) == 2 and declared is not None and not declared.is_required():
            return declared.default
        return found

    return value


Check = Callable[[Recipe], Iterable[tuple[Key, str]]]
"""Finds what is wrong with a recipe: keys, and for each of them a message."""


def listed(names: Iterable[str]) -> str:
    """Join names for a message.

    >>> listed(["adalora", "uniform", "lora"])
    'adalora, uniform or lora'
    """
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


def _in_section(key: Key) -> str:
    return f' in "{dotted(key[:-1])}"' if key[:-1] else ""


def _unknown(key: Key, tree: Mapping[str, Any]) -> str:
    name, where = key[-1], _in_section(key)
    if dotted(key) in recipe_keys():
        return f'"{name}"{where} does not apply to method {_get(tree, "method", "name")}: remove it'
    return f'unknown key "{name}"{where}.{suggest(key, _keys_and_options())}'


def method_names() -> Sequence[str]:
    """Return what a recipe may call a method."""
    from loralloc.methods.registry import sections

    return list(sections())


def _description(key: Key, tree: Mapping[str, Any]) -> str:
    """What a key is; of one that several methods have, what it is to the recipe's."""
    from loralloc.methods.registry import sections

    section = sections().get(_get(tree, "method", "name"))
    if section is not None and len(key) == 2 and key[0] == "method" and key[1] in section.model_fields:
        return section.model_fields[str(key[1])].description or ""
    return recipe_keys()[dotted(key)]


def _explain(error: ErrorDetails, tree: Mapping[str, Any]) -> tuple[Key, str]:
    kind = error["type"]
    key: Key = tuple(error["loc"])
    if key[:1] == ("method",) and key[1:2] and key[1] in method_names():  # pydantic adds which class it tried
        key = (key[0], *key[2:])
    if kind == "extra_forbidden":
        return key, _unknown(key, tree)
    if kind == "union_tag_not_found":
        key = (*key, "name")
    if kind in ("missing", "union_tag_not_found"):
        return key, f'missing "{key[-1]}"{_in_section(key)}: {_description(key, tree)}'
    value, hint = error["input"], ""
    if kind == "union_tag_invalid":
        key, value = (*key, "name"), error.get("ctx", {})["tag"]
        rule, hint = f"must be {listed(method_names())}", closest(str(value), method_names())
    else:
        rule = broken_rule(error)
    return key, f"{dotted(key)} {rule}, got {shown(value)}.{hint}".removesuffix(".")


def load_recipe(path: Path, overrides: Sequence[str] = (), check: Check | None = None) -> Recipe:
    """Read a recipe: defaults, then the file, then flags.

    Args:
        path: The YAML file.
        overrides: Words left over on the command line, such as `["--training.steps", "100"]` or
            `["--learning-rate=5e-4"]`.
        check: What else to ask of a recipe that is complete; each key it yields is told with its line or flag.

    Returns:
        The recipe, complete and checked.

    Raises:
        loralloc.errors.UserError: With every mistake, one a line, each with its line or flag.
    """
    source = read_recipe_file(path)
    apply_overrides(source, overrides, _keys_and_options(), _exclusive(), MAPPINGS)
    source.report(_broken_rules(source.tree))
    source.report(_broken_by_method(source.tree))
    try:
        recipe = complete_recipe().model_validate(source.tree)
    except ValidationError as error:
        # An error without a location repeats the broken rules.
        source.report(_explain(detail, source.tree) for detail in error.errors() if detail["loc"])
        source.raise_problems()
        raise
    source.raise_problems()  # keys that are set twice, flags that mean nothing
    if check is not None:
        source.report(check(recipe))
        source.raise_problems()
    return recipe


def peek_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe | None:
    """Read a recipe without its method, which takes seconds to import: for what can be refused before that.

    Args:
        path: The YAML file.
        overrides: As for `load_recipe`.

    Returns:
        The recipe, its `method` unchecked; None where `load_recipe` would have something to say about the rest.

    Raises:
        loralloc.errors.UserError: There is no such file, or it is no recipe at all.
    """
    source = read_recipe_file(path)
    keys = dict(_walk_keys(Recipe))
    apply_overrides(source, overrides, keys, [*_exclusive()])
    try:
        return Recipe.model_validate(source.tree)
    except ValidationError:
        return None


def dump_recipe(recipe: Recipe) -> str:
    """Write a recipe with all its defaults, as YAML that loads back to an equal recipe.

    Args:
        recipe: The recipe.

    Returns:
        The text. Keys that are not set (null) are left out.
    """
    return dump_yaml(recipe.model_dump(exclude_none=True))
