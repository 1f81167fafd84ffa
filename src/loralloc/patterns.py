r"""Regular expressions of recipes and adapters: tried on the names of modules before PEFT matches with them.

`(x+x+)+y` takes longer than a life on a name of forty x, and Python's matcher cannot be told to stop. So patterns are
tried in a process of their own, which the system ends when a limit of processor time is reached. Patterns without
repetition and choice, such as names, need no such care. Standard library only.

The names of modules are written here as patterns, too: for PEFT every key of `rank_pattern` and `alpha_pattern` is one.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

from loralloc.errors import UserError

ENDING = r"(.*\.)?({})"
"""What PEFT puts around a key of `rank_pattern` and `alpha_pattern`."""
SAVED = r"(^|.*\.){}($|\..*)"
"""The same of an entry of `modules_to_save`."""
AT_LAYERS = r"(?:^|.*?\.){}\.(?P<idx>\d+)\..*"
"""The same of an entry of `layers_pattern`."""

SECONDS = 0.3
"""Processor time for one pattern on all names: realistic patterns take a thousandth of it."""
SECONDS_A_NAME = 20e-6
"""Additional seconds per name, for models with tens of thousands of modules."""
MOST_PAIRS = 50_000_000
"""Most patterns times names; comparing that many takes about a minute."""
_WALL_SECONDS = 60.0
"""When to give up where the system cannot measure a process's time (Windows)."""

MANY = 400
"""Modules from which on one key stands for several (see `keyed`)."""

_HARMLESS = re.compile(r"\^?(?:[\w.,:/ -]|\\[^\w\s]|\(\d+(?:\|\d+)*\))*")
_PLAIN = re.compile(r"[\w.,:/ -]+")
"""Names in which only the dots mean something else in a regular expression: any character."""

_CHILD = """
import json, re, signal, sys
seconds, pairs, names = json.load(sys.stdin)
measured = hasattr(signal, "setitimer")
if measured:
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
for pattern, whole in pairs:
    if measured:
        signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        re.compile(pattern)
        fits = re.compile(whole).fullmatch
        found = [at for at, name in enumerate(names) if fits(name)]
    except (re.error, RecursionError, OverflowError, MemoryError) as error:
        found = str(error) or "too large"
    if measured:
        signal.setitimer(signal.ITIMER_PROF, 0)
    print(json.dumps(found), flush=True)
"""


_Value = TypeVar("_Value")


class PatternError(UserError):
    """A pattern is no regular expression, or takes too long."""


def keyed(values: Mapping[str, _Value]) -> dict[str, _Value]:
    r"""Return the `rank_pattern` or `alpha_pattern` that gives every module its own value, in whatever order.

    PEFT takes the first key that fits the end of a module's name, and sorts the keys when it saves them. So no key may
    fit a module with another value.

    Keys are names, or nearly. From `MANY` modules on, those of one value whose names differ in a number share one,
    such as `layers\.(0|3)\.v`: PEFT tries the keys on every module, and Python remembers 512 regular expressions; more
    are compiled again for every module. With 896 modules 896 keys took PEFT 19 s, and 84 took 1.4 s.

    Args:
        values: The values of all adapted modules, by their full names.

    >>> keyed({"layers.0.v": 2, "vision.layers.0.v": 4, "layers.0.k": 2, "vision.layers.0.k": 2})
    {'^layers\\.0\\.v': 2, 'vision.layers.0.v': 4, 'layers.0.k': 2, 'vision.layers.0.k': 2}
    """
    others = {value: [name for name in values if values[name] != value] for value in set(values.values())}
    groups = [[name] for name in values] if len(values) < MANY else _alike(values)
    return {_key_of_all(names, others[values[names[0]]]): values[names[0]] for names in groups}


def key_of(end: str, others: Collection[str]) -> str:
    r"""Return the key of `rank_pattern` or `alpha_pattern` for modules whose names end so: the end itself if that does.

    Args:
        end: The end of the modules' names; the whole name if another module's name ends in it.
        others: Modules that the key must not fit.

    >>> key_of("fc", ["up"]), key_of("fc.1", ["fc_1"]), key_of("fc", ["block.fc"])
    ('fc', 'fc\\.1', '^fc')
    """
    last = end.rpartition(".")[2]  # without dots, so that whatever the end fits ends in it, too
    near = [other for other in others if other.endswith(last)]
    if any(f".{other}".endswith(f".{end}") for other in near):
        return f"^{re.escape(end)}"  # behind PEFT's optional group, which is empty then
    if not _PLAIN.fullmatch(end) or any(map(re.compile(_inside(ENDING, end)).fullmatch, near)):
        return re.escape(end)
    return end


