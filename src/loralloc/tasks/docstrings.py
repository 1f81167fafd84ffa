"""The demo's data: which area of the standard library does a docstring describe?

Real text that every Python carries, so the demo downloads nothing. The sources are parsed, never imported. To
make it a question of meaning, names that give the area away are masked: the names of the area's modules, the
classes and functions defined in the docstring's own module, and the words of the area's name. The split is by
module, so that test docstrings come from other modules than training docstrings.
"""

from __future__ import annotations

import ast
import random
import re
import sysconfig
import warnings
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from loralloc.errors import UserError
from loralloc.tasks.locations import DEMO_DATA

# Top-level modules by area, over all supported Pythons; one that a Python lacks is passed over.
AREAS = {
    "archives and files": "_compression bz2 compression filecmp fileinput fnmatch genericpath glob gzip io _pyio "
    "linecache lzma ntpath nturl2path os pathlib posixpath shutil stat tarfile tempfile zipfile zipimport",
    "command lines": "argparse cmd curses getopt getpass optparse pty readline rlcompleter tty",
    "concurrency": "_threading_local asyncio concurrent contextvars multiprocessing queue sched signal subprocess "
    "threading",
    "data formats": "_markupbase configparser copyreg csv dbm html json pickle pickletools plistlib shelve "
    "sqlite3 tomllib xdrlib xml",
    "data types": "_collections_abc _py_abc _pydatetime _pydecimal _strptime _weakrefset abc bisect calendar "
    "collections contextlib copy dataclasses datetime decimal enum fractions functools graphlib heapq numbers "
    "operator random reprlib statistics types typing weakref zoneinfo",
    "graphical interfaces": "idlelib tkinter turtle turtledemo",
    "language tooling": "__future__ annotationlib ast code codeop compileall dis imp importlib inspect keyword "
    "lib2to3 modulefinder opcode pkgutil py_compile pyclbr runpy symtable tabnanny token tokenize",
    "mail": "base64 binhex email imaplib mailbox mailcap mimetypes netrc nntplib poplib quopri smtpd smtplib uu",
    "media": "aifc chunk colorsys imghdr sndhdr sunau wave",
    "networking": "asynchat asyncore cgi cgitb ftplib http ipaddress selectors socket socketserver ssl telnetlib "
    "urllib uuid webbrowser wsgiref xmlrpc",
    "packaging": "_osx_support _sitebuiltins distutils ensurepip platform pydoc site sysconfig venv zipapp",
    "security": "crypt hashlib hmac secrets",
    "testing and debugging": "bdb cProfile doctest faulthandler logging pdb profile profiling pstats timeit trace "
    "traceback tracemalloc unittest warnings",
    "text": "codecs difflib encodings gettext locale pprint re shlex string stringprep textwrap",
}

AREA_COUNT = 8
MINIMUM_WORDS = 8
"""Docstrings with fewer words left after masking say too little."""
MODULE_LIMIT = 100
"""Most docstrings of one module: otherwise a few huge modules would dominate an area."""
HELD_OUT_LIMIT = 45
"""Modules with more docstrings go to the training split, so that held-out splits come from many modules."""
LIMITS = {"test": 75, "validation": 60, "train": 450}
"""Most docstrings of one area in each split."""
SHARES = {"test": 0.2, "validation": 0.15}
"""Largest share of the smallest area in each held-out split; all areas give such a split the same number."""
MASK = "_"

Row = dict[str, str]
Modules = Mapping[str, list[str]]


@cache
def build(seed: int = 0) -> Mapping[str, list[Row]]:
    """Collect the docstrings of the running Python's standard library.

    Args:
        seed: Seed of the split and of all samples.

    Returns:
        `train`, `validation` and `test`: rows with `text`, `label` (the area) and `module`. The same for the same
        Python and seed. No module and no text is in two splits.

    Raises:
        UserError: This Python carries no sources of its library.
    """
    areas = _largest_areas(_collect(Path(sysconfig.get_paths()["stdlib"])))
    smallest = min(_size(modules) for modules in areas.values())
    quotas = {split: min(LIMITS[split], int(share * smallest)) for split, share in SHARES.items()}
    splits: dict[str, list[Row]] = {split: [] for split in DEMO_DATA["docstrings"]}
    for area, modules in areas.items():
        # One generator per area, so that a change in one leaves the others as they are.
        for split, texts in _split_area(modules, quotas, random.Random(f"{seed} {area}")).items():
            splits[split] += [{"text": text, "label": area, "module": module} for module, text in texts]
    return splits


