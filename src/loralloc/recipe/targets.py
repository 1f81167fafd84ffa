"""Check the modules that a recipe names: if an entry fits none, less would be trained than the recipe says."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from peft import LoraConfig, PeftModel
from torch import nn

from loralloc.errors import UserError, closest, either
from loralloc.patterns import AT_LAYERS, ENDING, PatternError, check, fitting
from loralloc.peft_layers import lora_adapter, lora_layers
from loralloc.quantized import quantized_layers
from loralloc.recipe.sections import LoraSection
from loralloc.tasks.spec import TASKS

_NOT_TAKEN_APART = re.compile(r"\(\?(?!:)|\\[1-9]")
"""What makes parts of a pattern depend on each other: flags, assertions, references."""


def check_entries(lora: LoraSection, model: nn.Module, planned: bool) -> None:
    """Refuse the names and patterns of a recipe that fit no module, compared as PEFT does.

    Args:
        lora: The recipe's section.
        model: The base model, without an adapter.
        planned: Whether a plan decides which modules are adapted.

    Raises:
        UserError: With a line for each key at fault.
    """
    names = [name for name, _ in model.named_modules() if name]
    found = {}
    if not planned:
        every_linear = isinstance(lora.target_modules, str) and lora.target_modules.lower() == "all-linear"
        found["target_modules"] = "" if every_linear else _problem(lora.target_modules, names)
        found["exclude_modules"] = _problem(lora.exclude_modules, names)
    # PEFT compares modules_to_save with the ends of all names, shared modules too; an end need not follow a dot.
    every = [name for name, _ in model.named_modules(remove_duplicate=False)]
    unknown = [entry for entry in lora.modules_to_save or [] if not any(name.endswith(entry) for name in every)]
    found["modules_to_save"] = _no_such(unknown, every)
    found |= {f"peft.{key}": _pattern_error(patterns, names, ENDING) for key, patterns in _patterns(lora)}
    found["peft.layers_pattern"] = _pattern_error(_listed(lora.peft.get("layers_pattern")), names, AT_LAYERS)
    _check_trainable(lora.modules_to_save or (), model)
    lines = [
        f"lora.{key}: {problem}; the model has {linear_modules(model)}" for key, problem in found.items() if problem
    ]
    if lines:
        raise UserError("\n".join(lines))


def check_patterns(lora: LoraSection, adapted: Sequence[str]) -> None:
    """Refuse patterns of `lora.peft` that fit no adapted module, compared as PEFT does; it would ignore them.

    Args:
        lora: The recipe's section.
        adapted: Names of the adapted modules.

    Raises:
        UserError: With the pattern and the name that was most likely meant.
    """
    for key, patterns in _patterns(lora):
        for pattern, fits in zip(patterns, fitting(patterns, adapted, ENDING), strict=True):
            if not fits:
                raise UserError(
                    f'lora.peft.{key}: no adapted module fits "{pattern}".{_nearest_within(pattern, adapted)} '
                    "Correct it or leave it out"
                )


def check_ranks(config: LoraConfig, model: nn.Module) -> None:
    """Refuse ranks above the dimensions of the widest layer, before PEFT allocates memory for them.

    Args:
        config: The adapter configuration.
        model: The base model.

    Raises:
        UserError: With the rank and the dimensions.
    """
    widest = max((size for _, module in _linear_layers(model) for size in _features(module)), default=0)
    rank = max([config.r, *(config.rank_pattern or {}).values()])
    if 0 < widest < rank:
        raise UserError(
            f"lora.r: rank {rank} is above the {widest} dimensions of the model's widest layer; lower it to "
            f"{widest} at most"
        )


def _patterns(lora: LoraSection) -> Iterator[tuple[str, Sequence[str]]]:
    """The patterns to which `lora.peft` gives ranks or scales of their own."""
    return ((key, list(lora.peft.get(key, ()))) for key in ("rank_pattern", "alpha_pattern"))


def _listed(entries: str | Sequence[str] | None) -> Sequence[str]:
    """Return one entry or several, as PEFT takes them, as a sequence."""
    return [entries] if isinstance(entries, str) else entries or ()


def _pattern_error(patterns: Sequence[str], names: Sequence[str], around: str) -> str:
    """Say which pattern is invalid or takes too long to match; an empty string if all can be used."""
    try:
        check(patterns, names, around)
    except PatternError as error:
        return str(error)
    return ""


def _check_trainable(entries: Sequence[str], model: nn.Module) -> None:
    """Refuse `modules_to_save` whose weights are in 4 or 8 bits."""
    quantized = [name for name, _ in quantized_layers(model)]
    for entry in entries:
        ends = re.compile(rf".*{re.escape(entry)}(\..+)?")
        if found := next(filter(ends.fullmatch, quantized), None):
            raise UserError(
                f"lora.modules_to_save: {found} is quantised (model.load_in), and what is quantised cannot be trained "
                f'in full; take "{entry}" out, or load the model without model.load_in'
            )


def check_new(model: nn.Module, adapted: nn.Module) -> None:
    """Refuse an adapter that leaves out weights missing from the checkpoint: each load would draw them at random.

    Args:
        model: The base model; its `new_parameters` are the names of the weights that the checkpoint lacks.
        adapted: The same model with its adapter.

    Raises:
        UserError: With the modules that must be trained in full.
    """
    new: Iterable[str] = getattr(model, "new_parameters", ())
    trained = {
        name.replace("modules_to_save.default.", "").removeprefix("base_model.model.")
        for name, parameter in adapted.named_parameters()
        if parameter.requires_grad
    }
    left = dict.fromkeys(name.rpartition(".")[0] for name in sorted(new) if name not in trained)
    if left:
        raise UserError(
            f"lora.modules_to_save: the checkpoint has no weights of {', '.join(left)}; drawn at random, they would "
            f"neither be trained nor exported. Add them to lora.modules_to_save: [{', '.join(left)}]"
        )


def check_output_layer(task: str, model: PeftModel, key: str, cure: str) -> None:
    """Refuse an adapter on the layer that gives the logits, where TRL trains: it takes that layer's weight alone.

    Args:
        task: The recipe's task.
        model: The adapted model.
        key: What names the adapted modules, for the message.
        cure: What to do, for the message.

    Raises:
        UserError: With the layer's name.
    """
    if not TASKS[task].arguments.startswith("trl."):
        return
    base: Any = model.get_base_model()
    head = base.get_output_embeddings()
    for name, layer in lora_layers(model, lora_adapter(model, None)):
        if layer is head:
            raise UserError(
                f"{key}: {name} has an adapter, and TRL, which trains task {task}, computes the logits from the weight "
                f"of {name} without it; {cure}"
            )


def linear_modules(model: nn.Module) -> str:
    """List the names of linear layers with how often they occur, for a message."""
    names = Counter(name.rpartition(".")[2] for name, _ in _linear_layers(model))
    return ", ".join(f"{name} ({count})" for name, count in names.most_common()) or "no linear layers"


def _linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        kind = type(module).__name__
        if "Linear" in kind or kind == "Conv1D":
            yield name, module


def _features(layer: Any) -> tuple[int, ...]:
    """Inputs and outputs of a linear layer, in either order; empty if the module does not have such sizes."""
    if hasattr(layer, "in_features") and hasattr(layer, "out_features"):
        return layer.in_features, layer.out_features
    return tuple(getattr(getattr(layer, "weight", None), "shape", ()))


def _problem(entries: str | Sequence[str] | None, names: Sequence[str]) -> str:
    if isinstance(entries, str):
        return _pattern_problem(entries, names)
    ends = {end for name in names for end in _ends(name)}
    return _no_such([entry for entry in entries or () if entry not in ends], names)


def _ends(name: str) -> Iterator[str]:
    """The ends of a module's name that begin after a dot, and the whole name."""
    parts = name.split(".")
    return (".".join(parts[at:]) for at in range(len(parts)))


