"""Where each value of a recipe comes from: YAML read with line numbers, and command-line flags over it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from loralloc import reading
from loralloc.errors import UserError, closest
from loralloc.plain_yaml import FLOAT, PlainLoader

Key = tuple[str | int, ...]

_ELSEWHERE = {  # other tools' names of our keys
    "lr": "training.learning_rate",
    "max_steps": "training.steps",
    "num_epochs": "training.epochs",
    "num_train_epochs": "training.epochs",
    "per_device_train_batch_size": "training.batch_size",
    "gradient_accumulation_steps": "training.accumulation",
    "warmup_ratio": "training.warmup",
    "warmup_steps": "training.warmup",
    "eval_steps": "training.eval_every",
    "save_steps": "training.save_every",
    "logging_steps": "training.log_every",
    "model_name_or_path": "model.name",
    "torch_dtype": "model.dtype",
    "max_seq_length": "data.max_length",
    "rank": "lora.r",
    "init_r": "lora.r",
    "lora_r": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "target_r": "method.budget.average_rank",
    "tinit": "method.warmup",
    "tfinal": "method.cooldown",
    "deltaT": "method.interval",
    "orth_reg_weight": "method.gamma",
    "output_dir": "output",
}


def dotted(key: Key) -> str:
    """Write a key as messages show it.

    >>> dotted(("lora", "modules_to_save", 0))
    'lora.modules_to_save[0]'
    """
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key).lstrip(".")


def get(tree: Any, *key: str | int) -> Any:
    """Look a key up in a recipe whose values may be of any type; None where it is not set."""
    for part in key:
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree


def suggest(key: Key, keys: Collection[str]) -> str:
    """Offer the key that an unknown one most likely meant.

    Args:
        key: The unknown key, with the section it stands in.
        keys: All keys a recipe may have, with dots.

    Returns:
        A sentence to append to an error message, or nothing: the same name in another section, else our
        name for what another tool calls it, else a near miss in the same section.
    """
    section, name = dotted(key[:-1]), str(key[-1])
    same = [k for k in keys if k.endswith(f".{name}")] or [_ELSEWHERE.get(name, "")]
    if same[0]:
        return f' Did you mean "{same[0]}"?'
    return closest(name, [k.rpartition(".")[2] for k in keys if k.rpartition(".")[0] == section])


class Place(NamedTuple):
    """Where a value was written: `recipe.yaml:12`, or `--training.batch_size`. Sorts in reading order."""

    order: tuple[int, int]
    text: str


@dataclass
class Source:
    """The values of a recipe before they are checked, with the place each was written at."""

    name: str
    tree: dict[str, Any] = field(default_factory=dict)
    places: dict[Key, Place] = field(default_factory=dict)
    problems: list[tuple[Place, str]] = field(default_factory=list)

    def line(self, mark: yaml.Mark | None) -> Place:
        """Name the line that a YAML mark points at."""
        number = mark.line + 1 if mark else 1
        return Place((0, number), f"{self.name}:{number}")

    def place(self, key: Key) -> Place:
        """Find where a key, or else the section around it, was written."""
        while key and key not in self.places:
            key = key[:-1]
        return self.places[key] if key else Place((0, 0), self.name)

    def report(self, found: Iterable[tuple[Key, str]]) -> None:
        """Note problems of keys, each with the place of its key."""
        self.problems += [(self.place(key), message) for key, message in found]

    def raise_problems(self) -> None:
        """Raise every problem found so far, one a line, in reading order.

        Raises:
            UserError: If there is any.
        """
        if self.problems:
            raise UserError("\n".join(f"{place.text}: {message}" for place, message in sorted(self.problems)))


class _Dumper(yaml.SafeDumper):
    """Quotes what either YAML 1.1 or `PlainLoader` would take for something other than text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # Only double quotes keep every kind of line break (U+0085, U+2028) as it is.
        style = None if data.isprintable() else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))


def read_recipe_file(path: Path) -> Source:
    """Read a YAML file into nested dictionaries and the line of every key.

    Args:
        path: The file.

    Returns:
        The values. Duplicate keys are noted in `problems`, so that they are reported with all the rest.

    Raises:
        UserError: If the file cannot be read, is not YAML, or is not a mapping.
    """
    source = Source(str(path))
    try:
        node = _compose(reading.read_text(path, reading.RECIPE_LIMIT, "utf-8-sig"), source)
    except FileNotFoundError:
        message = f"{path}: there is no such file. `loralloc init` lists recipes to start from"
        raise UserError(message) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    if not isinstance(node, yaml.MappingNode):
        found = "the file is empty" if node is None else "this is not"
        raise UserError(f"{path}:1: a recipe is a mapping of keys such as `task: causal-lm`; {found}")
    source.tree = _build(node, (), source)
    return source


def _compose(text: str, source: Source) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=PlainLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        lines = text.splitlines()
        written = lines[mark.line].strip()[:200] if mark and mark.line < len(lines) else ""
        raise UserError(f"{source.line(mark).text}: not valid YAML: {error.problem}: {written!r}") from error
    except yaml.reader.ReaderError as error:
        number = text.count("\n", 0, error.position) + 1
        raise UserError(f"{source.name}:{number}: not valid YAML: it holds a control character") from error