def _alike(values: Mapping[str, Any]) -> list[list[str]]:
    """Group modules of one value whose names differ in one number, at the place that makes the fewest groups."""
    places = range(1 + max(name.count(".") for name in values))
    return min((_alike_but_at(place, values) for place in places), key=len)


def _alike_but_at(place: int, values: Mapping[str, Any]) -> list[list[str]]:
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, value in values.items():
        *parts, last = name.split(".")
        if place < len(parts) and parts[place].isdecimal():
            parts[place] = ""  # no part of a name is empty
        groups.setdefault((value, last, *parts), []).append(name)
    return list(groups.values())


def _key_of_all(names: Sequence[str], others: Collection[str]) -> str:
    r"""Return one key for modules whose names differ in one number.

    >>> _key_of_all(["layers.0.v", "layers.12.v"], ["layers.1.v"]), _key_of_all(["0.v", "2.v"], ["vision.0.v"])
    ('layers\\.(0|12)\\.v', '^(0|2)\\.v')
    """
    if len(names) == 1:
        return key_of(names[0], others)
    parts = [list(dict.fromkeys(at)) for at in zip(*(name.split(".") for name in names), strict=True)]
    key = r"\.".join(f"({'|'.join(at)})" if len(at) > 1 else re.escape(at[0]) for at in parts)
    near = [other for other in others if other.endswith(parts[-1][0])]
    return f"^{key}" if any(map(re.compile(_inside(ENDING, key)).fullmatch, near)) else key


def fitting(patterns: Sequence[str], names: Sequence[str], around: str = "{}") -> list[list[str]]:
    r"""Return the names that each pattern fits as a whole.

    Args:
        patterns: Regular expressions.
        names: Names of modules.
        around: What PEFT puts around a pattern, for example `(.*\.)?({})`.

    Raises:
        PatternError: With the first pattern that is invalid or takes too long.

    >>> fitting(["q|v", "a.c"], ["q", "k", "abc"])
    [['q'], ['abc']]
    """
    if len(patterns) * len(names) > MOST_PAIRS:
        raise PatternError(f"{len(patterns):,} patterns for {len(names):,} modules are too many to compare")
    tried = _tried(patterns, names, around)
    return [
        tried[pattern] if pattern in tried else list(filter(re.compile(_inside(around, pattern)).fullmatch, names))
        for pattern in patterns
    ]


def check(patterns: Sequence[str], names: Sequence[str], around: str = "{}") -> None:
    """Refuse patterns that are invalid or take too long, as `fitting` does, without matching the harmless ones."""
    _tried(patterns, names, around)


def _inside(around: str, pattern: str) -> str:
    before, after = around.split("{}")
    return f"{before}{pattern}{after}"


def _tried(patterns: Sequence[str], names: Sequence[str], around: str) -> dict[str, list[str]]:
    """For each pattern that may take long, the names that it fits, found in another process."""
    risky: list[str] = [pattern for pattern in dict.fromkeys(patterns) if not _HARMLESS.fullmatch(pattern)]
    if not risky:
        return {}
    pairs = [(pattern, _inside(around, pattern)) for pattern in risky]
    seconds = SECONDS + SECONDS_A_NAME * len(names)
    try:
        output = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _CHILD],
            input=json.dumps([seconds, pairs, list(names)]).encode(),
            capture_output=True,
            timeout=_WALL_SECONDS,
            check=False,
        ).stdout
    except subprocess.TimeoutExpired as stopped:
        output = stopped.stdout or b""
    answers: list[Any] = [json.loads(line) for line in output.splitlines(keepends=True) if line.endswith(b"\n")]
    for pattern, answer in zip(risky, answers, strict=False):
        if isinstance(answer, str):
            raise PatternError(f'"{_shown(pattern)}" is no regular expression ({answer})')
    if len(answers) < len(risky):
        raise PatternError(
            f'"{_shown(risky[len(answers)])}" takes longer than {seconds:.1f} s to compare with the names of '
            f"{len(names)} modules; write it without a repetition inside of a repetition, or list the names"
        )
    return {pattern: [names[int(at)] for at in answer] for pattern, answer in zip(risky, answers, strict=True)}


def _shown(pattern: str) -> str:
    return pattern if len(pattern) <= 200 else f"{pattern[:197]}..."