def _collect(library: Path) -> dict[str, Modules]:
    """Gather the usable docstrings of every area by module; a text that occurs twice counts once."""
    seen: set[str] = set()
    areas = {}
    for area, names in AREAS.items():
        paths = {name: path for top in names.split() for name, path in _sources(library, top)}
        common = _words(area) | {part for name in paths for part in _words(name)}
        modules: dict[str, list[str]] = {}
        for name, path in paths.items():
            for text in _docstrings(path, common):
                if text not in seen:
                    seen.add(text)
                    modules.setdefault(name, []).append(text)
        areas[area] = modules
    return areas


def _sources(library: Path, top: str) -> Iterator[tuple[str, Path]]:
    """Find the sources of a module or a package, without its tests."""
    single = library / f"{top}.py"
    for path in [single] if single.is_file() else sorted((library / top).rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if not {"test", "tests", "idle_test"} & set(parts):
            yield ".".join(parts).removesuffix(".__init__"), path


def _docstrings(path: Path, common: set[str]) -> Iterator[str]:
    """Yield the docstrings of a module that keep enough words once names that give the area away are masked."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library has old escapes that newer Pythons frown upon
        tree = ast.parse(path.read_bytes())
    named = list(_definitions(tree))
    telling = common | {node.name.lower() for node in named}
    for node in [tree, *named]:
        text = mask(" ".join((ast.get_docstring(node) or "").split()), telling)
        if len(re.findall(r"[A-Za-z]+", text)) >= MINIMUM_WORDS:
            yield text


def _definitions(node: ast.AST) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Find the classes and functions at any depth below a node."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
        if not isinstance(child, ast.expr):  # expressions, most of a tree, hold no definitions
            yield from _definitions(child)


def _words(name: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+|\w+", name.lower()))


def mask(text: str, names: set[str]) -> str:
    """Replace the names in a text, in any case and in the plural.

    Args:
        text: Any text.
        names: Names in lower case.

    Returns:
        The text with `_` for each of them.

    >>> mask("The Socket class: sockets and websockets.", {"socket"})
    'The _ class: _ and websockets.'
    """

    def replace(match: re.Match[str]) -> str:
        word = match.group().lower()
        return MASK if word in names or word.removesuffix("s") in names else match.group()

    return re.sub(r"\w+", replace, text)


def _size(modules: Modules) -> int:
    return sum(min(len(texts), MODULE_LIMIT) for texts in modules.values())


def _largest_areas(areas: Mapping[str, Modules]) -> dict[str, Modules]:
    order = sorted(areas, key=lambda area: (-_size(areas[area]), area))
    chosen = sorted(area for area in order[:AREA_COUNT] if _size(areas[area]) >= 1 / min(SHARES.values()))
    if len(chosen) < 2:
        raise UserError(
            "demo:docstrings needs the sources of Python's standard library, and this Python has none at "
            f"{sysconfig.get_paths()['stdlib']}. Use a full installation of Python."
        )
    return {area: areas[area] for area in chosen}


def _split_area(
    modules: Modules, quotas: Mapping[str, int], generator: random.Random
) -> dict[str, list[tuple[str, str]]]:
    """Assign each module of an area to one split."""
    names = list(modules)
    generator.shuffle(names)
    waiting = [name for name in names if len(modules[name]) <= HELD_OUT_LIMIT]
    splits: dict[str, list[tuple[str, str]]] = {}
    for split, quota in quotas.items():
        chosen: list[tuple[str, str]] = []
        while waiting and len(chosen) < quota:
            chosen += _sample(modules, waiting.pop(), generator)
        splits[split] = chosen[:quota]
        names = [name for name in names if name not in {module for module, _ in chosen}]
    rest = [pair for name in names for pair in _sample(modules, name, generator)]
    splits["train"] = generator.sample(rest, min(len(rest), LIMITS["train"]))
    return splits


def _sample(modules: Modules, name: str, generator: random.Random) -> list[tuple[str, str]]:
    texts = modules[name]
    return [(name, text) for text in generator.sample(texts, min(len(texts), MODULE_LIMIT))]
