"""YAML as recipes are written in: no aliases, no tags, and the scalars of YAML 1.2.

PyYAML keeps the rules of YAML 1.1. Here `1e-3` is a number, and `yes`, `no` and `on` are text, because they are labels
in real data. Without aliases a file is no larger in memory than on disk, and without tags it makes no objects.
"""

from __future__ import annotations

import re

import yaml

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


class PlainLoader(yaml.SafeLoader):
    """YAML in which each value is written plainly, where it is used."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Make a node of the next event; refuse aliases and tags."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            problem = f'aliases such as "*{event.anchor}" are not supported in recipes: repeat the value'
        elif getattr(event, "tag", None) is not None:
            problem = f'tags such as "{event.tag}" are not supported in recipes: write the plain value'
        else:
            return super().compose_node(parent, index)
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)


PlainLoader.yaml_implicit_resolvers = {}  # none of YAML 1.1's
for _tag, _pattern, _first in _SCALARS:
    PlainLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, _first)