def _build(node: yaml.Node, key: Key, source: Source) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return [_build(item, (*key, index), source) for index, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        return _build_mapping(node, key, source)
    return _scalar(node)


def _build_mapping(node: yaml.MappingNode, key: Key, source: Source) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        name, place = key_node.value, source.line(key_node.start_mark)
        if not isinstance(name, str):
            source.problems.append((place, "a key must be a single word"))
        elif name in result:
            first = source.places[*key, name].text
            source.problems.append((place, f'"{name}" is set twice, first at {first}. Keep one of the two'))
        else:
            source.places[*key, name] = place
            result[name] = _build(value_node, (*key, name), source)
    return result


def _scalar(node: yaml.Node) -> Any:
    try:
        return yaml.constructor.SafeConstructor().construct_object(node)
    except ValueError:  # an integer longer than Python converts; as text it fails the check of its type
        return node.value


TEMPLATE = re.compile(r"\{[^{}\[\]:,\"']+\}")
"""A text that begins with a column in braces, which in YAML would be a mapping from that name to nothing."""


def parse_value(text: str) -> Any:
    """Read the value of a flag: a YAML scalar, or a list or mapping in brackets.

    Text stays as typed: unlike in a file, `#` starts no comment and `: ` no mapping.

    Args:
        text: The word from the command line.

    Returns:
        The value.

    Raises:
        UserError: If the text opens a bracket or a quote and is not YAML.

    >>> parse_value("5e-4"), parse_value("[q_proj, v_proj]"), parse_value("runs/a #1"), parse_value("{question}?")
    (0.0005, ['q_proj', 'v_proj'], 'runs/a #1', '{question}?')
    """
    if TEMPLATE.match(text):
        return text
    if text.startswith(("[", "{", '"', "'")):
        source = Source("value")
        try:
            node = _compose(text, source)
            value = None if node is None else _build(node, (), source)
            source.raise_problems()
        except UserError:
            rule = "a value that opens a bracket or a quote must be YAML"
            raise UserError(f"{rule}, got {text}. Text needs two pairs of quotes: '\"[ab].*\"'") from None
        return value
    tag = PlainLoader("").resolve(yaml.ScalarNode, text, (True, False))
    return _scalar(yaml.ScalarNode(tag, text))


def apply_overrides(
    source: Source,
    words: Sequence[str],
    keys: Collection[str],
    groups: Iterable[Sequence[Key]],
    mappings: Collection[str] = (),
    inapplicable: Collection[str] = (),
) -> None:
    """Lay command-line flags over the values of a file.

    Args:
        source: The values of the file; changed in place.
        words: `--key value` or `--key=value`. A key is written in full (`--training.steps`) or as any
            last part that names one key only (`--steps`), with `-` or `_`.
        keys: All keys a recipe may have, with dots.
        groups: Keys of which at most one may be set: a flag that sets one of them drops the others in the file.
        mappings: Keys whose value is a mapping; names in it need not be among `keys`.
        inapplicable: Keys that this recipe cannot have: a last part means them only if no other key ends in it.
    """
    flags: dict[Key, Any] = {}
    for index, (flag, text) in enumerate(_pairs(source, words)):
        place = Place((1, index), flag)
        try:
            key: Key = tuple(_full_key(flag, keys, mappings, inapplicable).split("."))
            flags[key] = parse_value(text)
        except UserError as error:
            source.problems.append((place, str(error)))
        else:
            _set(source, key, flags[key], place)
    for group in groups:
        chosen = [key for key in group if flags.get(key) is not None]
        for key in group:
            if chosen and key not in chosen:
                _drop(source, key)


def _pairs(source: Source, words: Sequence[str]) -> list[tuple[str, str]]:
    pairs, rest = [], list(words)
    while rest:
        place = Place((1, len(words) - len(rest)), rest[0])
        flag, equals, text = rest.pop(0).partition("=")
        if not flag.startswith("--") or not flag[2:]:
            source.problems.append((place, "an override is written --key value"))
        elif equals:
            pairs.append((flag, text))
        elif rest and not rest[0].startswith("--"):
            pairs.append((flag, rest.pop(0)))
        else:
            source.problems.append((place, f"needs a value: {flag} VALUE"))
    return pairs


def _full_key(flag: str, keys: Collection[str], mappings: Collection[str], inapplicable: Collection[str]) -> str:
    word = flag.removeprefix("--").replace("-", "_")
    found = (
        [word]
        if word in keys or word.rpartition(".")[0] in mappings
        else [key for key in keys if key.endswith(f".{word}")]
    )
    found = [key for key in found if key not in inapplicable] or found
    if len(found) == 1:
        return found[0]
    if found:
        flags = ", ".join(f"--{key}" for key in found)
        raise UserError(f'"{word}" could mean {flags}: write one of these')
    near = closest(word, [*keys, *(key.rpartition(".")[2] for key in keys)])
    raise UserError(f'unknown key "{word}".{near or suggest(tuple(word.split(".")), keys)}')


def _set(source: Source, key: Key, value: Any, place: Place) -> None:
    section = source.tree
    for part in key[:-1]:
        section = section.setdefault(str(part), {})
        if not isinstance(section, dict):  # reported as a wrong type
            return
    _drop(source, key)
    section[str(key[-1])] = value
    source.places[key] = place


def _drop(source: Source, key: Key) -> None:
    section: Any = source.tree
    for part in key[:-1]:
        section = section.get(part) if isinstance(section, dict) else None
    if isinstance(section, dict):
        section.pop(key[-1], None)
    for placed in [placed for placed in source.places if placed[: len(key)] == key]:
        del source.places[placed]


def dump_yaml(tree: Mapping[str, Any]) -> str:
    """Write nested dictionaries as YAML that reads back to the same values.

    Args:
        tree: The values.

    Returns:
        The text, with keys in the order of the mapping.
    """
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=2**31 - 1)
