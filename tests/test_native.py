"""The kernel in C++: where it is found, how it is built, when it is used. Its arithmetic is held by `either_way`."""

from __future__ import annotations

import functools
import logging
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any

import pytest
import torch
from cli.command import done
from kernels import IN, OUT, SCALE, draw
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.cpp_extension import get_cxx_compiler, is_ninja_available
from torch.utils.flop_counter import FlopCounterMode

from loralloc import native
from loralloc.errors import UserError
from loralloc.kernel import gated_linear


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "loaded", native.loaded.__wrapped__)


def test_it_is_looked_for_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.folder().parent == tmp_path / "cache/loralloc"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert native.folder().parent == Path.home() / ".cache/loralloc"


def test_another_pytorch_or_another_source_finds_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = native.folder()
    assert native.folder() == first
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    other = native.folder()
    monkeypatch.undo()
    monkeypatch.setattr(native, "SOURCE", tmp_path / "kernel.cpp")
    native.SOURCE.write_text("// another", encoding="utf-8")
    assert len({first.name, other.name, native.folder().name}) == 3


def test_until_it_is_built_there_is_none() -> None:
    assert native.loaded() is None
    assert "kernel         in Python (loralloc build-kernel compiles it)" in done("env")


def homeless() -> Path:
    raise RuntimeError("Could not determine home directory.")


def closed(path: Path) -> bool:
    raise PermissionError(13, "Permission denied", str(path))


