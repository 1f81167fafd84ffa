"""Names of modules: which layer a module is in, and how messages refer to groups of modules.

PEFT matches a list entry of `target_modules` or `exclude_modules` with the module of exactly this name, and with every
module whose name ends in a dot and the entry. A string instead of a list is a regular expression for the whole name.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

LONGEST, DEEPEST = 512, 32
"""Most characters and most dot-separated parts of a module's name; existing models use about a fifth of that."""


def is_module_name(value: Any) -> bool:
    r"""Whether a value from a file can be the name of a module, and is safe to print.

    >>> is_module_name("layers.0.fc"), is_module_name(""), is_module_name("fc\x1b[2J"), is_module_name("x" * 513)
    (True, False, False, False)
    """
    whole = isinstance(value, str) and 0 < len(value) <= LONGEST
    return whole and value.isprintable() and value.count(".") < DEEPEST


def ends_in(name: str, end: str) -> bool:
    """Whether PEFT would take a listed entry to mean this module.

    >>> ends_in("layers.0.fc", "fc"), ends_in("layers.0.fc", "0.fc"), ends_in("layers.0.fc", "c")
    (True, True, False)
    """
    return name == end or name.endswith(f".{end}")


def common_ends(names: Iterable[str], others: Collection[str]) -> list[str]:
    """Return the shortest name endings that match these modules and none of the others; the whole name if none does.

    >>> common_ends(["layers.0.mlp.gate", "layers.1.mlp.gate"], ["layers.0.mlp.up", "layers.1.mlp.up"])
    ['gate']
    >>> common_ends(["layers.0.mlp.up", "layers.1.mlp.up"], ["layers.0.expert.up"])
    ['mlp.up']
    """
    found: list[str] = []
    for name in names:
        if not any(ends_in(name, end) for end in found):
            parts = name.split(".")
            ends = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
            found.append(next((end for end in ends if not any(ends_in(other, end) for other in others)), name))
    return found


def named(names: Sequence[str], others: Collection[str]) -> str:
    """Say which modules are meant, as the subject of a sentence.

    >>> named(["layers.0.q"], ["layers.1.q"]), named(["layers.0.q", "layers.1.q"], ["layers.0.k"])
    ('layers.0.q', '2 layers whose names end in q')
    """
    if len(names) == 1:
        return names[0]
    if not others:
        return f"all {len(names)} adapted layers"
    return f"{len(names)} layers whose names end in {', '.join(common_ends(names, others))}"


def selecting(names: Sequence[str], others: Collection[str]) -> list[str] | str:
    """Return what makes PEFT select these modules and none of the others: a list of name endings, or else a pattern.

    >>> selecting(["a.fc", "b.fc"], ["a.up"]), selecting(["fc"], ["block.fc"])
    (['fc'], 'fc')
    """
    ends = list(names) if len(names) == 1 else common_ends(names, others)
    if any(ends_in(other, end) for end in ends for other in others):
        return "|".join(map(re.escape, names))
    return ends


def excluding(names: Sequence[str], others: Collection[str], already: Iterable[str] | str | None) -> str:
    r"""Return the argument of LoraConfig that excludes these modules, in addition to those it excludes already.

    Args:
        names: The modules to leave out.
        others: The other adapted modules.
        already: `exclude_modules` of the adapter's config.

    >>> excluding(["a.fc", "b.fc"], ["a.up"], {"head"})
    'exclude_modules=["head", "fc"]'
    >>> excluding(["fc"], ["block.fc"], ["head"])
    'exclude_modules="(.*\\\\.)?head|fc"'
    """
    return f"exclude_modules={json.dumps(joined(already, selecting(names, others)))}"


def joined(already: Iterable[str] | str | None, more: Sequence[str] | str) -> list[str] | str:
    r"""Return `exclude_modules` with more of them: a list of names, or a pattern if either is one.

    >>> joined({"head"}, ["fc"]), joined(None, "fc"), joined(r".*\.0\..*", ["fc"])
    (['head', 'fc'], 'fc', '.*\\.0\\..*|(.*\\.)?fc')
    """
    if isinstance(already, str) or isinstance(more, str):
        return "|".join(filter(None, map(_pattern, (already, more))))
    return [*sorted(already or ()), *more]