def _no_such(entries: Sequence[str], names: Sequence[str]) -> str:
    if not entries:
        return ""
    quoted = either(f'"{entry}"' for entry in entries)
    return (
        f"no module is named {quoted}.{''.join(_nearest(entry, names) for entry in entries)} Correct it or leave it out"
    )


def _nearest(entry: str, names: Sequence[str]) -> str:
    """Suggest the end of a module's name that was most likely meant, with as many parts as the entry."""
    length = entry.count(".") + 1
    return closest(entry, dict.fromkeys(".".join(name.split(".")[-length:]) for name in names))


def _nearest_within(pattern: str, names: Sequence[str]) -> str:
    """Suggest a name for an unknown word of a pattern: for the first one that resembles a name."""
    parts = {part for name in names for part in name.split(".")}
    unknown = (word for word in re.findall(r"\w+", pattern) if word not in parts)
    return next(filter(None, (closest(word, parts) for word in unknown)), "")


def _pattern_problem(pattern: str, names: Sequence[str]) -> str:
    try:
        if not fitting([pattern], names)[0]:
            single = any(pattern in _ends(name) for name in names)
            named = f" A name is written in a list: [{pattern}]"
            return f'no module fits the pattern "{pattern}".' + (
                named if single else f"{_nearest_within(pattern, names)} Correct it"
            )
        alternatives = list(_alternatives(pattern))
        fits = fitting([narrowed for _, narrowed in alternatives], names)
    except PatternError as error:
        return str(error)
    for (part, _), fitted in zip(alternatives, fits, strict=True):
        if not fitted:
            return (
                f'no module fits the part "{part}" of the pattern "{pattern}".{_nearest_within(part, names)} '
                "Correct it or leave it out"
            )
    return ""


def _alternatives(pattern: str) -> Iterator[tuple[str, str]]:
    """Yield every alternative of a pattern, and the pattern with that one alone in place of its siblings.

    >>> list(_alternatives("self.(query|value)"))
    [('query', 'self.(query)'), ('value', 'self.(value)')]
    """
    if _NOT_TAKEN_APART.search(pattern):
        return
    branches = _split(pattern)
    if len(branches) > 1 and "" not in branches:  # with an empty one, the others are optional
        yield from ((branch, branch) for branch in branches)
    for branch in branches:
        for start, end in _groups(branch):
            for part, inner in _alternatives(branch[start:end]):
                yield part, branch[:start] + inner + branch[end:]


def _marks(pattern: str) -> Iterator[tuple[int, str]]:
    """The parentheses and bars of a pattern that are not escaped and in no set of characters."""
    tokens = re.finditer(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|[()|]", pattern, re.S)
    return ((token.start(), token[0]) for token in tokens if token[0] in "()|")


def _split(pattern: str) -> list[str]:
    depth, start, branches = 0, 0, []
    for at, mark in _marks(pattern):
        depth += {"(": 1, ")": -1, "|": 0}[mark]
        if mark == "|" and depth == 0:
            branches.append(pattern[start:at])
            start = at + 1
    return [*branches, pattern[start:]]


def _groups(branch: str) -> Iterator[tuple[int, int]]:
    """Where the outermost groups begin and end; not of repeated ones, which may need several alternatives at once."""
    depth, start = 0, 0
    for at, mark in _marks(branch):
        if mark == "(":
            start = at + (3 if branch.startswith("(?:", at) else 1) if depth == 0 else start
            depth += 1
        elif mark == ")":
            depth -= 1
            if depth == 0 and branch[at + 1 : at + 2] not in ("*", "+", "{"):
                yield start, at
