"""What strangers write: values that fit nowhere, changes to a file that is right, and files that are none."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

NUMBERS = (0, -1, 1, 10**9, 10**30, 10**400, 2**31, 2**53, 2**63, 1e308, -1e308, 5e-324, 1e-9)
TEXTS = (
    "",
    "(x+x+)+y",
    "(.*)*" * 12 + "y",
    "(a|a)*" * 9 + "$",
    "(",
    "(?i)x",
    ".*",
    "[",
    "../../mine.txt",
    "/dev/zero",
    "\x1b[2J",
    "\ud800",
    "\u202e",
    "x" * 100_000,
    "." * 5_000,
    "x." * 300,
    "<script>alert(1)</script>",
    "{{ 7 * 7 }}",
    "!!python/object/apply:os.system [true]",
    "NaN",
    "None",
    "adalora",
    "autolora",
)

numbers = st.sampled_from(NUMBERS) | st.integers() | st.floats()
texts = st.sampled_from(TEXTS) | st.text(max_size=20)
scalars = st.none() | st.booleans() | numbers | texts
values = scalars | st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=8
)
"""Anything that JSON can say."""


@st.composite
def mutated(draw: st.DrawFn, tree: Any, edits: int = 3) -> Any:
    """A tree of dictionaries and lists with up to so many places changed."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(0, edits))):
        _edit(draw, tree)
    return tree


def _edit(draw: st.DrawFn, node: Any) -> None:
    """Walk down to some place, and put another value there, take it away, or add one."""
    while node:
        key = draw(st.sampled_from(list(node) if isinstance(node, dict) else range(len(node))))
        if isinstance(node[key], dict | list) and node[key] and draw(st.integers(0, 3)):
            node = node[key]
            continue
        change = draw(st.sampled_from(["replace", "replace", "replace", "nudge", "delete", "add"]))
        if change == "delete":
            del node[key]
        elif change == "add" and isinstance(node, dict):
            node[draw(texts)] = draw(values)
        elif change == "nudge" and isinstance(node[key], int | float) and abs(node[key]) < 2**1000:  # as a float, too
            node[key] = node[key] + draw(st.sampled_from([-1, 1, 0.5, 1000]))
        else:
            node[key] = draw(values)
        return


@st.composite
def damaged(draw: st.DrawFn, text: str) -> bytes:
    """A text as it is, most of the time, or one that somebody has spoiled as a whole."""
    kind = draw(st.sampled_from([*["as it is"] * 12, "cut", "deep", "twice", "bytes", "long", "nothing"]))
    content = text.encode("utf-8", "surrogatepass")
    if kind == "cut":
        return content[: draw(st.integers(0, len(content)))]
    if kind == "deep":
        return ("[" * draw(st.sampled_from([70, 1_000, 100_000])) + text).encode("utf-8", "surrogatepass")
    if kind == "twice":
        return content + b"\n" + content
    if kind == "bytes":
        at = draw(st.integers(0, len(content)))
        return content[:at] + draw(st.binary(min_size=1, max_size=4)) + content[at:]
    if kind == "long":
        return content + b" " * 20_000_000
    return b"" if kind == "nothing" else content


def as_json(tree: Any) -> str:
    """JSON, as Python writes it: NaN and infinities as they are."""
    return json.dumps(tree)


FILES = st.sampled_from([*["as it is"] * 30, "FIFO", "device", "link out", "loop", "folder", "missing", "sparse"])
"""What a file is."""


def put(path: Path, content: bytes, kind: str, outside: Path) -> None:
    """Write a file, or something else in its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "link out":
        path.symlink_to(outside)
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes(content)
        if kind == "sparse":
            os.truncate(path, 2**42)
