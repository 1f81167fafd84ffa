"""Promises, on the standard library of the Python that runs the tests: no leak, balance, the same every time."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest

from loralloc.errors import UserError
from loralloc.tasks import docstrings
from loralloc.tasks.docstrings import AREAS, MINIMUM_WORDS, build, mask

LIBRARY = Path(sysconfig.get_paths()["stdlib"])


@cache
def defined_names(module: str) -> set[str]:
    path = LIBRARY.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    named = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name.lower() for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, named)}


def test_areas_are_apart() -> None:
    modules = [module for names in AREAS.values() for module in names.split()]
    assert len(set(modules)) == len(modules)
    assert len(AREAS) >= 12


def test_splits_share_no_module_and_no_text() -> None:
    splits = build()
    assert set(splits) == {"train", "validation", "test"}
    for key in ("module", "text"):
        owners = Counter(value for rows in splits.values() for value in {row[key] for row in rows})
        assert set(owners.values()) == {1}
    texts = [row["text"] for rows in splits.values() for row in rows]
    assert len(set(texts)) == len(texts)


def test_areas_are_many_and_balanced() -> None:
    splits = build()
    areas = {row["label"] for row in splits["train"]}
    assert 6 <= len(areas) <= 8
    for name in ("validation", "test"):
        counts = Counter(row["label"] for row in splits[name])
        assert set(counts) == areas
        assert len(set(counts.values())) == 1
        assert len({row["module"] for row in splits[name]}) > 2 * len(areas)
    train = Counter(row["label"] for row in splits["train"])
    assert max(train.values()) <= 3 * min(train.values())
    assert len(splits["train"]) > 3 * len(splits["test"])


def test_telling_names_are_masked() -> None:
    generator = random.Random(0)
    rows = generator.sample([row for rows in build().values() for row in rows], 80)
    for row in rows:
        telling = defined_names(row["module"]) | {part.lower() for part in row["module"].split(".")}
        telling |= set(row["label"].split()) - {"and"}
        words = {word.lower() for word in re.findall(r"\w+", row["text"])} - {"_"}
        assert not words & telling, row


def test_texts_say_enough() -> None:
    for rows in build().values():
        assert all(len(re.findall(r"[A-Za-z]+", row["text"])) >= MINIMUM_WORDS for row in rows)


def digest(splits: Mapping[str, list[dict[str, str]]]) -> str:
    return hashlib.sha256(json.dumps(splits).encode()).hexdigest()


def test_another_process_makes_the_same_rows() -> None:
    # Another hash seed: the order of a set must not matter.
    code = "import json; from loralloc.tasks.docstrings import build; print(json.dumps(build()))"
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    output = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True).stdout
    assert digest(json.loads(output)) == digest(build())


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("Open a socket.", "Open a _."),
        ("SOCKETS, sockets; websocket", "_, _; websocket"),
        ("socket_server is another name", "socket_server is another name"),
        ("class and classes", "class and classes"),
    ],
)
def test_masking_takes_whole_words_in_any_case_and_plurals(text: str, masked: str) -> None:
    assert mask(text, {"socket"}) == masked


def make_library(folder: Path, sizes: dict[str, int]) -> Path:
    """A library of modules with so many docstrings each."""
    for module, size in sizes.items():
        body = [
            f'def f{i}():\n    """Word {module}{i} alpha beta gamma delta epsilon zeta eta."""\n' for i in range(size)
        ]
        (folder / f"{module}.py").write_text("\n".join(body))
    return folder


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(docstrings.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    return tmp_path


def test_a_library_with_few_areas(library: Path) -> None:
    make_library(
        library, {"shutil": 30, "glob": 20, "tarfile": 90, "queue": 25, "threading": 40, "sched": 20, "wave": 2}
    )
    splits = build.__wrapped__()
    assert {row["label"] for row in splits["train"]} == {"archives and files", "concurrency"}
    # A fifth of the smaller area, which has 85.
    assert Counter(row["label"] for row in splits["test"]) == {"archives and files": 17, "concurrency": 17}
    assert build.__wrapped__(0) == splits
    assert build.__wrapped__(1) != splits
    assert all(row["module"] != "tarfile" for row in splits["test"] + splits["validation"]), "giants are trained on"


def test_a_library_without_sources(library: Path) -> None:
    make_library(library, {"shutil": 30})
    with pytest.raises(UserError, match="demo:docstrings needs the sources of Python's standard library, and this"):
        build.__wrapped__()
