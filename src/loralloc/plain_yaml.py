"""YAML as recipes are written in: no aliases, no tags, and the scalars of YAML 1.2.

PyYAML keeps the rules of YAML 1.1. Here `1e-3` is a number, and `yes`, `no` and `on` are text, because they are labels
in real data. Without aliases a file is no larger in memory than on disk, and without tags it makes no objects.
"""

from __future__ import annotations

import re

import yaml

from loralloc.reading import DEEPEST

FLOAT = re.compile(  # with a point or an exponent, so that 010 is neither integer nor float
    r"(?:[-+]?(?:(?:\.[0-9]+|[0-9][0-9_]*\.[0-9_]*)(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+)"
    r"|[-+]?\.inf|\.nan)$"
)
_SCALARS = (  # the first pattern that matches wins, so integers stand before floats
    ("null", re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("int", re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789")),
    ("float", FLOAT, list("-+.0123456789")),
)

MOST_NODES = 10_000
"""Most keys and values of a file; PyYAML takes half a second for that many."""


class PlainLoader(yaml.SafeLoader):
    """YAML in which each value is written plainly, where it is used."""

    _nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Make a node of the next event; refuse aliases and tags."""
        event = self.peek_event()
        self._nodes += 1
        if isinstance(event, yaml.AliasEvent):
            problem = f'aliases such as "*{event.anchor}" are not supported in recipes: repeat the value'
        elif getattr(event, "tag", None) is not None:
            problem = f'tags such as "{event.tag}" are not supported in recipes: write the plain value'
        elif not _is_text(getattr(event, "value", "")):
            problem = "a string has half a character (a lone surrogate)"
        elif "\0" in (getattr(event, "value", "") or ""):
            problem = "a string has a NUL character, which no path and no name can have"
        elif self._nodes > MOST_NODES:
            problem = f"more than {MOST_NODES:,} values"
        else:
            return super().compose_node(parent, index)
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)

    def fetch_flow_collection_start(self, TokenClass: type[yaml.Token]) -> None:
        """Open a bracket, unless too many are open: PyYAML looks at each of them for every character."""
        self._check_depth(self.flow_level)
        super().fetch_flow_collection_start(TokenClass)

    def add_indent(self, column: int) -> bool:
        """Begin an indented block, unless it is in too many others."""
        self._check_depth(len(self.indents))
        return super().add_indent(column)

    def _check_depth(self, depth: int) -> None:
        if depth > DEEPEST:
            raise yaml.MarkedYAMLError(problem=f"nested more than {DEEPEST} deep", problem_mark=self.get_mark())


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


PlainLoader.yaml_implicit_resolvers = {}  # none of YAML 1.1's
for _tag, _pattern, _first in _SCALARS:
    PlainLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, _first)
