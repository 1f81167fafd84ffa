"""`loralloc build-kernel`: the kernel in C++, for this PyTorch."""

from __future__ import annotations

import typer


def build_kernel() -> None:
    """Compile the kernel in C++, once for each release of PyTorch: layers of small models and batches become faster.

    Needs a C++ compiler and ninja, and takes a minute. Trainings that start later use it; the results are the same up
    to rounding. It lies in the user's cache, below $XDG_CACHE_HOME or ~/.cache: remove the folder, and the kernel in
    Python is used again.
    """
    from loralloc import native

    typer.echo(f"the kernel lies in {native.build()}; from now on it is used")
