"""Rules over several keys of a recipe: keys that exclude each other, columns of a task, rules of a method."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, get_args

from pydantic.fields import FieldInfo

from loralloc.budget import AMOUNTS
from loralloc.errors import closest, either
from loralloc.recipe.sections import VARIANT, DataConfig, GenerateConfig, LoraSection, Peer
from loralloc.recipe.source import Key, dotted, get
from loralloc.setting_types import is_number, is_text
from loralloc.tasks.locations import is_weighted
from loralloc.tasks.spec import TASKS, WRITTEN

EXCLUSIVE: dict[Key, tuple[str, ...]] = {
    ("method", "budget"): AMOUNTS,
    ("training",): ("steps", "epochs"),
}
"""Sections, and their keys of which exactly one must be set."""

ALONE: dict[Key, str] = {("method", "budget"): "max_rank"}
"""A key of such a section that suffices without any of them."""


SPLITS = ("validation", "test")
"""Names by which results tell the recipe's own data to evaluate on."""


def _too_large(value: Any, key: Key = ()) -> Iterator[tuple[Key, str]]:
    """Whole numbers of more than 64 bits, in which the libraries cannot count."""
    if isinstance(value, Mapping | list):
        for name, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _too_large(inner, (*key, name))
    elif type(value) is int and value >= 2**63:
        yield key, f"{dotted(key)} must be below {2**63}, got {value if value < 10**30 else 'a much larger number'}"


def broken_rules(tree: Mapping[str, Any]) -> Iterator[tuple[Key, str]]:
    """Check rules over several keys: yields (key, message). The values may be of any type."""
    for section, members in EXCLUSIVE.items():
        values = get(tree, *section)
        if isinstance(values, Mapping):
            chosen = [name for name in members if values.get(name) is not None]
            alone = ALONE.get(section)
            if len(chosen) > 1 or not (chosen or values.get(alone) is not None):
                listed_keys = " and ".join(chosen) or "none of them"
                key = (*section, chosen[-1]) if chosen else section
                needs = f"exactly one of {', '.join(members)}" + ("" if alone is None else f", or {alone} alone")
                yield key, f"{dotted(section)} needs {needs}; got {listed_keys}"
    yield from _too_large(tree)
    yield from _broken_names(tree)
    yield from _broken_columns(tree)
    yield from _broken_metric(tree)
    yield from _broken_judging(tree)
    writers, task = [name for name, task in TASKS.items() if task.generates], tree.get("task")
    if get(tree, "evaluate", "generate") is not None and task not in (*writers, None):
        yield ("evaluate", "generate"), f"evaluate.generate is for task {either(writers)}, but the task is {task}"
    yield from _broken_generation(get(tree, "evaluate", "generate"))
    if get(tree, "evaluate", "generate") is not None and get(tree, "data", "packing") == "wrapped":
        yield (
            ("evaluate", "generate"),
            "evaluate.generate answers prompts, and data.packing: wrapped cuts them anywhere; set it to bfd or none",
        )
    capacity, target = _value_of(tree, {})("lora", "r"), get(tree, "method", "budget", "average_rank")
    patterned = get(tree, "lora", "peft", "rank_pattern")  # it sets ranks other than lora.r
    if is_number(capacity) and is_number(target) and target > capacity and not patterned:
        yield (
            ("method", "budget", "average_rank"),
            f"method.budget.average_rank is {target}, but no layer can exceed lora.r, which is {capacity}. "
            "Lower the one or raise the other (AdaLoRA starts at about 1.5 times its target)",
        )
    cap = get(tree, "method", "budget", "max_rank")
    if is_number(cap) and is_number(target) and target > cap:
        yield (
            ("method", "budget", "max_rank"),
            f"method.budget.max_rank is {cap}, so average_rank {target} is impossible; "
            "raise the one or lower the other",
        )


def _broken_names(tree: Mapping[str, Any]) -> Iterator[tuple[Key, str]]:
    """Names of more data that are those of other rows wherever metrics are shown."""
    also = get(tree, "data", "also")
    for name in SPLITS:
        if isinstance(also, Mapping) and name in also:
            yield ("data", "also", name), f"data.also.{name}: the results have data.{name} by this name; choose another"


def _broken_metric(tree: Mapping[str, Any]) -> Iterator[tuple[Key, str]]:
    """A metric that the task does not have."""
    metric, task = get(tree, "evaluate", "metric"), TASKS.get(str(tree.get("task")))
    if is_text(metric) and task is not None and metric not in task.metrics:
        near = closest(metric, task.metrics)
        yield ("evaluate", "metric"), f"evaluate.metric must be {either(task.metrics)}, found {metric}.{near}"
    elif is_text(metric) and task is not None and task.generates:
        source = next((name for name, figures in WRITTEN.items() if metric in figures), None)
        if source is not None and source not in (get(tree, "evaluate", "generate", "metrics") or ()):
            yield (
                ("evaluate", "metric"),
                f"evaluate.metric: {metric} judges what the model writes; add {source} to evaluate.generate.metrics",
            )


