"""The kernel in C++, for whoever has a compiler: built once by `loralloc build-kernel`, used from then on.

It makes small layers faster, and every layer where a GPU waits for the host (benchmarks/README.md has the figures). The
package itself stays pure Python: what is built fits one release of PyTorch and of Python alone, so it lies in the
user's cache and is not found after an upgrade. Then the kernel in Python is used, until somebody builds anew.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import torch
from torch import Tensor

from loralloc.errors import UserError

SOURCE = Path(__file__).with_name("kernel.cpp")
NAME = "loralloc_kernel"
SUFFIX = EXTENSION_SUFFIXES[-1]  # the plain one, as PyTorch names what it builds

logger = logging.getLogger(__name__)


def folder() -> Path:
    """Where the kernel lies once built: below `$XDG_CACHE_HOME` or `~/.cache`, named by all that it depends on.

    Raises:
        UserError: The variable is not set, and nobody knows the user's home folder.
    """
    try:
        cached = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:  # neither $HOME nor an entry for the user, as in containers
        raise UserError("there is no home folder to keep the kernel in: set XDG_CACHE_HOME to a folder") from error
    fits = (version(), "torch", torch.__version__, sys.implementation.cache_tag, platform.machine())
    return Path(cached) / "loralloc" / f"kernel-{'-'.join(map(str, fits))}"


def version() -> str:
    """What tells one source of the kernel from another: the beginning of its SHA-256."""
    return hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]


def build() -> Path:
    """Compile the kernel, which takes a minute; processes that start from now on use it, and so does this one.

    Returns:
        The folder that it lies in.

    Raises:
        UserError: There is no ninja, no compiler that accepts the source, or no folder that the kernel can be kept in.
    """
    from torch.utils import cpp_extension

    try:
        cpp_extension.verify_ninja_availability()
    except RuntimeError as error:
        raise UserError("building the kernel takes ninja: pip install ninja") from error
    built = folder()
    # In a folder of its own: a build that was killed leaves a lock behind, for which the next one would wait forever.
    try:
        built.mkdir(parents=True, exist_ok=True)
        own = tempfile.TemporaryDirectory(prefix=".build-", dir=built)
    except OSError as error:
        raise UserError(f"the kernel cannot be kept: {error}; set XDG_CACHE_HOME to a folder of yours") from error
    with own as work:
        try:
            # Not as a module: from the second build of a process on, PyTorch gives the file another name.
            cpp_extension.load(
                NAME, str(SOURCE), extra_cflags=["-O3"], build_directory=work, with_cuda=False, is_python_module=False
            )
            library = next(Path(work).glob(f"{NAME}*{SUFFIX}"), None)
            if library is None:
                raise FileNotFoundError(f"no {NAME}*{SUFFIX} came out")
        except (RuntimeError, OSError, ImportError, subprocess.SubprocessError) as error:
            raise UserError(f"no C++ compiler that PyTorch can use has built the kernel:\n{error}") from error
        os.replace(library, built / f"{NAME}{SUFFIX}")  # whole or not at all, for whoever starts now
    loaded.cache_clear()
    return built


@cache
def loaded() -> Callable[..., Tensor] | None:
    """Return `gated_linear` in C++, with the arguments that it has in kernel.py; None if it has not been built."""
    try:
        library = folder() / f"{NAME}{SUFFIX}"
        if not library.is_file():
            return None
    except (UserError, OSError):  # no home folder, or one that is closed to this user: nothing was built there
        return None
    spec = spec_from_file_location(NAME, library)
    assert spec is not None
    assert spec.loader is not None
    try:
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        logger.warning("the kernel in %s cannot be loaded, the one in Python is used: %s", folder(), error)
        return None
    return module.gated_linear  # type: ignore[no-any-return]