@pytest.mark.parametrize(("name", "fault"), [("home", homeless), ("is_file", closed)], ids=["unknown", "closed"])
def test_without_a_home_folder_there_is_none(
    name: str, fault: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container whose user has no entry in /etc/passwd, or one whose home is another user's."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, name, fault)
    assert native.loaded() is None


def test_what_cannot_be_loaded_is_not_used_and_named(caplog: pytest.LogCaptureFixture) -> None:
    native.folder().mkdir(parents=True)
    (native.folder() / f"{native.NAME}.so").write_bytes(b"no library")
    with caplog.at_level(logging.WARNING):
        assert native.loaded() is None
    assert f"the kernel in {native.folder()} cannot be loaded, the one in Python is used: " in caplog.text


def raises(error: Exception) -> Callable[..., Any]:
    def function(*_: object, **__: object) -> None:
        raise error

    return function


# Compiled in a second, since it includes nothing of PyTorch.
ANOTHER_KERNEL = """
#include <Python.h>
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "loralloc_kernel"};
PyMODINIT_FUNC PyInit_loralloc_kernel() {
  PyObject* self = PyModule_Create(&module);
  PyModule_AddStringConstant(self, "gated_linear", "another kernel");
  return self;
}
"""


class TestBuilding:
    def test_without_ninja(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("torch.utils.cpp_extension.verify_ninja_availability", raises(RuntimeError("none")))
        with pytest.raises(UserError, match=r"^building the kernel takes ninja: pip install ninja$"):
            native.build()

    def test_without_a_compiler(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("torch.utils.cpp_extension.verify_ninja_availability", lambda: None)
        monkeypatch.setattr("torch.utils.cpp_extension.load", raises(RuntimeError("c++: not found")))
        with pytest.raises(
            UserError, match=r"^no C\+\+ compiler that PyTorch can use has built the kernel:\nc\+\+: not found$"
        ):
            native.build()

    def test_without_a_home_folder(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", homeless)
        with pytest.raises(
            UserError, match=r"^there is no home folder to keep the kernel in: set XDG_CACHE_HOME to a folder$"
        ):
            native.build()

    def test_where_it_cannot_be_kept(self, tmp_path: Path) -> None:
        (tmp_path / "cache").write_text("a file", encoding="utf-8")
        with pytest.raises(
            UserError, match=r"^the kernel cannot be kept: .*/cache.*; set XDG_CACHE_HOME to a folder of yours$"
        ):
            native.build()

    @pytest.mark.parametrize(
        "error",
        [ImportError("no such file"), OSError("not loaded"), CalledProcessError(1, "c++")],
        ids=lambda error: type(error).__name__,
    )
    def test_with_a_compiler_that_is_none(self, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("torch.utils.cpp_extension.verify_ninja_availability", lambda: None)
        monkeypatch.setattr("torch.utils.cpp_extension.load", raises(error))
        with pytest.raises(UserError, match=f"has built the kernel:\n{re.escape(str(error))}$"):
            native.build()

    def test_without_a_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("torch.utils.cpp_extension.verify_ninja_availability", lambda: None)
        monkeypatch.setattr("torch.utils.cpp_extension.load", lambda *_, **__: None)
        with pytest.raises(UserError, match=r"has built the kernel:\nno loralloc_kernel\*\.so came out$"):
            native.build()

    @pytest.mark.skipif(
        shutil.which(get_cxx_compiler()) is None or not is_ninja_available(), reason="there is no compiler, or no ninja"
    )
    def test_after_one_that_failed_the_next_is_used(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """PyTorch numbers what it builds in one process: its second file has another name."""
        monkeypatch.setattr(native, "SOURCE", tmp_path / "kernel.cpp")
        monkeypatch.setattr(native, "loaded", functools.cache(native.loaded))
        native.SOURCE.write_text("no C++", encoding="utf-8")
        with pytest.raises(UserError, match=r"^no C"):
            native.build()
        assert native.loaded() is None
        native.SOURCE.write_text(ANOTHER_KERNEL, encoding="utf-8")
        native.build()
        assert native.loaded() == "another kernel"  # type: ignore[comparison-overlap]

    @pytest.mark.parametrize("error", [None, RuntimeError("refused")], ids=["built", "refused"])
    def test_it_is_there_whole_or_not_at_all(self, error: Exception | None, monkeypatch: pytest.MonkeyPatch) -> None:
        """What else a build leaves, such as the lock of one that was killed, is not in the way of the next."""

        def load(name: str, *_: object, build_directory: str, **__: object) -> None:
            assert list(Path(build_directory).iterdir()) == []
            for file in ("lock", "kernel.o", f"{name}.so"):
                Path(build_directory, file).write_bytes(b"")
            if error is not None:
                raise error

        monkeypatch.setattr("torch.utils.cpp_extension.verify_ninja_availability", lambda: None)
        monkeypatch.setattr("torch.utils.cpp_extension.load", load)
        monkeypatch.setattr(native, "loaded", functools.cache(native.loaded))
        for _ in range(2):
            if error is None:
                native.build()
            else:
                with pytest.raises(UserError, match="refused"):
                    native.build()
            assert [path.name for path in native.folder().iterdir()] == ([f"{native.NAME}.so"] if error is None else [])

    def test_the_command_says_where_it_lies(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(native, "build", lambda: Path("somewhere"))
        assert done("build-kernel").strip() == "the kernel lies in somewhere; from now on it is used"


def vmapped(inputs: tuple[Any, ...]) -> Tensor:
    x, *others = inputs
    return torch.vmap(lambda row: gated_linear(row, *others))(x)


def traced(inputs: tuple[Any, ...]) -> Tensor:
    x, *others = (part.detach() if isinstance(part, Tensor) else part for part in inputs)
    return torch.jit.trace(lambda x: gated_linear(x, *others), x[:1], check_trace=False)(x)


def with_tangent(inputs: tuple[Any, ...]) -> Tensor:
    """The derivative in a direction, by forward mode."""
    x, *others = inputs
    with forward_ad.dual_level():
        y = gated_linear(forward_ad.make_dual(x, torch.ones_like(x)), *others)
        return forward_ad.unpack_dual(y).tangent


def compiled(inputs: tuple[Any, ...]) -> Tensor:
    return torch.compile(gated_linear, backend="eager")(*inputs)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of vmap
@pytest.mark.parametrize(
    ("layout", "context", "call", "used"),
    [
        ("3-D, shared gate", nullcontext, lambda inputs: gated_linear(*inputs), True),
        ("3-D, gate per sample", nullcontext, lambda inputs: gated_linear(*inputs), False),
        ("3-D, shared gate", lambda: FlopCounterMode(display=False), lambda inputs: gated_linear(*inputs), True),
        ("3-D, shared gate", nullcontext, vmapped, False),
        ("3-D, shared gate", nullcontext, compiled, False),
        ("3-D, shared gate", nullcontext, traced, False),
        ("3-D, shared gate", nullcontext, with_tangent, False),
    ],
    ids=[
        "plain",
        "a gate per sample",
        "in a dispatch mode",
        "in a transform",
        "in a compiled model",
        "in a trace",
        "in forward mode",
    ],
)
def test_when_it_is_used(
    layout: str,
    context: Callable[[], Any],
    call: Callable[[tuple[Any, ...]], Tensor],
    used: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[object] = []

    def stand_in(x: Tensor, W: Tensor, *_: object) -> Tensor:
        seen.append(x)
        return x @ W.T

    inputs = draw(layout)
    W = torch.randn(OUT, inputs.x.shape[-1], dtype=inputs.x.dtype)
    arguments = (inputs.x, W, None, inputs.A, inputs.g, inputs.B, SCALE)
    expected = call(arguments)
    monkeypatch.setattr(native, "loaded", lambda: stand_in)
    with context():
        found = call(arguments)
    assert bool(seen) == used
    if not used:
        torch.testing.assert_close(found, expected)


@pytest.mark.slow
def test_other_threads_go_on_meanwhile(built_kernel: Callable[..., Tensor]) -> None:
    """Python's own switching is off, so that only a kernel which gives up the interpreter's lock lets the other run."""
    inputs, W = draw("3-D, shared gate"), torch.randn(OUT, IN, dtype=torch.float64)
    arguments = (inputs.x, W, None, inputs.A, inputs.g, inputs.B, torch.tensor(SCALE, dtype=torch.float64), None)
    closed, went_on = threading.Lock(), threading.Event()
    other = threading.Thread(target=lambda: closed.acquire() and went_on.set())
    interval = sys.getswitchinterval()
    closed.acquire()
    other.start()
    sys.setswitchinterval(1000)
    try:
        closed.release()
        until = time.monotonic() + 5
        while not went_on.is_set() and time.monotonic() < until:
            built_kernel(*arguments)
        assert went_on.is_set()
    finally:
        sys.setswitchinterval(interval)
        other.join()