def _broken_judging(tree: Mapping[str, Any]) -> Iterator[tuple[Key, str]]:
    """Early stopping and keep_best need evaluations during training; keep_best also a checkpoint with each."""
    keep_best, patience = get(tree, "training", "keep_best") is True, get(tree, "training", "early_stopping")
    every, saved = get(tree, "training", "eval_every"), get(tree, "training", "save_every")
    for name, asked in {"keep_best": keep_best, "early_stopping": patience is not None}.items():
        if asked and every is None:
            yield (
                ("training", name),
                f"training.{name} judges by evaluations within the training; set training.eval_every",
            )
    if keep_best and every is not None and saved != every:
        yield (
            ("training", "keep_best"),
            f"training.keep_best brings an evaluated state back from its checkpoint; set training.save_every to {every}"
            ", as training.eval_every",
        )
    if keep_best and get(tree, "training", "trainer", "load_best_model_at_end") is not None:
        yield (
            ("training", "keep_best"),
            "training.keep_best is training.trainer.load_best_model_at_end, and more: leave that out",
        )


def _broken_generation(settings: Any) -> Iterator[tuple[Key, str]]:
    """Settings of `evaluate.generate` that contradict each other, or have no effect because of another one."""
    if get(settings, "after") is not None and "exact_match" not in (get(settings, "metrics") or ()):
        key = ("evaluate", "generate", "after")
        yield key, "evaluate.generate.after is for exact_match: add it to evaluate.generate.metrics"
    if get(settings, "top_p") not in (None, 1, 1.0) and not get(settings, "temperature"):
        yield (
            ("evaluate", "generate", "top_p"),
            "evaluate.generate.top_p is for sampling, and temperature 0 does not sample: set the temperature",
        )
    if get(settings, "length_penalty") not in (None, 1, 1.0) and get(settings, "num_beams") in (None, 1):
        yield (
            ("evaluate", "generate", "length_penalty"),
            "evaluate.generate.length_penalty compares beams, and there is one: set evaluate.generate.num_beams",
        )
    least, most = get(settings, "min_new_tokens"), get(settings, "max_new_tokens")
    most = GenerateConfig.model_fields["max_new_tokens"].default if most is None else most
    if is_number(least) and is_number(most) and least > most:
        yield (
            ("evaluate", "generate", "min_new_tokens"),
            f"evaluate.generate.min_new_tokens is {least}, above max_new_tokens, which is {most}; lower it",
        )


def lost_marker(tree: Mapping[str, Any]) -> Iterator[tuple[Key, str]]:
    """A marker that is there without a value: YAML takes #### for a comment, and whole answers would be compared.

    Args:
        tree: The recipe as it is in its file; a complete recipe has null where nothing is set.
    """
    settings = get(tree, "evaluate", "generate")
    if isinstance(settings, Mapping) and "after" in settings and settings["after"] is None:
        yield (
            ("evaluate", "generate", "after"),
            'evaluate.generate.after has no value: # begins a comment; quote the marker, as in "####", or take the key '
            "out",
        )


def _broken_columns(tree: Mapping[str, Any]) -> Iterator[tuple[Key, str]]:
    """Columns that a task needs and the recipe does not name, and keys that belong to other tasks."""
    name, data = tree.get("task"), tree.get("data")
    if not isinstance(name, str) or name not in TASKS or not isinstance(data, Mapping):
        return
    task, set_keys = TASKS[name], {key for key, value in data.items() if value is not None}
    keys = dict.fromkeys(key for other in TASKS.values() for key in other.keys)
    for key in keys:
        if data.get(key) not in (None, DataConfig.model_fields[key].default) and key not in task.keys:
            others = either(other for other, its in TASKS.items() if key in its.keys)
            yield ("data", key), f"data.{key} is for task {others}, but the task is {name}"
    least, reason = task.shortest
    length = data.get("max_length")
    if isinstance(length, int) and 1 <= length < least:
        yield ("data", "max_length"), f"data.max_length must be at least {least}: {reason}"
    if "streaming" in task.keys:
        yield from _broken_stream(tree, data)
    yield from _broken_words(data)
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