def _pattern(entries: Iterable[str] | str | None) -> str:
    """A regular expression that is equivalent to a list of entries; a string is one already."""
    if isinstance(entries, str):
        return entries
    return "|".join(rf"(.*\.)?{re.escape(entry)}" for entry in sorted(entries or ()))


def sort_names(config: Any) -> None:
    """Sort the names of modules in a config, so that equal adapters are saved as equal bytes.

    PEFT keeps them in sets and saves them in iteration order, which differs between processes.

    Args:
        config: A LoraConfig, changed in place.
    """
    for key in ("target_modules", "exclude_modules"):
        names = getattr(config, key)
        if isinstance(names, set):
            setattr(config, key, sorted(names))


@contextmanager
def sorted_names(config: Any) -> Iterator[None]:
    """Have the names of modules in a config sorted inside; what else PEFT does with them needs its sets.

    Args:
        config: A LoraConfig.
    """
    before = config.target_modules, config.exclude_modules
    sort_names(config)
    try:
        yield
    finally:
        config.target_modules, config.exclude_modules = before


class Place(NamedTuple):
    """Where a module is: the name before its layer's number, the number, and the name after it."""

    stack: str
    layer: int
    kind: str


def places(names: Iterable[str]) -> list[Place | None]:
    """Find the layer of every module.

    The layer is the first number in a name that varies across the model. Numbers after it belong to experts or to the
    parts of a T5 block; a wrapper may put a constant number before it. If no number varies, the layer is the first one.

    Args:
        names: The names of all modules.

    Returns:
        One place a name; None for a module outside of the layers.

    >>> places(["0.layers.0.q", "0.layers.1.experts.7.up", "head"])
    [Place(stack='0.layers', layer=0, kind='q'), Place(stack='0.layers', layer=1, kind='experts.7.up'), None]
    """
    numbered = [(name, _numbers(name)) for name in names]
    values: dict[str, set[str]] = {}
    for name, numbers in numbered:
        for before, at in numbers:
            values.setdefault(before, set()).add(name.split(".")[at])
    found: list[Place | None] = []
    for name, numbers in numbered:
        at = next((at for before, at in numbers if len(values[before]) > 1), numbers[0][1] if numbers else None)
        parts = name.split(".")
        if at is None:
            found.append(None)
        else:
            found.append(Place(".".join(parts[:at]), int(parts[at]), ".".join(parts[at + 1 :])))
    return found


def _numbers(name: str) -> list[tuple[str, int]]:
    """The numbers in a name: for each, the name before it with earlier numbers as `*`, and its index among the parts.

    >>> _numbers("encoder.block.3.layer.0.q")
    [('encoder.block', 2), ('encoder.block.*.layer', 4)]
    """
    numbers, before = [], []
    for at, part in enumerate(name.split(".")):
        # `isdecimal` alone also accepts the digits of other scripts, `isdigit` superscripts.
        number = part.isascii() and part.isdecimal()
        if number:
            numbers.append((".".join(before), at))
        before.append("*" if number else part)
    return numbers


def kind_of(name: str) -> str:
    """Return a module's name without the numbers in it.

    >>> kind_of("model.layers.11.mlp.up_proj")
    'model.layers.mlp.up_proj'
    """
    return ".".join(part for part in name.split(".") if not part.isdecimal())


def short_names(types: Sequence[str]) -> dict[str, str]:
    """Return for each type the shortest run of consecutive parts that no other type has; on a tie, the last such run.

    >>> short_names(["attention.output.dense", "output.dense", "attention.self.query"])
    {'attention.output.dense': 'attention.output', 'output.dense': 'output.dense', 'attention.self.query': 'query'}
    """
    runs = {name: _runs(name.split(".")) for name in types}
    found_in = Counter(run for name, several in runs.items() for run in {name, *several})
    return {name: next((run for run in several if found_in[run] == 1), name) for name, several in runs.items()}


def _runs(parts: Sequence[str]) -> list[str]:
    """All runs of consecutive parts except the whole name: shorter ones first, later ones before earlier ones."""
    return [
        ".".join(parts[at : at + length])
        for length in range(1, len(parts))
        for at in reversed(range(len(parts) - length + 1))
    ]