def _broken_words(data: Mapping[str, Any]) -> Iterator[tuple[Key, str]]:
    """Windows that would never advance, a tag scheme for data without tags, rows to test on that would not stay."""
    stride, length = data.get("stride"), data.get("max_length", DataConfig.model_fields["max_length"].default)
    if is_number(stride) and is_number(length) and stride >= length:
        yield (
            ("data", "stride"),
            f"data.stride is {stride}, but windows have data.max_length tokens, which is {length}, and share fewer",
        )
    if data.get("spans") is not None and data.get("scheme") not in (None, "bio"):
        yield ("data", "scheme"), "data.scheme is for data.tags; data.spans become BIO tags: take data.scheme out"
    if is_number(data.get("test")) and is_weighted(data.get("train")):
        yield (
            ("data", "test"),
            f"data.test is {data['test']}, but training data mixed by weights are others for every training.seed; name "
            "data to test on, or take the weights out of data.train",
        )


def _broken_stream(tree: Mapping[str, Any], data: Mapping[str, Any]) -> Iterator[tuple[Key, str]]:
    """Keys that streaming rules out: the number of rows is not known, and no share of them can be held out."""
    if data.get("streaming") is not True:
        return
    reason = "data.streaming reads the training data while training"
    if get(tree, "training", "steps") is None:
        yield ("data", "streaming"), f"{reason}, so their number is not known; set training.steps"
    for part in SPLITS:
        if is_number(data.get(part, DataConfig.model_fields[part].default)):
            yield ("data", "streaming"), f"{reason}, so nothing can be cut off; name a file in data.{part}"
    if is_weighted(data.get("train")):
        yield ("data", "streaming"), f"{reason}, one source after the other; take the weights out of data.train"


def broken_by_method(tree: Mapping[str, Any]) -> Iterator[tuple[Key, str]]:
    """The rules of the recipe's method, and of the methods that it compares."""
    from loralloc.methods import registry

    yield from _broken_comparison(tree, list(registry.sections()), list(registry.methods()))
    name = get(tree, "method", "name")
    if not isinstance(name, str) or name not in registry.sections():
        return
    value = _value_of(tree, registry.sections()[name].model_fields)
    yield from registry.broken_rules(name, value)
    looks_at = registry.source_of_examples(name, value)
    task = TASKS.get(str(tree.get("task")))
    if looks_at is not None and task is not None and not task.own_loss:
        learner = value("method", "allocate") or name
        yield (
            ("method", "name"),
            f"{learner} learns ranks from the loss of a batch, which task {tree.get('task')} does not have: its loss "
            "compares two answers; use adalora or allora",
        )
    if looks_at not in (None, "validation") and get(tree, "data", "streaming") is True:
        yield (
            ("method", "validation"),
            f"method.validation is {looks_at}, but nothing can be cut off data that are streamed; set it to "
            "validation, or take data.streaming out",
        )


def _broken_comparison(
    tree: Mapping[str, Any], known: Collection[str], methods: Collection[str]
) -> Iterator[tuple[Key, str]]:
    """Unknown methods in `compare.methods`, and invalid variants; `known` are the methods and plain LoRA."""
    variants, compared = get(tree, "compare", "variants"), get(tree, "compare", "methods")
    variants = variants if isinstance(variants, Mapping) else {}
    for variant, settings in variants.items():
        key, name = f"compare.variants.{variant}", get(variants, variant, "name")
        if not (is_text(variant) and re.fullmatch(VARIANT, variant)):
            yield ("compare", "variants"), f"{key}: a variant is named with lower-case letters, digits and _"
        elif variant in (*known, *get_args(Peer)):
            yield ("compare", "variants"), f"{key}: {variant} is the name of another contender; rename the variant"
        elif not is_text(name):
            yield ("compare", "variants"), f"{key}: name its method, as in {{name: adalora, parity: none}}"
        elif name not in methods:
            reason = f"{key}: there is no method {name}; there are {either(methods)}."
            yield ("compare", "variants"), reason + closest(name, methods)
        elif variant not in (compared if isinstance(compared, list) else [compared]):
            reason = f"{key}: this variant is not compared; add {variant} to compare.methods, or take the variant out"
            yield ("compare", "variants"), reason
        elif own := [setting for setting in ("budget", "rank_seed") if setting in settings]:
            yield ("compare", "variants"), f"{key}.{own[0]}: a comparison sets it for every contender; take it out"
    names = [*known, *map(str, variants)]
    for name in compared if isinstance(compared, list) else [compared]:
        if is_text(name) and name not in names:
            yield (
                ("compare", "methods"),
                f"compare.methods: there is no method {name}; there are {either(names)}." + (closest(name, names)),
            )


def _value_of(tree: Mapping[str, Any], method: Mapping[str, FieldInfo]) -> Callable[..., Any]:
    """Look keys up in a recipe, with the defaults of `lora` and of the method."""
    defaults = {"lora": LoraSection.model_fields, "method": method}

    def value(*key: str) -> Any:
        found, declared = get(tree, *key), defaults.get(key[0], {}).get(key[-1])
        if found is None and len(key) == 2 and declared is not None and not declared.is_required():
            return declared.default
        return found

    return value
